"""A bridge's message in a worker: take, decode, run, acknowledge.

Owns the life of a message from the moment Celery's pool hands it over: its rows are taken, each notification is run
through Celery's own tracer with its own request, and what became of it is written where it must be:

* `LockedDelivery`, listeners with `session`: effect and acknowledgement commit together (`locked`);
* `OwnedDelivery`, listeners without: running under an owner token and a heartbeat, no transaction open;
* `CarriedDelivery`, messages without rows: Celery's own guarantees.

Never decides what is published, and never answers to the broker: Celery has done that before.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from celery.app.task import Context
from celery.app.trace import trace_ok_t
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgpubsub_celery import runs
from pgpubsub_celery.channels import TriggerChannel
from pgpubsub_celery.errors import DecodeError, LeaseLostError, PgPubSubError, TransactionEndedError
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.messages import KEYWORD, Envelope, notification_task_id
from pgpubsub_celery.payload import decode_message
from pgpubsub_celery.rows import decode_rows
from pgpubsub_celery.runs import DONE, FAILED, RETRY, Run
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.shortcut import Shortcut
from pgpubsub_celery.store import Taken

if TYPE_CHECKING:
    from pgpubsub_celery.tasks import ListenerTask

logger = logging.getLogger(__name__)

RELEASE_DELAY_MAX = 60.0
"""Seconds that a row given back again and again waits at most before it is published once more."""

Tracer = Callable[..., Any]
T = TypeVar("T")


def deliver(
    task: ListenerTask, tracer: Tracer, uuid: str, kwargs: Mapping[str, Any], request: Mapping[str, Any]
) -> Any:
    """Handle a bridge's message; return what Celery's tracer returns for a task."""
    try:
        envelope = Envelope.from_kwargs(kwargs)
        assert envelope is not None
        delivery = _delivery(task, tracer, uuid, request, envelope)
        return delivery.deliver()
    except PgPubSubError as exc:
        # Whatever cannot even be begun is a failure that Celery shows; a row that it speaks for is left to its lease.
        return _refused(task, tracer, uuid, request, exc)
    except DBAPIError as exc:
        logger.warning("Taking the notifications of message %s failed; their lease gives them back: %s", uuid, exc.orig)
        return trace_ok_t(None, None, 0.0, "not taken: the database is unavailable")


def _delivery(
    task: ListenerTask, tracer: Tracer, uuid: str, request: Mapping[str, Any], envelope: Envelope
) -> Delivery:
    from pgpubsub_celery.locked import LockedDelivery

    kind: type[Delivery]
    if envelope.carried:
        kind = CarriedDelivery
    elif task.listener.wants_session:
        kind = LockedDelivery
    else:
        kind = OwnedDelivery
    return kind(task, tracer, uuid, request, envelope)


def _refused(task: ListenerTask, tracer: Tracer, uuid: str, request: Mapping[str, Any], error: Exception) -> Any:
    taken = Taken(
        id=0,
        channel=task.listener.channel.name(),
        subscription=0,
        operation="",
        payload=None,
        context=None,
        created_at=datetime.datetime.now(datetime.timezone.utc),
        db_version=None,
        dispatches=0,
        starts=0,
        retries=0,
    )
    run = Run(task, taken, uuid, lambda call, kwargs: None)
    run.undecodable = error
    with runs.entered(run):
        return tracer(uuid, (), {}, {**request, "id": uuid})


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
        self.single = len(envelope.ids or envelope.carried) == 1
        self._trace_result: Any = None
        self._outcomes: dict[str, int] = {}
        self._shortcut: Shortcut | None = None

    def deliver(self) -> Any:
        """Take what the message tells of, run each, settle each; return what Celery's tracer returns."""
        if not self.envelope.carried:
            self._check_installation()
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            if not self.single:
                self._shortcut = Shortcut.of(self.task, self._common_request)
                if self._shortcut is not None:
                    stack.enter_context(self._shortcut.opened())
            self._run_all()
        self._measure(time.monotonic() - began)
        if self.single and self._trace_result is not None:
            return self._trace_result
        told = ", ".join(f"{count} {outcome}" for outcome, count in self._outcomes.items())
        return trace_ok_t(None, None, 0.0, told or "dropped: gone, taken or published again since")

    def _run_all(self) -> None:
        raise NotImplementedError

    def _measure(self, seconds: float) -> None:
        """Count how long this message took, and now and then tell the bridges, who make bundles by it."""
        runs, subscription = sum(self._outcomes.values()), self.envelope.subscription
        if not runs or subscription is None:
            return
        report = self.runtime.means.add(subscription, max(seconds, 1e-6), runs)
        if report is None:
            return
        try:
            with self.runtime.autocommit() as connection:
                self.store.report_run_time(connection, subscription, self.runtime.process, *report)
        except DBAPIError as exc:
            logger.debug("Reporting a run time failed: %s", exc.orig)

    def begin(self, step: Callable[[], T]) -> T:
        """Do the first step with Postgres, once more where a pooled connection turned out to be dead.

        Nothing has run by then: a connection lost later does not come out of `step`.
        """
        try:
            return step()
        except DBAPIError as exc:
            if not exc.connection_invalidated:
                raise
        return step()

    def _check_installation(self) -> None:
        """Refuse a message of another database than this worker's."""
        ours = self.begin(self.runtime.installation)
        if ours != self.envelope.installation:
            raise PgPubSubError(
                f"Message {self.uuid} is of the installation {self.envelope.installation}, this worker's database has "
                f"{ours}: bridge and worker use different databases but the same queue. Check PGPUBSUB_DATABASE_URL."
            )

    def decode(self, rows: Sequence[Taken], connection: Connection) -> list[dict[str, Any] | DecodeError]:
        """Return the listener's arguments for each row, or why they cannot be read."""
        channel, fields = self.listener.channel, self.listener.fields
        if issubclass(channel, TriggerChannel):
            decoded = decode_rows(channel, [row.payload for row in rows], connection)
            return [
                one
                if isinstance(one, DecodeError)
                else {name: value for name, value in zip(("old", "new"), one, strict=True) if name in fields}
                for one in decoded
            ]
        return [self._decode_message(row) for row in rows]

    def _decode_message(self, row: Taken) -> dict[str, Any] | DecodeError:
        try:
            message = decode_message(self.listener.channel, row.payload)
        except DecodeError as exc:
            return exc
        return {name: getattr(message, name) for name in self.listener.fields}

    def trace(self, run: Run, arguments: dict[str, Any] | DecodeError) -> None:
        """Run one notification through Celery's tracer, with a request of its own."""
        if isinstance(arguments, DecodeError):
            run.undecodable, arguments = arguments, {}
        own: dict[str, Any] = {
            "id": run.task_id,
            "retries": run.taken.retries,
            "kwargsrepr": describe(run.taken),
        }
        if not self.single:
            own |= {"root_id": run.task_id, "headers": dict(self._common_request["headers"])}
        # What an earlier run of a bundle asked for with retry(max_retries=…) is not this one's.
        self.task.__dict__.pop("override_max_retries", None)
        if self._shortcut is not None and run.undecodable is None and self._shortcut.run(run, arguments, own):
            return
        with runs.entered(run):
            result = self.tracer(run.task_id, (), arguments, {**self._common_request, **own})
        if run.outcome == runs.PENDING:
            # before_start, or a signal's receiver, ended it before the listener was called.
            state = None if result.info is None else result.info.state
            run.outcome = RETRY if run.retry_options is not None else DONE if state in (None, "IGNORED") else FAILED
            run.error = None if result.info is None else result.info.retval
            run.error_text = getattr(result.retval, "traceback", None)
        if self.single:
            self._trace_result = result

    @functools.cached_property
    def _common_request(self) -> dict[str, Any]:
        """What the requests of all runs of this message share."""
        request = {**self.request, "argsrepr": "()", "is_eager": False}
        if not self.single:
            # Celery looks for custom headers in each request anew, which takes longer than most of the rest.
            request |= {"parent_id": None, "shadow": None, "headers": Context(request).headers or {}}
        return request

    def count(self, run: Run) -> None:
        """Count the run's outcome for the message's own result."""
        self._outcomes[run.outcome] = self._outcomes.get(run.outcome, 0) + 1

    def task_id(self, row: Taken) -> str:
        """Return the task id of a row's runs."""
        return notification_task_id(self.envelope.installation, row.id)

    def wants(self, row: Taken) -> bool:
        """Whether this release's listener has asked for the row's operation."""
        return row.operation in self.listener.operations

    def release_delay(self) -> float:
        """Return the seconds that a row given back waits: none at first, longer when it comes again and again."""
        times = self.envelope.dispatches - 1
        return 0.0 if times <= 0 else min(RELEASE_DELAY_MAX, 0.1 * 2.0 ** min(times, 16))

    def write_retry(self, connection: Connection, run: Run, owner: uuid.UUID | None) -> bool:
        """Make the run's row wait for its retry; False when it is no longer ours."""
        assert run.retry_options is not None
        return self.store.retry(
            connection,
            run.taken.id,
            retries=run.retry_options["retries"],
            owner=owner,
            dispatches=self.envelope.dispatches,
            countdown=run.retry_options["countdown"],
            eta=aware(run.retry_options["eta"], self.task.app),
        )

    def write_failure(self, connection: Connection, run: Run, owner: uuid.UUID | None) -> bool:
        """Mark the run's row as failed; False when it is no longer ours."""
        error = "failed" if run.error is None else runs.one_line(run.error)
        logger.error("Notification %s of %s failed for good: %s", run.taken.id, run.taken.channel, error)
        return bool(
            self.store.fail(
                connection,
                [run.taken.id],
                owner=owner,
                dispatches=self.envelope.dispatches,
                error=error,
                traceback=run.error_text,
                task_id=run.task_id,
            )
        )


class OwnedDelivery(Delivery):
    """For listeners without `session`: running under an owner token, each acknowledged as it finishes."""

    def _run_all(self) -> None:
        owner = uuid.uuid4()
        lease = self.listener.channel.lease or self.runtime.settings.lease
        rows = self.begin(lambda: self._take(owner, lease))
        # If we die after this, the lease gives the rows back; their starts say that a run began.
        if not rows:
            return
        self.runtime.heartbeat.add([row.id for row in rows], owner, lease)
        begun = 0
        try:
            arguments = self._decode_all(rows)
            for row, one in zip(rows, arguments, strict=True):
                begun += 1
                if not self._run_one(row, one, owner):
                    break
        finally:
            for row in rows:
                self.runtime.heartbeat.remove(row.id)
            left = [row.id for row in rows[begun:]]
            if left:
                self._settle(lambda connection: self._release(connection, left, owner, started=1))

    def _take(self, owner: uuid.UUID, lease: float) -> list[Taken]:
        with self.runtime.autocommit() as connection:
            return self.store.take_owned(connection, self.envelope.ids, self.envelope.dispatches, owner, lease)

    def _decode_all(self, rows: Sequence[Taken]) -> list[dict[str, Any] | DecodeError]:
        if not issubclass(self.listener.channel, TriggerChannel):
            return [self._decode_message(row) for row in rows]
        with self.runtime.connect() as connection:
            return self.decode(rows, connection)

    def _run_one(self, row: Taken, arguments: dict[str, Any] | DecodeError, owner: uuid.UUID) -> bool:
        """Run one row and settle it; whether the next may follow."""
        if not self.wants(row):
            self._settle(lambda connection: self._release(connection, [row.id], owner, started=1))
            return True
        acknowledged = _Acknowledged(self, row, owner)
        run = Run(self.task, row, self.task_id(row), self._invoke)
        run.acknowledge = acknowledged.acknowledge
        run.is_transient = lambda exc: not self.single and isinstance(exc, SoftTimeLimitExceeded)
        self.trace(run, arguments)
        self.runtime.heartbeat.remove(row.id)
        self.count(run)
        self._settle(lambda connection: self._write(connection, run, owner, acknowledged))
        return not isinstance(run.error, SoftTimeLimitExceeded)

    def _invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        run = runs.current_run()
        assert run is not None
        return call(**kwargs, **run.injected())

    def _write(self, connection: Connection, run: Run, owner: uuid.UUID, acknowledged: _Acknowledged) -> None:
        if acknowledged.asked:
            if not self.store.is_owned(connection, run.taken.id, owner):
                return  # committed by the listener, or lost: then its own commit was refused
            if run.outcome == DONE:
                run.outcome = FAILED
                run.error = TransactionEndedError(
                    "notification.acknowledge(session) was called, but the session was not committed: commit it before "
                    "the listener returns."
                )
        if run.outcome == DONE:
            ours = self.store.acknowledge_owned(connection, run.taken.id, owner)
        elif run.outcome == RETRY:
            ours = self.write_retry(connection, run, owner)
            self.runtime.ring(connection, [run.taken.channel])
        elif run.outcome == FAILED:
            ours = self.write_failure(connection, run, owner)
        else:
            ours = self._release(connection, [run.taken.id], owner, started=1)
        if not ours:
            logger.warning(
                "Notification %s of %s: its lease was lost while it ran (outcome: %s); it was given to another worker",
                run.taken.id,
                run.taken.channel,
                run.outcome,
            )

    def _release(self, connection: Connection, ids: Sequence[int], owner: uuid.UUID, *, started: int) -> bool:
        released = self.store.release_owned(connection, ids, owner, started=started, delay=self.release_delay())
        self.runtime.ring(connection, [self.listener.channel.name()])
        return bool(released)

    def _settle(self, write: Callable[[Connection], object]) -> None:
        # If we die before this, the listener has run and the lease gives the row back: it runs again (at least once).
        for attempt in (1, 2):
            try:
                with self.runtime.autocommit() as connection:
                    write(connection)
                return
            except DBAPIError as exc:
                # The pool may have held a connection that died meanwhile; the second one is new.
                if attempt == 2 or not exc.connection_invalidated:
                    logger.warning("Settling a notification failed; its lease gives it back: %s", exc.orig)
                    return


class _Acknowledged:
    """Whether and how a listener acknowledged its notification itself."""

    def __init__(self, delivery: OwnedDelivery, row: Taken, owner: uuid.UUID) -> None:
        self._delivery = delivery
        self._row = row
        self._owner = owner
        self.asked = False

    def acknowledge(self, session: Session) -> None:
        deleted = self._delivery.store.acknowledge_owned(session.connection(), self._row.id, self._owner)
        if not deleted:
            raise LeaseLostError(
                f"Notification {self._row.id} is no longer this worker's: its lease ran out and it was given to "
                "another. "
                "Roll back; the other one does the work."
            )
        self.asked = True
        # The open transaction locks the row: a heartbeat would only skip it.
        self._delivery.runtime.heartbeat.remove(self._row.id)


class CarriedDelivery(Delivery):
    """For messages without rows: they carry what they tell of, and Celery's own guarantees apply."""

    def _run_all(self) -> None:
        rows = [self._row(one) for one in self.envelope.carried]
        if issubclass(self.listener.channel, TriggerChannel):
            with self.runtime.connect() as connection:
                arguments = self.decode(rows, connection)
        else:
            arguments = [self._decode_message(row) for row in rows]
        for row, one in zip(rows, arguments, strict=True):
            run = Run(self.task, row, self.uuid if self.single else str(uuid.uuid4()), self._invoke)
            run.retry_message = self._retry_message(row)
            self.trace(run, one)
            self.count(run)

    def _row(self, carried: Mapping[str, Any]) -> Taken:
        try:
            return Taken(
                id=int(carried.get("id") or 0),
                channel=self.envelope.channel,
                subscription=self.envelope.subscription or 0,
                operation=str(carried["operation"]),
                payload=carried["payload"],
                context=carried.get("context"),
                created_at=datetime.datetime.fromisoformat(str(carried["created_at"])),
                db_version=carried.get("db_version"),
                dispatches=self.envelope.dispatches,
                starts=0,
                # Retried by Celery, so the message counts.
                retries=int(self.request.get("retries") or 0) if self.single else 0,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise DecodeError(f"The message carries a malformed notification ({type(exc).__name__}: {exc}).") from exc

    def _invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        run = runs.current_run()
        assert run is not None
        if not self.listener.wants_session:
            return call(**kwargs, **run.injected())
        with own_session(self.runtime) as session:
            return call(**kwargs, **run.injected(), session=session)

    def _retry_message(self, row: Taken) -> Callable[..., Any]:
        position = (
            0
            if self.single
            else next(i for i, one in enumerate(self.envelope.carried) if int(one.get("id") or 0) == row.id)
        )

        def message(request: Any, **options: Any) -> Any:
            # As the message came, not as it was decoded: listeners' arguments need not be JSON.
            body = self.envelope.to_kwargs()[KEYWORD]
            body["carried"] = [body["carried"][position]]
            return self.task.message_from_request(request, {KEYWORD: body}, **options)

        return message


@contextlib.contextmanager
def own_session(runtime: Runtime) -> Iterator[Session]:
    """A session in a transaction of its own, committed when the block ends well."""
    with runtime.connect() as connection, connection.begin():
        session = runtime.session(connection)
        try:
            yield session
            session.commit()
        finally:
            session.close()


def describe(row: Taken) -> str:
    """Return what logs and monitors show instead of a notification's contents."""
    return f"<{row.operation} notification {row.id or 'without row'} of {row.channel}>"


def aware(eta: datetime.datetime | None, app: Any) -> datetime.datetime | None:
    """Return `eta` with a time zone; a naive one is in the application's, as Celery has it."""
    if eta is None or eta.tzinfo is not None:
        return eta
    return eta.replace(tzinfo=app.timezone)
