"""Databases for tests: prepared once, cloned for each test that commits.

Owns the making, cloning and dropping of databases on a server that tests may do so on, whoever's it is. Never touches a
database that it has not made.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from pgpubsub_celery.channels import TriggerChannel, registered_channels
from pgpubsub_celery.migrations import install
from pgpubsub_celery.schema import quote_identifier
from pgpubsub_celery.settings import sync_url


class Databases:
    """The databases of one test process on one server."""

    def __init__(self, server_url: str, *, worker: str = "main") -> None:
        """`server_url`: of any database of the server, as a role that may create others. `worker` names this process.

        The names of its databases are its own: several processes, and several runs, may share the server.
        """
        self._server = sync_url(server_url)
        self._prefix = f"pgpubsub_test_{worker}_{os.getpid()}"
        self._numbers = itertools.count(1)
        self._made: list[str] = []

    def make(self, *, template: URL | None = None) -> URL:
        """Create a database, empty or as a copy of one that nobody is connected to; return its URL."""
        name = f"{self._prefix}_{next(self._numbers)}"
        copied = "" if template is None else f" TEMPLATE {quote_identifier(str(template.database))}"
        self._execute(f"CREATE DATABASE {quote_identifier(name)}{copied}")
        self._made.append(name)
        return self._server.set(database=name)

    def drop(self, url: URL) -> None:
        """Drop a database that was made here, and whoever is connected to it."""
        name = str(url.database)
        self._made.remove(name)
        self._execute(f"DROP DATABASE IF EXISTS {quote_identifier(name)} WITH (FORCE)")

    def close(self) -> None:
        """Drop all that are left."""
        for name in list(self._made):
            self.drop(self._server.set(database=name))

    def prepared(self, prepare: Callable[[Engine], object]) -> URL:
        """Return a database that `prepare` has made its tables in, to be a template."""
        url = self.make()
        engine = create_engine(url, poolclass=NullPool)
        try:
            prepare(engine)
        finally:
            engine.dispose()
        return url

    def _execute(self, statement: str) -> None:
        engine = create_engine(self._server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement.replace(":", "\\:")))
        finally:
            engine.dispose()


def prepare(engine: Engine) -> None:
    """Create the tables of the declared trigger channels, with all of their metadata, and what `install` makes."""
    for metadata in {_metadata_of(channel) for channel in registered_channels() if issubclass(channel, TriggerChannel)}:
        metadata.create_all(engine)
    install(engine)


def _metadata_of(channel: type[TriggerChannel[Any]]) -> MetaData:
    model: Any = channel.model
    metadata: MetaData = getattr(model, "__table__", model).metadata
    return metadata
