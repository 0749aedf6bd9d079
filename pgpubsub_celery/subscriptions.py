"""Which subscription is which listener's, over renames and releases.

Owns the comparison of what is stored (`pgpubsub_channel`, `pgpubsub_subscription`) with the channels and listeners
that a release declares, and the rows' statements. Never touches a notification: a subscription keeps its id when it
is renamed, so that what is stored for it follows.

Several releases run at once during a deployment. Each finds a row by any name that both know; a row remembers all its
names. A release that knows a newer name renames it, an older one never renames it back.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, text

from pgpubsub_celery.channels import Channel, Keys, keys_of
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.schema import Names, quote_literal

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelRow:
    """A channel as stored, or as it should be."""

    name: str
    aliases: frozenset[str]
    listen_name: str
    stored: bool
    table_name: str | None
    ordering_key: tuple[str, ...] | None = ()
    """Fields of its messages; None, here and below, leaves what the database has, which may not know keys yet."""
    unique_key: tuple[str, ...] | None = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A subscription as stored."""

    id: int
    channel: str
    channel_aliases: frozenset[str]
    listener: str
    aliases: frozenset[str]
    operations: frozenset[str]

    @property
    def channel_names(self) -> frozenset[str]:
        """All names of its channel."""
        return self.channel_aliases | {self.channel}

    @property
    def names(self) -> frozenset[str]:
        """All names of its listener."""
        return self.aliases | {self.listener}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A subscription to add, or what to set in one; what is None stays."""

    was: Row | None = None
    """None to add it."""
    channel: str | None = None
    listener: str | None = None
    channel_aliases: frozenset[str] | None = None
    aliases: frozenset[str] | None = None
    operations: frozenset[str] | None = None

    @property
    def result(self) -> Row:
        """The subscription afterwards; its id is 0 while it has none."""
        before = self.was or Row(
            id=0, channel="", channel_aliases=frozenset(), listener="", aliases=frozenset(), operations=frozenset()
        )
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "was"}
        return dataclasses.replace(before, **{name: value for name, value in given.items() if value is not None})

    def statement(self, names: Names) -> str:
        """Return it as SQL. Safe to run twice, and beside another process that does the same."""
        if self.was is None:
            values = ", ".join(
                (
                    quote_literal(self.channel or ""),
                    text_array(self.channel_aliases or ()),
                    quote_literal(self.listener or ""),
                    text_array(self.aliases or ()),
                    text_array(self.operations or ()),
                )
            )
            return (
                f"INSERT INTO {names.subscription} (channel, channel_aliases, listener, aliases, operations) "
                f"VALUES ({values}) ON CONFLICT (channel, listener) DO NOTHING"
            )
        settings: list[str] = []
        conditions = [f"s.id = {self.was.id}"]
        for column, value, old in (
            ("channel", self.channel, self.was.channel),
            ("listener", self.listener, self.was.listener),
        ):
            if value is not None:
                settings.append(f"{column} = {quote_literal(value)}")
                conditions.append(f"s.{column} = {quote_literal(old)}")
        if self.channel is not None or self.listener is not None:
            conditions.append(
                f"NOT EXISTS (SELECT FROM {names.subscription} o WHERE "
                f"o.channel = {quote_literal(self.channel or self.was.channel)} "
                f"AND o.listener = {quote_literal(self.listener or self.was.listener)})"
            )
        for column, names_to_have in (("channel_aliases", self.channel_aliases), ("aliases", self.aliases)):
            if names_to_have is not None:
                settings.append(f"{column} = {_union(column, names_to_have)}")
        if self.operations is not None:
            wider = self.operations >= self.was.operations
            settings.append(
                f"operations = {_union('operations', self.operations) if wider else text_array(self.operations)}"
            )
        return f"UPDATE {names.subscription} s SET {', '.join(settings)} WHERE {' AND '.join(conditions)}"


def read_channels(connection: Connection, names: Names) -> list[ChannelRow]:
    """Return the channels that are stored."""
    # All columns: an older version of the schema has no keys.
    rows = connection.execute(text(f"SELECT c.* FROM {names.channel} c"))
    return [
        ChannelRow(
            name=row.name,
            aliases=frozenset(row.aliases),
            listen_name=row.listen_name,
            stored=row.stored,
            table_name=row.table_name,
            ordering_key=tuple(getattr(row, "ordering_key", None) or ()),
            unique_key=tuple(getattr(row, "unique_key", None) or ()),
        )
        for row in rows
    ]


def read_subscriptions(connection: Connection, names: Names) -> list[Row]:
    """Return the subscriptions that are stored."""
    rows = connection.execute(
        text(
            f"SELECT id, channel, channel_aliases, listener, aliases, operations FROM {names.subscription} ORDER BY id"
        )
    )
    return [
        Row(
            id=row.id,
            channel=row.channel,
            channel_aliases=frozenset(row.channel_aliases),
            listener=row.listener,
            aliases=frozenset(row.aliases),
            operations=frozenset(row.operations),
        )
        for row in rows
    ]


def wanted_channel(channel: type[Channel]) -> ChannelRow:
    """Return what should be stored of a channel."""
    model: Any = getattr(channel, "model", None)
    table = getattr(model, "__table__", model)
    # Triggers make the keys of changes themselves.
    keys = Keys() if table is not None else keys_of(channel)
    return ChannelRow(
        name=channel.name(),
        aliases=frozenset(channel.aliases),
        listen_name=channel.listen_safe_name(),
        stored=channel.lock_notifications,
        table_name=None if table is None else str(table.fullname),
        ordering_key=keys.ordering,
        unique_key=keys.unique,
    )


def channel_statement(row: ChannelRow, names: Names) -> str:
    """Return the SQL that stores a channel. Earlier names keep rows of their own, for releases that listen to those."""
    values = {
        "aliases": text_array(row.aliases),
        "listen_name": quote_literal(row.listen_name),
        "stored": str(row.stored).lower(),
        "table_name": "NULL" if row.table_name is None else quote_literal(row.table_name),
    }
    for column, fields in (("ordering_key", row.ordering_key), ("unique_key", row.unique_key)):
        if fields is not None:
            # In their order, which is that of the parts in the key.
            values[column] = f"ARRAY[{', '.join(map(quote_literal, fields))}]::text[]" if fields else "NULL"
    return (
        f"INSERT INTO {names.channel} (name, {', '.join(values)}) "
        f"VALUES ({quote_literal(row.name)}, {', '.join(values.values())}) "
        f"ON CONFLICT (name) DO UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in values)}"
    )


def match(rows: Iterable[Row], listeners: Sequence[Listener]) -> dict[Listener, list[Row]]:
    """Return the rows that each listener stands for, the one to keep first. No row stands for two."""
    found: dict[Listener, list[tuple[int, int, Row]]] = {listener: [] for listener in listeners}
    for row in rows:
        ranks = [(rank, n) for n, listener in enumerate(listeners) if (rank := _rank(row, listener)) is not None]
        if ranks:
            rank, n = min(ranks)
            found[listeners[n]].append((rank, row.id, row))
    return {listener: [row for _, _, row in sorted(ranked, key=lambda r: r[:2])] for listener, ranked in found.items()}


def changes(rows: Sequence[Row], listeners: Sequence[Listener], *, exact: bool) -> list[Change]:
    """Return what to change so that each listener has its operations.

    `exact` (install) sets them to what is declared, and leaves them to one row where a listener has several. Otherwise
    (a bridge's start, beside other releases) operations are only added.
    """
    found: list[Change] = []
    for listener, mine in match(rows, listeners).items():
        declared = frozenset(listener.operations)
        names = frozenset((listener.channel.name(), *listener.channel.aliases))
        if not mine:
            found.append(
                Change(
                    channel=listener.channel.name(),
                    listener=listener.name,
                    channel_aliases=names - {listener.channel.name()},
                    aliases=frozenset(listener.names) - {listener.name},
                    operations=declared,
                )
            )
            continue
        row, others = mine[0], mine[1:]
        has = frozenset().union(*(one.operations for one in mine))
        operations = declared if exact else row.operations | (declared - has)
        change = _renamed(row, listener, names, operations)
        if change is not None:
            found.append(change)
        if exact:
            found += [Change(was=other, operations=frozenset()) for other in others if other.operations]
    return found


def register(connection: Connection, schema: str, listeners: Sequence[Listener]) -> dict[int, Listener]:
    """Add what is missing of these listeners' subscriptions; return all that they stand for, by id.

    Each statement may be a transaction of its own. Needs SELECT, and INSERT and UPDATE where something is missing:
    without them it is said, and what exists is returned.
    """
    names = Names(schema)
    rows = read_subscriptions(connection, names)
    statements = [change.statement(names) for change in changes(rows, listeners, exact=False)]
    known = {row.name for row in read_channels(connection, names)}
    new = {listener.channel.name(): listener.channel for listener in listeners if listener.channel.name() not in known}
    statements += [channel_statement(wanted_channel(channel), names) for channel in new.values()]
    if statements and _may_write(connection, names):
        for statement in statements:
            execute_literally(connection, statement)
        rows = read_subscriptions(connection, names)
    found = match(rows, listeners)
    for change in changes(rows, listeners, exact=False):
        logger.warning("%s: this database role may not write it; run `pgpubsub-bridge install`", describe(change))
    return {row.id: listener for listener, mine in found.items() for row in mine}


def describe(change: Change) -> str:
    """Return what is missing or different, for people."""
    if change.was is None:
        return f"the subscription of {change.listener} to {change.channel} is missing"
    what = f"the subscription of {change.was.listener} to {change.was.channel}"
    if change.listener is not None or change.channel is not None:
        now = f"{change.listener or change.was.listener} to {change.channel or change.was.channel}"
        return f"{what} has an earlier name: {now}"
    if change.operations is not None:
        has = ", ".join(sorted(change.was.operations)) or "nothing"
        return f"{what} takes {has}, and should take {', '.join(sorted(change.operations)) or 'nothing'}"
    return f"{what} lacks an earlier name"


def text_array(values: Iterable[str]) -> str:
    """Return strings as an SQL array."""
    return f"ARRAY[{', '.join(quote_literal(value) for value in sorted(values))}]::text[]"


def execute_literally(connection: Connection, statement: str) -> None:
    """Execute SQL that holds its values: every colon is literal, and so is every percent sign to every driver."""
    connection.execute(text(statement.replace(":", "\\:")))


def _rank(row: Row, listener: Listener) -> int | None:
    """How well a row fits: 0 by its present names, 1 by a name it has had, 2 by one that the listener has had."""
    channel = listener.channel.name()
    if row.channel_names.isdisjoint((channel, *listener.channel.aliases)) or row.names.isdisjoint(listener.names):
        return None
    if row.channel == channel and row.listener == listener.name:
        return 0
    return 1 if channel in row.channel_names and listener.name in row.names else 2


def _renamed(row: Row, listener: Listener, names: frozenset[str], operations: frozenset[str]) -> Change | None:
    channel = row.channel if listener.channel.name() in row.channel_names else listener.channel.name()
    name = row.listener if listener.name in row.names else listener.name
    channel_aliases = (row.channel_names | names) - {channel}
    aliases = (row.names | frozenset(listener.names)) - {name}
    change = Change(
        was=row,
        channel=None if channel == row.channel else channel,
        listener=None if name == row.listener else name,
        channel_aliases=None if channel_aliases == row.channel_aliases else channel_aliases,
        aliases=None if aliases == row.aliases else aliases,
        operations=None if operations == row.operations else operations,
    )
    return None if change == Change(was=row) else change


def _union(column: str, values: Iterable[str]) -> str:
    # Over what the row has now, which another process may have changed since it was read.
    return f"ARRAY(SELECT DISTINCT v FROM unnest(s.{column} || {text_array(values)}) AS u (v) ORDER BY v)"


def _may_write(connection: Connection, names: Names) -> bool:
    return bool(
        connection.execute(
            text(
                "SELECT current_setting('transaction_read_only') = 'off' AND bool_and(has_table_privilege(t, p)) "
                "FROM unnest(CAST(:tables AS text[])) AS t, unnest(ARRAY['INSERT', 'UPDATE']) AS p"
            ),
            {"tables": [names.subscription, names.channel]},
        ).scalar()
    )
