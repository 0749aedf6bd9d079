"""An engine inside somebody else's transaction: what it calls transactions are savepoints of that one.

Owns what stands between a worker's statements and the connection of a test whose transaction is open: everything
happens on that connection, sees what it sees, and goes when the test rolls it back. The worker's own guard stands on
top, so that what a listener may do with its `session`, and what is refused, is what it is in a worker. Never ends the
test's transaction and never closes its connection.
"""

from __future__ import annotations

import contextlib
import copy
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import StaticPool

from pgpubsub_celery.roundtrips import autocommitting
from pgpubsub_celery.runtime import Heartbeat, Runtime
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.transactions import guarding


class EngineRuntime(Runtime):
    """The runtime of an engine that is given, whose transactions are real."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        super().__init__(settings)
        self._engine = engine
        self._guard = guarding(engine)
        self._autocommit = autocommitting(engine)
        self.heartbeat = _NoHeartbeat(self)


class NestedRuntime(EngineRuntime):
    """The runtime of a connection whose transaction is the caller's."""

    def __init__(self, settings: Settings, connection: Connection) -> None:
        engine = nested_engine(connection)
        super().__init__(settings, engine)
        # A guard begins transactions of its own kind, which would have to be the connection's first.
        assert self._guard is not None
        guard: Any = self._guard.dialect
        guard.do_begin = engine.dialect.do_begin

    @contextlib.contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """A connection in a savepoint: a statement that fails must not end the caller's transaction."""
        with self.engine.begin() as connection:
            yield connection


class _NoHeartbeat(Heartbeat):
    """Nothing here runs for as long as a lease, or nobody else would take it."""

    def add(self, ids: Iterable[int], owner: uuid.UUID, lease: float) -> None:
        """Not needed."""

    def remove(self, id: int) -> None:
        """Not needed."""


def nested_engine(connection: Connection) -> Engine:
    """Return an engine whose one connection is this one's, and whose transactions are savepoints in its transaction."""
    if not connection.in_transaction():
        connection.begin()  # or its commit would not know that there is anything
    raw: Any = connection.connection.dbapi_connection
    dialect = _nested(connection.dialect)
    pool = StaticPool(lambda: raw, dialect=dialect, reset_on_return=None)
    return Engine(pool, dialect, connection.engine.url)


def _nested(original: Any) -> Any:
    """Return a dialect that begins, commits and rolls back by savepoints, the innermost first, and closes nothing."""
    dialect = copy.copy(original)
    savepoints: list[str] = []

    def begin(raw: Any) -> None:
        savepoints.append(f"pgpubsub_{len(savepoints)}")
        _execute(raw, f"SAVEPOINT {savepoints[-1]}")

    def commit(raw: Any) -> None:
        # Not taken off before it has worked: where it has not, what follows is a rollback.
        _execute(raw, f"RELEASE SAVEPOINT {savepoints[-1]}")
        savepoints.pop()

    def roll_back(raw: Any) -> None:
        if savepoints:
            name = savepoints.pop()
            _execute(raw, f"ROLLBACK TO SAVEPOINT {name}")
            _execute(raw, f"RELEASE SAVEPOINT {name}")

    dialect.do_begin = begin
    dialect.do_commit = commit
    dialect.do_rollback = roll_back
    # A connection is thrown away when its transaction cannot or must not be committed.
    dialect.do_close = dialect.do_terminate = roll_back
    dialect.set_isolation_level = dialect.reset_isolation_level = lambda *_: None
    return dialect


def _execute(raw: Any, statement: str) -> None:
    with contextlib.closing(raw.cursor()) as cursor:
        cursor.execute(statement)
