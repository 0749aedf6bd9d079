"""`listen`: the reference's command, option for option.

Owns the parsing and checking of its options, before any process is started. What happens then is `supervisor`'s and
`bridge`'s.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import click
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import bridge, observing, supervisor
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.channels import Channel, check_databases, select_channels
from pgpubsub_celery.cli.context import State, app_option, connected, database_option
from pgpubsub_celery.drivers import sqlstate
from pgpubsub_celery.emit import EnqueuedTask
from pgpubsub_celery.errors import SettingsError, UnknownChannelError
from pgpubsub_celery.logs import configure_logging, level_number, make_formatter
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings, variable
from pgpubsub_celery.wakeups import require_installed

logger = logging.getLogger("pgpubsub_celery.listen")

RECOVER = ("all", "waiting")


class ListenCommand(click.Command):
    """Reads `--channels a.B c.D` and a bare `--recover` as the reference does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what `normalise` makes of the words."""
        return super().parse_args(ctx, normalise(args))


def normalise(args: list[str]) -> list[str]:
    """Return the words with `--channels` before each of its values, and a value for a bare `--recover`.

    Raises:
        click.UsageError: `--channels` has no value, or `--recover` has one without `=`.
    """
    words: list[str] = []
    in_channels = False
    for position, word in enumerate(args):
        following = args[position + 1] if position + 1 < len(args) else "-"
        if word == "--":
            return words + args[position:]
        if word == "--channels":
            if following.startswith("-"):
                raise click.UsageError(
                    "--channels has no value: expected full module paths, for example blog.channels.PostReads."
                )
            in_channels = True
        elif word == "--recover":
            if following in RECOVER:
                raise click.UsageError(f"--recover takes its value after =: write --recover={following}.")
            words.append("--recover=all")
            in_channels = False
        elif word.startswith("-"):
            words.append(word)
            # An option with "=" takes no further word; --channels=a.B is followed by others all the same.
            in_channels = word.startswith("--channels=")
        elif in_channels:
            words += ["--channels", word]
        else:
            words.append(word)
    return words


_EXAMPLES = """
Examples:

\b
  pgpubsub-bridge -A blog.celery_app listen
  pgpubsub-bridge -A blog.celery_app listen --channels blog.channels.PostReads blog.channels.AuthorChanges
  pgpubsub-bridge -A blog.celery_app listen --processes 2 --recover --loglevel debug
  pgpubsub-bridge -A blog.celery_app listen --worker --no-restart-on-failure
  pgpubsub-bridge -A blog.celery_app listen --health-port 8080
"""


@click.command("listen", cls=ListenCommand, epilog=_EXAMPLES)
@app_option
@click.option(
    "--channels",
    multiple=True,
    metavar="PATH [PATH …]",
    help="Full module paths of the channels to listen to, separated by spaces; a base class takes its subclasses. "
    "Default: all that are registered.",
)
@click.option("--processes", type=int, metavar="N", help="How many processes listen, below a supervisor.  [default: 1]")
@click.option("--worker", is_flag=True, help="One process, without a supervisor. Not together with --processes.")
@click.option(
    "--recover",
    metavar="[=all|waiting]",
    help="Also take up what was stored before: held and failed notifications (all, the default), or held ones "
    "only (waiting).",
)
@click.option("--loglevel", default="info", show_default=True, help="debug, info, warning, error or critical.")
@click.option("--logformat", metavar="FORMAT", help="A % format of Python's logging, or json.")
@click.option(
    "--worker-start-method",
    default="spawn",
    show_default=True,
    metavar="spawn|fork",
    help="How processes are started; fork is quicker, but not for applications that start threads.",
)
@click.option(
    "--no-restart-on-failure",
    is_flag=True,
    help="A process that fails is not replaced; the others go on, and the exit code tells.",
)
@click.option(
    "--poll-interval", type=float, metavar="SECONDS", help="How often to look without being rung.  [default: 30]"
)
@click.option("--batch-size", type=int, metavar="N", help="Notifications claimed by one statement.  [default: 500]")
@click.option(
    "--max-in-flight",
    type=int,
    metavar="N",
    help="Notifications of one listener published and not yet acknowledged, at most.  [default: 1000]",
)
@click.option(
    "--drain-timeout",
    type=float,
    metavar="SECONDS",
    help="How long a stop may take to finish the batch.  [default: 30]",
)
@click.option(
    "--health-port",
    type=int,
    metavar="PORT",
    help="Serve /livez, /readyz and /metrics there, over HTTP; 0 is any port that is free.",
)
@click.option("--health-host", metavar="ADDRESS", help="The address for that.  [default: all, as probes need it]")
@click.option(
    "--health-file",
    metavar="PATH",
    help="Renew this file every few seconds while the processes live; `pgpubsub-bridge health` looks at it.",
)
@click.option("--resume", is_flag=True, hidden=True, help="Of `celery worker --pgpubsub`, see sidecar.")
@database_option
@click.pass_context
def listen(
    ctx: click.Context,
    /,
    channels: tuple[str, ...],
    processes: int | None,
    worker: bool,
    recover: str | None,
    loglevel: str,
    logformat: str | None,
    worker_start_method: str,
    no_restart_on_failure: bool,
    resume: bool,
    **settings: Any,
) -> None:
    """Listen to channels, and publish a Celery task for each notification's listeners.

    SIGTERM and SIGINT finish the batch and exit 0; a second one ends at once.
    """
    state = ctx.ensure_object(State)
    # What is wrong with the words themselves is said before anything is imported.
    if worker and processes is not None:
        raise SettingsError(f"--worker is one process: leave out --processes {processes}, or leave out --worker.")
    if processes is not None and processes < 1:
        raise SettingsError(f"--processes is {processes}: expected a whole number of at least 1.")
    if recover is not None and recover not in RECOVER:
        raise SettingsError(f"--recover is {recover!r}: expected --recover, --recover=all or --recover=waiting.")
    if worker_start_method not in supervisor.START_METHODS:
        expected = " or ".join(supervisor.START_METHODS)
        raise SettingsError(f"--worker-start-method is {worker_start_method!r}: expected {expected}.")
    level_number(loglevel)
    make_formatter(logformat)
    plan = supervisor.Plan(
        processes=1 if processes is None else processes,
        worker=worker,
        restart_on_failure=not no_restart_on_failure,
        start_method=worker_start_method,
    )
    paths = _paths(channels)
    app = state.require_app()
    given = {name: value for name, value in {**settings, "database": state.database}.items() if value is not None}
    checked = Settings.load(app.conf, **given)
    checked.require_database_url()
    check_databases(checked.aliases)
    selected = _select(paths, checked.database)
    Broker.check(app)
    _check_database(checked)
    options = bridge.ListenOptions(
        app=state.require_app_path(),
        channels=paths,
        recover=recover,
        resume=resume,
        settings=given,
        loglevel=loglevel,
        logformat=logformat,
    )
    if "database_url" in given:
        # For what the application itself reads from the environment, in each of the processes.
        os.environ[variable("database_url", checked.database)] = given["database_url"]
    configure_logging(loglevel, logformat)
    if recover is not None and not any(channel.lock_notifications for channel in selected):
        logger.warning("--recover has nothing to do: none of the channels has lock_notifications = True")
    plan = dataclasses.replace(plan, drain_timeout=checked.drain_timeout)
    watching = observing.watching(checked)
    ctx.exit(supervisor.run(bridge.run, options, plan, initialise=bridge.prepare, watching=watching))


def _paths(words: tuple[str, ...]) -> tuple[str, ...]:
    paths = tuple(path for word in words for path in word.split())
    if words and not paths:
        # --channels "$CHANNELS" with nothing in it is more likely a mistake than a wish for all of them.
        raise SettingsError(
            "--channels is empty: name channels, for example blog.channels.PostReads, or leave it out for all."
        )
    return paths


def _select(paths: tuple[str, ...], database: str) -> list[type[Channel]]:
    selected = select_channels(paths, database)
    if not paths and all(channel is EnqueuedTask for channel in selected):
        if database != DEFAULT_DATABASE:
            raise UnknownChannelError(
                f"No channel is in the database {database!r}: set database = {database!r} on those that are. "
                "For enqueue() alone: --channels pgpubsub.enqueue."
            )
        raise UnknownChannelError(
            "No channel is registered: import the modules of your channels and listeners in your application, "
            "for example "
            'with app.autodiscover_tasks(["blog"], related_name="listeners"); or name them with --channels. '
            "For enqueue() alone: --channels pgpubsub.enqueue."
        )
    return selected


def _check_database(settings: Settings) -> None:
    """Refuse a database that lacks our tables; one that cannot be reached now is the bridge's to wait for."""
    try:
        with connected(settings, autocommit=True) as connection:
            require_installed(connection, settings.schema, VERSION)
    except DBAPIError as exc:
        if sqlstate(exc) is not None:
            raise
