"""`health`: the file that `listen --health-file` renews, for probes that run a command."""

from __future__ import annotations

import json
import os
import time

import click

from pgpubsub_celery.cli.context import Duration
from pgpubsub_celery.cli.exit_codes import EXIT_FAILED


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge health --file /tmp/pgpubsub-health
  pgpubsub-bridge health --file /tmp/pgpubsub-health --ready

It takes a moment of CPU, as each start of Python does. For a probe every few seconds, this asks the same:

\b
  test -n "$(find /tmp/pgpubsub-health -newermt '-30 seconds')"
"""
)
@click.option("--file", "path", required=True, metavar="PATH", help="As for `listen --health-file`.")
@click.option(
    "--max-age",
    type=Duration(),
    default="30s",
    show_default=True,
    metavar="DURATION",
    help="How long ago it may have been renewed.",
)
@click.option("--ready", is_flag=True, help="Also ask whether every process listens.")
@click.pass_context
def health(ctx: click.Context, path: str, max_age: float, ready: bool) -> None:
    """Say whether a `listen` of this host lives: exit code 0 if so, 1 if not, with the reason."""
    try:
        age = time.time() - os.stat(path).st_mtime
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except FileNotFoundError:
        _fail(ctx, f"there is no {path}: no `listen --health-file {path}` runs, or it has just begun")
        return
    except (OSError, ValueError) as exc:
        _fail(ctx, f"{path} cannot be read: {exc}")
        return
    if age > max_age:
        _fail(ctx, f"{path} was renewed {age:.0f} s ago: the processes hang, or are gone")
    elif ready and not told.get("ready"):
        _fail(ctx, "alive, but not every process listens")
    else:
        click.echo("ready" if told.get("ready") else "alive")


def _fail(ctx: click.Context, why: str) -> None:
    click.echo(why, err=True)
    ctx.exit(EXIT_FAILED)
