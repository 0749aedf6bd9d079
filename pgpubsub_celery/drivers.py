"""What psycopg2 and psycopg 3 do differently, so that nobody else need know which of the two it is.

Owns the choice of the driver by a URL, what a connection is opened with, the reading of an error's SQLSTATE, what a
connection hears, how a value is read, and the cleaning up after a query that an exception has cut short. Never sends
a statement. Imports neither driver before it is used.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

PSYCOPG2 = "postgresql+psycopg2"
PSYCOPG = "postgresql+psycopg"

_ASK_FOR_PSYCOPG = ("psycopg", "psycopg_async")

# A dead peer is noticed after about half a minute; unacknowledged data is given up after the same time.
_CONNECT_ARGUMENTS = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}

# libpq's PQTRANS_ACTIVE: a query has been sent, and its result has not been read.
_ACTIVE = 1


def choose(asked: str) -> str:
    """Return the dialect and driver to use where a URL asks for `asked`, as `postgresql+asyncpg`.

    psycopg 3 where it is named and can be imported, else psycopg2, which is always installed.
    """
    driver = asked.partition("+")[2]
    return PSYCOPG if driver in _ASK_FOR_PSYCOPG and _has_psycopg() else PSYCOPG2


@functools.lru_cache(maxsize=1)
def _has_psycopg() -> bool:
    try:
        importlib.import_module("psycopg")
    except ImportError:  # not installed, or without the library below it
        return False
    return True


def connect_arguments(url: URL, application_name: str) -> dict[str, Any]:
    """Return what a connection of ours to `url` is opened with: a name for `pg_stat_activity`, and keepalives."""
    arguments: dict[str, Any] = {**_CONNECT_ARGUMENTS, "application_name": application_name}
    if url.drivername == PSYCOPG:
        # It would prepare what is sent five times: a pooler between transactions gives the next one another server
        # process, which knows nothing of that.
        arguments["prepare_threshold"] = None
    return arguments


@contextlib.contextmanager
def preparing(connection: Connection) -> Iterator[None]:
    """Let psycopg 3 prepare what is executed within the block, and execute it as it was prepared before."""
    raw: Any = connection.connection.driver_connection
    raw.prepare_threshold = 0
    try:
        yield
    finally:
        raw.prepare_threshold = None


def sqlstate(exc: DBAPIError) -> str | None:
    """Return the SQLSTATE of an error, or None when it did not come from the server; whichever driver raised it."""
    state = getattr(exc.orig, "sqlstate", None) or getattr(exc.orig, "pgcode", None)
    return None if state is None else str(state)


def end_interrupted(connection: Connection) -> None:
    """Cancel a query that an exception has cut short, such as a time limit's, so that the connection can be used again.

    psycopg 3 waits for a result in Python, where a signal's handler may raise; for a KeyboardInterrupt it does this
    itself. psycopg2 waits in C, and never leaves a query half done. Where it does not work the connection stays as it
    is, and its next statement raises.
    """
    if connection.dialect.driver != "psycopg" or connection.closed or connection.invalidated:
        return
    raw: Any = connection.connection.driver_connection
    if int(raw.info.transaction_status) != _ACTIVE:
        return
    raw.cancel()
    while raw.pgconn.get_result() is not None:
        pass


def parameter(connection: Connection, name: str) -> str | None:
    """Return a setting of the session that the server tells drivers of, such as DateStyle; asks nobody."""
    raw: Any = connection.connection.driver_connection
    told = raw.info.parameter_status if connection.dialect.driver == "psycopg" else raw.get_parameter_status
    value = told(name)
    return None if value is None else str(value)


@contextlib.contextmanager
def reading(connection: Connection) -> Iterator[Callable[[int, str], Any]]:
    """Give what reads the server's text for a value, by the oid of its type, as the driver does in a result."""
    raw: Any = connection.connection.driver_connection
    if connection.dialect.driver == "psycopg":
        from psycopg.adapt import Transformer
        from psycopg.pq import Format

        transformer = Transformer(raw)
        encoding = raw.info.encoding
        yield lambda oid, value: transformer.get_loader(oid, Format.TEXT).load(value.encode(encoding))
    else:
        with contextlib.closing(raw.cursor()) as cursor:
            yield cursor.cast


class Notify(NamedTuple):
    """A NOTIFY that has come."""

    channel: str
    payload: str
    pid: int
    """Of the backend that sent it."""


class Wire(abc.ABC):
    """A connection as a socket: what comes without having been asked for, and whether the server is still there."""

    def __init__(self, raw: Any, error: type[Exception]) -> None:
        self._raw = raw
        # ValueError: of waiting for a closed connection's -1.
        self.errors: tuple[type[Exception], ...] = (error, OSError, ValueError)
        """What the methods raise when the connection is gone."""
        self.pid = int(raw.info.backend_pid)

    def fileno(self) -> int:
        """Return what becomes readable when something has come."""
        return int(self._raw.fileno())

    @property
    @abc.abstractmethod
    def has_heard(self) -> bool:
        """Whether a NOTIFY has been read that was not taken."""

    @abc.abstractmethod
    def poll(self) -> None:
        """Read what has come, without waiting."""

    @abc.abstractmethod
    def take(self) -> list[Notify]:
        """Return the notifies that have been read, in order, and forget them."""


def wire(connection: Connection) -> Wire:
    """Return the wire of a connection. For psycopg 3 once for each connection: it has its notifies from then on."""
    raw: Any = connection.connection.driver_connection
    error = connection.dialect.loaded_dbapi.Error
    return (_PsycopgWire if connection.dialect.driver == "psycopg" else _Psycopg2Wire)(raw, error)


class _Psycopg2Wire(Wire):
    @property
    def has_heard(self) -> bool:
        return bool(self._raw.notifies)

    def poll(self) -> None:
        self._raw.poll()

    def take(self) -> list[Notify]:
        heard = [Notify(one.channel, one.payload, one.pid) for one in self._raw.notifies]
        self._raw.notifies.clear()
        return heard


class _PsycopgWire(Wire):
    def __init__(self, raw: Any, error: type[Exception]) -> None:
        super().__init__(raw, error)
        self._heard: list[Notify] = []
        # Of those that come with the answer to a statement.
        raw.add_notify_handler(lambda one: self._heard.append(Notify(one.channel, one.payload, one.pid)))

    @property
    def has_heard(self) -> bool:
        return bool(self._heard)

    def poll(self) -> None:
        libpq = self._raw.pgconn
        libpq.consume_input()
        encoding = self._raw.info.encoding
        while (one := libpq.notifies()) is not None:
            self._heard.append(Notify(one.relname.decode(encoding), one.extra.decode(encoding), one.be_pid))

    def take(self) -> list[Notify]:
        heard = self._heard[:]
        self._heard.clear()
        return heard
