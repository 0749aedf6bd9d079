"""One notification on its way through its listener.

Owns what a run is: what the listener is given, what became of it, what `retry()` leaves behind, and what a listener can
know of its notification. Runs of one thread form a stack, so that a task called inside a listener is not taken for it.
Never talks to Postgres by itself; `delivery` does, before and after.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session

from pgpubsub_celery import logs
from pgpubsub_celery.binds import run_in
from pgpubsub_celery.errors import BindError, ListenerError
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.store import Taken
from pgpubsub_celery.tracing import Told, continued, of_notification

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from pgpubsub_celery.tasks import ListenerTask

logger = logging.getLogger(__name__)

PENDING = "pending"
DONE = "done"
"""The listener returned, or raised Ignore: to be acknowledged."""
RETRY = "retry"
FAILED = "failed"
RELEASED = "released"
"""Circumstances ended the run, not the listener: to be given back."""
SPLIT = "split"
"""A list of notifications failed together: its halves are run instead."""


class Acknowledging(Protocol):
    """Acknowledges a run in a transaction of its listener's."""

    def __call__(self, session: Session) -> None:
        """Do so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotificationInfo:
    """What a listener can know of the notification it handles."""

    id: int | None
    """None for messages that are not stored."""
    channel: str
    listener: str
    operation: str
    """`"message"`, or insert, update, delete, truncate."""
    created_at: datetime.datetime
    """When its transaction began; time zone aware."""
    retries: int
    context: Mapping[str, Any]
    db_version: str | None = None
    """Alembic's revision(s) at the time of the change."""
    _acknowledge: Acknowledging | None = dataclasses.field(default=None, repr=False, compare=False)

    def acknowledge(self, session: Session) -> None:
        """Acknowledge in `session`'s transaction: its commit makes result and acknowledgement one.

        For listeners without a `session` parameter that do slow work first. Never commits; the listener does, before it
        returns.

        Raises:
            LeaseLostError: the notification was given to another worker meanwhile; roll back.
            ListenerError: the notification is not stored, or its listener has a `session` of its own.
        """
        if self._acknowledge is None:
            raise ListenerError(
                "notification.acknowledge(session) is for stored notifications of listeners without a `session` "
                f"parameter: {self.listener!r} is acknowledged without it."
            )
        self._acknowledge(session)

    async def aacknowledge(self, session: Any) -> None:
        """As `acknowledge`, for an AsyncSession or async_scoped_session."""

        def acknowledge(sync: Any) -> None:
            if not isinstance(sync, Session):
                raise BindError(f"aacknowledge() was given a {type(session).__name__}: expected an AsyncSession.")
            self.acknowledge(sync)

        await run_in(session, "aacknowledge", acknowledge)


class Run:
    """One notification, the request that it is in Celery, and what became of it."""

    # Of the class until set: most runs of a bundle set one of them.
    outcome: str = PENDING
    error: BaseException | None = None
    error_text: str | None = None
    seconds: float = 0.0
    """How long a listener that did not return had been running."""
    retry_options: dict[str, Any] | None = None
    """What `retry()` asked for: retries, countdown, eta."""
    undecodable: Exception | None = None
    """Raised instead of calling the listener."""
    replay: Exception | None = None
    """What the run has raised: raised once more, for Celery's tracer."""
    acknowledge: Acknowledging | None = None
    is_transient: Callable[[Exception], bool] | None = None
    """Whether an error is circumstance's, and not the listener's."""
    retry_message: Callable[..., Any] | None = None
    """Makes the message that a retry sends, for runs without a row."""
    tracer: Tracer | None = None
    """What makes its span."""
    _begun = False

    def __init__(self, task: ListenerTask, taken: Taken, task_id: str, invoke: Callable[..., Any]) -> None:
        """`invoke(call, kwargs)` calls the listener with what it is given besides its fields."""
        self.task = task
        self.listener: Listener = task.listener
        self.taken = taken
        self.task_id = task_id
        self._invoke = invoke

    @property
    def rows(self) -> Sequence[Taken]:
        """All notifications that it is of."""
        return (self.taken,)

    @property
    def ids(self) -> list[int]:
        """Return the ids of its rows."""
        return [row.id for row in self.rows]

    @property
    def described(self) -> str:
        """What logs and monitors show instead of the notification's contents."""
        row = self.taken
        if len(self.rows) > 1:
            return f"<{len(self.rows)} notifications of {row.channel}>"
        return f"<{row.operation} notification {row.id or 'without row'} of {row.channel}>"

    def told_ids(self, id: int | None = None) -> dict[str, Any]:
        """Return what a log record says of whom it is about: of one row, or of all."""
        of: dict[str, Any] = {"task_id": self.task_id, "channel": self.taken.channel, "listener": self.listener.name}
        if id is None and len(self.rows) > 1:
            return {**of, "notification_ids": self.ids}
        return {**of, "notification_id": id or self.taken.id or None}

    def _span(self) -> Told:
        """Return what its span in a trace says."""
        taken = self.taken
        attributes = of_notification("process", taken.channel, self.listener.name, taken.id)
        attributes |= {"pgpubsub.task_id": self.task_id, "pgpubsub.retries": taken.retries}
        if len(self.rows) > 1:
            attributes["messaging.batch.message_count"] = len(self.rows)
        others = [row.context for row in self.rows if row is not taken]
        return Told(f"process {taken.channel}", attributes, others, one_line)

    @property
    def told(self) -> str | None:
        """What went wrong, in one line, where something did."""
        return None if self.error is None else one_line(self.error)

    @property
    def notification(self) -> NotificationInfo:
        """What the listener can know of it."""
        return self.info(self.taken, self.acknowledge)

    def info(self, row: Taken, acknowledge: Acknowledging | None) -> NotificationInfo:
        """Return what the listener can know of one row."""
        return NotificationInfo(
            id=row.id or None,
            channel=row.channel,
            listener=self.listener.name,
            operation=row.operation,
            created_at=row.created_at,
            retries=row.retries,
            context=dict(row.context or {}),
            db_version=row.db_version,
            _acknowledge=acknowledge,
        )

    def injected(self) -> dict[str, Any]:
        """Return context and notification, where the listener declares them."""
        wanted = self.listener.injected
        values: dict[str, Any] = {}
        if "context" in wanted:
            values["context"] = dict(self.taken.context or {})
        if "notification" in wanted:
            values["notification"] = self.notification
        return values

    def starting(self, task: ListenerTask) -> bool:
        """Whether this call of the task is the notification's, not one that its listener makes."""
        return task is self.task and (not self._begun or self.replay is not None)

    def run(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Run the listener and note what became of it; what it raised goes on to Celery's tracer."""
        self._begun = True
        if self.replay is not None:
            raise self.replay
        try:
            if self.undecodable is not None:
                raise self.undecodable
            with continued(self.taken.context, self.tracer, self._span):
                result = self._invoke(call, kwargs)
        except Retry as exc:
            self._note(RETRY, exc)
            raise
        except Reject as exc:
            self._note(RELEASED if exc.requeue else FAILED, exc)
            if exc.requeue:
                # A requeue here is the row's: the broker is not to send the message again.
                raise Ignore("given back: rejected with requeue") from exc
            raise
        except Ignore:
            # Retry(throw=False) and then Ignore: the wait was asked for.
            self._note(DONE if self.retry_options is None else RETRY)
            raise
        except Exception as exc:
            if self.is_transient is None or not self.is_transient(exc):
                if len(self.rows) > 1:
                    self._note(SPLIT, exc)
                    logger.warning(
                        "%d notifications of %s failed together, running them in halves: %s",
                        len(self.rows),
                        self.listener.name,
                        one_line(exc),
                        extra=self.told_ids(),
                    )
                    raise Ignore("run in halves instead") from exc
                self._note(FAILED, exc)
                raise
            self._note(RELEASED, exc)
            raise Ignore(f"given back: {one_line(exc)}") from exc
        self._note(DONE if self.retry_options is None else RETRY)
        return result

    def let_go(self) -> None:
        """Forget who has called it: what refers to itself would be left to the garbage collector, run after run."""
        self._invoke, self.is_transient, self.retry_message = _over, None, None

    def retry_signature(self, request: Any, *args: Any, **options: Any) -> Any:
        """Return what `Task.retry` sends: here, a record of when the row is due again."""
        if self.retry_message is not None:
            return self.retry_message(request, **options)
        return _RetryRecord(self, options)

    def _note(self, outcome: str, error: BaseException | None = None) -> None:
        self.outcome = outcome
        self.error = error
        if error is not None:
            # Rendered now: the tracer clears the frames.
            self.error_text = render_traceback(error)


class BatchRun(Run):
    """Notifications that their listener is given as a list, and their fate in common."""

    def __init__(self, task: ListenerTask, rows: Sequence[Taken], task_id: str, invoke: Callable[..., Any]) -> None:
        # Its retries are counted by the row that has most.
        super().__init__(task, max(rows, key=lambda row: row.retries), task_id, invoke)
        self._rows = tuple(rows)
        self.acknowledges: Callable[[Taken], Acknowledging] | None = None
        """Makes what acknowledges one of the rows."""

    @property
    def rows(self) -> Sequence[Taken]:
        """All notifications that it is of."""
        return self._rows

    def injected(self) -> dict[str, Any]:
        """Return the notifications, where the listener declares them."""
        if "notifications" not in self.listener.injected:
            return {}
        of = self.acknowledges
        return {"notifications": [self.info(row, None if of is None else of(row)) for row in self._rows]}


class _RetryRecord:
    """Stands where Celery would send the retry's message."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    def __init__(self, run: Run, options: dict[str, Any]) -> None:
        self._run = run
        self._options = options

    def apply_async(self) -> None:
        """Keep what was asked for."""
        self._run.retry_options = {name: self._options.get(name) for name in ("retries", "countdown", "eta")}


def _over(*_: Any) -> None:
    raise RuntimeError("this run is over")


def one_line(error: BaseException) -> str:
    """Return the error's type and message in one line, without a statement's parameters."""
    message = str(error)
    if isinstance(error, StatementError) and error.orig is not None:
        diagnostics = getattr(error.orig, "diag", None)
        message = getattr(diagnostics, "message_primary", None) or str(error.orig)
    text = " ".join(message.split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def render_traceback(error: BaseException) -> str:
    """Return the traceback as text: no locals, and no parameters of SQL statements."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, StatementError):
            cause.hide_parameters = True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


class _Stack(threading.local):
    def __init__(self) -> None:
        self.runs: list[Run] = []


_stack = _Stack()


def current_run() -> Run | None:
    """Return the innermost run of this thread, or None outside of one."""
    return _stack.runs[-1] if _stack.runs else None


def _ids_of_current_run() -> dict[str, Any]:
    run = current_run()
    return {} if run is None else run.told_ids()


logs.add_ids(_ids_of_current_run)


class entered:  # noqa: N801 - read as `with entered(run)`
    """Make a run the thread's current one; a class, which costs a third of a generator."""

    __slots__ = ("_run",)

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        _stack.runs.append(self._run)

    def __exit__(self, *_: object) -> None:
        _stack.runs.pop()
