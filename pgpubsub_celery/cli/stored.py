"""`list` and `show`: what is stored."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.text import Text
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from pgpubsub_celery import insights
from pgpubsub_celery.channels import TriggerChannel, captured_columns, registered_channels, table_of
from pgpubsub_celery.cli.context import (
    C,
    Duration,
    State,
    app_option,
    connected,
    console,
    database_option,
    new_table,
    told_time,
)
from pgpubsub_celery.cli.exit_codes import EXIT_FAILED
from pgpubsub_celery.errors import PgPubSubError, did_you_mean
from pgpubsub_celery.models import STATES
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.upkeep import Selection
from pgpubsub_celery.wakeups import require_installed

COLUMNS = {
    "id": "id",
    "channel": "channel",
    "listener": "listener",
    "operation": "operation",
    "state": "state",
    "created_at": "stored",
    "due": "due or failed",
    "retries": "retries",
    "error": "error",
}
"""Shown by default, with their titles."""

KEY = "key"
"""Shown besides where one has any: what it is ordered and made unique by."""

MORE = (
    "available_at",
    "context",
    "db_version",
    "dispatches",
    "failed_at",
    KEY,
    "ordering_key",
    "owner",
    "payload",
    "recovered_at",
    "starts",
    "subscription",
    "task_id",
    "traceback",
    "unique_key",
)
"""Shown when asked for."""


class _Columns(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """Names, separated by commas."""

    name = "columns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names."""
        if isinstance(value, tuple):
            return value
        known = [*COLUMNS, *MORE]
        names = tuple(name.strip() for name in str(value).split(",") if name.strip())
        for name in names:
            if name not in known:
                self.fail(f"{name!r}: expected some of {', '.join(known)}.{did_you_mean(name, known)}", param, ctx)
        return names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete the last of them."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(before + comma + name) for name in (*COLUMNS, *MORE) if name.startswith(last)]


class _Known(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """A name that the shell can complete: from the database, where one is configured in the environment."""

    name = "text"

    def __init__(self, which: int) -> None:
        self._which = which

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that the database knows; none where it cannot be asked, for nobody could be told why."""
        try:
            settings = Settings.load(database_url=ctx.params.get("database_url"))
            with connected(settings, autocommit=True) as connection:
                names = insights.read_names(connection, settings.schema)[self._which]
        except (PgPubSubError, SQLAlchemyError):
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class _State(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """A state; what is none is refused by `Selection`."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return those that fit."""
        return [CompletionItem(state) for state in STATES if state.startswith(incomplete)]


def selecting(command: C) -> C:
    """Add the options that say which notifications are meant."""
    for option in reversed(
        (
            click.option(
                "--channel",
                "channels",
                type=_Known(0),
                multiple=True,
                metavar="NAME",
                help="Of this channel; repeatable.",
            ),
            click.option(
                "--listener",
                "listeners",
                type=_Known(1),
                multiple=True,
                metavar="TASK",
                help="For this listener; repeatable.",
            ),
            click.option(
                "--state",
                "states",
                type=_State(),
                multiple=True,
                metavar="STATE",
                help=f"One of {', '.join(STATES)}; repeatable.",
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


@click.command(
    "list",
    epilog="""
Examples:

\b
  pgpubsub-bridge list --state failed --newest
  pgpubsub-bridge list --channel blog.channels.PostReads --older-than 1h --json
  pgpubsub-bridge list --columns id,error,traceback --state failed
  pgpubsub-bridge list --after 4711                       # the next page
""",
)
@app_option
@database_option
@selecting
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N")
@click.option("--after", type=int, metavar="ID", help="Begin after this one: the next page.")
@click.option("--newest", is_flag=True, help="Newest first.")
@click.option(
    "--columns",
    type=_Columns(),
    metavar="NAME,…",
    help=f"Of {', '.join((*COLUMNS, *MORE))}. Default: up to error; with --json all.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with payload and traceback.")
@click.pass_context
def list_stored(
    ctx: click.Context,
    /,
    database_url: str | None,
    limit: int,
    after: int | None,
    newest: bool,
    columns: tuple[str, ...] | None,
    as_json: bool,
    **selected: Any,
) -> None:
    """List stored notifications, oldest first.

    With -A, columns that their channel excludes by now are left out of payloads that were stored before it did.
    """
    state = ctx.ensure_object(State)
    settings = state.settings(database_url=database_url)
    selection = Selection(**selected)
    condition, parameters = selection.condition(settings.schema)
    page: dict[str, Any] = {"limit": limit + 1, "after": after, "newest": newest}  # one more: are there more?
    with connected(settings) as connection:
        require_installed(connection, settings.schema, VERSION)
        found = insights.read_notifications(connection, settings.schema, condition, parameters, **page)
        hint = "" if found else unknown_names(connection, settings.schema, selection)
    rows = [_seen(state, row) for row in found[:limit]]
    if as_json:
        for row in rows:
            wanted = {name: row[name] for name in columns} if columns else row
            click.echo(json.dumps(wanted, default=str, ensure_ascii=False))
    elif rows:
        console().print(_table(rows, columns))
    else:
        click.echo(f"No notification is stored that fits.{hint}", err=True)
    if len(found) > limit:
        click.echo(f"There are more: --after {rows[-1]['id']} shows the next {limit}.", err=True)


def _table(rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...] | None) -> Any:
    names = columns or _usual(rows)
    table = new_table(*(COLUMNS.get(name, name) for name in names))
    for row in rows:
        table.add_row(*(Text(_cell(name, row[name])) for name in names))
    return table


def _usual(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    names = list(COLUMNS)
    if any(row[KEY] for row in rows):
        names.insert(names.index("operation") + 1, KEY)
    return tuple(names)


def _cell(name: str, value: Any) -> str:
    if value is None or (name == "retries" and not value):
        return ""
    if isinstance(value, datetime.datetime):
        return told_time(value)
    if isinstance(value, dict | list):
        return json.dumps(value, default=str, ensure_ascii=False)
    if name == "error":
        return str(value).split("\n", 1)[0]
    return str(value).rstrip()


def _seen(state: State, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as people are to see it: without what its channel hides by now."""
    seen = {**row, "due": row["failed_at"] or row["available_at"], KEY: _keys(row)}
    hidden = _hidden(state, row["channel"])
    if hidden and isinstance(row["payload"], dict):
        seen["payload"] = {
            side: {name: value for name, value in columns.items() if name not in hidden}
            if isinstance(columns, dict)
            else columns
            for side, columns in row["payload"].items()
        }
    return seen


def _hidden(state: State, channel: str) -> frozenset[str]:
    if not state.app_path:
        return frozenset()
    state.require_app()
    for known in registered_channels():
        if issubclass(known, TriggerChannel) and channel in (known.name(), *known.aliases):
            return frozenset(str(one.name) for one in {*table_of(known).columns} - {*captured_columns(known)})
    return frozenset()


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
    """Show one stored notification, with payload and traceback.

    With -A, columns that its channel excludes by now are left out.
    """
    state = ctx.ensure_object(State)
    settings = state.settings(database_url=database_url)
    with connected(settings) as connection:
        require_installed(connection, settings.schema, VERSION)
        condition, parameters = Selection(ids=(id,)).condition(settings.schema)
        rows = insights.read_notifications(connection, settings.schema, condition, parameters, limit=1)
    if not rows:
        click.echo(f"No notification {id} is stored: it has been acknowledged or discarded, or never was.", err=True)
        ctx.exit(EXIT_FAILED)
    row = _seen(state, rows[0])
    del row["due"]
    if as_json:
        click.echo(json.dumps(row, default=str, ensure_ascii=False))
        return
    for name, value in row.items():
        if value is None or name == "traceback":
            continue
        shown = json.dumps(value, ensure_ascii=False, indent=2) if isinstance(value, dict | list) else str(value)
        click.echo(f"{name:>14}  {shown}")
    if row["traceback"]:
        click.echo(f"\n{row['traceback'].rstrip()}")
