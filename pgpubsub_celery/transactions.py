"""The one transaction in which notifications are run and acknowledged, guarded, and cheap where it is short.

Owns the defence of a delivery's transaction against whoever would end it, and the savepoints of the sessions inside it.
A listener's savepoint costs two round trips where SQLAlchemy sends it, which is most of what a short listener costs. So
it is set together with the listener's first statement, and released only together with what follows: the next
savepoint, or the end of the transaction. Never commits by itself, and never decides what becomes of a notification.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import roundtrips
from pgpubsub_celery.errors import TransactionEndedError

ENDED = (
    "The listener ended the transaction that its notification is acknowledged in: use session.commit() and "
    "session.rollback(), which end at a savepoint, and never COMMIT, ROLLBACK or the connection's own methods."
)

_ENDING_STATEMENT = re.compile(
    r"(?:\s+|/\*.*?\*/|--[^\n]*(?:\n|$)|;)*"
    r"(?:commit|end|abort|begin|start\s+transaction|prepare\s+transaction|rollback(?!\s+(?:work\s+|transaction\s+)?to\b))\b",
    re.IGNORECASE | re.DOTALL,
)

_KEY = "pgpubsub_transaction"


class Transaction:
    """The one transaction of some runs, which only their delivery may end. Its connection is of a `guarding` engine."""

    def __init__(self, connection: Connection, *, joins: bool = True) -> None:
        """`joins`: a listener's savepoint may go with its first statement."""
        self._connection = connection
        self.joins = joins
        self._ours = True
        self._committed = False
        self.lost = False
        """It cannot or must not be committed any more, or its commit's outcome is unknown."""
        self.unreleased: str | None = None
        """A savepoint that is done with, and still there."""
        self.savepoints = 0
        """How many were set: above 64 the subtransaction cache overflows, for the whole server."""
        self.outermost: str | None = None
        """The savepoint of the running listener's session."""
        self.listener_committed = False
        """The running listener has committed its session: what it did until then cannot be taken back alone."""

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Begin, refuse a listener's attempts to end the transaction, and leave nothing open."""
        self._connection.info[_KEY] = self
        try:
            self._connection.begin()
            self._ours = False
            yield
        finally:
            self._ours = True
            if self._committed:
                self._connection.info.pop(_KEY, None)
            elif self.lost or not self.alive():
                # Whatever state it is in, the pool is not to have it back.
                self._connection.invalidate()
            else:
                self._connection.info.pop(_KEY, None)
                self._connection.rollback()

    def lose(self) -> None:
        """Give the transaction up."""
        self.lost = True

    def alive(self) -> bool:
        """Whether the transaction is still open."""
        return self._connection.in_transaction() and not self._connection.invalidated

    def commit(self, last: Callable[[], object] | None = None) -> None:
        """Commit; DBAPIError when the server refused or the connection was lost.

        `last` sends a last statement that has COMMIT with it; only where `ends_by_text`.
        """
        if not self.alive():
            raise TransactionEndedError(ENDED)
        self._ours = True
        try:
            if last is not None:
                last()
            self._connection.commit()
            self._committed = True
        except DBAPIError:
            self.lost = True
            raise
        finally:
            self._ours = False

    @property
    def ends_by_text(self) -> bool:
        """Whether COMMIT may go with the last statement."""
        return self.alive() and roundtrips.ends_by_text(self._connection)

    def start_run(self) -> None:
        """A listener is about to be given a session in this transaction."""
        self.outermost = None
        self.listener_committed = False

    def check_end(self) -> None:
        """Refuse to end the transaction for anybody else."""
        if not self._ours:
            self.lost = True
            raise TransactionEndedError(ENDED)

    def check_statement(self, statement: str) -> None:
        """Refuse a statement that would end the transaction."""
        if not self._ours and _ENDING_STATEMENT.match(statement):
            raise TransactionEndedError(ENDED)


def guarding(engine: Engine) -> Engine:
    """Return an engine on the same pool whose connections can carry a `Transaction`.

    READ COMMITTED, which row locks rely on. The engine that was given, which may be the application's own, stays as it
    is.
    """
    guard, dialect = roundtrips.saving(engine)
    dialect.do_begin = _begin
    dialect.do_savepoint = _set_savepoint
    dialect.do_rollback_to_savepoint = _roll_back_to_savepoint
    dialect.do_release_savepoint = _release_savepoint
    event.listen(guard, "before_cursor_execute", _before_cursor_execute, retval=True)
    event.listen(guard, "commit", _before_end)
    event.listen(guard, "rollback", _before_end)
    return guard


def _before_cursor_execute(
    conn: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    transaction = conn.info.get(_KEY)
    if transaction is not None:
        transaction.check_statement(statement)
    # What is executed many times, or declares a cursor at the server, is one statement and no more.
    apart = executemany or getattr(context, "_is_server_side", False)
    return roundtrips.opening(conn, apart=apart) + statement, parameters


def _begin(proxy: Any) -> None:
    # Who is not a delivery may send what does not go through SQLAlchemy.
    roundtrips.begin(proxy, by_text=_KEY in proxy.info)


def _before_end(conn: Connection) -> None:
    if not conn.invalidated:
        transaction = conn.info.get(_KEY)
        if transaction is not None:
            transaction.check_end()


# Of a dialect: savepoints sent as they are, without the cost of a statement, and released late.


def _set_savepoint(connection: Connection, name: str) -> None:
    transaction: Transaction | None = connection.info.get(_KEY)
    if transaction is None:
        _send(connection, f"SAVEPOINT {name}")
        return
    statements = [f"SAVEPOINT {name}"]
    if transaction.unreleased is not None:
        statements.insert(0, f"RELEASE SAVEPOINT {transaction.unreleased}")
        transaction.unreleased = None
    transaction.savepoints += 1
    if transaction.outermost is not None:
        # A listener's own: it may be there for a statement that nobody could parse, and what goes with that is lost.
        _send(connection, "; ".join(statements))
        return
    transaction.outermost = name
    if not transaction.joins or not roundtrips.leave(connection, *statements):
        _send(connection, "; ".join(statements))


def _roll_back_to_savepoint(connection: Connection, name: str) -> None:
    transaction: Transaction | None = connection.info.get(_KEY)
    if transaction is None:
        _send(connection, f"ROLLBACK TO SAVEPOINT {name}")
        return
    # Set later than this one, so gone with it.
    transaction.unreleased = None
    if transaction.outermost == name:
        transaction.outermost = None
        if _take_back(connection, transaction, name):
            return
    try:
        _send(connection, f"ROLLBACK TO SAVEPOINT {name}")
    except DBAPIError:
        # It went with a statement that nobody could parse, and was never set; or somebody has ended the transaction.
        transaction.lose()
        raise


def _release_savepoint(connection: Connection, name: str) -> None:
    transaction: Transaction | None = connection.info.get(_KEY)
    if transaction is not None and transaction.outermost == name and _take_back(connection, transaction, name):
        transaction.outermost = None
        return
    if transaction is None or not _healthy(connection):
        # In a transaction that has failed, or been ended, this is what says so, to who is to blame.
        _send(connection, f"RELEASE SAVEPOINT {name}")
        return
    # One that is released later was set earlier, and takes those within it along.
    transaction.unreleased = name
    if transaction.outermost == name:
        transaction.outermost = None
        transaction.listener_committed = True


def _take_back(connection: Connection, transaction: Transaction, name: str) -> bool:
    """Forget a savepoint that no statement has followed; False when it has been set."""
    forgotten = roundtrips.take_back(connection, f"SAVEPOINT {name}")
    transaction.savepoints -= forgotten
    return forgotten


def _healthy(connection: Connection) -> bool:
    """Whether the driver believes the connection to be inside a transaction that has not failed."""
    info = getattr(connection.connection.dbapi_connection, "info", None)
    # libpq's PQTRANS_INTRANS, in both drivers.
    return info is not None and int(info.transaction_status) == 2


def _send(connection: Connection, statement: str) -> None:
    """Execute without parameters and results; an error comes as SQLAlchemy's, as from any statement."""
    statement = roundtrips.opening(connection) + statement
    dialect: Any = connection.dialect
    try:
        cursor = connection.connection.cursor()
        try:
            cursor.execute(statement)
        finally:
            cursor.close()
    except dialect.loaded_dbapi.Error as exc:
        lost = dialect.is_disconnect(exc, connection.connection, None)
        if lost:
            connection.invalidate(exc)
        raise DBAPIError.instance(
            statement, None, exc, dialect.loaded_dbapi.Error, connection_invalidated=lost, dialect=dialect
        ) from exc
