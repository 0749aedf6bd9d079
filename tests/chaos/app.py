"""The application of the chaos tests: each listener's effect is a row, and each step of the flow is a place to die.

Run by real processes: `pgpubsub-bridge -A tests.chaos.app listen` and `celery -A tests.chaos.app worker`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, Task, signals
from sqlalchemy import BigInteger, Engine, Float, Integer, String, create_engine, event, text
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import Channel, NotificationInfo, TriggerChannel, channel_task, notify
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.settings import sync_url
from tests.chaos.steps import FOLDER, become, step

# Short, so that what a dead worker had reserved comes again, besides what comes again by its lease.
TRANSPORT_OPTIONS = {"visibility_timeout": 10, "unacked_mutex_expire": 5}

LEASE = 4.0

faulthandler.register(signal.SIGUSR2)  # a process that hangs is asked where

app = Celery("chaos", broker=os.environ.get("CHAOS_BROKER_URL", "memory://"))
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_hijack_root_logger=True,
    worker_prefetch_multiplier=4,
    task_default_queue="chaos",
    broker_transport_options=TRANSPORT_OPTIONS,
)


class Base(DeclarativeBase):
    """Of the chaos tests."""


class Emitted(Base):
    """What a writer has emitted, in the same transaction: the truth about what has to have an effect."""

    __tablename__ = "emitted"

    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    at: Mapped[float] = mapped_column(Float)


class Author(Base):
    """A table whose changes are listened to."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


class Effect(Base):
    """What a listener with `session` has done, each time that it was committed."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    number: Mapped[int] = mapped_column(BigInteger)
    notification: Mapped[int] = mapped_column(BigInteger)
    pid: Mapped[int] = mapped_column(Integer)
    at: Mapped[float] = mapped_column(Float)


class Started(Base):
    """A run of a listener without `session`, in transactions of its own."""

    __tablename__ = "run"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    number: Mapped[int] = mapped_column(BigInteger)
    notification: Mapped[int | None] = mapped_column(BigInteger)
    pid: Mapped[int] = mapped_column(Integer)
    begun_at: Mapped[float] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)


@dataclasses.dataclass
class Single(Channel):
    """A `session`, bundles as the bridge likes."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class Bundled(Channel):
    """A `session`, twenty in a message."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class Owned(Channel):
    """No `session`."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class OwnedBundled(Channel):
    """No `session`, five in a message."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class Retrying(Channel):
    """A `session`, and only the third run succeeds."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class Leading(Channel):
    """A `session`, in which it emits what follows."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class Following(Channel):
    """What `Leading` emits."""

    lock_notifications = True
    number: int


class AuthorChanges(TriggerChannel[Author]):
    """The changes of a table."""

    lock_notifications = True


CHANNELS: list[type[Channel]] = [
    Single,
    Bundled,
    Owned,
    OwnedBundled,
    Retrying,
    Leading,
    Following,
    AuthorChanges,
]


# Effects in the listener's transaction


def record(session: Session, kind: str, number: int, notification: NotificationInfo) -> None:
    """Leave an effect in the session."""
    step("listener-before")
    session.execute(
        text("INSERT INTO effect (kind, number, notification, pid, at) VALUES (:kind, :number, :id, :pid, :at)"),
        {"kind": kind, "number": number, "id": notification.id, "pid": os.getpid(), "at": time.time()},
    )
    step("listener-after")


@channel_task(Single)
def take_single(number: int, session: Session, notification: NotificationInfo) -> None:
    """Exactly once."""
    record(session, "single", number, notification)


@channel_task(Bundled, bundle=20)
def take_bundled(number: int, session: Session, notification: NotificationInfo) -> None:
    """Exactly once."""
    record(session, "bundled", number, notification)


@channel_task(Retrying, bind=True, max_retries=5)
def take_retrying(self: Task, number: int, session: Session, notification: NotificationInfo) -> None:
    """Exactly once, after two runs whose effects are taken back."""
    record(session, "retrying", number, notification)
    if notification.retries < 2:
        raise self.retry(countdown=0.2)


@channel_task(Leading)
def take_leading(number: int, session: Session, notification: NotificationInfo) -> None:
    """Exactly once, together with what it emits."""
    record(session, "leading", number, notification)
    notify(session, Following(number=number))


@channel_task(Following)
def take_following(number: int, session: Session, notification: NotificationInfo) -> None:
    """Exactly once for each effect of `take_leading`."""
    record(session, "following", number, notification)


@channel_task(AuthorChanges, on="insert")
def take_author(new: Author, session: Session, notification: NotificationInfo) -> None:
    """Exactly once for each row of the table."""
    record(session, "author", new.id, notification)


# Effects apart


_engine: tuple[int, Engine] | None = None


def own_engine() -> Engine:
    """Return this process's engine for what listeners without `session` do."""
    global _engine
    if _engine is None or _engine[0] != os.getpid():
        _engine = (
            os.getpid(),
            create_engine(
                sync_url(os.environ["PGPUBSUB_DATABASE_URL"]),
                pool_pre_ping=True,
                connect_args={"application_name": "chaos-listener", "connect_timeout": 10},
            ),
        )
    return _engine[1]


def run_apart(kind: str, number: int, notification: int | None, seconds: float = 0) -> None:
    """Begin in a transaction of its own, and finish in another, `seconds` later."""
    step("listener-before")
    begun_at = time.time()
    with own_engine().begin() as connection:
        id = connection.execute(
            text(
                "INSERT INTO run (kind, number, notification, pid, begun_at) "
                "VALUES (:kind, :number, :notification, :pid, :at) RETURNING id"
            ),
            {"kind": kind, "number": number, "notification": notification, "pid": os.getpid(), "at": begun_at},
        ).scalar_one()
    time.sleep(seconds)
    with own_engine().begin() as connection:
        connection.execute(text("UPDATE run SET finished_at = :at WHERE id = :id"), {"id": id, "at": time.time()})
    step("listener-after")


# Somebody else's database errors are a listener's own affair: these are tried again for as long as it takes.
APART: dict[str, Any] = {
    "autoretry_for": (DBAPIError,),
    "retry_backoff": True,
    "retry_backoff_max": 2,
    "max_retries": None,
}


@channel_task(Owned, **APART)
def take_owned(number: int, notification: NotificationInfo) -> None:
    """At least once; now and then for longer than the lease, which is renewed meanwhile."""
    run_apart("owned", number, notification.id, seconds=1.3 * LEASE if number % 50 == 0 else 0)


@channel_task(OwnedBundled, bundle=5, **APART)
def take_owned_bundled(number: int, notification: NotificationInfo) -> None:
    """At least once."""
    run_apart("owned5", number, notification.id)


@app.task(acks_late=True, reject_on_worker_lost=True, **APART)
def plain(number: int) -> None:
    """At least once from the moment that the broker has it, for as long as the broker remembers."""
    run_apart("plain", number, None)


# The steps


@signals.worker_init.connect
def _in_worker(**_: Any) -> None:
    become("worker")


@signals.worker_process_init.connect
def _in_child(**_: Any) -> None:
    become("child")


@signals.after_task_publish.connect
def _note_publication(sender: str, body: Any, **_: Any) -> None:
    """Write down when a plain task was given to the broker: it may forget what it had before it lost its data."""
    folder = os.environ.get(FOLDER)
    if folder and sender == plain.name:
        descriptor = os.open(f"{folder}/published", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{body[0][0]} {time.time()}\n".encode())
        os.close(descriptor)


for _signal, _name in (
    (signals.before_task_publish, "message-before"),
    (signals.after_task_publish, "message-after"),
    (signals.task_received, "received"),
    (signals.task_prerun, "prerun"),
    (signals.task_success, "success"),
    (signals.task_postrun, "postrun"),
):
    _signal.connect(lambda _name=_name, **_: step(_name), weak=False)


@event.listens_for(Engine, "before_cursor_execute")
def _before_statement(*_: Any) -> None:
    step("statement-before")


@event.listens_for(Engine, "after_cursor_execute")
def _after_statement(*_: Any) -> None:
    step("statement-after")


def _around(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def around(*args: Any, **kwargs: Any) -> Any:
        step(f"{name}-before")
        result = function(*args, **kwargs)
        step(f"{name}-after")
        return result

    return around


# There is no event after a COMMIT, nor around the confirmation of a batch.
PGDialect_psycopg2.do_commit = _around(PGDialect_psycopg2.do_commit, "commit")  # type: ignore[method-assign]
Broker.publish = _around(Broker.publish, "publish")  # type: ignore[method-assign]
