"""Transactions that cost no round trip: BEGIN goes with the first statement, COMMIT with the last.

psycopg2 sends BEGIN ahead of a transaction's first statement, by itself, and waits for the answer; a connection that
SQLAlchemy has given an isolation level costs one more when that is taken back. Owns a connection that need not: what
can wait for the next statement, whoever sends that and however, is sent in front of it, and its own `commit()` and
`rollback()` send what is still to be sent. To everybody else it is a connection of psycopg2's as any. With other
drivers nothing is changed, and nothing is saved. Knows nothing of notifications.
"""

from __future__ import annotations

import copy
from typing import Any

import psycopg2.extensions
from sqlalchemy import Connection, Engine, event

_LEVEL = "ISOLATION LEVEL READ COMMITTED"
BEGIN = f"BEGIN {_LEVEL}"

_NO_LEVEL = "pgpubsub_no_level"
_Base: Any = psycopg2.extensions.connection
_BaseCursor: Any = psycopg2.extensions.cursor
_IDLE = psycopg2.extensions.TRANSACTION_STATUS_IDLE


class _Saving(_Base):  # type: ignore[misc]
    """A connection whose transactions may be begun and ended by text: the driver believes it to be in autocommit."""

    by_text = False
    waiting: tuple[str, ...] = ()
    """Statements that go with the next one, before it."""
    isolation_level: Any
    level: Any = None
    """The isolation level that the driver begins with, where that has been taken from it."""

    def begin_by_text(self) -> None:
        """Leave BEGIN to the next statement; where a transaction is open already, that is as good."""
        if self.info.transaction_status == _IDLE:
            self.autocommit = True
            self.by_text, self.waiting = True, (BEGIN,)

    def take_waiting(self) -> str:
        """Return what is to be sent in front of a statement; its sending is the caller's."""
        waiting, self.waiting = self.waiting, ()
        return "".join(f"{statement}; " for statement in waiting)

    def send_waiting(self) -> None:
        """Send it now, alone."""
        if self.waiting:
            self._send(self.take_waiting())

    @property
    def autocommit(self) -> Any:
        """Whether each statement is a transaction, as whoever asks means it."""
        return not self.by_text and _Base.autocommit.__get__(self)

    @autocommit.setter
    def autocommit(self, value: Any) -> None:
        _Base.autocommit.__set__(self, value)

    def commit(self) -> None:
        """Commit, if that has not been done by text."""
        if self.by_text:
            self._end("COMMIT")
        else:
            super().commit()
            self._give_level()

    def rollback(self) -> None:
        """Roll back, if there is anything left."""
        if self.by_text:
            self._end("ROLLBACK")
        else:
            super().rollback()
            self._give_level()

    def cursor(self, name: Any = None, *arguments: Any, **options: Any) -> Any:
        """As psycopg2's; for one at the server, the driver has to know of the transaction.

        It then sends BEGIN once more, which is a warning to the server's log and nothing else, if no level goes with
        it.
        """
        if not self.by_text:
            return super().cursor(name, *arguments, **options)
        if name is not None:
            self.send_waiting()
            self.level = self.isolation_level
            if self.level is not None:
                self.isolation_level = None
            self.by_text = False
            self.autocommit = False
        elif arguments or options.get("cursor_factory") or self.cursor_factory is not None:
            self.send_waiting()  # whatever this cursor does
        else:
            options["cursor_factory"] = _SavingCursor
        return super().cursor(name, *arguments, **options)

    def lobject(self, *arguments: Any, **options: Any) -> Any:
        """As psycopg2's."""
        self.send_waiting()
        return super().lobject(*arguments, **options)

    def _give_level(self) -> None:
        if self.level is not None and not self.closed:
            self.level, self.isolation_level = None, self.level

    def _end(self, how: str) -> None:
        # What is waiting has changed nothing yet.
        self.waiting = ()
        try:
            if self.info.transaction_status != _IDLE:
                self._send(how)
        finally:
            self.by_text = False
            if not self.closed:
                self.autocommit = False

    def _send(self, statement: str) -> None:
        with super().cursor() as cursor:
            cursor.execute(statement)


class _SavingCursor(_BaseCursor):  # type: ignore[misc]
    """A cursor of such a connection, used by SQLAlchemy or anybody else."""

    connection: _Saving

    def execute(self, query: Any, vars: Any = None) -> Any:
        """As psycopg2's."""
        if self.connection.waiting:
            # Before anything is taken: what the driver cannot put together is not sent, and what waits goes on waiting.
            query, vars = self.mogrify(query, vars), None
            query = self.connection.take_waiting().encode() + query
        return super().execute(query, vars)

    def executemany(self, query: Any, vars_list: Any) -> Any:
        """As psycopg2's."""
        self.connection.send_waiting()
        return super().executemany(query, vars_list)

    def callproc(self, *arguments: Any) -> Any:
        """As psycopg2's."""
        self.connection.send_waiting()
        return super().callproc(*arguments)

    def copy_from(self, *arguments: Any, **options: Any) -> Any:
        """As psycopg2's."""
        self.connection.send_waiting()
        return super().copy_from(*arguments, **options)

    def copy_to(self, *arguments: Any, **options: Any) -> Any:
        """As psycopg2's."""
        self.connection.send_waiting()
        return super().copy_to(*arguments, **options)

    def copy_expert(self, *arguments: Any, **options: Any) -> Any:
        """As psycopg2's."""
        self.connection.send_waiting()
        return super().copy_expert(*arguments, **options)


def saving(engine: Engine) -> tuple[Engine, Any]:
    """Return an engine on the same pool for transactions in READ COMMITTED, and its dialect, a copy.

    The pool's connections, those made from now on, are ones that can save, if the application has not chosen another
    kind. `begin` and `opening` are to be called.
    """
    level = {} if engine.dialect.driver == "psycopg2" else {"isolation_level": "READ COMMITTED"}
    return _copied(engine, **level)


def autocommitting(engine: Engine) -> Engine:
    """Return an engine on the same pool where each statement is a transaction of its own."""
    if engine.dialect.driver != "psycopg2":
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    other, dialect = _copied(engine)
    dialect.do_begin = _begin_autocommit
    dialect.do_commit = dialect.do_rollback = _end_autocommit
    return other


def _copied(engine: Engine, **options: Any) -> tuple[Engine, Any]:
    if engine.dialect.driver == "psycopg2" and not event.contains(engine, "do_connect", _make_saving):
        event.listen(engine, "do_connect", _make_saving)
    other = engine.execution_options(**options)
    other.dialect = copy.copy(engine.dialect)
    return other, other.dialect


def _make_saving(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    options.setdefault("connection_factory", _Saving)


# They are given the pool's proxy of a driver's connection.


def begin(proxy: Any, *, by_text: bool) -> None:
    """Begin a transaction; `by_text` with its first statement."""
    raw = proxy.driver_connection
    if by_text and isinstance(raw, _Saving):
        raw.begin_by_text()
    elif isinstance(raw, _Base):
        proxy.info[_NO_LEVEL] = True


def _begin_autocommit(proxy: Any) -> None:
    proxy.driver_connection.autocommit = True


def _end_autocommit(proxy: Any) -> None:
    proxy.driver_connection.autocommit = False


def opening(connection: Connection, *, apart: bool = False) -> str:
    """Return what SQLAlchemy is to put before the statement that is sent now; mostly nothing.

    `apart`: nothing can be put before it, so that is sent by itself.
    """
    proxy = connection.connection
    if not proxy.info.pop(_NO_LEVEL, False):
        return ""
    begins = f"SET TRANSACTION {_LEVEL}"
    if not apart:
        return f"{begins}; "
    cursor = proxy.cursor()
    cursor.execute(begins)
    cursor.close()
    return ""


def leave(connection: Connection, *statements: str) -> bool:
    """Leave statements to the next one, or to nobody when the transaction ends before; False where that cannot be."""
    raw = connection.connection.driver_connection
    if not isinstance(raw, _Saving) or not raw.by_text:
        return False
    raw.waiting = (*raw.waiting, *statements)
    return True


def take_back(connection: Connection, statement: str) -> bool:
    """Take back a statement that was left, and those after it; False when it has been sent."""
    raw = connection.connection.driver_connection
    if not isinstance(raw, _Saving) or statement not in raw.waiting:
        return False
    raw.waiting = raw.waiting[: raw.waiting.index(statement)]
    return True


def ends_by_text(connection: Connection) -> bool:
    """Whether the open transaction may be ended by a COMMIT that goes with its last statement."""
    raw = connection.connection.driver_connection
    return isinstance(raw, _Saving) and raw.by_text
