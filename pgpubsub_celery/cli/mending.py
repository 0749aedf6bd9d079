"""`retry` and `discard`: mending what is stored.

Owns counting, asking and telling; what is changed, and how, is `upkeep`'s.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Connection

from pgpubsub_celery import upkeep
from pgpubsub_celery.cli.context import C, State, app_option, connected, database_option
from pgpubsub_celery.cli.stored import selecting, unknown_names
from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.upkeep import Selection
from pgpubsub_celery.wakeups import require_installed

SHOWN_FROM = 5_000
"""Notifications to be changed, from which on a progress bar is worth while."""


def changing(command: C) -> C:
    """Add the options of commands that change what is selected."""
    for option in reversed(
        (
            click.option("--force", is_flag=True, help="Also what is in flight: a run may be under way."),
            click.option("--dry-run", is_flag=True, help="Only say how many."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object: selected, in_flight, changed."),
        )
    ):
        command = option(command)
    return command


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge retry 17 18
  pgpubsub-bridge retry --state failed --error OSError
  pgpubsub-bridge retry --state held --dry-run
"""
)
@app_option
@database_option
@click.argument("ids", type=int, nargs=-1)
@selecting
@click.option("--all", "everything", is_flag=True, help="All that are held or failed.")
@changing
@click.pass_context
def retry(
    ctx: click.Context,
    /,
    database_url: str | None,
    ids: tuple[int, ...],
    everything: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **selected: Any,
) -> None:
    """Make stored notifications due now: failed and held ones, and those waiting for a later time.

    Without ids or --state: failed and held ones. What is in flight is left alone, unless --force: then a run that is
    under way may happen beside the new one.
    """
    selection = Selection(ids=ids, **selected)
    if selection.everything and not everything:
        raise SettingsError(
            "retry: say which, by id, --channel, --listener, --state, --older-than or --error; or --all."
        )
    settings = ctx.ensure_object(State).settings(database_url=database_url)
    change = _Change("retry", "made due", upkeep.retry_batch, force, dry_run, as_json)
    if selection.states or ids:
        change.run(settings, selection)
    else:
        states = ("failed", "held", *(upkeep.BUSY_STATES if force else ()))
        change.run(settings, selection, states=states)


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge discard 17
  pgpubsub-bridge discard --state failed --older-than 30d --yes
"""
)
@app_option
@database_option
@click.argument("ids", type=int, nargs=-1)
@selecting
@changing
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def discard(
    ctx: click.Context,
    /,
    database_url: str | None,
    ids: tuple[int, ...],
    force: bool,
    dry_run: bool,
    as_json: bool,
    yes: bool,
    **selected: Any,
) -> None:
    """Delete stored notifications, for good.

    What is in flight is left alone, unless --force: a run that is under way goes on.
    """
    selection = Selection(ids=ids, **selected)
    if selection.everything:
        raise SettingsError("discard: say which, by id, --channel, --listener, --state, --older-than or --error.")
    settings = ctx.ensure_object(State).settings(database_url=database_url)
    change = _Change("discard", "discarded", upkeep.discard_batch, force, dry_run, as_json, asks=not yes)
    change.run(settings, selection)


class ChangeBatch(Protocol):
    """`upkeep.retry_batch` or `upkeep.discard_batch`."""

    def __call__(
        self, connection: Connection, schema: str, selection: Selection, /, *, after: int, last: int, force: bool
    ) -> upkeep.Batch:
        """Change a batch."""


@dataclasses.dataclass(frozen=True)
class _Change:
    """Changing what is meant in batches, each a transaction of its own; and saying what was in flight."""

    verb: str
    done: str
    batch: ChangeBatch
    force: bool
    dry_run: bool
    as_json: bool
    asks: bool = False

    def run(self, settings: Settings, selection: Selection, *, states: tuple[str, ...] = ()) -> None:
        """Count, ask, change and tell; `states` narrows down what is changed, not what is told of."""
        with connected(settings, autocommit=True) as connection:
            require_installed(connection, settings.schema, VERSION)
            busy = upkeep.measure(connection, settings.schema, selection, upkeep.BUSY_STATES).count
            if states:
                selection = dataclasses.replace(selection, states=states)
            idle = None if self.force else upkeep.IDLE_STATES
            meant = upkeep.measure(connection, settings.schema, selection, idle)
            hint = "" if meant.count or busy else unknown_names(connection, settings.schema, selection)
        if busy and not self.force:
            click.echo(f"{busy} in flight: left alone; {self.verb} them when they are done, or --force.", err=True)
        changed = 0
        if meant.count and not self.dry_run:
            if self.asks:
                click.confirm(f"Discard {meant.count} notification(s), for good?", abort=True, err=True)
            changed = self._in_batches(settings, selection, meant)
        if self.as_json:
            told = {"selected": meant.count, "in_flight": busy, "changed": changed, "dry_run": self.dry_run}
            click.echo(json.dumps(told))
            return
        count, would = (meant.count, "would be ") if self.dry_run else (changed, "")
        click.echo(f"{count} notification(s) {would}{self.done}.{hint}")
        if changed < meant.count and not self.dry_run:
            click.echo(f"{meant.count - changed} were due already, or locked by somebody else.", err=True)

    def _in_batches(self, settings: Settings, selection: Selection, meant: upkeep.Extent) -> int:
        changed = 0
        after: int | None = 0
        # For people only: rich would draw it into a file, too, once at its end.
        shown = meant.count >= SHOWN_FROM and not self.as_json and os.isatty(2)
        with Progress(*_BAR, console=Console(stderr=True), transient=True, disable=not shown) as progress:
            bar = progress.add_task(self.verb, total=meant.count)
            while after is not None:
                with connected(settings) as connection:
                    batch = self.batch(
                        connection, settings.schema, selection, after=after, last=meant.last, force=self.force
                    )
                changed += batch.changed
                after = batch.after
                progress.update(bar, completed=changed)
        return changed


_BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
