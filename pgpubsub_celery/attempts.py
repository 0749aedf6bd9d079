"""DDL beside writers: tried for a moment at a time, until the lock is to be had or the time is up.

Owns how `install` and `uninstall` wait. Who waits for a table's lock makes all that come after wait, too: so nobody
waits for long at once, and one at a time, under a lock of our own. Knows nothing of what is done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery.binds import is_autocommit
from pgpubsub_celery.drivers import sqlstate
from pgpubsub_celery.errors import BindError, PgPubSubError

P = ParamSpec("P")
R = TypeVar("R")

ATTEMPT = 1.0
"""Seconds that one attempt waits for a lock; writers queue behind it for no longer than that."""
PAUSE = 0.2
"""Seconds between attempts, in which they go on."""

_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK = "40P01"
_INSUFFICIENT_PRIVILEGE = "42501"


class Attempts:
    """Runs functions that lock tables, each in a transaction of its own, or in a savepoint of the caller's."""

    def __init__(self, bind: Engine | Connection, caller: str, key: str, lock_timeout: float) -> None:
        """Describe them.

        Args:
            bind: an Engine, for transactions; a Connection, for savepoints in its transaction, which the caller
                commits.
            caller: the function's name, for errors.
            key: what is never done twice at the same time in one database.
            lock_timeout: seconds for each function.

        Raises:
            BindError: `bind` is something else, or a connection without a transaction.
        """
        given: Any = bind
        if not isinstance(given, (Engine, Connection)):
            kind = type(given).__name__
            fix = f" (await connection.run_sync({caller}))" if kind.startswith("Async") else ""
            raise BindError(
                f"{caller}() was given a {kind}: expected an Engine, or a Connection with its transaction{fix}."
            )
        if isinstance(bind, Connection) and is_autocommit(bind):
            raise BindError(
                f"{caller}() was given a Connection in AUTOCOMMIT: pass its engine, or one with a transaction."
            )
        if isinstance(lock_timeout, bool) or not isinstance(lock_timeout, (int, float)) or lock_timeout <= 0:
            raise PgPubSubError(f"{caller}(): lock_timeout is {lock_timeout!r}: expected a number of seconds above 0.")
        self._bind = bind
        self._caller = caller
        self._key = f"pgpubsub {key}"
        self._lock_timeout = lock_timeout

    def run(self, what: str, function: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what `function(connection, …)` does; it may be called several times. `what` it locks, for errors.

        Raises:
            PgPubSubError: a lock was not to be had in time, or a right is lacking.
        """
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                with self._transaction() as connection, self._alone(connection, deadline):
                    return function(connection, *args, **kwargs)
            except DBAPIError as exc:
                state = sqlstate(exc)
                if state in (_LOCK_NOT_AVAILABLE, _DEADLOCK) and time.monotonic() < deadline:
                    time.sleep(PAUSE)
                    continue
                if state in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
                    raise PgPubSubError(
                        f"{self._caller} waited {self._lock_timeout:g} s in vain for {what}: other transactions hold "
                        "it. Try again, give it longer (lock_timeout), or end the transaction that is open for so long "
                        "(pg_stat_activity shows it)."
                    ) from exc
                if state == _INSUFFICIENT_PRIVILEGE:
                    raise PgPubSubError(
                        f"{self._caller}: this database role lacks a right ({first_line(exc)}): run it as the owner of "
                        f"{what}, or as a role that may create in that schema."
                    ) from exc
                raise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        if isinstance(self._bind, Connection):
            with self._bind.begin_nested():
                yield self._bind
            return
        # READ COMMITTED: what another install has just committed is seen once its lock is ours.
        connection = self._bind.connect().execution_options(isolation_level="READ COMMITTED")
        with connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def _alone(self, connection: Connection, deadline: float) -> Iterator[None]:
        seconds = max(0.01, min(ATTEMPT, deadline - time.monotonic()))
        before = connection.execute(
            text(
                "SELECT current_setting('lock_timeout'), set_config('lock_timeout', :milliseconds, true), "
                "pg_advisory_xact_lock(hashtextextended(:key, 0))"
            ),
            {"milliseconds": str(int(seconds * 1000)), "key": self._key},
        ).one()[0]
        yield
        connection.execute(text("SELECT set_config('lock_timeout', :before, true)"), {"before": before})


def first_line(exc: DBAPIError) -> str:
    """Return what the server says, without its details."""
    return (str(exc.orig).strip().splitlines() or [type(exc.orig).__name__])[0]
