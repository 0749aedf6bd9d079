"""`drain`: what a bridge and a worker would do with what is stored, at once and in this thread.

Owns the loop of claim, build and deliver without a broker, and what is told of each run. The claim, the messages and
the delivery are those of bridges and workers, so that decoding, injection, retries and failures are, too. Only where
the rows are locked and committed is different: inside the caller's transaction all is savepoints (`nested`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from celery import Celery, _state
from celery.app.trace import build_tracer
from celery.exceptions import NotRegistered
from celery.result import AsyncResult, ResultSet, allow_join_result
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from pgpubsub_celery import filters, runs, subscriptions
from pgpubsub_celery.binds import connection_of, session_or_connection
from pgpubsub_celery.channels import Channel, keys_of, registered_channels, select_channels
from pgpubsub_celery.delivery import deliver
from pgpubsub_celery.emit import EnqueuedTask
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.keyed import KeyedQuota, KeyedStore
from pgpubsub_celery.listeners import Listener, registered_listeners
from pgpubsub_celery.messages import Address, Message, build_messages
from pgpubsub_celery.runs import Run
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.signatures import load_signature
from pgpubsub_celery.store import Claimed, Quota, Store
from pgpubsub_celery.testing import clock
from pgpubsub_celery.testing.nested import EngineRuntime, NestedRuntime
from pgpubsub_celery.tracing import continued
from pgpubsub_celery.wakeups import require_installed

ACKNOWLEDGED, RETRIED, FAILED, RELEASED, PUBLISHED = "acknowledged", "retried", "failed", "released", "published"

_OUTCOMES = {runs.DONE: ACKNOWLEDGED, runs.RETRY: RETRIED, runs.FAILED: FAILED, runs.RELEASED: RELEASED}

BATCH_SIZE = 500


class DrainError(PgPubSubError, RuntimeError):
    """`drain` cannot do what it was asked to, or does not come to an end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrainedRun:
    """One run of one notification."""

    id: int
    channel: type[Channel]
    listener: str
    """The name of the task that ran; for `enqueue`, of the task that was enqueued."""
    operation: str
    """`"message"`, or insert, update, delete, truncate."""
    retries: int
    """How often it had been retried before."""
    outcome: str
    """"acknowledged", "retried", "failed", "released" (given back by circumstances, or `Reject(requeue=True)`), or
    "published" (enqueued, and not a task of this application: nothing ran)."""
    error: BaseException | None = None
    """What the listener raised; for a retry, Celery's `Retry`."""


@dataclasses.dataclass(frozen=True)
class Drained:
    """All runs of one `drain`, in order."""

    runs: tuple[DrainedRun, ...] = ()

    def _of(self, outcome: str) -> list[DrainedRun]:
        return [run for run in self.runs if run.outcome == outcome]

    @property
    def acknowledged(self) -> list[DrainedRun]:
        """Those whose listener returned: their notification is gone."""
        return self._of(ACKNOWLEDGED)

    @property
    def retried(self) -> list[DrainedRun]:
        """Those whose notification waits for its next run."""
        return self._of(RETRIED)

    @property
    def failed(self) -> list[DrainedRun]:
        """Those that failed for good, with the exception in `error`."""
        return self._of(FAILED)

    @property
    def released(self) -> list[DrainedRun]:
        """Those that were given back, and came again."""
        return self._of(RELEASED)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each outcome that there is."""
        return dict(Counter(run.outcome for run in self.runs))

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[DrainedRun]:
        return iter(self.runs)


def drain(
    bind: Any,
    /,
    *,
    channels: Iterable[type[Channel] | str] | type[Channel] | str | None = None,
    app: Celery | None = None,
    with_scheduled: bool = False,
    raise_errors: bool = True,
    limit: int = 1000,
) -> Drained:
    """Run the listeners of what is stored and due, in this thread, until nothing is; what they emit is run, too.

    Args:
        bind: a Session, scoped_session or Connection: everything happens in its open transaction, in savepoints, is
            never committed, and goes when the test rolls it back. Listeners' `session` is on the same connection. A
            session is flushed before, and its objects are expired after. Or an Engine: what is committed is run, in
            transactions that are committed, as in a worker.
        channels: only these, as classes or paths; of a base class its subclasses. Default: all.
        app: the Celery application whose tasks run. Default: the current one.
        with_scheduled: also what is not due yet: an `eta`, a `countdown`, a retry's wait. In order of their times.
        raise_errors: raise what the first listener raised that failed for good, after its notification was marked as
            failed; what has not run by then waits. False: go on, and tell it in the result. A retry raises nothing.
        limit: runs after which it is an error that there are more.

    Returns:
        What ran, and how each run ended.

    Raises:
        DrainError: there is no end of it, or the application lacks a task.
        BindError, NotInstalledError: as `notify`.
    """
    if limit < 1:
        raise DrainError(f"drain(): limit is {limit!r}: expected at least 1.")
    application: Celery = _state.get_current_app() if app is None else app
    application.finalize()
    settings = Settings.load(application.conf)
    session: Session | None = None
    runtime: Runtime
    if isinstance(bind, Engine):
        runtime = EngineRuntime(settings, bind)
    else:
        owner = session_or_connection(bind, "drain")
        if isinstance(owner, Session):
            session = owner
            session.flush()
        runtime = NestedRuntime(settings, connection_of(bind, "drain"))
    drainage = _Drainage(application, runtime, _select(channels), limit=limit, raise_errors=raise_errors)
    try:
        with Runtime.replaced(application, runtime):
            drainage.run(with_scheduled=with_scheduled)
    finally:
        if session is not None:
            session.expire_all()
    return Drained(tuple(drainage.ran))


def _select(given: Iterable[type[Channel] | str] | type[Channel] | str | None) -> list[type[Channel]]:
    if given is None:
        return registered_channels()
    found: list[type[Channel]] = []
    for one in [given] if isinstance(given, (str, type)) else given:
        if isinstance(one, str):
            found += select_channels([one])
        else:
            found += [channel for channel in registered_channels() if issubclass(channel, one)]
    return found


class _Drainage:
    """One call of `drain`."""

    def __init__(
        self, app: Celery, runtime: Runtime, channels: Sequence[type[Channel]], *, limit: int, raise_errors: bool
    ) -> None:
        self._app = app
        self._runtime = runtime
        self._limit = limit
        self._raise_errors = raise_errors
        self._channels = channels
        self._tracers: dict[str, Any] = {}
        self.ran: list[DrainedRun] = []

    def run(self, *, with_scheduled: bool) -> None:
        with self._runtime.autocommit() as connection:
            listeners, strangers = self._register(connection)
            self._installation = self._runtime.store.installation(connection)
            conditions = filters.conditions(listeners, self._runtime.settings.listener_filter)
            self._store = Store(self._runtime.settings.schema, conditions)
            self._keyed = KeyedStore(self._runtime.settings.schema, conditions)
            self._store.adopt(connection, list(listeners))
        self._listeners = listeners
        while True:
            claimed = self._claim(with_scheduled=with_scheduled)
            if not claimed:
                break
            self._deliver_all(claimed)
        self._refuse_strangers(strangers)

    def _register(self, connection: Connection) -> tuple[dict[int, Listener], dict[int, Listener]]:
        """Return the listeners to run, and those that this application has no task for, by subscription."""
        schema = self._runtime.settings.schema
        require_installed(connection, schema, VERSION)
        names = {channel.name() for channel in self._channels if channel.lock_notifications}
        mine = [listener for listener in registered_listeners() if listener.channel.name() in names]
        found = subscriptions.register(connection, schema, mine)
        known = {
            id: listener
            for id, listener in found.items()
            if listener.channel is EnqueuedTask or listener.name in self._app.tasks
        }
        return known, {id: listener for id, listener in found.items() if id not in known}

    def _refuse_strangers(self, strangers: Mapping[int, Listener]) -> None:
        with self._runtime.autocommit() as connection:
            due = clock.waiting(connection, self._store.names, list(strangers)) if strangers else []
        if due:
            listener = strangers[due[0]]
            raise DrainError(
                f"drain(): notifications of {listener.channel.name()} wait for {listener.name}, which is no task of "
                f"the application {self._app.main!r}: pass the one that it is a task of, drain(…, app=your_app), or "
                "only the channels that you mean, drain(…, channels=[…])."
            )

    # Claim

    def _claim(self, *, with_scheduled: bool) -> list[Claimed]:
        with self._runtime.autocommit() as connection:
            ids = list(self._listeners)
            # In an open transaction now() stands still; what is waited for by the clock is not.
            clock.make_due(connection, self._store.names, ids)
            claimed = self._claim_due(connection)
            if not claimed and with_scheduled and clock.make_next_due(connection, self._store.names, ids):
                claimed = self._claim_due(connection)
            return claimed

    def _claim_due(self, connection: Connection) -> list[Claimed]:
        quotas = [self._quota(id, listener) for id, listener in self._listeners.items()]
        keyed = [quota for quota in quotas if isinstance(quota, KeyedQuota)]
        plain = [quota for quota in quotas if not isinstance(quota, KeyedQuota)]
        most = self._runtime.settings.max_starts
        rows: list[Claimed] = []
        if plain:
            rows += self._store.claim(connection, plain, batch_size=BATCH_SIZE, max_starts=most).rows
        # What one claim deletes or puts back may leave another to be claimed.
        unfinished = bool(keyed)
        while unfinished:
            claim = self._keyed.claim(connection, keyed, batch_size=BATCH_SIZE, max_starts=most)
            rows += claim.rows
            unfinished = claim.unfinished and not claim.rows
        return rows

    def _quota(self, id: int, listener: Listener) -> Quota:
        lease = listener.channel.lease or self._runtime.settings.lease
        keys = keys_of(listener.channel)
        common: dict[str, Any] = {
            "subscription": id,
            "limit": BATCH_SIZE,
            "lease": lease,
            "lease_max": max(lease, self._runtime.settings.lease_max),
            "with_payload": listener.channel is EnqueuedTask,
        }
        if not keys.ordering and not keys.unique:
            return Quota(**common)
        return KeyedQuota(**common, ordered=bool(keys.ordering), passes=keys.passes, unique=bool(keys.unique))

    # Deliver

    def _deliver_all(self, claimed: Sequence[Claimed]) -> None:
        """Deliver in the order in which a bridge publishes; on an error, give back what has not been come to."""
        enqueued = {row.id: row for row in claimed if self._listeners[row.subscription].channel is EnqueuedTask}
        addresses = {id: _address(listener) for id, listener in self._listeners.items()}
        messages = build_messages([row for row in claimed if row.id not in enqueued], addresses, self._installation)
        work: dict[int, Message | Claimed] = {message.claimed[0][0]: message for message in messages}
        left: list[Message | Claimed] = [one for _, one in sorted({**work, **enqueued}.items())]
        try:
            while left:
                self._check_limit()
                one = left.pop(0)
                before = len(self.ran)
                if isinstance(one, Message):
                    self._deliver(one)
                else:
                    self._run_enqueued(one)
                self._raise_first(self.ran[before:])
        finally:
            rows = [pair for one in left for pair in _pairs(one)]
            if rows:
                with self._runtime.autocommit() as connection:
                    self._store.release_unpublished(connection, rows)

    def _deliver(self, message: Message) -> None:
        task = self._app.tasks[message.task]
        if task.name not in self._tracers:
            self._tracers[task.name] = build_tracer(task.name, task, app=self._app, eager=True)
        ended: list[Run] = []
        self._runtime.observer = ended.append
        request = {
            "id": message.task_id,
            "task": message.task,
            "delivery_info": {},
            "retries": 0,
            "hostname": "drain",
        }
        deliver(task, self._tracers[task.name], message.task_id, message.envelope.to_kwargs(), request)
        for run in ended:
            outcome = _OUTCOMES.get(run.outcome)
            if outcome is not None:  # else its halves are run instead
                self.ran += [_told(run, row, outcome) for row in run.rows]

    def _run_enqueued(self, row: Claimed) -> None:
        """Run what `enqueue` stored, eagerly, as `apply()` does; without its row, as in production."""
        with self._runtime.autocommit() as connection:
            self._store.delete_published(connection, [(row.id, row.dispatches)])
        outcome, error = ACKNOWLEDGED, None
        name = str(row.payload.get("task"))
        try:
            # A chain waits for its parts; a worker in this process would forbid it.
            with continued(row.context), allow_join_result():
                error = _error_of(load_signature(row.payload, self._app).apply())
        except NotRegistered:
            outcome = PUBLISHED
        except Exception as exc:  # noqa: BLE001 - it is raised, or told, as the caller wants
            error = exc
        self.ran.append(
            DrainedRun(
                id=row.id,
                channel=EnqueuedTask,
                listener=name,
                operation=row.operation,
                retries=0,
                outcome=outcome if error is None else FAILED,
                error=error,
            )
        )

    def _check_limit(self) -> None:
        if len(self.ran) < self._limit:
            return
        common = ", ".join(f"{name} {n} times" for name, n in Counter(r.listener for r in self.ran).most_common(3))
        raise DrainError(
            f"drain(): {len(self.ran)} runs, and more is due ({common}): a listener that emits to its own channel, or "
            "retries for ever, never comes to an end. Raise limit= if there is so much."
        )

    def _raise_first(self, ended: Sequence[DrainedRun]) -> None:
        if not self._raise_errors:
            return
        for run in ended:
            if run.outcome == FAILED:
                error = run.error or DrainError(f"{run.listener} failed, notification {run.id}, without an exception.")
                if sys.version_info >= (3, 11):
                    error.add_note(f"Raised by the listener {run.listener} of {run.channel.name()}, inside drain().")
                raise error


def _address(listener: Listener) -> Address:
    return Address(
        channel=listener.channel.name(),
        listener=listener.name,
        task=listener.name,
        # What has to be measured first is one at a time.
        bundle=listener.batch or (listener.bundle if isinstance(listener.bundle, int) else 1),
    )


def _pairs(one: Message | Claimed) -> list[tuple[int, int]]:
    return one.claimed if isinstance(one, Message) else [(one.id, one.dispatches)]


def _told(run: Run, row: Any, outcome: str) -> DrainedRun:
    return DrainedRun(
        id=row.id,
        channel=run.listener.channel,
        listener=run.listener.name,
        operation=row.operation,
        retries=row.retries,
        outcome=outcome,
        error=run.error,
    )


def _error_of(result: Any) -> BaseException | None:
    """Return the first exception in an eager result, of however many tasks."""
    if isinstance(result, ResultSet):
        return next((found for one in result.results or () if (found := _error_of(one)) is not None), None)
    if isinstance(result, AsyncResult) and result.state == "FAILURE":
        error: BaseException = result.result
        return error
    parent = getattr(result, "parent", None)
    return None if parent is None else _error_of(parent)
