"""What all tests stand on: one Postgres and one Valkey for the run, and for each test a database of its own on both.

Owns the servers' and databases' lives. A server that cannot be started fails the tests that need it; nothing here
skips. PGPUBSUB_TEST_POSTGRES_BIN=/usr/lib/postgresql/15/bin runs the whole suite on another Postgres,
PGPUBSUB_TEST_DRIVER=psycopg with another driver.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import _state
from sqlalchemy import Engine, create_engine

from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey
from pgpubsub_celery.settings import sync_url

POSTGRES_BIN = "PGPUBSUB_TEST_POSTGRES_BIN"
DRIVER = "PGPUBSUB_TEST_DRIVER"
TEMPLATE = "pgpubsub_template"
BROKER_DATABASES = 4096
"""More than there are tests with a broker: what one test's late process still writes is not the next one's."""

_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Let psycopg 3 say nothing of what psycopg2 never mentions: pools that a test leaves to the garbage collector."""
    if os.environ.get(DRIVER) == "psycopg":
        config.addinivalue_line("filterwarnings", "ignore:.* was deleted while still open:ResourceWarning")


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_caller() -> Iterator[None]:
    """Take the developer's own settings, such as PGPUBSUB_DATABASE_URL or PGHOST, out of the tests' environment."""
    with pytest.MonkeyPatch.context() as environment:
        for name in list(os.environ):
            if name.startswith("PG") and not name.startswith("PGPUBSUB_TEST_"):
                environment.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Undo what applications and workers of a test change for the whole process: Celery's current app, log levels."""
    apps = _state._tls.current_app, _state.default_app
    loggers = [logging.getLogger(name) for name in ("", "celery", "pgpubsub_celery")]
    levels = [(logger.level, logger.disabled, logger.propagate) for logger in loggers]
    yield
    _state._tls.current_app, _state.default_app = apps
    for logger, (level, disabled, propagate) in zip(loggers, levels, strict=True):
        logger.setLevel(level)
        logger.disabled, logger.propagate = disabled, propagate


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running Postgres. Tests that stop or kill the server start their own."""
    with EmbeddedPostgres(
        bin_dir=os.environ.get(POSTGRES_BIN), fsync=False, options={"max_connections": "200", "log_lock_waits": "on"}
    ) as server:
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedValkey]:
    """A running Valkey. Tests that stop or kill the server start their own."""
    with EmbeddedValkey(options={"databases": str(BROKER_DATABASES)}) as server:
        yield server


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a fresh, empty database, which is dropped after the test, with whoever is connected to it."""
    with _database(postgres) as url:
        yield url


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The name of a database with this package's tables and functions, to be cloned: quicker than installing."""
    from pgpubsub_celery.migrations import install

    # Without the channels of test modules: their tables are not there.
    with _registries(empty=True), _engine(of_driver(postgres.create_database(TEMPLATE))) as engine:
        install(engine)
    return TEMPLATE


@pytest.fixture
def installed_url(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The URL of a fresh database with this package's tables and functions, dropped after the test."""
    with _database(postgres, template) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a fresh, empty database."""
    with _engine(database_url) as engine:
        yield engine


@pytest.fixture
def installed_engine(installed_url: str) -> Iterator[Engine]:
    """An engine on a fresh database with this package's tables and functions."""
    with _engine(installed_url) as engine:
        yield engine


@pytest.fixture
def broker_url(valkey: EmbeddedValkey) -> Iterator[str]:
    """The URL of an empty Valkey database that no other test uses."""
    url = valkey.url_of(next(_numbers) % BROKER_DATABASES)
    yield url
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushdb()


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget after the test which channels and listeners it declared."""
    with _registries():
        yield


@pytest.fixture
def nothing_declared() -> Iterator[None]:
    """As if no other test had declared a channel, for tests of all that are registered; but this package's own are."""
    from pgpubsub_celery import channels, listeners
    from pgpubsub_celery.emit import EnqueuedTask

    own = {key: channel for key, channel in channels._registry.items() if channel is EnqueuedTask}
    its = {key: listener for key, listener in listeners._registry.items() if listener.channel is EnqueuedTask}
    with _registries(empty=True):
        channels._registry.update(own)
        listeners._registry.update(its)
        yield


@contextlib.contextmanager
def _registries(*, empty: bool = False) -> Iterator[None]:
    from pgpubsub_celery import channels, listeners

    # Nobody else may look there.
    registries: list[dict[Any, Any]] = [channels._registry, listeners._registry]
    before = [known.copy() for known in registries]
    try:
        if empty:
            for known in registries:
                known.clear()
        yield
    finally:
        for known, content in zip(registries, before, strict=True):
            known.clear()
            known.update(content)


def of_driver(url: str) -> str:
    """Return a URL for the driver that the tests are run with."""
    driver = os.environ.get(DRIVER)
    return url if driver is None else url.replace("postgresql://", f"postgresql+{driver}://", 1)


def libpq_url(url: str) -> str:
    """Return a URL as libpq, and so a driver's own `connect`, understands it."""
    return sync_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextlib.contextmanager
def _database(postgres: EmbeddedPostgres, template: str | None = None) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    try:
        yield of_driver(postgres.create_database(name, template=template))
    finally:
        postgres.drop_database(name)


@contextlib.contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = create_engine(sync_url(url))
    try:
        yield engine
    finally:
        engine.dispose()
