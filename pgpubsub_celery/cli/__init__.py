"""The command line: `pgpubsub-bridge`, and `celery -A app pgpubsub`.

The only part of the package that prints or exits. Reading order: `context` (the application, the database, errors in
one line), `listening` (listen), `probing` (health), `database` (install, uninstall, triggers), `status` and `attention`
(status), `stored` (list, show), `mending` (retry, discard), `demonstration` (demo), `development` (dev), `exit_codes`.
"""

from __future__ import annotations

from typing import Any

import click

from pgpubsub_celery._version import __version__
from pgpubsub_celery.cli.context import Group, State, print_anything
from pgpubsub_celery.cli.database import install, triggers, uninstall
from pgpubsub_celery.cli.demonstration import demo
from pgpubsub_celery.cli.development import dev
from pgpubsub_celery.cli.listening import listen
from pgpubsub_celery.cli.mending import discard, retry
from pgpubsub_celery.cli.probing import health
from pgpubsub_celery.cli.status import status
from pgpubsub_celery.cli.stored import list_stored, show

_COMMANDS = (listen, install, uninstall, triggers, status, list_stored, show, retry, discard, health)

_EXAMPLES = """
Examples:

\b
  pgpubsub-bridge demo                                # see it work; needs nothing
  pgpubsub-bridge -A blog.celery_app install          # tables and triggers; repeat it with each deploy
  pgpubsub-bridge -A blog.celery_app listen           # beside `celery -A blog.celery_app worker`
  pgpubsub-bridge -A blog.celery_app status
  celery -A blog.celery_app pgpubsub listen           # the same commands, as Celery's

Channels and listeners are found in the modules that the application imports: for listeners.py in the package blog, let
it call app.autodiscover_tasks(["blog"], related_name="listeners").
"""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXAMPLES)
@click.option("-A", "--app", metavar="MODULE", envvar="PGPUBSUB_APP", help="The Celery application, as for celery -A.")
@click.version_option(__version__, prog_name="pgpubsub-bridge")
@click.pass_context
def main(ctx: click.Context, app: str | None) -> None:
    """Committed changes in Postgres become Celery tasks."""
    print_anything()
    ctx.obj = State(app_path=app)


@click.group("pgpubsub", cls=Group)
@click.pass_context
def celery_command(ctx: click.Context) -> None:
    """Committed changes in Postgres become Celery tasks (pgpubsub-bridge)."""
    print_anything()
    # Celery has loaded the application, but processes of ours have to find it by its name.
    path: Any = ctx.find_root().params.get("app")
    ctx.obj = State(app_path=path if isinstance(path, str) else None)


for _command in _COMMANDS:
    main.add_command(_command)
    celery_command.add_command(_command)
main.add_command(demo)
main.add_command(dev)
