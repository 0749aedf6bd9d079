"""A bridge's message in a worker: take, decode, run, acknowledge.

Owns the life of a message from the moment Celery's pool hands it over: its rows are taken, each notification is run
through Celery's own tracer with its own request, and what became of it is written where it must be:

* `LockedDelivery`, listeners with `session`: effect and acknowledgement commit together;
* `OwnedDelivery`, listeners without: running under an owner token and a heartbeat, no transaction open;
* `CarriedDelivery`, messages without rows.

Never decides what is published, and never answers to the broker: Celery has done that before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.app.trace import trace_ok_t
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from pgpubsub_celery.channels import TriggerChannel
from pgpubsub_celery.errors import DecodeError, LeaseLostError, ListenerError, PgPubSubError, TransactionEndedError
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.messages import Envelope, notification_task_id
from pgpubsub_celery.payload import decode_message
from pgpubsub_celery.rows import decode_notification_rows
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.store import Taken

if TYPE_CHECKING:
    from pgpubsub_celery.tasks import ListenerTask

logger = logging.getLogger(__name__)

SAVEPOINTS = 60
"""Notifications in one transaction: above 64 the subtransaction cache overflows, for the whole server."""

SLOW_BUNDLE = 10
"""Times `bundle_target` after which a bundle is cut short and its rest given back."""

# SQLSTATEs that say nothing about the listener: the same run can succeed a moment later.
_TRANSIENT = {"40001", "40P01", "55P03"}

Tracer = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotificationInfo:
    """What a listener can know of the notification it handles."""

    id: int | None
    """None for messages that are not stored."""
    channel: str
    listener: str
    operation: str
    created_at: datetime.datetime
    """When its transaction began; time zone aware."""
    retries: int
    context: Mapping[str, Any]
    db_version: str | None = None
    _run: Run | None = dataclasses.field(default=None, repr=False, compare=False)

    def acknowledge(self, session: Session) -> None:
        """Acknowledge in `session`'s transaction: its commit makes result and acknowledgement one.

        For listeners without `session` that do slow work first. Never commits; the listener does, before it returns.

        Raises:
            LeaseLostError: the notification was given to another worker meanwhile; roll back.
            ListenerError: the notification is not stored, or its listener has a `session` of its own.
        """
        if self._run is None:
            raise ListenerError("This notification is not being handled by a worker: there is nothing to acknowledge.")
        self._run.acknowledge_in(session)


class Run:
    """One notification on its way through its listener: the request it is, and what became of it."""

    def __init__(self, delivery: Delivery, taken: Taken, task_id: str) -> None:
        self.delivery = delivery
        self.taken = taken
        self.task_id = task_id
        self.outcome = "pending"
        """pending, done, retry, failed, or released."""
        self.error: BaseException | None = None
        self.error_text: str | None = None
        self.retry_at: dict[str, Any] = {}
        self.begun = False
        listener = delivery.listener
        self.notification = NotificationInfo(
            id=taken.id or None,
            channel=taken.channel,
            listener=listener.name,
            operation=taken.operation,
            created_at=taken.created_at,
            retries=taken.retries,
            context=dict(taken.context or {}),
            db_version=taken.db_version,
            _run=self,
        )

    def starting(self, task: ListenerTask) -> bool:
        """Whether this call of the task is the notification's, not one that its listener makes."""
        return not self.begun and task is self.delivery.task

    def run(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Run the listener and note what became of it; what it raised goes on to Celery's tracer."""
        self.begun = True
        try:
            result = self.invoke(call, kwargs)
        except Retry as exc:
            self._settle("retry" if self.retry_at else "failed", exc)
            raise
        except Reject as exc:
            self._settle("released" if exc.requeue else "failed", exc)
            raise
        except Ignore:
            self._settle("done")
            raise
        except Exception as exc:
            if not self.transient(exc):
                self._settle("failed", exc)
                raise
            self._settle("released", exc)
            logger.info("Notification %s was given back: %s", self.taken.id, _one_line(exc))
            raise Ignore(f"given back: {_one_line(exc)}") from exc
        self._settle("retry" if self.retry_at else "done")
        return result

    def invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Call the listener with what it is to be given besides its fields."""
        return call(**kwargs, **self.injected())

    def injected(self) -> dict[str, Any]:
        wanted = self.delivery.listener.injected
        known = {"context": self.notification.context, "notification": self.notification}
        return {name: value for name, value in known.items() if name in wanted}

    def retry_signature(self, **options: Any) -> Any:
        """Return what `Task.retry` sends: here, a record of when the row is due again."""
        return _RetryRecord(self, options)

    def transient(self, exc: Exception) -> bool:
        """Whether `exc` is the circumstances' failure rather than the listener's."""
        return False

    def acknowledge_in(self, session: Session) -> None:
        raise ListenerError(
            "notification.acknowledge(session) is for stored notifications of listeners without a `session` parameter: "
            "this one is acknowledged without it."
        )

    def _settle(self, outcome: str, error: BaseException | None = None) -> None:
        self.outcome = outcome
        self.error = error
        if error is not None:
            # Rendered now: the tracer clears the frames. No locals, and no statement parameters.
            self.error_text = _traceback(error)


class _RetryRecord:
    """Stands where Celery would send the retry's message."""

    def __init__(self, run: Run, options: dict[str, Any]) -> None:
        self._run = run
        self._options = options
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def apply_async(self) -> None:
        self._run.retry_at = {
            "retries": self._options["retries"],
            "countdown": self._options.get("countdown"),
            "eta": self._options.get("eta"),
        }


class Delivery:
    """One message: its task, envelope and request, and the runs that it makes."""

    def __init__(
        self, task: ListenerTask, tracer: Tracer, uuid: str, request: Mapping[str, Any], envelope: Envelope
    ) -> None:
        self.task = task
        self.listener: Listener = task.listener
        self.tracer = tracer
        self.uuid = uuid
        self.request = request
        self.envelope = envelope
        self.runtime = Runtime.of(task.app)
        self.store = self.runtime.store
        self.finished = 0
        self.single = len(envelope.ids) + len(envelope.carried) == 1
        self.trace_result: Any = None

    def deliver(self) -> None:
        """Take what the message tells of, run each, and settle each."""
        raise NotImplementedError

    def decode(self, taken: Taken, connection: Connection) -> dict[str, Any]:
        """Return the listener's arguments; DecodeError when the payload cannot be read."""
        channel = self.listener.channel
        if issubclass(channel, TriggerChannel):
            old, new = decode_notification_rows(channel, taken.payload, connection, taken.db_version)
            known = {"old": old, "new": new}
        else:
            message = decode_message(channel, taken.payload)
            known = {name: getattr(message, name) for name in self.listener.fields}
        return {name: known[name] for name in self.listener.fields if name in known}

    def trace(self, run: Run, kwargs: dict[str, Any] | None, undecodable: Exception | None = None) -> None:
        """Run one notification through Celery's tracer, with a request of its own."""
        request = {
            **self.request,
            "id": run.task_id,
            "root_id": run.task_id,
            "parent_id": None,
            "retries": run.taken.retries,
            "argsrepr": "()",
            "kwargsrepr": f"<notification {run.taken.id} of {run.taken.channel}>",
            "is_eager": False,
        }
        if undecodable is not None:
            run.undecodable = undecodable  # type: ignore[attr-defined]
        _runs.stack.append(run)
        try:
            result = self.tracer(run.task_id, (), kwargs or {}, request)
        finally:
            _runs.stack.pop()
        if self.single:
            self.trace_result = result
        self.finished += run.outcome == "done"

    def task_id(self, id: int) -> str:
        return notification_task_id(self.envelope.installation, id)

    def fail(self, connection: Connection, run: Run, owner: uuid.UUID | None) -> None:
        """Mark the run's row as failed, with what Celery knows of it."""
        self.store.fail(
            connection,
            [run.taken.id],
            owner=owner,
            dispatches=self.envelope.dispatches,
            error=_one_line(run.error) if run.error is not None else "failed",
            traceback=run.error_text,
            task_id=run.task_id,
        )

    def retry(self, connection: Connection, run: Run, owner: uuid.UUID | None) -> None:
        """Make the run's row wait for its retry."""
        self.store.retry(
            connection,
            run.taken.id,
            retries=run.retry_at["retries"],
            owner=owner,
            dispatches=self.envelope.dispatches,
            countdown=run.retry_at["countdown"],
            eta=_aware(run.retry_at["eta"], self.task.app),
        )


class LockedRun(Run):
    """A run inside the transaction that acknowledges it."""

    delivery: LockedDelivery

    def __init__(self, delivery: LockedDelivery, taken: Taken, task_id: str, connection: Connection) -> None:
        super().__init__(delivery, taken, task_id)
        self.connection = connection
        self.committed_inside = False
        """The listener committed its session: those changes outlive a later failure within the transaction."""

    def invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        session = self.delivery.runtime.session(self.connection)
        finishing = False

        def note_commit(_: Session) -> None:
            self.committed_inside = self.committed_inside or not finishing

        event.listen(session, "before_commit", note_commit)
        try:
            result = call(**kwargs, **self.injected(), session=session)
            finishing = True
            session.commit()  # to the savepoint; flushes
        except BaseException:
            with contextlib.suppress(Exception):
                session.rollback()
            raise
        finally:
            with contextlib.suppress(Exception):
                session.close()
        if not self.connection.in_transaction() or self.connection.invalidated:
            raise TransactionEndedError(_ENDED)
        if self.delivery.single:
            self.delivery.commit_single(self)
        return result

    def transient(self, exc: Exception) -> bool:
        return isinstance(exc, DBAPIError) and (
            exc.connection_invalidated or self.connection.invalidated or getattr(exc.orig, "pgcode", None) in _TRANSIENT
        )


_ENDED = (
    "The listener ended the transaction that its notification is acknowledged in: use session.commit() and "
    "session.rollback(), which end at a savepoint, and never COMMIT, ROLLBACK or the connection's own methods."
)


class LockedDelivery(Delivery):
    """For listeners with `session`: rows locked, run in savepoints, deleted last, all in one transaction."""

    def deliver(self) -> None:
        ids = list(self.envelope.ids)
        dispatches = self.envelope.dispatches
        if dispatches > 1:
            # If we die after this, the row's starts say that a run began and never ended.
            with self.runtime.autocommit() as connection:
                ids = self.store.count_start(connection, ids, dispatches)
        started = time.monotonic()
        while ids:
            chunk, ids = ids[:SAVEPOINTS], ids[SAVEPOINTS:]
            left = self._transaction(chunk, started)
            if left:
                self._give_back(left + ids)
                return

    def _transaction(self, ids: Sequence[int], started: float) -> list[int]:
        """Run a chunk in one transaction; return the ids that were not come to."""
        runs: list[LockedRun] = []
        left: list[int] = []
        with self.runtime.connect() as connection, _guarded(connection) as guard:
            guard.begin()
            taken, transaction = self.store.take_locked(connection, ids, self.envelope.dispatches)
            for position, row in enumerate(taken):
                run = LockedRun(self, row, self.task_id(row.id), connection)
                runs.append(run)
                self._run_one(run, connection, transaction)
                if connection.invalidated or not connection.in_transaction():
                    break
                if run.committed_inside and run.outcome not in ("done", "retry"):
                    break
                slow = time.monotonic() - started > SLOW_BUNDLE * self.runtime.settings.bundle_target
                if position + 1 < len(taken) and (run.outcome == "released" or slow):
                    left = [row.id for row in taken[position + 1 :]]
                    break
            if self.single and runs and runs[0].outcome in ("done", "committed"):
                return left
            if self._settle_together(connection, guard, runs, transaction):
                return left
        self._settle_apart(runs)
        return left

    def _run_one(self, run: LockedRun, connection: Connection, transaction: int) -> None:
        run.transaction = transaction  # type: ignore[attr-defined]
        try:
            kwargs = self.decode(run.taken, connection)
        except Exception as exc:
            self.trace(run, None, exc)
        else:
            self.trace(run, kwargs)

    def commit_single(self, run: LockedRun) -> None:
        """Acknowledge and commit inside the run, so that its success is told only once it is true."""

    def _settle_together(
        self, connection: Connection, guard: _Guard, runs: Sequence[LockedRun], transaction: int
    ) -> bool:
        raise NotImplementedError

    def _settle_apart(self, runs: Sequence[LockedRun]) -> None:
        raise NotImplementedError

    def _give_back(self, ids: Sequence[int]) -> None:
        raise NotImplementedError
