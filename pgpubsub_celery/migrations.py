"""What exists in the database: installing, upgrading, comparing and removing it.

Owns the difference between what a release needs (tables, functions, channels, subscriptions, triggers) and what a database
has: `install` makes it go away, `check` tells it, `install_sql` writes it down for others to run. Never removes a stored
notification unasked, never waits long for a table that writers are using, and leaves alone what others made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, event, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable

from pgpubsub_celery import models
from pgpubsub_celery.binds import is_autocommit, sqlstate_of
from pgpubsub_celery.channels import Channel, TriggerChannel, registered_channels, select_channels
from pgpubsub_celery.emit import ENQUEUE_LISTENER, EnqueuedTask
from pgpubsub_celery.errors import BindError, NotInstalledError, PgPubSubError
from pgpubsub_celery.listeners import Listener, listeners_of
from pgpubsub_celery.schema import EMIT_FUNCTIONS, VERSION, Function, Names, functions, quote_identifier, quote_literal
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.subscriptions import (
    Change,
    ChannelRow,
    Row,
    changes,
    channel_statement,
    describe,
    execute_literally,
    match,
    read_channels,
    read_subscriptions,
    text_array,
    wanted_channel,
)
from pgpubsub_celery.subscriptions import register as register_subscriptions
from pgpubsub_celery.triggers import COMMENT, TriggerDefinition, trigger_definitions

__all__ = [
    "check",
    "grant_emit",
    "grant_run",
    "install",
    "install_on_create_all",
    "install_sql",
    "register_subscriptions",
    "uninstall",
]

LOCK_ATTEMPT = 1.0
"""Seconds that one attempt waits for a table: writers that come after us queue behind us for no longer than that."""
LOCK_PAUSE = 0.2
"""Seconds between attempts, in which they go on."""

# Colons and percent signs are literal in what it compiles.
_DIALECT = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One difference, and the statements that make it go away."""

    what: str
    """What is missing or different, for people."""
    statements: tuple[str, ...] = ()
    """Nothing where somebody has to decide."""


def install(
    bind: Engine | Connection,
    *,
    channels: Sequence[type[Channel] | str] | None = None,
    prune: bool = False,
    lock_timeout: float = 10.0,
    schema: str | None = None,
) -> list[str]:
    """Make the database what this release needs: tables, functions, channels, subscriptions and triggers.

    Idempotent, and safe beside another install and beside writers. Where all is in place it locks no table. With a
    Connection it works in the caller's transaction, each step in a savepoint, and the caller commits; with an Engine, each
    table's triggers are a transaction of their own, so that never two of your tables are locked at once.

    Args:
        bind: an Engine or Connection of a role that may create in the schema and owns the tables of trigger channels.
        channels: only these, as classes or module paths. Default: all that are registered.
        prune: also remove what no registered listener or channel wants any more; never what stored notifications wait for.
        lock_timeout: seconds to keep trying for the lock on a table that others use.
        schema: of this package's tables and functions. Default: PGPUBSUB_SCHEMA, else public.

    Returns:
        What was missing or different, one line each; what could not be removed says so.

    Raises:
        PgPubSubError: a lock or privilege is not to be had, a table of a channel does not exist, or the database is of a
            newer release; says which and what to do.
    """
    names = Names(_schema(schema))
    selected = _select(channels)
    attempts = _Attempts(bind, names, lock_timeout)
    done = attempts.run(
        "this package's own tables", lambda connection: _execute(connection, _own_steps(connection, names, selected))
    )
    if prune:
        done += attempts.run("this package's own tables", lambda connection: _prune(connection, names))
    for table, definitions in sorted(_definitions(names, selected).items()):
        done += attempts.run(
            f"the table {table}",
            lambda connection, table=table, definitions=definitions: _execute(  # type: ignore[misc]
                connection, _trigger_steps(connection, names, table, definitions)
            ),
        )
    if prune:
        for step in attempts.run("", lambda connection: _unwanted_triggers(connection, names)):
            done += attempts.run(step.what, lambda connection, step=step: _execute(connection, [step]))  # type: ignore[misc]
        done += attempts.run("", lambda connection: _execute(connection, _unused_functions(connection, names)))
    return done


def check(
    connection: Connection,
    *,
    channels: Sequence[type[Channel] | str] | None = None,
    schema: str | None = None,
) -> list[str]:
    """Return how the database differs from what this release needs, one line each; an empty list when it does not.

    Only reads.
    """
    names = Names(_schema(schema))
    selected = _select(channels)
    steps = _own_steps(connection, names, selected)
    for table, definitions in sorted(_definitions(names, selected).items()):
        steps += _trigger_steps(connection, names, table, definitions)
    if channels is None:
        steps += _unwanted_triggers(connection, names) + _unused_functions(connection, names)
    return [step.what for step in steps]


def install_sql(*, channels: Sequence[type[Channel] | str] | None = None, schema: str | None = None) -> str:
    """Return what `install` does on an empty or older database, as a script for somebody else to run, idempotent too.

    Renamed channels and listeners are left to the first bridge of the release, which renames them.
    """
    names = Names(_schema(schema))
    selected = _select(channels)
    parts = [
        f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(names.schema)}" if names.schema != "public" else "",
        *(statement for table in _tables(names.schema).sorted_tables for statement in _table_statements(table)),
        f"INSERT INTO {names.installation} (id, version) SELECT gen_random_uuid(), {VERSION} "
        f"WHERE NOT EXISTS (SELECT FROM {names.installation})",
        _offline_functions(names),
        *(channel_statement(wanted_channel(channel), names) for channel in selected),
        *(
            _offline_subscription(change, listener, names)
            for listener in _listeners(selected)
            for change in changes([], [listener], exact=True)
        ),
        *(
            _offline_trigger(definition)
            for _, definitions in sorted(_definitions(names, selected).items())
            for definition in definitions
        ),
    ]
    return "BEGIN;\n\n" + "".join(f"{part.strip()};\n\n" for part in parts if part) + "COMMIT;\n"


def uninstall(
    bind: Engine | Connection, *, discard_stored: bool = False, lock_timeout: float = 10.0, schema: str | None = None
) -> list[str]:
    """Remove our triggers, functions and tables; the schema and everything of others' stays.

    With an Engine each table's triggers go in a transaction of their own, the rest in the last.

    Args:
        bind: an Engine, or a Connection whose transaction the caller commits.
        discard_stored: also when notifications are stored, which are lost then.
        lock_timeout: as for `install`.
        schema: as for `install`.

    Returns:
        What was removed, one line each.

    Raises:
        PgPubSubError: notifications are stored, and how many; or a lock or privilege is not to be had.
    """
    names = Names(_schema(schema))
    attempts = _Attempts(bind, names, lock_timeout)

    def refuse(connection: Connection) -> None:
        if discard_stored or not _exists(connection, names.notification):
            return
        count = connection.execute(text(f"SELECT count(*) FROM {names.notification}")).scalar_one()
        if count:
            raise PgPubSubError(
                f"uninstall: {count} notification(s) are stored, and would be lost: let a bridge finish them "
                "(`listen --recover`), or pass discard_stored=True (`uninstall --discard-stored`)."
            )

    def remove(connection: Connection) -> list[str]:
        present = [table for table in reversed(_tables(names.schema).sorted_tables) if _exists(connection, _qualified(table))]
        for table in present:
            execute_literally(connection, f"LOCK TABLE {_qualified(table)} IN ACCESS EXCLUSIVE MODE")
        refuse(connection)  # nobody can add any more
        removed = []
        for signature in connection.execute(
            text(
                "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
                "WHERE n.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND p.prokind = 'f' ORDER BY p.oid DESC"
            ),
            {"schema": names.schema},
        ).scalars():
            execute_literally(connection, f"DROP FUNCTION {signature}")
            removed.append(f"removed the function {signature}")
        for table in present:
            execute_literally(connection, f"DROP TABLE {_qualified(table)}")
            removed.append(f"removed the table {_qualified(table)}")
        return removed

    attempts.run("this package's own tables", refuse)
    done: list[str] = []
    for trigger in attempts.run("", lambda connection: _triggers(connection, names)):
        step = Step(what=f"removed the trigger {trigger.name} on {trigger.table}", statements=trigger.drop)
        done += attempts.run(
            f"the table {trigger.table}",
            lambda connection, step=step: _execute(connection, [step]),  # type: ignore[misc]
        )
    return done + attempts.run("this package's own tables", remove)


def install_on_create_all(target: MetaData, *, schema: str | None = None) -> None:
    """Let `target.create_all()` also install, and `target.drop_all()` remove our triggers with their functions first.

    Triggers are made on tables that exist then: `create_all(tables=[…])` leaves the others for later. Calling this twice
    does no harm.
    """
    if "pgpubsub_install" in target.info:
        return
    target.info["pgpubsub_install"] = schema

    @event.listens_for(target, "after_create")
    def after_create(_: MetaData, connection: Any, **__: Any) -> None:
        if not isinstance(connection, Connection):
            return  # a mock, which prints
        names = Names(_schema(schema))
        present = [
            channel
            for channel in registered_channels()
            if not issubclass(channel, TriggerChannel)
            or all(_exists(connection, table) for table in _definitions(names, [channel]))
        ]
        install(connection.engine if is_autocommit(connection) else connection, channels=present, schema=schema)

    @event.listens_for(target, "before_drop")
    def before_drop(_: MetaData, connection: Any, tables: Sequence[Any] = (), **__: Any) -> None:
        if not isinstance(connection, Connection):
            return
        dropped = {_oid(connection, _qualified(table)) for table in tables}
        for trigger in _triggers(connection, Names(_schema(schema))):
            if trigger.relation in dropped:
                _execute(connection, [Step(what="", statements=trigger.drop)])


def grant_emit(connection: Connection, role: str, schema: str | None = None) -> None:
    """Let a role emit with `notify()`, `enqueue()` and `pgpubsub_notify`; changing a table with triggers needs no grant.

    Who may emit may have any Celery task of the application run, by `enqueue`. Uses the caller's transaction.
    """
    names = Names(_schema(schema))
    _grant(
        connection,
        role,
        f"USAGE ON SCHEMA {quote_identifier(names.schema)}",
        *(f"EXECUTE ON FUNCTION {names.prefix}{signature}" for signature in EMIT_FUNCTIONS),
    )


def grant_run(connection: Connection, role: str, schema: str | None = None) -> None:
    """Let a role run bridges and workers, and emit. Uses the caller's transaction."""
    names = Names(_schema(schema))
    grant_emit(connection, role, schema)
    _grant(
        connection,
        role,
        f"SELECT, INSERT, UPDATE, DELETE ON {names.notification}",
        f"SELECT, INSERT, UPDATE ON {names.subscription}, {names.channel}",
        f"SELECT ON {names.installation}",
        f"EXECUTE ON FUNCTION {names.prefix}pgpubsub_ring(text)",
    )


# What is wanted


def _schema(schema: str | None) -> str:
    return Settings.load(schema=schema).schema


def _select(channels: Sequence[type[Channel] | str] | None) -> list[type[Channel]]:
    """The channels to install, with the one of `enqueue`."""
    if channels is None:
        selected = list(registered_channels())
    else:
        selected = []
        for given in channels:
            selected += select_channels([given]) if isinstance(given, str) else [given]
    return [*dict.fromkeys([*selected, EnqueuedTask])]


def _listeners(channels: Sequence[type[Channel]]) -> list[Listener]:
    found = [listener for channel in channels if channel is not EnqueuedTask for listener in listeners_of(channel)]
    return [*found, *([ENQUEUE_LISTENER] if EnqueuedTask in channels else [])]


def _definitions(names: Names, channels: Sequence[type[Channel]]) -> dict[str, list[TriggerDefinition]]:
    """The triggers of channels, by the qualified name of their table."""
    found: dict[str, list[TriggerDefinition]] = {}
    for channel in channels:
        if issubclass(channel, TriggerChannel):
            for definition in trigger_definitions(channel, listeners_of(channel), names.schema):
                schema, table = definition.table
                qualified = quote_identifier(table)
                found.setdefault(f"{quote_identifier(schema)}.{qualified}" if schema else qualified, []).append(definition)
    return found


def _tables(schema: str) -> MetaData:
    copy = MetaData()
    for table in models.metadata.sorted_tables:
        table.to_metadata(copy, schema=schema)
    return copy


def _qualified(table: Any) -> str:
    name = quote_identifier(table.name)
    return f"{quote_identifier(table.schema)}.{name}" if table.schema else name


def _table_statements(table: Any) -> list[str]:
    statements = [CreateTable(table, if_not_exists=True)]
    statements += [CreateIndex(index, if_not_exists=True) for index in sorted(table.indexes, key=lambda i: i.name)]
    return [str(statement.compile(dialect=_DIALECT)).strip() for statement in statements]


def _function_statements(names: Names, function: Function) -> list[str]:
    signature = f"{names.prefix}{function.signature}"
    revoke = [] if function.public else [f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC"]
    return [function.create, *revoke, f"COMMENT ON FUNCTION {signature} IS 'pgpubsub:{function.hash}'"]


# What there is, and the difference


def _own_steps(connection: Connection, names: Names, channels: Sequence[type[Channel]]) -> list[Step]:
    """What differs, but for triggers."""
    steps: list[Step] = []
    if connection.execute(text("SELECT to_regnamespace(:s)"), {"s": quote_identifier(names.schema)}).scalar() is None:
        steps.append(Step(what=f"the schema {names.schema} is missing", statements=(f"CREATE SCHEMA {quote_identifier(names.schema)}",)))
    steps += _table_steps(connection, names)
    installed = not any(step.statements for step in steps)
    row = connection.execute(text(f"SELECT id, version FROM {names.installation}")).first() if installed else None
    installation = uuid.uuid4() if row is None else row.id
    if row is None:
        insert = f"INSERT INTO {names.installation} (id, version) VALUES ('{installation}', {VERSION})"
        steps.append(Step(what="the installation has no id", statements=(insert,)))
    elif row.version > VERSION:
        raise PgPubSubError(
            f"The database has version {row.version} of the schema, this release has {VERSION}: a downgrade is not possible; "
            "use the release that installed it, or a newer one."
        )
    elif row.version < VERSION:
        update = f"UPDATE {names.installation} SET version = {VERSION}"
        steps.append(Step(what=f"the schema has version {row.version}, this release needs {VERSION}", statements=(update,)))
    steps += _function_steps(connection, names, installation)
    known = {channel.name: channel for channel in (read_channels(connection, names) if installed else [])}
    for channel in channels:
        wanted = wanted_channel(channel)
        if known.get(wanted.name) != wanted:
            what = "is missing" if wanted.name not in known else "is out of date"
            steps.append(
                Step(what=f"the channel {wanted.name} {what}", statements=(channel_statement(wanted, names),))
            )
    rows = read_subscriptions(connection, names) if installed else []
    for change in changes(rows, _listeners(channels), exact=True):
        steps.append(Step(what=describe(change), statements=(change.statement(names),)))
    return steps


def _table_steps(connection: Connection, names: Names) -> list[Step]:
    steps: list[Step] = []
    tables = _tables(names.schema).sorted_tables
    present = {table.name: _exists(connection, _qualified(table)) for table in tables}
    _refuse_others_objects(connection, names)
    for table in tables:
        if not present[table.name]:
            steps.append(
                Step(what=f"the table {_qualified(table)} is missing", statements=tuple(_table_statements(table)))
            )
            continue
        columns = set(
            connection.execute(
                text("SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:t) AND attnum > 0 AND NOT attisdropped"),
                {"t": _qualified(table)},
            ).scalars()
        )
        lacking = [column.name for column in table.columns if column.name not in columns]
        if lacking:
            raise PgPubSubError(
                f"The table {_qualified(table)} exists and has no column {', '.join(lacking)}: it is not this package's, or of an "
                "unreleased version. Rename it, or name another schema in PGPUBSUB_SCHEMA or pgpubsub_schema."
            )
    return steps


def _refuse_others_objects(connection: Connection, names: Names) -> None:
    """Refuse to build upon objects with our names that another role made: our functions would run what it put there."""
    found = connection.execute(
        text(
            "SELECT relname AS name, pg_get_userbyid(relowner) AS owner FROM pg_class WHERE relnamespace = to_regnamespace(:s) "
            "AND relname = ANY (CAST(:tables AS text[])) UNION ALL "
            "SELECT proname, pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = to_regnamespace(:s) "
            "AND proname LIKE 'pgpubsub\\_%'"
        ),
        {
            "s": quote_identifier(names.schema),
            "tables": [table.name for table in models.metadata.sorted_tables],
        },
    ).all()
    me = connection.execute(text("SELECT current_user")).scalar_one()
    for name, owner in found:
        if owner != me:
            raise PgPubSubError(
                f"{name} in the schema {names.schema!r} belongs to the role {owner!r}, and this is {me!r}: install as {owner} (SET "
                "ROLE); or, if it is not this package's, remove it, or name another schema in PGPUBSUB_SCHEMA."
            )


def _function_steps(connection: Connection, names: Names, installation: uuid.UUID) -> list[Step]:
    wanted = functions(names.schema, installation)
    signatures = [names.prefix + function.signature for function in wanted]
    comments = {
        row.signature: row.comment
        for row in connection.execute(
            text(
                "SELECT f AS signature, obj_description(to_regprocedure(f)::oid, 'pg_proc') AS comment "
                "FROM unnest(CAST(:signatures AS text[])) AS f WHERE to_regprocedure(f) IS NOT NULL"
            ),
            {"signatures": signatures},
        )
    }
    moved = f"{names.prefix}pgpubsub_installation()" in comments and installation != connection.execute(
        text(f"SELECT {names.prefix}pgpubsub_installation()")
    ).scalar()
    steps: list[Step] = []
    for function, signature in zip(wanted, signatures, strict=True):
        if signature not in comments or moved or comments[signature] != f"pgpubsub:{function.hash}":
            what = "is out of date" if signature in comments else "is missing"
            steps.append(
                Step(
                    what=f"the function {signature} {what}", statements=tuple(_function_statements(names, function))
                )
            )
    return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trigger:
    """A trigger of ours, as it is."""

    relation: int
    table: str
    """Qualified and quoted."""
    name: str
    comment: str
    function: str
    """Qualified and quoted, without arguments."""

    @property
    def drop(self) -> tuple[str, ...]:
        """The statements that remove it and, where no other trigger has it, its function."""
        return (
            f"DROP TRIGGER IF EXISTS {quote_identifier(self.name)} ON {self.table}",
            f"DO $pgpubsub$ BEGIN IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgfoid = to_regproc({quote_literal(self.function)})) "
            f"THEN DROP FUNCTION IF EXISTS {self.function}(); END IF; END $pgpubsub$",
        )


def _triggers(connection: Connection, names: Names) -> list[_Trigger]:
    """All triggers of ours: those whose function is. Not the copies that partitions have of their parent's."""
    rows = connection.execute(
        text(
            "SELECT t.tgrelid::bigint AS relation, format('%I.%I', n.nspname, c.relname) AS relation_name, t.tgname AS name, "
            "format('%I.%I', f.nspname, p.proname) AS function_name, obj_description(t.oid, 'pg_trigger') AS comment "
            "FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            "JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace f ON f.oid = p.pronamespace "
            "WHERE f.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND t.tgparentid = 0 AND NOT t.tgisinternal "
            "ORDER BY 2, 3"
        ),
        {"schema": names.schema},
    )
    return [
        _Trigger(
            relation=row.relation,
            table=row.relation_name,
            name=row.name,
            comment=row.comment or "",
            function=row.function_name,
        )
        for row in rows
    ]


def _trigger_steps(
    connection: Connection, names: Names, table: str, definitions: Sequence[TriggerDefinition]
) -> list[Step]:
    relation = _oid(connection, table)
    if relation is None:
        return [Step(what=f"the table {table} of a trigger channel does not exist")]
    existing = {trigger.name: trigger for trigger in _triggers(connection, names) if trigger.relation == relation}
    steps: list[Step] = []
    for definition in definitions:
        present = existing.get(definition.name)
        if present is not None and present.comment == COMMENT + definition.hash:
            continue
        what = "is missing" if present is None else "is out of date"
        steps.append(Step(what=f"the trigger {definition.name} on {table} {what}", statements=tuple(definition.create)))
    return steps


def _unwanted_triggers(connection: Connection, names: Names) -> list[Step]:
    """Triggers of ours that no registered channel wants."""
    wanted = {
        (_oid(connection, table), name)
        for table, definitions in _definitions(names, registered_channels()).items()
        for definition in definitions
        for name in definition.names
    }
    return [
        Step(what=f"the trigger {trigger.name} on {trigger.table} is not wanted any more", statements=trigger.drop)
        for trigger in _triggers(connection, names)
        if (trigger.relation, trigger.name) not in wanted
    ]


def _unused_functions(connection: Connection, names: Names) -> list[Step]:
    """Trigger functions of ours that no trigger calls and no registered channel wants: a table may go without us."""
    definitions = _definitions(names, registered_channels()).values()
    rows = connection.execute(
        text(
            "SELECT format('%I.%I()', n.nspname, p.proname) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
            "WHERE n.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND p.prorettype = 'trigger'::regtype "
            "AND p.proname <> ALL (CAST(:wanted AS text[])) AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgfoid = p.oid) "
            "ORDER BY 1"
        ),
        {"schema": names.schema, "wanted": [one.function for mine in definitions for one in mine]},
    )
    return [
        Step(what=f"the trigger function {function} is not used any more", statements=(f"DROP FUNCTION {function}",))
        for function in rows.scalars()
    ]


def _prune(connection: Connection, names: Names) -> list[str]:
    """Remove subscriptions and channels that are not registered, unless notifications wait for them."""
    channels = _select(None)
    rows = read_subscriptions(connection, names)
    kept = {row.id for mine in match(rows, _listeners(channels)).values() for row in mine}
    known = {name for channel in channels for name in (channel.name(),)}
    old = [row for row in rows if row.id not in kept]
    gone = [channel for channel in read_channels(connection, names) if channel.name not in known]
    if not old and not gone:
        return []
    # Whoever has read a subscription and may yet store for it ends first; then what is counted is all there is.
    execute_literally(connection, f"LOCK TABLE {names.subscription}, {names.channel} IN ACCESS EXCLUSIVE MODE")
    done: list[str] = []
    for row in old:
        stored = _count(connection, names, "subscription = :value", row.id)
        what = f"the subscription of {row.listener} to {row.channel}"
        if stored:
            done.append(f"kept {what}: {stored} notification(s) are stored for it")
        else:
            connection.execute(text(f"DELETE FROM {names.subscription} WHERE id = :id"), {"id": row.id})
            done.append(f"removed {what}")
    for channel in gone:
        stored = _count(connection, names, "subscription IS NULL AND channel = :value", channel.name)
        if stored:
            done.append(f"kept the channel {channel.name}: {stored} notification(s) without a listener are stored for it")
        else:
            connection.execute(text(f"DELETE FROM {names.channel} WHERE name = :name"), {"name": channel.name})
            done.append(f"removed the channel {channel.name}")
    return done


def _count(connection: Connection, names: Names, condition: str, value: Any) -> int:
    statement = text(f"SELECT count(*) FROM {names.notification} WHERE {condition}")
    return int(connection.execute(statement, {"value": value}).scalar_one())


def _oid(connection: Connection, qualified: str) -> int | None:
    found = connection.execute(text("SELECT to_regclass(:name)::oid::bigint"), {"name": qualified}).scalar()
    return None if found is None else int(found)


def _exists(connection: Connection, qualified: str) -> bool:
    return _oid(connection, qualified) is not None


# Doing it


def _execute(connection: Connection, steps: Sequence[Step]) -> list[str]:
    for step in steps:
        if not step.statements:
            raise PgPubSubError(f"install: {step.what}: create it first, with your migrations or create_all().")
        for statement in step.statements:
            execute_literally(connection, statement)
    return [step.what for step in steps]


class _Attempts:
    """Runs what locks tables: for a short while each time, until it succeeds or the time is up."""

    def __init__(self, bind: Engine | Connection, names: Names, lock_timeout: float) -> None:
        if not isinstance(bind, (Engine, Connection)):
            kind = type(bind).__name__
            hint = " (`await connection.run_sync(install)`)" if kind.startswith("Async") else ""
            raise BindError(f"install() was given a {kind}: expected an Engine, or a Connection with its transaction{hint}.")
        if isinstance(bind, Connection) and is_autocommit(bind):
            raise BindError("install() was given a Connection in AUTOCOMMIT: pass its engine, or one with a transaction.")
        if isinstance(lock_timeout, bool) or not isinstance(lock_timeout, (int, float)) or lock_timeout <= 0:
            raise PgPubSubError(f"lock_timeout is {lock_timeout!r}: expected a number of seconds above 0.")
        self._bind = bind
        self._names = names
        self._lock_timeout = lock_timeout

    def run(self, what: str, function: Callable[[Connection], Any]) -> Any:
        """Return what `function` does, within one transaction or savepoint."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                with self._transaction() as connection:
                    seconds = max(0.01, min(LOCK_ATTEMPT, deadline - time.monotonic()))
                    with self._prepared(connection, seconds):
                        return function(connection)
            except DBAPIError as exc:
                state = sqlstate_of(exc)
                # lock_not_available, deadlock_detected
                if state in ("55P03", "40P01"):
                    if time.monotonic() < deadline:
                        time.sleep(LOCK_PAUSE)
                        continue
                    raise PgPubSubError(
                        f"install waited {self._lock_timeout:g} s in vain for {what}: other transactions hold it. Try again, give "
                        "it longer (lock_timeout), or end the transaction that is open for so long (pg_stat_activity)."
                    ) from exc
                # insufficient_privilege
                if state == "42501":
                    raise PgPubSubError(
                        f"install: this database role lacks a right ({_first_line(exc)}): run it as the owner of {what}, or as a "
                        f"role that may create in the schema {self._names.schema!r}."
                    ) from exc
                raise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        if isinstance(self._bind, Connection):
            with self._bind.begin_nested():
                yield self._bind
        else:
            # READ COMMITTED: what another install has just committed is seen once its lock is ours.
            with self._bind.connect().execution_options(isolation_level="READ COMMITTED") as connection:
                with connection.begin():
                    yield connection

    @contextlib.contextmanager
    def _prepared(self, connection: Connection, seconds: float) -> Iterator[None]:
        before = connection.execute(
            text(
                "SELECT current_setting('lock_timeout'), set_config('lock_timeout', :milliseconds, true), "
                "pg_advisory_xact_lock(hashtextextended(:name, 0))"
            ),
            {"milliseconds": str(int(seconds * 1000)), "name": f"pgpubsub install {self._names.schema}"},
        ).one()[0]
        yield
        connection.execute(text("SELECT set_config('lock_timeout', :before, true)"), {"before": before})


def _grant(connection: Connection, role: str, *rights: str) -> None:
    if connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).scalar() is None:
        raise PgPubSubError(f"The database has no role {role!r}: create it first, or correct the name.")
    for right in rights:
        try:
            execute_literally(connection, f"GRANT {right} TO {quote_identifier(role)}")
        except DBAPIError as exc:
            if sqlstate_of(exc) in ("42883", "42P01", "3F000"):
                raise NotInstalledError(f"Nothing to grant yet ({_first_line(exc)}): run install first.") from exc
            raise


def _first_line(exc: DBAPIError) -> str:
    return str(exc.orig).strip().splitlines()[0]


# As a script


def _offline_functions(names: Names) -> str:
    """The functions, with the id that the installation has or is given by the script."""
    unknown = uuid.UUID(int=0)
    executed = "\n".join(
        f"    EXECUTE replace({_quoted(statement)}, '{unknown}', installation);"
        for function in functions(names.schema, unknown)
        for statement in _function_statements(names, function)
    )
    return _do(f"DECLARE\n    installation text := (SELECT id FROM {names.installation});\nBEGIN\n{executed}\nEND")


def _offline_subscription(change: Change, listener: Listener, names: Names) -> str:
    known = text_array({*listener.names})
    channels = text_array({listener.channel.name(), *listener.channel.aliases})
    operations = text_array(listener.operations)
    return _do(
        f"BEGIN\n    IF NOT EXISTS (SELECT FROM {names.subscription} s WHERE (s.channel || s.channel_aliases) && {channels}\n"
        f"        AND (s.listener || s.aliases) && {known}) THEN\n        {change.statement(names)};\n    END IF;\n"
        f"    UPDATE {names.subscription} SET operations = {operations}\n"
        f"        WHERE channel = {quote_literal(listener.channel.name())} AND listener = {quote_literal(listener.name)}\n"
        f"        AND NOT (operations @> {operations} AND operations <@ {operations});\nEND"
    )


def _offline_trigger(definition: TriggerDefinition) -> str:
    """A trigger, made only where it is missing or out of date: making one locks its table."""
    schema, table = definition.table
    qualified = f"{quote_identifier(schema)}." if schema else ""
    qualified += quote_identifier(table)
    executed = "\n".join(f"        EXECUTE {_quoted(statement)};" for statement in definition.create)
    return _do(
        f"BEGIN\n    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = {quote_literal(qualified)}::regclass\n"
        f"        AND t.tgname = {quote_literal(definition.name)}\n"
        f"        AND obj_description(t.oid, 'pg_trigger') = {quote_literal(COMMENT + definition.hash)}) THEN\n{executed}\n"
        "    END IF;\nEND"
    )


def _do(block: str) -> str:
    return f"DO {_quoted(block)}"


def _quoted(body: str) -> str:
    """Return text as a literal that reads as it is: in dollar quotes that it does not contain."""
    tag = "$pgpubsub$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"{tag}\n{body}\n{tag}"
