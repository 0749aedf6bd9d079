"""`status`, `list`, `show`, `retry` and `discard`: what is stored, and mending it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import click
from rich.console import Group as Lines
from rich.live import Live
from rich.text import Text
from sqlalchemy import Connection

from pgpubsub_celery import insights, upkeep
from pgpubsub_celery.cli.context import State, app_option, connected, console, database_option, new_table
from pgpubsub_celery.cli.exit_codes import EXIT_ATTENTION, EXIT_FAILED
from pgpubsub_celery.errors import SettingsError, did_you_mean
from pgpubsub_celery.models import STATES
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.upkeep import Selection
from pgpubsub_celery.wakeups import require_installed

C = TypeVar("C", bound=Callable[..., Any])

SHOWN_FROM = 5_000
"""Notifications to be changed, from which on a progress bar is worth while."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """Seconds, or a number with s, m, h or d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        if match is None:
            self.fail(f"{value!r}: expected a duration such as 90, 30s, 5m, 2h or 1d.", param, ctx)
        return float(match[1]) * _UNITS[match[2] or "s"]


def selecting(command: C) -> C:
    """Add the options that say which notifications are meant."""
    for option in reversed(
        (
            click.option("--channel", "channels", multiple=True, metavar="NAME", help="Of this channel; repeatable."),
            click.option(
                "--listener", "listeners", multiple=True, metavar="TASK", help="For this listener; repeatable."
            ),
            click.option(
                "--state", "states", multiple=True, metavar="STATE", help=f"One of {', '.join(STATES)}; repeatable."
            ),
            click.option(
                "--older-than", type=Duration(), metavar="DURATION", help="Stored longer ago, e.g. 90s, 2h, 1d."
            ),
            click.option("--error", metavar="TEXT", help="Failed with an error that contains this."),
        )
    ):
        command = option(command)
    return command


def _settings(ctx: click.Context, database_url: str | None) -> Settings:
    return ctx.ensure_object(State).settings(database_url=database_url)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _count(number: int, style: str = "") -> Text:
    return Text(f"{number}+" if number >= insights.COUNT_LIMIT else str(number), style if number else "dim")


# status


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge -A blog.celery_app status
  pgpubsub-bridge status --database-url postgresql://… --json
  pgpubsub-bridge status --max-age 5m --max-failed 0      # exit code 4 when exceeded, for monitoring
"""
)
@app_option
@database_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option(
    "--max-age", type=Duration(), metavar="DURATION", help="Exit code 4 when something has been due for longer."
)
@click.option("--max-failed", type=int, metavar="N", help="Exit code 4 when a listener has more failed ones.")
@click.pass_context
def status(
    ctx: click.Context,
    database_url: str | None,
    as_json: bool,
    watch: bool,
    max_age: float | None,
    max_failed: int | None,
) -> None:
    """Show for each listener what waits, runs and fails, and which bridges are connected."""
    settings = _settings(ctx, database_url)
    with connected(settings, autocommit=True) as connection:
        require_installed(connection, settings.schema, VERSION)
        if watch:
            _watch(connection, settings.schema)
            return
        listeners = insights.read_listeners(connection, settings.schema)
        bridges = insights.read_bridges(connection, settings.schema)
    if as_json:
        click.echo(json.dumps(_status_json(listeners, bridges), default=str))
    else:
        console().print(_status_tables(listeners, bridges))
    late = [one for one in listeners if max_age is not None and (one.oldest_seconds or 0) > max_age]
    failed = [one for one in listeners if max_failed is not None and one.failed > max_failed]
    for one in late:
        click.echo(f"{one.listener or one.channel}: due for {_age(one.oldest_seconds)}", err=True)
    for one in failed:
        click.echo(f"{one.listener}: {one.failed} failed", err=True)
    if late or failed:
        ctx.exit(EXIT_ATTENTION)


def _watch(connection: Connection, schema: str) -> None:
    with Live(console=console(), auto_refresh=False) as live:
        try:
            while True:
                shown = _status_tables(
                    insights.read_listeners(connection, schema), insights.read_bridges(connection, schema)
                )
                live.update(shown, refresh=True)
                time.sleep(1)
        except KeyboardInterrupt:
            return


def _status_json(listeners: list[insights.ListenerStatus], bridges: list[insights.BridgeStatus]) -> dict[str, Any]:
    return {
        "listeners": [{**dataclasses.asdict(one), "in_flight": one.in_flight} for one in listeners],
        "bridges": [dataclasses.asdict(one) for one in bridges],
    }


def _status_tables(listeners: list[insights.ListenerStatus], bridges: list[insights.BridgeStatus]) -> Lines:
    table = new_table("channel", "listener", title="Notifications")
    for name in ("waiting", "oldest", "delayed", "in flight", "held", "failed"):
        table.add_column(name, justify="right")
    table.add_column("versions")
    for one in listeners:
        table.add_row(
            Text(one.channel),
            Text("none yet", "yellow") if one.listener is None else Text(one.listener),
            _count(one.waiting),
            _age(one.oldest_seconds),
            _count(one.delayed),
            _count(one.in_flight),
            _count(one.held, "yellow"),
            _count(one.failed, "red"),
            Text(", ".join(one.versions)),
        )
    connected_bridges = new_table("backend", "host", "since", "channels", title="Bridges")
    for bridge in bridges:
        connected_bridges.add_row(str(bridge.pid), bridge.host, _time(bridge.since), str(len(bridge.channels)))
    nobody = Text("No bridge is connected for a stored channel: nothing is published.", "yellow")
    return Lines(table, "", connected_bridges if bridges else nobody)


# list and show


@click.command(
    "list",
    epilog="""
Examples:

\b
  pgpubsub-bridge list --state failed
  pgpubsub-bridge list --channel blog.channels.PostReads --older-than 1h --json
""",
)
@app_option
@database_option
@selecting
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with payload and traceback.")
@click.pass_context
def list_stored(ctx: click.Context, /, database_url: str | None, limit: int, as_json: bool, **selected: Any) -> None:
    """List stored notifications, oldest first."""
    settings = _settings(ctx, database_url)
    selection = Selection(**selected)
    condition, parameters = selection.condition(settings.schema)
    with connected(settings) as connection:
        require_installed(connection, settings.schema, VERSION)
        rows = insights.read_notifications(connection, settings.schema, condition, parameters, limit=limit)
        total = upkeep.measure(connection, settings.schema, selection).count if len(rows) == limit else len(rows)
        hint = "" if rows else _unknown_names(connection, settings.schema, selection)
    if as_json:
        for row in rows:
            click.echo(json.dumps(dict(row), default=str, ensure_ascii=False))
        return
    if not rows:
        click.echo(f"No notification is stored that fits.{hint}", err=True)
        return
    table = new_table("id", "channel", "listener", "operation", "state", "stored", "due or failed", "retries", "error")
    for row in rows:
        first = (row["error"] or "").splitlines()[:1]
        table.add_row(
            str(row["id"]),
            Text(row["channel"]),
            Text(row["listener"] or ""),
            row["operation"],
            row["state"],
            _time(row["created_at"]),
            _time(row["failed_at"] or row["available_at"]),
            str(row["retries"] or ""),
            Text(first[0] if first else ""),
        )
    console().print(table)
    if total > len(rows):
        click.echo(f"{len(rows)} of {total}: --limit shows more.", err=True)


def _unknown_names(connection: Connection, schema: str, selection: Selection) -> str:
    """Return a hint at names that nobody knows: what was meant may be another."""
    channels, listeners = insights.read_names(connection, schema)
    hints = [
        f" The database knows no {kind} {name!r}.{did_you_mean(name, known)}"
        for kind, given, known in (
            ("channel", selection.channels, channels),
            ("listener", selection.listeners, listeners),
        )
        for name in given
        if name not in known
    ]
    return "".join(hints)


def _time(moment: datetime.datetime | None) -> str:
    return "" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge show 17
  pgpubsub-bridge show 17 --json
"""
)
@app_option
@database_option
@click.argument("id", type=int)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def show(ctx: click.Context, database_url: str | None, id: int, as_json: bool) -> None:
    """Show one stored notification, with payload and traceback."""
    settings = _settings(ctx, database_url)
    with connected(settings) as connection:
        require_installed(connection, settings.schema, VERSION)
        condition, parameters = Selection(ids=(id,)).condition(settings.schema)
        rows = insights.read_notifications(connection, settings.schema, condition, parameters, limit=1)
    if not rows:
        click.echo(f"No notification {id} is stored: it has been acknowledged or discarded, or never was.", err=True)
        ctx.exit(EXIT_FAILED)
    (row,) = rows
    if as_json:
        click.echo(json.dumps(dict(row), default=str, ensure_ascii=False))
        return
    for name, value in row.items():
        if value is None or name == "traceback":
            continue
        shown = json.dumps(value, ensure_ascii=False, indent=2) if isinstance(value, dict | list) else str(value)
        click.echo(f"{name:>14}  {shown}")
    if row["traceback"]:
        click.echo(f"\n{row['traceback'].rstrip()}")


# retry and discard


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
    change = _Change("retry", "made due", upkeep.retry_batch, force, dry_run, as_json)
    if selection.states or ids:
        change.run(_settings(ctx, database_url), selection)
    else:
        states = ("failed", "held", *(upkeep.BUSY_STATES if force else ()))
        change.run(_settings(ctx, database_url), selection, states=states)


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
    change = _Change("discard", "discarded", upkeep.discard_batch, force, dry_run, as_json, asks=not yes)
    change.run(_settings(ctx, database_url), selection)


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
            hint = "" if meant.count or busy else _unknown_names(connection, settings.schema, selection)
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
        many = meant.count >= SHOWN_FROM and not self.as_json
        with click.progressbar(length=meant.count, label=self.verb, file=sys.stderr) if many else _no_bar() as bar:
            while after is not None:
                with connected(settings) as connection:
                    batch = self.batch(
                        connection, settings.schema, selection, after=after, last=meant.last, force=self.force
                    )
                changed += batch.changed
                after = batch.after
                if bar is not None:
                    bar.update(batch.changed)
        return changed


def _no_bar() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
