"""What exists in the database: installing, upgrading, comparing and removing it.

Owns every DDL statement: tables, functions, triggers, grants, and the subscriptions that say which listeners a channel has.
Never runs at import or by itself, never removes a stored notification unasked, and leaves what others made alone.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from sqlalchemy import Connection, Engine, MetaData, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from pgpubsub_celery import models
from pgpubsub_celery.errors import BindError, PgPubSubError
from pgpubsub_celery.schema import VERSION, Names, functions, quote_identifier
from pgpubsub_celery.settings import Settings

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


def install(
    bind: Engine | Connection,
    *,
    lock_timeout: float = 10.0,
    schema: str | None = None,
) -> None:
    """Create or upgrade what this package needs in the database; does nothing where all is in place."""
    names = Names(Settings.load(schema=schema).schema)
    with _transaction(bind, lock_timeout) as connection:
        _lock(connection, names)
        _execute(connection, f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(names.schema)}")
        for table in _tables(names.schema).sorted_tables:
            qualified = names.prefix + quote_identifier(table.name)
            if connection.execute(text("SELECT to_regclass(:name)"), {"name": qualified}).scalar() is None:
                for statement in (CreateTable(table), *(CreateIndex(index) for index in sorted(table.indexes, key=str))):
                    _execute(connection, str(statement.compile(dialect=_DIALECT)))
        row = connection.execute(text(f"SELECT id, version FROM {names.installation}")).first()
        if row is not None and row.version > VERSION:
            raise PgPubSubError(
                f"The database has version {row.version} of the schema, this release has {VERSION}: "
                "a downgrade is not possible; upgrade pgpubsub-celery."
            )
        installation = uuid.uuid4() if row is None else row.id
        if row is None:
            connection.execute(
                text(f"INSERT INTO {names.installation} (id, version) VALUES (:id, :version)"),
                {"id": installation, "version": VERSION},
            )
        for function in functions(names.schema, installation):
            _execute(connection, function.create)
            if not function.public:
                _execute(connection, f"REVOKE ALL ON FUNCTION {names.prefix}{function.signature} FROM PUBLIC")


def _tables(schema: str) -> MetaData:
    copy = MetaData()
    for table in models.metadata.sorted_tables:
        table.to_metadata(copy, schema=schema)
    return copy


@contextlib.contextmanager
def _transaction(bind: Engine | Connection, lock_timeout: float) -> Iterator[Connection]:
    if isinstance(bind, Engine):
        with bind.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
            yield connection
        return
    if not isinstance(bind, Connection):
        raise BindError(f"install() was given a {type(bind).__name__}: give it an Engine, or a Connection with its transaction.")
    yield bind


def _lock(connection: Connection, names: Names) -> None:
    # Two installs at once: the second finds everything in place.
    connection.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": f"pgpubsub install {names.schema}"}
    )


def _execute(connection: Connection, sql: str) -> None:
    # Every colon is literal, and each driver's percent sign is SQLAlchemy's business.
    connection.execute(text(sql.replace(":", "\\:")))
