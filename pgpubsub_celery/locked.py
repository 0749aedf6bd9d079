"""Listeners with `session`: rows locked, each run in a savepoint, deleted last, all in one transaction.

Owns the transaction that makes effect and acknowledgement one, and its defence against whatever ends it: a listener, a
lock, a lost connection, a constraint that is only checked at COMMIT. The order is: lock, run, delete, commit; deleting
first would lose rows when a listener commits the connection under us.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from celery.exceptions import Reject, SoftTimeLimitExceeded
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgpubsub_celery import announcements, runs
from pgpubsub_celery.delivery import Delivery, Part, halves
from pgpubsub_celery.drivers import end_interrupted, sqlstate
from pgpubsub_celery.errors import TransactionEndedError
from pgpubsub_celery.runs import DONE, FAILED, RELEASED, RETRY, SPLIT, Run
from pgpubsub_celery.transactions import ENDED, Transaction

logger = logging.getLogger(__name__)

SAVEPOINTS = 60
"""In one transaction, at most: above 64 the subtransaction cache overflows, for the whole server. A listener that
leaves its session alone needs none, one that commits in between needs several."""

SLOW_BUNDLE = 10
"""Times `bundle_target` after which a bundle commits what is done and gives the rest back."""

SETTLE_LOCK_TIMEOUT = "5s"
"""How long rows given back wait for a backend that has not noticed that its client is gone; then their lease
decides."""

# A savepoint cures these; the others end the transaction.
_CURABLE = {"40P01": "deadlock", "55P03": "lock not available"}
_SERIALIZATION = "40001"
# A savepoint that is not there, or outside of any transaction: the listener has ended ours behind our back.
_ENDED_STATES = {"3B001", "25P01"}
_IDLE_TIMEOUT = "25P03"


class LockedDelivery(Delivery):
    """Delivers to a listener with `session`: exactly once, however often the message comes."""

    def _run_all(self) -> None:
        ids = list(self.envelope.ids)
        if self.envelope.dispatches > 1:
            # If we die after this, the row's starts say that a run began and never ended.
            ids = self.begin(lambda: self._count_start(ids))
            announcements.dropped(self.listener, self.envelope.ids, ids)
        started = time.monotonic()
        while ids:
            size = self._transaction_size()
            chunk = self._run_chunk(ids[:size], started)
            ids = chunk.beyond + ids[size:]
            if chunk.cut_short:
                self._settle_apart([], ids)
                return

    def _transaction_size(self) -> int:
        """Return how many notifications are likely to fit into one transaction's savepoints."""
        if self.listener.batch is not None:
            return len(self.envelope.ids)
        each = self.runtime.savepoints_each.get(self.listener.name, 1.0)
        return len(self.envelope.ids) if each == 0 else max(1, int(SAVEPOINTS / each))

    def _count_start(self, ids: Sequence[int]) -> list[int]:
        with self.runtime.autocommit() as connection:
            return self.store.count_start(connection, ids, self.envelope.dispatches)

    def _run_chunk(self, ids: Sequence[int], started: float) -> _Chunk:
        """Run one transaction's worth of them."""
        chunk, settled = self.begin(lambda: self._transact(ids, started))
        if settled:
            announcements.ended(self.listener, chunk.runs, chunk.left)
        else:
            self._settle_apart(chunk.runs, chunk.left, chunk.number)
            # What was done may have been given back with the rest: nothing is to run before it.
            chunk.cut_short = chunk.cut_short or self.ordered
        return chunk

    def _transact(self, ids: Sequence[int], started: float) -> tuple[_Chunk, bool]:
        with self.runtime.connect() as connection:
            # What was published before may have a statement that nobody can parse; alone, it harms nobody.
            transaction = Transaction(connection, joins=self.envelope.dispatches == 1)
            with transaction.guarded():
                chunk = _Chunk(self, connection, transaction, started)
                chunk.run(ids)
                if chunk.runs:
                    self.runtime.savepoints_each[self.listener.name] = transaction.savepoints / len(chunk.runs)
                return chunk, chunk.settled or chunk.settle()

    def write(self, connection: Connection, each: Sequence[Run], left: Sequence[int]) -> None:
        """Write what became of the runs that are not acknowledged, and give back those that were not come to."""
        released = [id for run in each if run.outcome == RELEASED for id in run.ids] + list(left)
        for run in each:
            if run.outcome == RETRY:
                self.write_retry(connection, run, None)
            elif run.outcome == FAILED:
                self.write_failure(connection, run, None)
        if released:
            # A run that ended by circumstance did end: its start is taken back.
            started = 1 if self.envelope.dispatches > 1 else 0
            delay = self.release_delay()
            self.store.release(connection, released, self.envelope.dispatches, started=started, delay=delay)
        freed = self.frees_by_failing and any(run.outcome == FAILED for run in each)
        if released or freed or any(run.outcome == RETRY for run in each):
            self.runtime.ring(connection, [self.listener.channel.name()])

    def ring_if_ordered(self, connection: Connection) -> None:
        """Tell the bridges, at the commit, that the next of each key may follow."""
        if self.ordered:
            self.runtime.ring(connection, [self.listener.channel.name()])

    def _settle_apart(self, each: Sequence[Run], left: Sequence[int], number: int = 0) -> None:
        """After transaction `number` was lost, which can have been committed all the same, by a listener or in time.

        Then what was done is acknowledged. Else its effects are gone, so it is given back and comes again, alone.
        Only rows that are still there as we took them are changed, after waiting for a commit that is still under way.
        """
        if not each and not left:
            return
        try:
            with self.runtime.connect() as connection, connection.begin():
                connection.execute(text(f"SET LOCAL lock_timeout = '{SETTLE_LOCK_TIMEOUT}'"))
                done = [run for run in each if run.outcome == DONE]
                if done and self.store.was_committed(connection, number):
                    ids = [id for run in done for id in run.ids]
                    self.store.acknowledge_committed(connection, ids, self.envelope.dispatches)
                    self.ring_if_ordered(connection)
                else:
                    for run in done:
                        run.outcome = RELEASED
                self._blame_pauses(connection, each)
                self.write(connection, each, left)
            announcements.ended(self.listener, each, left)
        except DBAPIError as exc:
            logger.warning("Giving notifications back failed; their lease does it: %s", exc.orig)

    def _blame_pauses(self, connection: Connection, each: Sequence[Run]) -> None:
        """A listener that pauses for too long inside its transaction loses its connection, and would the next time."""
        lost = [run for run in each if isinstance(run.error, DBAPIError) and run.error.connection_invalidated]
        if not lost:
            return
        timeout = self.store.idle_timeout(connection)
        for run in lost:
            if timeout and run.seconds >= timeout:
                run.outcome = FAILED
                run.error = TransactionEndedError(
                    f"The listener's connection was lost after {run.seconds:.1f} s, with "
                    "idle_in_transaction_session_timeout at "
                    f"{timeout:g} s: do slow work in a listener without `session`, or raise the timeout."
                )


class _Chunk:
    """The runs of one transaction."""

    def __init__(
        self, delivery: LockedDelivery, connection: Connection, transaction: Transaction, started: float
    ) -> None:
        self._delivery = delivery
        self._connection = connection
        self._transaction = transaction
        self._started = started
        self.number = 0
        """The transaction's id."""
        self.runs: list[Run] = []
        self.left: list[int] = []
        """Rows taken and not come to, to be given back."""
        self.beyond: list[int] = []
        """Rows that the next transaction is to take: this one's savepoints are used up."""
        self.cut_short = False
        """The rest of the message is to be given back."""
        self.settled = False
        """Its one run is acknowledged and committed: nothing is left to write."""

    def run(self, ids: Sequence[int]) -> None:
        """Lock the rows that are still the message's and run them in order, as far as that makes sense."""
        delivery = self._delivery
        rows, self.number = delivery.store.take_locked(self._connection, ids, delivery.envelope.dispatches)
        announcements.dropped(delivery.listener, ids, (row.id for row in rows))
        rows, self.left = delivery.in_turn(self._connection, ids, rows)
        arguments = delivery.decode(rows, self._connection)
        parts = delivery.parts(rows, arguments)
        while parts:
            part, behind = delivery.unblocked(parts.pop(0))
            self.left += behind
            if part is None:
                continue
            run = self._run_part(part)
            delivery.count(run)
            if run.outcome == SPLIT:
                parts = [*halves(part), *parts]
            else:
                self.runs.append(run)
                delivery.note_end(run)
            if self._transaction.lost or self._must_stop(run) or self._is_slow:
                self.left += [row.id for later, _ in parts for row in later]
                self.cut_short = True
                return
            if self._transaction.savepoints >= SAVEPOINTS:
                self.beyond = [row.id for later, _ in parts for row in later]
                return

    @property
    def _is_slow(self) -> bool:
        """Whether a bundle takes much longer than planned. How long a list takes is its listener's own business."""
        if self._delivery.single or self._delivery.listener.batch is not None:
            return False
        return time.monotonic() - self._started > SLOW_BUNDLE * self._delivery.runtime.settings.bundle_target

    def _must_stop(self, run: Run) -> bool:
        return run.outcome == RELEASED and not isinstance(run.error, Reject)

    def _run_part(self, part: Part) -> Run:
        rows, arguments = part
        inside = _Inside(self._delivery, self._connection, self._transaction)
        run = self._delivery.make_run(rows, inside.invoke)
        if not self._delivery.wants(rows[0]):
            run.outcome = RELEASED
            run.error = Reject("not an operation of this release's listener", requeue=True)
            return run
        run.is_transient = self._is_transient
        if self._delivery.single:
            inside.before_return = lambda: self._commit_inside(run)
        self._delivery.trace(run, arguments)
        run.let_go()
        if inside.committed and run.outcome in (RETRY, FAILED, RELEASED, SPLIT):
            # Its savepoint is released, so only the whole transaction can take back what it did.
            self._transaction.lose()
        return run

    def _is_transient(self, exc: Exception) -> bool:
        if isinstance(exc, SoftTimeLimitExceeded):
            return not self._delivery.single
        if not isinstance(exc, DBAPIError):
            return False
        state = sqlstate(exc)
        if state in _CURABLE:
            return True
        if state in _ENDED_STATES and self._transaction.alive():
            # A savepoint of the run before this one is gone: that listener ended the transaction behind our back.
            self._transaction.lose()
            return True
        if state == _IDLE_TIMEOUT:
            # Its own pause was too long for the server: that would be so the next time, too.
            self._transaction.lose()
            return False
        if state == _SERIALIZATION or exc.connection_invalidated or self._connection.invalidated:
            self._transaction.lose()
            return True
        return False

    def _commit_inside(self, run: Run) -> None:
        """Acknowledge and commit inside the run, so that Celery tells of a success only once it is true."""
        self._acknowledge_and_commit(run.ids)
        self.settled = True

    def _acknowledge(self, ids: Sequence[int]) -> None:
        deleted = self._delivery.store.acknowledge_locked(self._connection, ids, self.number)
        if deleted != len(ids):
            raise TransactionEndedError(ENDED)
        self._delivery.ring_if_ordered(self._connection)

    def _acknowledge_and_commit(self, ids: Sequence[int]) -> None:
        # If we die before this, nothing happened: the locks go with the connection, the lease gives the rows back.
        if not self._transaction.ends_by_text:
            self._acknowledge(ids)
            self._transaction.commit()
            return
        store, connection = self._delivery.store, self._connection

        def last() -> None:
            if not store.acknowledge_and_commit(connection, ids, self.number):
                raise TransactionEndedError(ENDED)

        # In the same transaction, and so heard when the rows are gone.
        self._delivery.ring_if_ordered(connection)
        self._transaction.commit(last)

    def settle(self) -> bool:
        """Acknowledge what is done, write the rest, commit; False when the transaction is lost."""
        if not self.runs and not self.left:
            return True
        if self._transaction.lost:
            return False
        try:
            done = [id for run in self.runs if run.outcome == DONE for id in run.ids]
            if done and not self.left and all(run.outcome == DONE for run in self.runs):
                self._acknowledge_and_commit(done)
                return True
            if done:
                self._acknowledge(done)
            self._delivery.write(self._connection, self.runs, self.left)
            # If we die before this, nothing happened: the locks go with the connection, the lease gives the rows back.
            self._transaction.commit()
        except (TransactionEndedError, DBAPIError) as exc:
            # Refused, or lost with an unknown outcome: the rows' presence is the truth.
            logger.warning(
                "A transaction of %d notification(s) was not committed: %s", len(self.runs), runs.one_line(exc)
            )
            return False
        return True


class _Inside:
    """Calls a listener with a session of its own, whose commits and rollbacks end at a savepoint."""

    def __init__(self, delivery: LockedDelivery, connection: Connection, transaction: Transaction) -> None:
        self._delivery = delivery
        self._connection = connection
        self._transaction = transaction
        self.committed = False
        """The listener committed its session: a later failure cannot be taken back to a savepoint."""
        self.before_return: Callable[[], None] | None = None

    def invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        run = runs.current_run()
        assert run is not None
        session = self._delivery.runtime.session(self._connection)
        self._transaction.start_run()
        started = time.monotonic()
        used = True
        try:
            try:
                result = call(**kwargs, **run.injected(), session=session)
            finally:
                self.committed = self._transaction.listener_committed
            used = self._finish(session)
        except BaseException:
            run.seconds = time.monotonic() - started
            with contextlib.suppress(Exception):
                end_interrupted(self._connection)
            with contextlib.suppress(Exception):
                session.rollback()
            raise
        finally:
            if used:
                with contextlib.suppress(Exception):
                    session.close()
        if run.retry_options is None and self.before_return is not None:
            self.before_return()
        return result

    def _finish(self, session: Session) -> bool:
        """Commit the session, to its savepoint; False when there was nothing in it."""
        # Whatever changes its state, and be it an object added, begins a session's transaction.
        used = session.in_transaction()
        if used:
            self._commit(session)
        if not self._transaction.alive():
            self._transaction.lose()
            raise TransactionEndedError(ENDED)
        return used

    def _commit(self, session: Session) -> None:
        if not self._delivery.single and self._delivery.runtime.has_deferrable(self._connection):
            # A constraint checked only at COMMIT would refuse the whole bundle. Rolling this check back keeps the
            # constraints deferred for the next one.
            session.flush()
            with self._connection.begin_nested() as savepoint:
                self._connection.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
                savepoint.rollback()
        try:
            session.commit()
        except DBAPIError as exc:
            if sqlstate(exc) in _ENDED_STATES:
                self._transaction.lose()
                raise TransactionEndedError(ENDED) from exc
            raise
