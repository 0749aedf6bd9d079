"""A worker's parent process, and what it does for notifications whose run ends without a word of its own.

Owns the Celery request of listener tasks: a killed child, a hard time limit, a revoked, expired or terminated message
never reach `delivery`, so the parent writes what became of their rows. From one thread of its own: the parent's event
loop must not wait for Postgres. Where that fails, the lease decides.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.exceptions import TimeLimitExceeded
from celery.worker.request import Request
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from pgpubsub_celery import announcements
from pgpubsub_celery.drivers import connect_arguments
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.messages import KEYWORD, Envelope, notification_task_id
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings
from pgpubsub_celery.store import Store
from pgpubsub_celery.telling import WANTED

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = "30s"
"""How long to wait for a killed child's backend, which notices within `client_connection_check_interval`."""

UNKNOWN_DELAY = 5.0
"""Seconds before a notification that this worker has no task for is published again; doubles with each dispatch."""

Write = Callable[[Store, Any], object]
Places = list[tuple[Settings, Engine]]
"""Databases that it may have to be written to."""

_NOT_SETTLED = "A lost run was not settled (%s); its lease does it: %s"


class ListenerRequest(Request):  # type: ignore[misc]  # celery has no types
    """The request of a listener's task, in the worker's parent process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Celery's; tells the child when somebody listens to events."""
        super().__init__(*args, **kwargs)
        events = self._eventer
        # A worker that sends no events of tasks has a dispatcher all the same, of the group of its own events.
        of_tasks = events is not None and events.enabled and (not events.groups or "task" in events.groups)
        if of_tasks and self.task.send_events:
            self._request_dict[WANTED] = True

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """A child that is gone gives its rows back at once; every other failure has been written by the child."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt)) and not return_ok:
            self._give_back()
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """A hard time limit fails a notification that was alone; of a bundle, nobody knows which one was slow."""
        if not soft:
            if len(self._ids) == 1:
                self._fail(one_line(TimeLimitExceeded(timeout)) + f": hard time limit of {timeout:g} s")
            else:
                self._give_back()
        return super().on_timeout(soft, timeout)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> Any:
        """Revoked, expired or terminated: failed, so that it can be looked at, retried or discarded."""
        if not self._already_revoked:
            self._fail(f"{reason}: the task was {reason} before it finished; `pgpubsub-bridge retry` runs it after all")
        return super()._announce_revoked(reason, terminated, signum, expired)

    @property
    def _envelope(self) -> Envelope | None:
        try:
            return Envelope.from_kwargs(self.kwargs or {})
        except PgPubSubError:
            return None

    @property
    def _ids(self) -> tuple[int, ...]:
        envelope = self._envelope
        return () if envelope is None or envelope.carried else envelope.ids

    def _give_back(self) -> None:
        envelope = self._envelope
        if envelope is not None and self._ids:
            what = f"giving back {len(envelope.ids)} notification(s)"
            settle_later(self.task.app, what, _give_back(envelope), envelope)

    def _fail(self, error: str) -> None:
        envelope = self._envelope
        if envelope is not None and self._ids:
            what = f"failing {len(envelope.ids)} notification(s)"
            ordered = self.task.listener.channel.ordering_key is not None
            settle_later(self.task.app, what, _fail(envelope, error, ordered), envelope)


def give_back_unknown(sender: Any, message: Any, **_: Any) -> None:
    """Receiver of Celery's `task_unknown`: a notification for a listener that only another release has."""
    try:
        kwargs = message.payload[1]
        if KEYWORD not in kwargs:
            return
        envelope = Envelope.from_kwargs(kwargs)
    except (PgPubSubError, LookupError, TypeError, AttributeError):
        return
    if envelope is None or not envelope.ids or envelope.carried:
        return
    delay = UNKNOWN_DELAY * 2 ** min(envelope.dispatches - 1, 6)
    what = f"giving back {len(envelope.ids)} unknown notification(s)"
    settle_later(sender.app, what, _give_back(envelope, delay), envelope)


def _give_back(envelope: Envelope, delay: float = 0.0) -> Write:
    def write(store: Store, connection: Any) -> None:
        retries = envelope.retries
        released = store.release_lost(connection, envelope.ids, envelope.dispatches, retries=retries, delay=delay)
        if released:
            store.ring(connection, envelope.channel)
            announcements.lost(envelope, released)

    return write


def _fail(envelope: Envelope, error: str, ordered: bool) -> Write:
    def write(store: Store, connection: Any) -> None:
        for id, retried in zip(envelope.ids, envelope.retries, strict=True):
            task_id = notification_task_id(envelope.installation, id)
            failed = store.fail_lost(
                connection, [id], envelope.dispatches, retries=[retried], error=error, task_id=task_id
            )
            announcements.lost(envelope, failed, error=error)
        if ordered:
            store.ring(connection, envelope.channel)

    return write


class _Settler(threading.Thread):
    """The one thread of a parent process that writes to Postgres."""

    def __init__(self) -> None:
        super().__init__(name="pgpubsub-settler", daemon=True)
        self.pid = os.getpid()
        self.work: queue.SimpleQueue[tuple[Places, str, Write, uuid.UUID | None]] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            places, what, write, installation = self.work.get()
            try:
                if not any(self._settle(*place, write, installation) for place in places):
                    logger.warning(_NOT_SETTLED, what, f"no database has the installation {installation}")
            except (SQLAlchemyError, PgPubSubError) as exc:
                logger.warning(_NOT_SETTLED, what, one_line(exc))
            except Exception:
                logger.exception("A lost run was not settled (%s); its lease does it", what)

    @staticmethod
    def _settle(settings: Settings, engine: Engine, write: Write, installation: uuid.UUID | None) -> bool:
        """Write; False when the notifications are another database's, which has the same ids."""
        store = Store(settings.schema)
        with engine.begin() as connection:
            if installation is not None and store.installation(connection) != installation:
                return False
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
            write(store, connection)
            return True


def _prepared(app: Any, database: str | None) -> Places:
    """Return what settling needs. Whatever it imports, it imports here, and so in the event loop's thread.

    The pool forks a lost child's successor while the settler is at work. A module that another thread is importing at
    that moment stays locked in the child for good: the child would hang at its own first connection.
    """
    aliases = Settings.load(app.conf, database=DEFAULT_DATABASE).aliases
    if database in aliases:
        aliases = (database,)
    # Seldom used, and never to be inherited by a child: no pool.
    found = [Settings.load(app.conf, database=alias) for alias in aliases]
    urls = [
        (settings, settings.require_database_url())
        for settings in found
        if settings.database_url is not None or len(aliases) == 1
    ]
    return [
        (
            settings,
            create_engine(url, poolclass=NullPool, connect_args=connect_arguments(url, "pgpubsub-worker")),
        )
        for settings, url in urls
    ]


_settler: _Settler | None = None
_creating = threading.Lock()


def settle_later(app: Any, what: str, write: Write, envelope: Envelope | None = None) -> None:
    """Have `write(store, connection)` done in a transaction, by a thread of this process.

    In the database that the envelope is of; without an envelope, in any.
    """
    global _settler
    try:
        places = _prepared(app, DEFAULT_DATABASE if envelope is None else envelope.database)
    except PgPubSubError as exc:
        logger.warning(_NOT_SETTLED, what, one_line(exc))
        return
    with _creating:
        if _settler is None or _settler.pid != os.getpid():
            _settler = _Settler()
            _settler.start()
    _settler.work.put((places, what, write, None if envelope is None else envelope.installation))
