"""`status`, `list` and `show`: what is stored, and who is there for it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import time
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Group as Lines
from rich.live import Live
from rich.text import Text
from sqlalchemy import Connection

from pgpubsub_celery import insights, upkeep
from pgpubsub_celery.cli.context import C, State, app_option, connected, console, database_option, new_table
from pgpubsub_celery.cli.exit_codes import EXIT_ATTENTION, EXIT_FAILED
from pgpubsub_celery.errors import did_you_mean
from pgpubsub_celery.models import STATES
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.upkeep import Selection
from pgpubsub_celery.wakeups import require_installed

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
            click.option(
                "--key", "keys", multiple=True, metavar="KEY", help="With this ordering or unique key; repeatable."
            ),
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
        hint = "" if rows else unknown_names(connection, settings.schema, selection)
    if as_json:
        for row in rows:
            click.echo(json.dumps(dict(row), default=str, ensure_ascii=False))
        return
    if not rows:
        click.echo(f"No notification is stored that fits.{hint}", err=True)
        return
    columns = ["id", "channel", "listener", "operation", "state", "stored", "due or failed", "retries", "error"]
    have_keys = any(_keys(row) for row in rows)
    table = new_table(*columns[:4], *(["key"] if have_keys else []), *columns[4:])
    for row in rows:
        first = (row["error"] or "").splitlines()[:1]
        table.add_row(
            str(row["id"]),
            Text(row["channel"]),
            Text(row["listener"] or ""),
            row["operation"],
            *([Text(_keys(row))] if have_keys else []),
            row["state"],
            _time(row["created_at"]),
            _time(row["failed_at"] or row["available_at"]),
            str(row["retries"] or ""),
            Text(first[0] if first else ""),
        )
    console().print(table)
    if total > len(rows):
        click.echo(f"{len(rows)} of {total}: --limit shows more.", err=True)


def _keys(row: Mapping[str, Any]) -> str:
    """Return what a notification is ordered and made unique by."""
    ordering = row["ordering_key"]
    own = ordering is not None and ordering.startswith("none:")
    return ", ".join(dict.fromkeys(key for key in (None if own else ordering, row["unique_key"]) if key is not None))


def unknown_names(connection: Connection, schema: str, selection: Selection) -> str:
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
