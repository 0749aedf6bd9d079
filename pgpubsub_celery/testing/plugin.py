"""pytest fixtures: a database for each test, a session that is rolled back, and `drain` on it.

Owns what pytest finds by its entry point `pgpubsub_celery`. Imports nothing but pytest before a fixture is used: a
suite that uses none pays nothing. Which server, which tables, and which application are fixtures to be overridden.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import URL
    from sqlalchemy.orm import Session

    from pgpubsub_celery.testing.databases import Databases

SERVER_URL = "PGPUBSUB_TEST_SERVER_URL"
"""Of the environment: a server to use instead of an embedded one."""


@pytest.fixture(scope="session")
def pgpubsub_server_url() -> Iterator[str]:
    """The URL of a database of a Postgres server, as a role that may create databases.

    Default: `PGPUBSUB_TEST_SERVER_URL`, else a server of this process's own, from the `[embedded]` extra. Override it
    to use another, such as pytest-postgresql's `postgresql_proc`.
    """
    given = os.environ.get(SERVER_URL)
    if given:
        yield given
        return
    from pgpubsub_celery.embedded import EmbeddedPostgres

    with EmbeddedPostgres(fsync=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def pgpubsub_prepare() -> Callable[[Engine], object]:
    """What makes an empty database one to test in. Override it where migrations do, or where there are more tables.

    Default: `create_all` for the metadata of all trigger channels' tables, and `install`.
    """
    from pgpubsub_celery.testing.databases import prepare

    return prepare


@pytest.fixture(scope="session")
def pgpubsub_databases(pgpubsub_server_url: str) -> Iterator[Databases]:
    """Makes and drops databases on the server."""
    from pgpubsub_celery.testing.databases import Databases

    databases = Databases(pgpubsub_server_url, worker=os.environ.get("PYTEST_XDIST_WORKER", "main"))
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def pgpubsub_template(pgpubsub_databases: Databases, pgpubsub_prepare: Callable[[Engine], object]) -> URL:
    """A prepared database that nobody connects to: tests get copies of it."""
    return pgpubsub_databases.prepared(pgpubsub_prepare)


@pytest.fixture
def pgpubsub_database(pgpubsub_databases: Databases, pgpubsub_template: URL) -> Iterator[str]:
    """The URL of a prepared database of the test's own, dropped after it: for tests that commit."""
    url = pgpubsub_databases.make(template=pgpubsub_template)
    yield url.render_as_string(hide_password=False)
    pgpubsub_databases.drop(url)


@pytest.fixture
def pgpubsub_engine(pgpubsub_database: str) -> Iterator[Engine]:
    """An engine on `pgpubsub_database`. `drain(pgpubsub_engine)` runs what has been committed."""
    from sqlalchemy import create_engine

    from pgpubsub_celery.settings import sync_url

    engine = create_engine(sync_url(pgpubsub_database))
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def pgpubsub_shared_database(pgpubsub_databases: Databases, pgpubsub_template: URL) -> str:
    """The URL of one prepared database for all tests that roll back. Override it to have them use another."""
    return pgpubsub_databases.make(template=pgpubsub_template).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def pgpubsub_shared_engine(pgpubsub_shared_database: str) -> Iterator[Engine]:
    """An engine on `pgpubsub_shared_database`."""
    from sqlalchemy import create_engine

    from pgpubsub_celery.settings import sync_url

    engine = create_engine(sync_url(pgpubsub_shared_database))
    yield engine
    engine.dispose()


@pytest.fixture
def pgpubsub_connection(pgpubsub_shared_engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction that is rolled back after the test, whatever was done with it."""
    with pgpubsub_shared_engine.connect() as connection:
        transaction = connection.begin()
        yield connection
        transaction.rollback()


@pytest.fixture
def pgpubsub_session(pgpubsub_connection: Connection) -> Iterator[Session]:
    """A session in that transaction. What commits it ends at a savepoint: the test's rollback takes it back."""
    from sqlalchemy.orm import Session

    with Session(pgpubsub_connection, join_transaction_mode="create_savepoint") as session:
        yield session


@pytest.fixture
def pgpubsub_app() -> Celery | None:
    """The Celery application whose tasks `pgpubsub_drain` runs; None is the current one. To be overridden."""
    return None


@pytest.fixture
def pgpubsub_drain(pgpubsub_session: Session, pgpubsub_app: Celery | None) -> Callable[..., Any]:
    """`drain` on `pgpubsub_session`, with all its options."""
    from pgpubsub_celery.testing import drain

    return functools.partial(drain, pgpubsub_session, app=pgpubsub_app)
