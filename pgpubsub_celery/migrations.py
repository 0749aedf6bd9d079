"""Installing, upgrading, comparing and removing what this package needs in a database.

Owns what users call for that, and the order in which it is done. What differs is `drift`'s and `trigger_drift`'s, how
long to wait for a table `attempts`'. Never removes a stored notification unasked, and leaves alone what others made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, event, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import drift, trigger_drift
from pgpubsub_celery.attempts import Attempts, first_line
from pgpubsub_celery.binds import is_autocommit
from pgpubsub_celery.channels import Channel, TriggerChannel, registered_channels
from pgpubsub_celery.drivers import sqlstate
from pgpubsub_celery.errors import NotInstalledError, PgPubSubError
from pgpubsub_celery.schema import EMIT_FUNCTIONS, Names, quote_identifier
from pgpubsub_celery.schemas import current_schema
from pgpubsub_celery.script import install_script
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings
from pgpubsub_celery.subscriptions import execute_literally, match, read_channels, read_subscriptions
from pgpubsub_celery.subscriptions import register as register_subscriptions
from pgpubsub_celery.trigger_drift import Step
from pgpubsub_celery.triggers import TriggerDefinition

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

_OWN = "this package's own tables"


def install(
    bind: Engine | Connection,
    *,
    channels: Sequence[type[Channel] | str] | None = None,
    prune: bool = False,
    lock_timeout: float = 10.0,
    schema: str | None = None,
    database: str = DEFAULT_DATABASE,
) -> list[str]:
    """Make the database what this release needs: tables, functions, channels, subscriptions and triggers.

    Idempotent, and safe beside another install and beside writers. Where all is in place it locks no table. With a
    Connection it works in the caller's transaction, each step in a savepoint, and the caller commits; with an Engine,
    each table's triggers are a transaction of their own, so that never two of your tables are locked at once.

    Args:
        bind: an Engine or Connection of a role that may create in the schema and owns the tables of trigger channels.
        channels: only these, as classes or module paths. Default: all that are registered and in the `database`.
        prune: also remove what no registered listener or channel wants any more; never what notifications wait for.
        lock_timeout: seconds to keep trying for the lock on a table that others use.
        schema: of this package's tables and functions. Default: the setting `schema`.
        database: the alias of this database, where there are several (the setting `databases`).

    Returns:
        What was missing or different, one line each; what could not be removed says so.

    Raises:
        PgPubSubError: a lock or right is not to be had, a table of a channel does not exist, or the database is of a
            newer release; says which and what to do.
    """
    names = _names(schema, database)
    selected = drift.select(channels, database)
    attempts = Attempts(bind, "install", names.schema, lock_timeout)
    done = attempts.run(_OWN, _install_own, names, selected)
    present = attempts.run(_OWN, drift.with_triggers, names, selected)
    for table, wanted in trigger_drift.definitions(names, present).items():
        done += attempts.run(f"the table {table}", _install_triggers, names, table, wanted)
    if prune:
        # Triggers first: what they store is for the subscriptions.
        for step in attempts.run(_OWN, trigger_drift.unwanted_triggers, names, database):
            done += attempts.run(step.what, _execute, [step])
        done += attempts.run(_OWN, _remove_unused_functions, names, database)
        done += attempts.run(_OWN, _prune, names, database)
    return done


def check(
    connection: Connection,
    *,
    channels: Sequence[type[Channel] | str] | None = None,
    schema: str | None = None,
    database: str = DEFAULT_DATABASE,
) -> list[str]:
    """Return how the database differs from what this release needs, one line each; an empty list when it does not.

    Only reads.

    Raises:
        PgPubSubError: the database is of a newer release, or another role's.
    """
    names = _names(schema, database)
    selected = drift.select(channels, database)
    steps = drift.own_steps(connection, names, selected)
    present = drift.with_triggers(connection, names, selected)
    for table, wanted in trigger_drift.definitions(names, present).items():
        steps += trigger_drift.trigger_steps(connection, names, table, wanted)
    if channels is None:
        steps += trigger_drift.unwanted_triggers(connection, names, database)
        steps += trigger_drift.unused_functions(connection, names, database)
    return [step.what for step in steps]


def install_sql(
    *,
    channels: Sequence[type[Channel] | str] | None = None,
    schema: str | None = None,
    database: str = DEFAULT_DATABASE,
) -> str:
    """Return what `install` does as a script for somebody else to run, idempotent, too.

    Renamed channels and listeners are left to the first bridge of the release, which renames them.
    """
    return install_script(_names(schema, database), drift.select(channels, database))


def uninstall(
    bind: Engine | Connection,
    *,
    discard_stored: bool = False,
    lock_timeout: float = 10.0,
    schema: str | None = None,
    database: str = DEFAULT_DATABASE,
) -> list[str]:
    """Remove our triggers, functions and tables; the schema and everything of others' stays.

    With an Engine each trigger goes in a transaction of its own, the rest in the last.

    Args:
        bind: an Engine, or a Connection whose transaction the caller commits.
        discard_stored: also when notifications are stored, which are lost then.
        lock_timeout: seconds to keep trying for the lock on a table that others use.
        schema: of this package's tables and functions. Default: the setting `schema`.
        database: the alias of this database, where there are several.

    Returns:
        What was removed, one line each.

    Raises:
        PgPubSubError: notifications are stored, and how many; or a lock or right is not to be had.
    """
    names = _names(schema, database)
    attempts = Attempts(bind, "uninstall", names.schema, lock_timeout)
    if not discard_stored:
        attempts.run(_OWN, _refuse_stored, names)
    done: list[str] = []
    for trigger in attempts.run(_OWN, trigger_drift.triggers, names):
        step = Step(what=f"removed the trigger {trigger.name} on {trigger.table}", statements=trigger.drop)
        done += attempts.run(f"the table {trigger.table}", _execute, [step])
    return done + attempts.run(_OWN, _remove_own, names, discard_stored)


def install_on_create_all(target: MetaData, *, schema: str | None = None, database: str = DEFAULT_DATABASE) -> None:
    """Let `target.create_all()` also install, and `target.drop_all()` first remove our triggers of what it drops.

    Triggers are made on tables that exist then: `create_all(tables=[…])` leaves the others for later. Calling this
    twice does no harm.
    """
    if "pgpubsub_install" in target.info:
        return
    target.info["pgpubsub_install"] = schema

    @event.listens_for(target, "after_create")
    def after_create(_: MetaData, connection: Any, **__: Any) -> None:
        if not isinstance(connection, Connection):
            return  # a mock, which prints
        names = _names(schema, database)
        present = [channel for channel in registered_channels(database) if _has_tables(connection, names, channel)]
        bind = connection.engine if is_autocommit(connection) else connection
        install(bind, channels=present, schema=names.schema)

    @event.listens_for(target, "before_drop")
    def before_drop(_: MetaData, connection: Any, tables: Sequence[Any] = (), **__: Any) -> None:
        if not isinstance(connection, Connection):
            return
        dropped = {
            trigger_drift.relation_of(connection, trigger_drift.qualified(table.schema, table.name)) for table in tables
        }
        for trigger in trigger_drift.triggers(connection, _names(schema, database)):
            if trigger.relation in dropped:
                _execute(connection, [Step(what="", statements=trigger.drop)])


def grant_emit(connection: Connection, role: str, schema: str | None = None) -> None:
    """Let a role emit with `notify()`, `enqueue()` and `pgpubsub_notify`. Uses the caller's transaction.

    To change a table with triggers needs no grant. Who may emit may have any Celery task of the application run, by
    `enqueue`.
    """
    names = _names(schema)
    _grant(
        connection,
        role,
        f"USAGE ON SCHEMA {quote_identifier(names.schema)}",
        *(f"EXECUTE ON FUNCTION {names.prefix}{signature}" for signature in EMIT_FUNCTIONS),
    )


def grant_run(connection: Connection, role: str, schema: str | None = None) -> None:
    """Let a role run bridges and workers, and emit. Uses the caller's transaction."""
    names = _names(schema)
    grant_emit(connection, role, schema)
    _grant(
        connection,
        role,
        f"SELECT, INSERT, UPDATE, DELETE ON {names.notification}, {names.run_time}",
        f"SELECT, INSERT, UPDATE ON {names.subscription}, {names.channel}",
        f"SELECT ON {names.installation}",
        f"EXECUTE ON FUNCTION {names.prefix}pgpubsub_ring(text), {names.prefix}pgpubsub_db_version()",
    )


def _names(schema: str | None, database: str = DEFAULT_DATABASE) -> Names:
    return Names(current_schema(database) if schema is None else Settings(schema=schema).schema)


def _has_tables(connection: Connection, names: Names, channel: type[Channel]) -> bool:
    """Whether all tables that the channel's triggers are for exist."""
    if not issubclass(channel, TriggerChannel):
        return True
    return all(
        trigger_drift.relation_of(connection, table) is not None
        for table in trigger_drift.definitions(names, [channel])
    )


# Each of these is done in one transaction or savepoint


def _execute(connection: Connection, steps: Sequence[Step]) -> list[str]:
    for step in steps:
        if not step.statements:
            raise PgPubSubError(f"install: {step.what}: create it first, with your migrations or create_all().")
        for statement in step.statements:
            execute_literally(connection, statement)
    return [step.what for step in steps]


def _install_own(connection: Connection, names: Names, channels: Sequence[type[Channel]]) -> list[str]:
    return _execute(connection, drift.own_steps(connection, names, channels))


def _install_triggers(
    connection: Connection, names: Names, table: str, wanted: Sequence[TriggerDefinition]
) -> list[str]:
    return _execute(connection, trigger_drift.trigger_steps(connection, names, table, wanted))


def _remove_unused_functions(connection: Connection, names: Names, database: str) -> list[str]:
    return _execute(connection, trigger_drift.unused_functions(connection, names, database))


def _prune(connection: Connection, names: Names, database: str) -> list[str]:
    """Remove subscriptions and channels that are not registered, unless notifications wait for them."""
    channels = drift.select(None, database)
    rows = read_subscriptions(connection, names)
    wanted = {row.id for mine in match(rows, drift.listeners(channels)).values() for row in mine}
    old = [row for row in rows if row.id not in wanted]
    registered = {channel.name() for channel in channels}
    gone = [channel.name for channel in read_channels(connection, names) if channel.name not in registered]
    if not old and not gone:
        return []
    # Whoever has read a subscription and may yet store for it ends first; then what is counted is all there is.
    execute_literally(connection, f"LOCK TABLE {names.subscription}, {names.channel} IN ACCESS EXCLUSIVE MODE")
    done: list[str] = []
    for row in old:
        what = f"the subscription of {row.listener} to {row.channel}"
        stored = _count(connection, names, "subscription = :value", row.id)
        if stored:
            done.append(f"kept {what}: {stored} notification(s) are stored for it")
        else:
            connection.execute(text(f"DELETE FROM {names.subscription} WHERE id = :id"), {"id": row.id})
            done.append(f"removed {what}")
    for name in gone:
        stored = _count(connection, names, "subscription IS NULL AND channel = :value", name)
        if stored:
            done.append(f"kept the channel {name}: {stored} notification(s) without a listener are stored for it")
        else:
            connection.execute(text(f"DELETE FROM {names.channel} WHERE name = :name"), {"name": name})
            done.append(f"removed the channel {name}")
    return done


def _count(connection: Connection, names: Names, condition: str, value: Any) -> int:
    statement = text(f"SELECT count(*) FROM {names.notification} WHERE {condition}")
    return int(connection.execute(statement, {"value": value}).scalar_one())


def _refuse_stored(connection: Connection, names: Names) -> None:
    if trigger_drift.relation_of(connection, names.notification) is None:
        return
    count = connection.execute(text(f"SELECT count(*) FROM {names.notification}")).scalar_one()
    if count:
        raise PgPubSubError(
            f"uninstall: {count} notification(s) are stored, and would be lost: let a bridge finish them (`listen "
            "--recover`), or pass discard_stored=True (`uninstall --discard-stored`)."
        )


def _remove_own(connection: Connection, names: Names, discard_stored: bool) -> list[str]:
    tables = [trigger_drift.qualified(table.schema, table.name) for table in drift.tables(names.schema)]
    present = [table for table in reversed(tables) if trigger_drift.relation_of(connection, table) is not None]
    for table in present:
        execute_literally(connection, f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    if not discard_stored:
        _refuse_stored(connection, names)  # again: nobody can add any more
    functions = connection.execute(
        text(
            "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
            "WHERE n.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND p.prokind = 'f' ORDER BY p.oid DESC"
        ),
        {"schema": names.schema},
    )
    steps = [
        Step(what=f"removed the function {signature}", statements=(f"DROP FUNCTION {signature}",))
        for signature in functions.scalars()
    ]
    steps += [Step(what=f"removed the table {table}", statements=(f"DROP TABLE {table}",)) for table in present]
    return _execute(connection, steps)


def _grant(connection: Connection, role: str, *rights: str) -> None:
    if connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).scalar() is None:
        raise PgPubSubError(f"The database has no role {role!r}: create it first, or correct the name.")
    for right in rights:
        try:
            execute_literally(connection, f"GRANT {right} TO {quote_identifier(role)}")
        except DBAPIError as exc:
            # undefined function, table, schema
            if sqlstate(exc) in ("42883", "42P01", "3F000"):
                raise NotInstalledError(
                    f"There is nothing to grant yet ({first_line(exc)}): run install first."
                ) from exc
            raise
