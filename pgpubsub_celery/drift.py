"""How a database differs from what this release needs, and the statements that make each difference go away.

Owns the comparison for `install`, which executes it, and `check`, which tells it: tables, functions, channels,
subscriptions. Triggers are `trigger_drift`'s. Reads the catalog, which locks nothing of the users', and executes
nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, Index, MetaData, Table, text
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.schema import CreateIndex, CreateTable

from pgpubsub_celery import models
from pgpubsub_celery.channels import Channel, registered_channels, select_channels
from pgpubsub_celery.emit import ENQUEUE_LISTENER, EnqueuedTask
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.listeners import Listener, listeners_of
from pgpubsub_celery.schema import VERSION, Function, Names, functions, quote_identifier
from pgpubsub_celery.settings import DEFAULT_DATABASE
from pgpubsub_celery.subscriptions import (
    ChannelRow,
    Row,
    changes,
    channel_statement,
    describe,
    read_channels,
    read_subscriptions,
    wanted_channel,
)
from pgpubsub_celery.trigger_drift import Step, definitions, qualified, relation_of, trigger_steps
from pgpubsub_celery.upgrades import pending

# Colons and percent signs are literal in what it compiles.
_DIALECT = PGDialect(paramstyle="named")  # type: ignore[no-untyped-call]


# What is wanted


def select(channels: Sequence[type[Channel] | str] | None, database: str = DEFAULT_DATABASE) -> list[type[Channel]]:
    """Return the channels to install, given as classes or paths, with the one of `enqueue`; None for the database's."""
    if channels is None:
        selected = registered_channels(database)
    else:
        selected = []
        for given in channels:
            selected += select_channels([given]) if isinstance(given, str) else [given]
    return [*dict.fromkeys([*selected, EnqueuedTask])]


def listeners(channels: Sequence[type[Channel]]) -> list[Listener]:
    """Return the listeners of channels, and the bridge's own of `enqueue`."""
    found = [listener for channel in channels if channel is not EnqueuedTask for listener in listeners_of(channel)]
    return [*found, *([ENQUEUE_LISTENER] if EnqueuedTask in channels else [])]


def with_triggers(connection: Connection, names: Names, channels: Sequence[type[Channel]]) -> list[type[Channel]]:
    """Return the channels without those that a newer release has renamed.

    A process of the older release that installs late would otherwise have their tables emit under both names.
    """
    rows = known_channels(connection, names)
    return [
        channel
        for channel in channels
        if not any(channel.name() in row.aliases and row.name not in channel.aliases for row in rows)
    ]


def tables(schema: str) -> list[Table]:
    """Return this package's tables, in `schema`, in the order to create them."""
    copy = MetaData()
    for table in models.metadata.sorted_tables:
        table.to_metadata(copy, schema=schema)
    return copy.sorted_tables


def table_statements(table: Table) -> list[str]:
    """Return the DDL of a table and its indexes; does nothing where they exist."""
    indexes = sorted(table.indexes, key=lambda index: str(index.name))
    statements = [str(CreateTable(table, if_not_exists=True).compile(dialect=_DIALECT)).strip()]
    statements += [_index_statement(index) for index in indexes]
    if table.name == models.Notification.__tablename__:
        statements.append(_storage_statement(table, models.STORAGE_PARAMETERS))
    return statements


def _index_statement(index: Index) -> str:
    return str(CreateIndex(index, if_not_exists=True).compile(dialect=_DIALECT)).strip()


def _storage_statement(table: Table, parameters: Mapping[str, str]) -> str:
    settings = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    return f"ALTER TABLE {qualified(table.schema, table.name)} SET ({settings})"


def function_statements(names: Names, function: Function) -> list[str]:
    """Return the DDL of a function; keeps the grants that it has."""
    signature = f"{names.prefix}{function.signature}"
    revoke = [] if function.public else [f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC"]
    return [function.create, *revoke, f"COMMENT ON FUNCTION {signature} IS 'pgpubsub:{function.hash}'"]


# The difference


def own_steps(connection: Connection, names: Names, channels: Sequence[type[Channel]]) -> list[Step]:
    """Return what differs, but for triggers.

    Raises:
        PgPubSubError: the database is of a newer release, or has objects with our names that are not ours.
    """
    steps = own_objects(connection, names)
    known = {row.name: row for row in known_channels(connection, names)}
    for wanted in map(wanted_channel, channels):
        if known.get(wanted.name) != wanted:
            what = "is missing" if wanted.name not in known else "is out of date"
            steps.append(Step(what=f"the channel {wanted.name} {what}", statements=(channel_statement(wanted, names),)))
    rows = known_subscriptions(connection, names)
    for change in changes(rows, listeners(channels), exact=True):
        steps.append(Step(what=describe(change), statements=(change.statement(names),)))
    return steps


def known_channels(connection: Connection, names: Names) -> list[ChannelRow]:
    """Return the channels that are stored; none where there is no table of them."""
    return [] if relation_of(connection, names.channel) is None else read_channels(connection, names)


def known_subscriptions(connection: Connection, names: Names) -> list[Row]:
    """Return the subscriptions that are stored; none where there is no table of them."""
    return [] if relation_of(connection, names.subscription) is None else read_subscriptions(connection, names)


def own_objects(connection: Connection, names: Names) -> list[Step]:
    """Return what differs of the schema, tables and functions.

    Raises:
        PgPubSubError: as `own_steps`.
    """
    schema = quote_identifier(names.schema)
    steps: list[Step] = []
    if connection.execute(text("SELECT to_regnamespace(:schema)"), {"schema": schema}).scalar() is None:
        steps.append(Step(what=f"the schema {names.schema} is missing", statements=(f"CREATE SCHEMA {schema}",)))
    _refuse_others_objects(connection, names)
    installation, version, version_steps = _installation(connection, names)
    # First what an older version lacks: the rest may be about that.
    upgrades = [] if version is None else upgrade_steps(names, version)
    steps += upgrades + _table_steps(connection, names, whole=not upgrades) + version_steps
    return steps + _function_steps(connection, names, installation)


def trigger_differences(connection: Connection, names: Names, channels: Sequence[type[Channel]]) -> list[str]:
    """Return which triggers of these channels are not what this release needs, one line each. Only reads."""
    found: list[str] = []
    for table, wanted in definitions(names, with_triggers(connection, names, channels)).items():
        found += [step.what for step in trigger_steps(connection, names, table, wanted)]
    return found


def key_differences(connection: Connection, names: Names, channels: Sequence[type[Channel]]) -> list[str]:
    """Return which of these channels' keys are not what emit makes of their messages, one line each. Only reads."""
    known = {row.name: row for row in known_channels(connection, names)}
    found: list[str] = []
    for wanted in map(wanted_channel, channels):
        row = known.get(wanted.name)
        if row is not None and (row.ordering_key, row.unique_key) != (wanted.ordering_key, wanted.unique_key):
            found.append(f"the keys of the channel {wanted.name} are out of date")
    return found


def upgrade_steps(names: Names, version: int) -> list[Step]:
    """Return what the tables of an older version lack, a step for each version between."""
    return [
        Step(what=f"version {one.to} of the schema: {one.what}", statements=tuple(one.up(names)))
        for one in pending(version)
    ]


def _table_steps(connection: Connection, names: Names, *, whole: bool) -> list[Step]:
    """Return which tables are missing. Those that exist must be `whole`, unless they are being upgraded."""
    steps: list[Step] = []
    for table in tables(names.schema):
        name = qualified(table.schema, table.name)
        if relation_of(connection, name) is None:
            steps.append(Step(what=f"the table {name} is missing", statements=tuple(table_statements(table))))
            continue
        columns = connection.execute(
            text("SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:name) AND NOT attisdropped"),
            {"name": name},
        )
        lacking = {column.name for column in table.columns} - set(columns.scalars())
        if lacking and whole:
            raise PgPubSubError(
                f"The table {name} exists and has no column {', '.join(sorted(lacking))}: it is not this package's, or "
                "of an unreleased version. Rename it, or name another schema in PGPUBSUB_SCHEMA or pgpubsub_schema."
            )
        if whole:
            steps += _index_steps(connection, table)
        if table.name == models.Notification.__tablename__:
            steps += _storage_steps(connection, table)
    return steps


def _index_steps(connection: Connection, table: Table) -> list[Step]:
    """Of a table that exists. Without the index, a claim behind a backlog takes seconds."""
    name = qualified(table.schema, table.name)
    found = connection.execute(
        text(
            "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "WHERE i.indrelid = to_regclass(:name) AND i.indisvalid"
        ),
        {"name": name},
    )
    present = set(found.scalars())
    return [
        Step(what=f"the index {index.name} on {name} is missing", statements=(_index_statement(index),))
        for index in sorted(table.indexes, key=lambda index: str(index.name))
        if index.name not in present
    ]


def _storage_steps(connection: Connection, table: Table) -> list[Step]:
    """Tables made by other means, such as Alembic's, lack them. What somebody has set otherwise stays."""
    name = qualified(table.schema, table.name)
    found = connection.execute(
        text("SELECT split_part(unnest(reloptions), '=', 1) FROM pg_class WHERE oid = to_regclass(:name)"),
        {"name": name},
    )
    present = set(found.scalars())
    lacking = {key: value for key, value in models.STORAGE_PARAMETERS.items() if key not in present}
    if not lacking:
        return []
    what = f"the table {name} lacks settings of a queue ({', '.join(lacking)})"
    return [Step(what=what, statements=(_storage_statement(table, lacking),))]


def _refuse_others_objects(connection: Connection, names: Names) -> None:
    """Refuse to build upon objects with our names of another role's: our functions would run what it has put there."""
    found = connection.execute(
        text(
            "SELECT relname AS name, pg_get_userbyid(relowner) AS owner, current_user AS me FROM pg_class "
            "WHERE relnamespace = to_regnamespace(:schema) AND relname = ANY (CAST(:tables AS text[])) "
            "UNION ALL SELECT proname, pg_get_userbyid(proowner), current_user FROM pg_proc "
            "WHERE pronamespace = to_regnamespace(:schema) AND proname LIKE 'pgpubsub\\_%'"
        ),
        {
            "schema": quote_identifier(names.schema),
            "tables": [table.name for table in models.metadata.sorted_tables],
        },
    )
    for name, owner, me in found:
        if owner != me:
            raise PgPubSubError(
                f"{name} in the schema {names.schema!r} belongs to the role {owner!r}, and this is {me!r}: install as "
                f"{owner} (SET ROLE); or, if it is not this package's, remove it, or name another schema in "
                "PGPUBSUB_SCHEMA or pgpubsub_schema."
            )


def _installation(connection: Connection, names: Names) -> tuple[uuid.UUID, int | None, list[Step]]:
    """Return the installation's id, which it may yet have to be given, its version, and what differs of both."""
    row = None
    if relation_of(connection, names.installation) is not None:
        row = connection.execute(text(f"SELECT id, version FROM {names.installation}")).first()
    if row is None:
        id = uuid.uuid4()
        insert = f"INSERT INTO {names.installation} (id, version) VALUES ('{id}', {VERSION})"
        return id, None, [Step(what="the installation has no id", statements=(insert,))]
    if row.version > VERSION:
        raise PgPubSubError(
            f"The database has version {row.version} of the schema, this release has {VERSION}: a downgrade is not "
            "possible; use the release that installed it, or a newer one."
        )
    if row.version == VERSION:
        return row.id, row.version, []
    update = f"UPDATE {names.installation} SET version = {VERSION}"
    what = f"the schema has version {row.version}, this release needs {VERSION}"
    return row.id, row.version, [Step(what=what, statements=(update,))]


def _function_steps(connection: Connection, names: Names, installation: uuid.UUID) -> list[Step]:
    wanted = functions(names.schema, installation)
    signatures = [names.prefix + function.signature for function in wanted]
    rows = connection.execute(
        text(
            "SELECT f AS signature, obj_description(p.oid, 'pg_proc') AS comment, p.prosrc AS source "
            "FROM unnest(CAST(:signatures AS text[])) AS f JOIN pg_proc p ON p.oid = to_regprocedure(f)"
        ),
        {"signatures": signatures},
    )
    present = {row.signature: row for row in rows}
    own_id = f"{names.prefix}pgpubsub_installation()"
    # Its functions know the id: one that was changed since has not reached them.
    changed = own_id in present and connection.execute(text(f"SELECT {own_id}")).scalar() != installation
    steps: list[Step] = []
    for function, signature in zip(wanted, signatures, strict=True):
        what = None
        if signature not in present:
            what = "is missing"
        elif changed or present[signature].comment != f"pgpubsub:{function.hash}":
            what = "is out of date"
        elif function.source is not None and present[signature].source != function.source:
            what = "has been edited"
        if what is not None:
            statements = tuple(function_statements(names, function))
            steps.append(Step(what=f"the function {signature} {what}", statements=statements))
    return steps
