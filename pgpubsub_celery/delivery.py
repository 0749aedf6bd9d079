"""A bridge's message in a worker: take, decode, run, acknowledge.

Owns the life of a message from the moment Celery's pool hands it over: its rows are taken, each notification is run
through Celery's own tracer with its own request, and what became of it is written where it must be:

* `locked`, listeners with `session`: effect and acknowledgement commit together;
* `owned`, listeners without: running under an owner token and a heartbeat, no transaction open;
* `carried`, messages without rows: Celery's own guarantees.

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
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgpubsub_celery import runs, tracing
from pgpubsub_celery.channels import TriggerChannel
from pgpubsub_celery.errors import DecodeError, PgPubSubError
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.messages import Envelope, notification_task_id
from pgpubsub_celery.origins import Origin
from pgpubsub_celery.payload import decode_message
from pgpubsub_celery.rows import decode_rows
from pgpubsub_celery.runs import DONE, FAILED, RELEASED, RETRY, SPLIT, BatchRun, Run
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.shortcut import Shortcut
from pgpubsub_celery.store import Taken
from pgpubsub_celery.telling import WANTED, Telling

if TYPE_CHECKING:
    from pgpubsub_celery.tasks import ListenerTask

logger = logging.getLogger(__name__)

RELEASE_DELAY_MAX = 60.0
"""Seconds that a row given back again and again waits at most before it is published once more."""

Tracer = Callable[..., Any]
T = TypeVar("T")
Arguments = dict[str, Any] | DecodeError
Part = tuple[Sequence[Taken], Arguments]
"""Rows of one run, and what their listener is given."""


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
    from pgpubsub_celery.carried import CarriedDelivery
    from pgpubsub_celery.locked import LockedDelivery
    from pgpubsub_celery.owned import OwnedDelivery

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
        self._origin = Origin(task.app, envelope, uuid)
        self.runtime = self._origin.runtime
        self.store = self.runtime.store
        self.single = len(envelope.ids or envelope.carried) == 1
        self._trace_result: Any = None
        self._outcomes: dict[str, int] = {}
        self._shortcut: Shortcut | None = None
        # A notification alone is its message: Celery tells of that.
        wanted = not self.single and WANTED in request
        self._telling = Telling(task.app, request) if wanted else None
        self._spans = tracing.tracer()
        self.ordered = self.listener.channel.ordering_key is not None
        self._blocked: dict[str, int] = {}
        """Ordering keys of which one was not finished, with its id: what comes behind it is not run."""

    def deliver(self) -> Any:
        """Take what the message tells of, run each, settle each; return what Celery's tracer returns."""
        self.runtime = self._origin.checked(self.begin)
        self.store = self.runtime.store
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            if not self.single:
                self._shortcut = Shortcut.of(self.task, self.tracer, self._common_request)
                if self._shortcut is not None:
                    stack.enter_context(self._shortcut.opened())
            self._run_all()
        self._measure(time.monotonic() - began)
        if self._telling is not None:
            self._telling.send()
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
                self.store.report_run_time(connection, subscription, self.runtime.process, report)
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

    def decode(self, rows: Sequence[Taken], connection: Connection) -> list[dict[str, Any] | DecodeError]:
        """Return the listener's arguments for each row, or why they cannot be read."""
        channel = self.listener.channel
        if not issubclass(channel, TriggerChannel):
            return self._explained([self._decode_message(row) for row in rows], rows, connection)
        decoded = decode_rows(channel, [row.payload for row in rows], connection)
        found = [one if isinstance(one, DecodeError) else self._arguments_of_change(*one) for one in decoded]
        return self._explained(found, rows, connection)

    def decode_messages(self, rows: Sequence[Taken]) -> list[Arguments]:
        """Return the same for rows that are no changes; needs no connection but to explain an error."""
        found = [self._decode_message(row) for row in rows]
        if not any(isinstance(one, DecodeError) for one in found):
            return found
        with self.runtime.connect() as connection:
            return self._explained(found, rows, connection)

    def _explained(self, found: list[Arguments], rows: Sequence[Taken], connection: Connection) -> list[Arguments]:
        """Add to errors which versions of the database are between what was stored and what reads it."""
        if not any(isinstance(one, DecodeError) for one in found):
            return found
        present = self.store.db_version(connection)
        return [_with_versions(one, row.db_version, present) for one, row in zip(found, rows, strict=True)]

    def _arguments_of_change(self, old: Any, new: Any) -> dict[str, Any]:
        fields, channel = self.listener.fields, self.listener.channel
        if self.listener.batch is not None:
            message = channel.__new__(channel)
            object.__setattr__(message, "old", old)
            object.__setattr__(message, "new", new)
            return {fields[0]: message}
        return {name: value for name, value in (("old", old), ("new", new)) if name in fields}

    def _decode_message(self, row: Taken) -> dict[str, Any] | DecodeError:
        try:
            message = decode_message(self.listener.channel, row.payload)
        except DecodeError as exc:
            return exc
        if self.listener.batch is not None:
            return {self.listener.fields[0]: message}
        return {name: getattr(message, name) for name in self.listener.fields}

    def make_run(self, rows: Sequence[Taken], invoke: Callable[..., Any]) -> Run:
        """Return the run of one row, or of several that their listener is given as a list."""
        if self.listener.batch is None:
            (row,) = rows
            run = Run(self.task, row, self.task_id(row), invoke)
        else:
            task_id = self.task_id(rows[0]) if len(rows) == 1 else str(uuid.uuid4())
            run = BatchRun(self.task, rows, task_id, invoke)
        run.tracer = self._spans
        return run

    def parts(self, rows: Sequence[Taken], arguments: Sequence[Arguments]) -> list[Part]:
        """Return what is to be run, part by part: a row each; where the listener is given a list, all in one.

        What cannot be read, or is no operation of the listener's, stands alone.
        """
        each: list[Part] = [((row,), one) for row, one in zip(rows, arguments, strict=True)]
        if self.listener.batch is None:
            return each
        alone: list[Part] = []
        listed: list[Taken] = []
        messages: list[Any] = []
        (name,) = self.listener.fields
        for part in each:
            (row,), one = part
            if isinstance(one, DecodeError) or not self.wants(row):
                alone.append(part)
            else:
                listed.append(row)
                messages.append(one[name])
        return [*alone, (listed, {name: messages})] if listed else alone

    # Order: in a message, notifications of one key run in the order of their ids, as its rows and parts are.

    def in_turn(
        self, connection: Connection, told: Sequence[int], rows: Sequence[Taken]
    ) -> tuple[list[Taken], list[int]]:
        """Return the taken rows whose turn it is, and the ids of those with one before them that another message has.

        Only where some of the ids that the message has told of were not to be had.
        """
        if not self.ordered or not rows or len(rows) == len(told):
            return list(rows), []
        ids = [row.id for row in rows]
        behind = self.store.behind(connection, ids, passes=self._passes)
        return [row for row in rows if row.id not in behind], [id for id in ids if id in behind]

    def unblocked(self, part: Part) -> tuple[Part | None, list[int]]:
        """Return what of a part may run, and the ids of those behind one of their key that was not finished."""
        rows, arguments = part
        behind = [row.id for row in rows if self._is_blocked(row)] if self._blocked else []
        if not behind:
            return part, []
        if len(behind) == len(rows) or isinstance(arguments, DecodeError):
            return None, behind
        ((name, messages),) = arguments.items()
        kept = [(row, one) for row, one in zip(rows, messages, strict=True) if row.id not in behind]
        return ([row for row, _ in kept], {name: [one for _, one in kept]}), behind

    def note_end(self, run: Run) -> None:
        """Note what a run's end means to those behind it; it is settled, or about to be together with them."""
        if run.outcome in (RETRY, RELEASED) or (run.outcome == FAILED and not self._passes):
            self.block(run.rows)

    def block(self, rows: Sequence[Taken]) -> None:
        """Run nothing more of this message that comes behind these in their keys."""
        if self.ordered:
            for row in rows:
                if row.ordering_key is not None:
                    self._blocked[row.ordering_key] = min(row.id, self._blocked.get(row.ordering_key, row.id))

    def _is_blocked(self, row: Taken) -> bool:
        return row.ordering_key is not None and row.id > self._blocked.get(row.ordering_key, row.id)

    @property
    def _passes(self) -> bool:
        return self.listener.channel.failed_key == "passes"

    @property
    def frees_by_failing(self) -> bool:
        """Whether a failed notification makes way for the next of its key, so that bridges are to be told."""
        return self.ordered and self._passes

    def trace(self, run: Run, arguments: dict[str, Any] | DecodeError) -> None:
        """Run one notification through Celery's tracer, with a request of its own."""
        began = time.time()
        self._trace(run, arguments)
        if self._telling is not None:
            self._telling.ran(run, began)

    def _trace(self, run: Run, arguments: dict[str, Any] | DecodeError) -> None:
        if isinstance(arguments, DecodeError):
            run.undecodable, arguments = arguments, {}
        own: dict[str, Any] = {"id": run.task_id, "retries": run.taken.retries, "kwargsrepr": run.described}
        if not self.single:
            own["root_id"] = run.task_id
            own["headers"] = self._common_request["headers"].copy()
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
        if self.runtime.observer is not None:
            self.runtime.observer(run)
        if run.outcome != SPLIT:
            self._outcomes[run.outcome] = self._outcomes.get(run.outcome, 0) + len(run.rows)

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
        if len(run.rows) > 1:
            retried = self.store.retry_all(
                connection,
                run.ids,
                owner=owner,
                dispatches=self.envelope.dispatches,
                countdown=run.retry_options["countdown"],
                eta=aware(run.retry_options["eta"], self.task.app),
            )
            return retried == len(run.rows)
        return self.store.retry(
            connection,
            run.taken.id,
            retries=run.retry_options["retries"],
            owner=owner,
            dispatches=self.envelope.dispatches,
            countdown=run.retry_options["countdown"],
            eta=aware(run.retry_options["eta"], self.task.app),
        )

    def write_failure(
        self, connection: Connection, run: Run, owner: uuid.UUID | None, ids: Sequence[int] | None = None
    ) -> bool:
        """Mark the run's rows, or some of them, as failed; False when one is no longer ours."""
        ids = run.ids if ids is None else ids
        error = "failed" if run.error is None else runs.one_line(run.error)
        for id in ids:
            logger.error(
                "Notification %s of %s failed for good: %s", id, run.taken.channel, error, extra=run.told_ids(id)
            )
        failed = self.store.fail(
            connection,
            ids,
            owner=owner,
            dispatches=self.envelope.dispatches,
            error=error,
            traceback=run.error_text,
            task_id=run.task_id,
        )
        return len(failed) == len(ids)


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


def halves(part: Part) -> list[Part]:
    """Return the two parts to run instead of one that failed as a whole."""
    rows, arguments = part
    assert not isinstance(arguments, DecodeError)
    ((name, messages),) = arguments.items()
    middle = len(rows) // 2
    return [(rows[:middle], {name: messages[:middle]}), (rows[middle:], {name: messages[middle:]})]


def aware(eta: datetime.datetime | None, app: Any) -> datetime.datetime | None:
    """Return `eta` with a time zone; a naive one is in the application's, as Celery has it."""
    if eta is None or eta.tzinfo is not None:
        return eta
    return eta.replace(tzinfo=app.timezone)


def _with_versions(arguments: Arguments, stored: str | None, present: str | None) -> Arguments:
    if not isinstance(arguments, DecodeError) or (stored is None and present is None):
        return arguments
    return DecodeError(
        f"{arguments} It was stored at version {stored or 'unknown'} of the database, which is now at "
        f"{present or 'unknown'}."
    )
