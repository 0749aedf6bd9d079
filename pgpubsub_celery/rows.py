"""From what triggers have stored back to rows: the values that the ORM would have loaded.

Owns the way back of `capture`: each value's text is converted by the same steps as one that arrives in a query (the
type that the column has in the database, the driver's typecaster, SQLAlchemy's result processor). The objects are built
by `instances`. Never fails a bundle for one row.

Most values are converted here, without a round trip. Types whose text depends on the session's settings, or that only
Postgres can read, go through one statement for the whole bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection, Dialect, Table, literal_column, select, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import drivers
from pgpubsub_celery.channels import TriggerChannel
from pgpubsub_celery.errors import DecodeError
from pgpubsub_celery.instances import Processor, builder_of
from pgpubsub_celery.schema import quote_identifier

SHAPE_SECONDS = 60.0
"""How long a worker relies on the types that it found a table's columns to have."""

# Circumstances (SQLSTATE classes), not the value: connection, transaction state, rollback, resources, operator, system.
_TRANSIENT = ("08", "25", "40", "53", "55", "57", "58")

Change = tuple[Any, Any]
"""The row before and after; None where there is none."""


def decode_rows(
    channel: type[TriggerChannel[Any]], payloads: Sequence[Any], connection: Connection
) -> list[Change | DecodeError]:
    """Return `(old, new)` for each payload of a bundle: instances of the channel's model, or rows of its `Table`.

    Instances are detached, as if loaded and expunged: what was not stored (excluded columns, relationships, other
    tables' columns) is not loaded, but for the channel's `defaults`. Rows are SQLAlchemy `Row`s of the stored columns.
    A payload that cannot be decoded gives a DecodeError in its place. Uses the caller's transaction, in a savepoint,
    for one statement at most, and one more when the table has not been looked at for a minute; never commits.
    """
    return _Bundle(channel, payloads, connection).decode()


class _Bundle:
    """The decoding of one bundle."""

    def __init__(self, channel: type[TriggerChannel[Any]], payloads: Sequence[Any], connection: Connection) -> None:
        self._channel = channel
        self._payloads = payloads
        self._connection = connection
        self._builder = builder_of(channel)

    def decode(self) -> list[Change | DecodeError]:
        changes: list[tuple[_Texts | None, _Texts | None] | DecodeError] = []
        for payload in self._payloads:
            try:
                changes.append((self._texts(payload, "old"), self._texts(payload, "new")))
            except DecodeError as exc:
                changes.append(exc)
        texts = [
            side for change in changes if not isinstance(change, DecodeError) for side in change if side is not None
        ]
        decoded = iter(self._rows(texts))

        def rows() -> Iterator[Change | DecodeError]:
            for change in changes:
                if isinstance(change, DecodeError):
                    yield change
                    continue
                old, new = (None if side is None else next(decoded) for side in change)
                yield old if isinstance(old, DecodeError) else new if isinstance(new, DecodeError) else (old, new)

        return list(rows())

    def _texts(self, payload: Any, side: str) -> _Texts | None:
        columns = payload.get(side) if isinstance(payload, Mapping) else payload
        if columns is None and payload is not None:
            return None
        if isinstance(columns, Mapping) and all(value is None or isinstance(value, str) for value in columns.values()):
            return self._by_present_names(columns)
        raise DecodeError(
            f"{self._channel.name()}: its payload is not one that a trigger stored: expected "
            '{"old": {column: text}, "new": {column: text}}.'
        )

    def _by_present_names(self, columns: _Texts) -> _Texts:
        earlier = {old: new for old, new in self._builder.renamed.items() if old in columns and new not in columns}
        return {earlier.get(name, name): value for name, value in columns.items()} if earlier else columns

    def _rows(self, texts: Sequence[_Texts]) -> list[Any]:
        """Return a row or a DecodeError for each."""
        if not texts:
            return []
        shape, fresh = self._shape()
        found = self._convert(shape, texts)
        if not fresh and any(isinstance(one, DecodeError) for one in found):
            # The table may have been altered.
            shape, _ = self._shape(renew=True)
            found = self._convert(shape, texts)
        return [one if isinstance(one, DecodeError) else self._build(one) for one in found]

    def _shape(self, *, renew: bool = False) -> tuple[_Shape, bool]:
        return _shape_of(self._connection, self._builder.table, renew=renew)

    def _build(self, values: Mapping[str, Any]) -> Any:
        added = {name: value for name, value in self._builder.defaults.items() if name not in values}
        try:
            defaults = {name: value() if callable(value) else value for name, value in added.items()}
            return self._builder.build({**values, **defaults} if added else values)
        except Exception as exc:  # noqa: BLE001 - what the application does when an object is loaded may raise anything
            return self._error(exc, None, None)

    # Values

    def _convert(self, shape: _Shape, texts: Sequence[_Texts]) -> list[dict[str, Any] | DecodeError]:
        if not shape.columns:
            name = self._builder.table.fullname
            return [DecodeError(f"{self._channel.name()}: there is no table {name} any more.") for _ in texts]
        local, remote = self._split(shape, texts)
        found: list[dict[str, Any] | DecodeError] = []
        if local:
            with drivers.reading(self._connection) as read:
                found.extend(self._convert_here(read, local, one) for one in texts)
        else:
            found.extend({} for _ in texts)
        if remote:
            self._convert_in_database(shape, remote, texts, found)
        return found

    def _split(self, shape: _Shape, texts: Sequence[_Texts]) -> tuple[list[_Local], list[str]]:
        """Which columns are converted here, and which by Postgres: what the model and the table both have."""
        names = {name for one in texts for name in one if name in self._builder.columns and name in shape.columns}
        session = _session_facts(self._connection)
        local: list[_Local] = []
        remote: list[str] = []
        for name in sorted(names):
            column, found = self._builder.columns[name], shape.columns[name]
            if found.is_virtual:
                continue  # transition tables have no values for these
            if session is None or column.name in self._builder.expressions or not found.settings <= session:
                remote.append(name)
            else:
                local.append(_Local(name, found, self._builder.processor(name, self._connection.dialect, found.oid)))
        return local, remote

    def _convert_here(
        self, read: Callable[[int, str], Any], local: Sequence[_Local], texts: _Texts
    ) -> dict[str, Any] | DecodeError:
        values: dict[str, Any] = {}
        for column in local:
            try:
                value = texts[column.name]
            except KeyError:
                continue
            try:
                if value is not None:
                    value = read(column.found.oid, value)
                values[column.name] = value if column.process is None else column.process(value)
            except Exception as exc:  # noqa: BLE001 - a type of the application's may raise anything
                return self._error(exc, column.name, column.found)
        return values

    def _convert_in_database(
        self,
        shape: _Shape,
        names: Sequence[str],
        texts: Sequence[_Texts],
        found: list[dict[str, Any] | DecodeError],
    ) -> None:
        positions = [position for position, one in enumerate(found) if not isinstance(one, DecodeError)]
        try:
            rows: list[Sequence[Any] | DecodeError] = [
                *self._select(shape, names, [texts[position] for position in positions])
            ]
        except Exception as exc:  # noqa: BLE001 - as above
            self._error(exc, None, None)
            rows = [self._select_alone(shape, names, texts[position]) for position in positions]
        for position, row in zip(positions, rows, strict=True):
            values = found[position]
            assert not isinstance(values, DecodeError)
            if isinstance(row, DecodeError):
                found[position] = row
            else:
                values.update((name, value) for name, value in zip(names, row, strict=True) if name in texts[position])

    def _select_alone(self, shape: _Shape, names: Sequence[str], texts: _Texts) -> Sequence[Any] | DecodeError:
        try:
            return self._select(shape, names, [texts])[0]
        except Exception as exc:  # noqa: BLE001 - as above
            error = self._error(exc, None, None)
        for name in names:
            try:
                self._select(shape, [name], [texts])
            except Exception as exc:  # noqa: BLE001 - as above
                return self._error(exc, name, shape.columns[name])
        return error

    def _select(self, shape: _Shape, names: Sequence[str], texts: Sequence[_Texts]) -> Sequence[Sequence[Any]]:
        """Have Postgres convert the texts, and the driver and SQLAlchemy load them, as in any query."""
        columns = [
            literal_column(_cast(position, shape.columns[name].type), self._builder.columns[name].type).label(
                f"c{position}"
            )
            for position, name in enumerate(names)
        ]
        source = text("pg_catalog.jsonb_array_elements(CAST(:texts AS pg_catalog.jsonb)) WITH ORDINALITY AS r (v, n)")
        encoded = json.dumps([[one.get(name) for name in names] for one in texts], ensure_ascii=False)
        with _protected(self._connection):
            return self._connection.execute(
                select(*columns).select_from(source).order_by(text("r.n")), {"texts": encoded}
            ).all()

    def _error(self, exc: Exception, column: str | None, found: _DatabaseColumn | None) -> DecodeError:
        """Return what to say of a value, but raise what is not the value's fault. Says nothing of what the value is."""
        if isinstance(exc, SoftTimeLimitExceeded | MemoryError):
            raise exc
        why = type(exc).__name__
        if isinstance(exc, DBAPIError):
            state = drivers.sqlstate(exc) or ""
            if exc.connection_invalidated or state.startswith(_TRANSIENT):
                raise exc
            why = re.sub(r'"[^"]*"', '"…"', str(exc.orig).strip().split("\n")[0])
        elif isinstance(exc, DecodeError):
            why = str(exc)
        name = self._channel.name()
        if column is None or found is None:
            return DecodeError(f"{name}: a row cannot be read as {self._builder.model_name} ({why}).")
        wanted = self._builder.columns[column].type
        return DecodeError(
            f"{name}: the value of the column {column!r}, which is of the type {found.type} in the database, cannot be "
            f"read as {wanted!r} ({why}). Was the column altered since the value was stored?"
        )


_Texts = Mapping[str, "str | None"]
"""A stored row: columns and Postgres's text for their values."""


def _cast(position: int, type_name: str) -> str:
    value = f"r.v ->> {position}"
    if type_name == "money":
        # The trigger's text is in the locale C, and reading money depends on the session's.
        value = f"CAST(pg_catalog.translate({value}, '$,', '') AS numeric)"
    return f"CAST({value} AS {type_name})"


@contextlib.contextmanager
def _protected(connection: Connection) -> Iterator[None]:
    """A failing cast must not abort the caller's transaction."""
    if getattr(connection.connection.dbapi_connection, "autocommit", False) is True:
        yield
    else:
        with connection.begin_nested():
            yield


# What columns are in the database


@dataclasses.dataclass(frozen=True)
class _DatabaseColumn:
    oid: int
    """Of its type; of a domain's base type, which is what the server tells drivers."""
    type: str
    """The same as SQL."""
    is_virtual: bool
    settings: frozenset[str]
    """Facts of the session that must hold for its stored text to be what the server would send to it."""


@dataclasses.dataclass(frozen=True)
class _Shape:
    columns: Mapping[str, _DatabaseColumn]
    read_at: float


@dataclasses.dataclass(frozen=True)
class _Local:
    name: str
    found: _DatabaseColumn
    process: Processor | None


_shapes: weakref.WeakKeyDictionary[Dialect, dict[tuple[str | None, str], _Shape]] = weakref.WeakKeyDictionary()
"""By the dialect, of which each engine has one. Written under `_reading`."""
_reading = threading.Lock()

# Base types of domains, and of domains over domains. Without modifiers: the stored text is the value as it was.
_READ_SHAPE = text(
    """
WITH RECURSIVE found AS (
    SELECT a.attname, a.attgenerated, a.atttypid AS oid FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = pg_catalog.to_regclass(:table) AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT f.attname, f.attgenerated, t.typbasetype FROM found f JOIN pg_catalog.pg_type t ON t.oid = f.oid
    WHERE t.typtype = 'd'
)
SELECT f.attname, f.attgenerated = 'v' AS is_virtual, CAST(f.oid AS bigint) AS oid,
    CASE WHEN n.nspname = 'pg_catalog' THEN pg_catalog.format_type(f.oid, -1)
        ELSE pg_catalog.format('%I.%I', n.nspname, t.typname) END AS type,
    CAST(CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN t.typelem ELSE t.oid END AS bigint) AS element,
    coalesce(e.typtype, t.typtype) AS kind, coalesce(e.typcategory, t.typcategory) AS category
FROM found f JOIN pg_catalog.pg_type t ON t.oid = f.oid JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
LEFT JOIN pg_catalog.pg_type e ON t.typcategory = 'A' AND e.oid = t.typelem
WHERE t.typtype <> 'd'
"""
)

# By the oids of Postgres's own types, which never change.
_DRIVERS = ("psycopg2", "psycopg")
_ISO = "DateStyle = ISO"
_UTC = "TimeZone = UTC"
_INTERVALS = "IntervalStyle = postgres"
_NEVER = "never"
_SETTINGS: Mapping[int, frozenset[str]] = {
    **dict.fromkeys((16, 18, 19, 20, 21, 23, 25, 26, 114, 700, 701, 869, 1042, 1043, 1700, 2950, 3802), frozenset()),
    17: frozenset(),
    **dict.fromkeys((1082, 1083, 1114, 1266), frozenset({_ISO})),
    1184: frozenset({_ISO, _UTC}),
    1186: frozenset({_INTERVALS}),
}


def _shape_of(connection: Connection, table: Table, *, renew: bool) -> tuple[_Shape, bool]:
    """Return the types of a table's columns, and whether they have been read just now."""
    schema = connection.schema_for_object(table)
    key = (None if schema is None else str(schema), str(table.name))
    with _reading:
        known = _shapes.setdefault(connection.dialect, {}).get(key)
    if known is not None and not renew and time.monotonic() - known.read_at < SHAPE_SECONDS:
        return known, False
    name = ".".join(quote_identifier(part) for part in key if part is not None)
    rows = connection.execute(_READ_SHAPE, {"table": name}).all()
    columns = {row.attname: _DatabaseColumn(int(row.oid), row.type, row.is_virtual, _settings_for(row)) for row in rows}
    shape = _Shape(columns, time.monotonic())
    with _reading:
        _shapes.setdefault(connection.dialect, {})[key] = shape
    return shape, True


def _settings_for(row: Any) -> frozenset[str]:
    """Enumerations and strings of any kind are their text; arrays are as their elements."""
    if row.kind == "e" or (row.kind == "b" and row.category == "S"):
        return frozenset()
    return _SETTINGS.get(row.element, frozenset({_NEVER}))


def _session_facts(connection: Connection) -> frozenset[str] | None:
    """What holds on this connection, as the server has told the driver; None for drivers that cannot cast here."""
    if connection.dialect.driver not in _DRIVERS or drivers.parameter(connection, "client_encoding") != "UTF8":
        return None
    facts = set()
    if str(drivers.parameter(connection, "DateStyle")).startswith("ISO"):
        facts.add(_ISO)
    if drivers.parameter(connection, "TimeZone") in ("UTC", "Etc/UTC", "GMT"):
        facts.add(_UTC)
    if drivers.parameter(connection, "IntervalStyle") == "postgres":
        facts.add(_INTERVALS)
    return frozenset(facts)
