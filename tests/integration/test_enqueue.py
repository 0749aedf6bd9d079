"""enqueue(): a Celery task is sent if and only if the caller's transaction commits, and is what apply_async() sends."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.contrib.testing.worker import start_worker
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgpubsub_celery import aenqueue, enqueue
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.emit import ENQUEUE_LISTENER
from pgpubsub_celery.errors import BindError, NotInstalledError, PayloadError
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.store import Quota, Store
from pgpubsub_celery.subscriptions import register

# Celery's result backend calls what the client library would rather it did not, and does not close its connections.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 30


class Noted(list[Any]):
    """What tasks have noted; can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def append(self, item: Any) -> None:
        with self._changed:
            super().append(item)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self) >= count, SECONDS), list(self)
        return self


def make_app(broker_url: str, ran: list[Any]) -> Celery:
    """Make one process's application: writer and bridge have one, the worker another."""
    app = Celery("enqueue", broker=broker_url, backend=broker_url, set_as_current=False)
    app.conf.worker_hijack_root_logger = False
    app.conf.broker_connection_retry_on_startup = True

    @app.task(name="add", shared=False)
    def add(a: int, b: int) -> int:
        ran.append((a, b))
        return a + b

    @app.task(name="total", shared=False)
    def total(numbers: list[int]) -> int:
        ran.append(numbers)
        return sum(numbers)

    @app.task(name="fail", shared=False)
    def fail() -> None:
        raise ValueError("as it should")

    @app.task(name="note_failure", shared=False)
    def note_failure(request: Any, error: Any, traceback: Any) -> None:
        ran.append(f"failed: {error}")

    app.finalize()
    return app


class Service:
    """An application with a broker, a result backend, and the work of a bridge when asked for."""

    def __init__(self, engine: Engine, broker_url: str) -> None:
        self.engine = engine
        self.broker_url = broker_url
        self.ran = Noted()
        self.app = make_app(broker_url, self.ran)
        names = ("add", "total", "fail", "note_failure")
        self.add, self.total, self.fail, self.note_failure = (self.app.tasks[name] for name in names)

    def publish(self) -> int:
        """Do what a bridge does: claim what is due, publish, settle; return how many were published."""
        store = Store("public")
        autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        broker = Broker(self.app, timeout=10)
        with contextlib.closing(broker), autocommit.connect() as connection:
            listeners = register(connection, "public", [ENQUEUE_LISTENER])
            dispatcher = Dispatcher(self.app, store, broker, store.installation(connection), Settings())
            dispatcher.know(listeners)
            quotas = [Quota(subscription=id, limit=100, lease=60, lease_max=60, with_payload=True) for id in listeners]
            claim = store.claim(connection, quotas, batch_size=100, max_starts=3)
            dispatched = dispatcher.dispatch(connection, claim.rows)
            assert dispatched.outage is None
            return dispatched.published

    def rows(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text("SELECT * FROM pgpubsub_notification ORDER BY id")))


@pytest.fixture
def service(installed_engine: Engine, broker_url: str) -> Iterator[Service]:
    """An application whose tasks are enqueued."""
    service = Service(installed_engine, broker_url)
    yield service
    service.app.close()
    del service
    gc.collect()  # what is left open is said here, not in another test


@pytest.fixture
def worker(service: Service) -> Iterator[Service]:
    """The same with a worker that runs them, in a thread of this process."""
    app = make_app(service.broker_url, service.ran)
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=SECONDS):
        yield service
    app.close()


def test_a_task_is_published_if_its_transaction_commits(worker: Service) -> None:
    """The id is known at once, and its result can be waited for."""
    with Session(worker.engine) as session:
        forgotten = enqueue(session, worker.add.s(0, 0))
        session.rollback()
        result = enqueue(session, worker.add.s(1, 2))
        assert worker.publish() == 0
        session.commit()
    assert worker.publish() == 1
    assert result.get(timeout=SECONDS) == 3
    assert worker.rows() == []
    assert worker.ran == [(1, 2)]
    assert forgotten.state == "PENDING"


def test_chains_groups_and_chords_run_as_they_would(worker: Service) -> None:
    """With their results under the ids that enqueue() returned."""
    add, total = worker.add, worker.total
    with Session(worker.engine) as session:
        in_chain = enqueue(session, chain(add.s(1, 2), add.s(3), add.s(4)))
        in_group = enqueue(session, group(add.s(n, n) for n in range(3)))
        in_nested = enqueue(session, group(add.s(1, 1), group(add.s(2, 2), chain(add.s(3, 3), add.s(1)))))
        in_chord = enqueue(session, chord([add.s(1, 1), add.s(2, 2)], total.s()))
        in_both = enqueue(session, chain(add.s(1, 1), group(add.s(1), add.s(2)), total.s(), add.s(10)))
        session.commit()
    assert worker.publish() == 5
    assert in_chain.get(timeout=SECONDS) == 10
    assert in_group.get(timeout=SECONDS) == [0, 2, 4]
    assert in_nested.get(timeout=SECONDS) == [2, 4, 7]
    assert in_chord.get(timeout=SECONDS) == 6
    assert in_both.get(timeout=SECONDS) == 17


def test_links_and_error_links_are_called(worker: Service) -> None:
    """By the worker, as of any task."""
    with Session(worker.engine) as session:
        enqueue(session, worker.add.s(1, 2).set(link=worker.add.s(10)))
        failing = enqueue(session, worker.fail.s().set(link_error=worker.note_failure.s()))
        session.commit()
    worker.publish()
    assert sorted(map(str, worker.ran.wait_for(3))) == ["(1, 2)", "(3, 10)", "failed: as it should"]
    assert failing.get(timeout=SECONDS, propagate=False).args == ("as it should",)


def test_queue_priority_and_headers_reach_the_broker(service: Service) -> None:
    """All options of the signature are those of the message."""
    with Session(service.engine) as session:
        enqueue(session, service.add.s(1, 2).set(queue="other", priority=7, headers={"tenant": 4}, expires=600))
        session.commit()
    service.publish()
    with service.app.connection_for_read() as connection:
        queue = connection.SimpleQueue("other")
        message = queue.get(block=True, timeout=SECONDS)
        message.ack()
        queue.close()
    assert message.properties["priority"] == 7
    assert message.headers["tenant"] == 4
    expires = datetime.datetime.fromisoformat(message.headers["expires"])
    assert 0 < (expires - service.app.now()).total_seconds() <= 600


def test_countdown_and_eta_are_waited_for_in_the_table(service: Service) -> None:
    """Whether given here or set on the signature; what is given here has the last word."""
    eta = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.timezone.utc)
    with Session(service.engine) as session:
        enqueue(session, service.add.s(1, 2), countdown=60)
        enqueue(session, service.add.s(1, 2).set(countdown=60))
        enqueue(session, service.add.s(1, 2), eta=eta)
        enqueue(session, service.add.s(1, 2).set(eta=eta))
        enqueue(session, service.add.s(1, 2).set(eta=eta), countdown=60)
        session.commit()
    rows = service.rows()
    waits = [(row.available_at - row.created_at).total_seconds() for row in rows]
    assert [60 <= wait < 70 for wait in waits] == [True, True, False, False, True]
    assert [row.available_at == eta for row in rows] == [False, False, True, True, False]
    assert service.publish() == 0


def test_the_row_says_which_task_it_is(service: Service) -> None:
    """For `show`, and for whoever looks with psql."""
    with Session(service.engine) as session:
        result = enqueue(session, service.add.s(1, 2), context={"user": 1})
        session.commit()
    (row,) = service.rows()
    assert (row.payload["task"], row.payload["id"], row.context) == ("add", result.id, {"user": 1})
    assert row.channel == "pgpubsub.enqueue"
    assert row.subscription is not None


def test_what_cannot_be_sent_is_refused_and_the_transaction_goes_on(service: Service) -> None:
    """Before anything is stored."""
    with Session(service.engine) as session:
        with pytest.raises(PayloadError, match="cannot be serialized"):
            enqueue(session, service.add.s(object(), 1))
        with pytest.raises(PayloadError, match=r"pass a signature of it, add\.s"):
            enqueue(session, service.add)
        with pytest.raises(PayloadError, match="no time zone"):
            enqueue(session, service.add.s(1, 2), eta=datetime.datetime(2030, 1, 1))  # noqa: DTZ001
        with pytest.raises(PayloadError, match="countdown is -5"):
            enqueue(session, service.add.s(1, 2).set(countdown=-5))
        enqueue(session, service.add.s(1, 2))
        session.commit()
    assert len(service.rows()) == 1


def test_engines_and_autocommit_are_refused(service: Service) -> None:
    """As by notify()."""
    with pytest.raises(BindError, match="enqueue"):
        enqueue(service.engine, service.add.s(1, 2))
    autocommit = create_engine(service.engine.url, isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection, pytest.raises(BindError, match="AUTOCOMMIT"):
        enqueue(connection, service.add.s(1, 2))
    autocommit.dispose()


def test_a_database_without_the_functions_says_so(service: Service, engine: Engine) -> None:
    """In enqueue's name."""
    with Session(engine) as session, pytest.raises(NotInstalledError, match=r"enqueue\(\)"):
        enqueue(session, service.add.s(1, 2))


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
def test_the_asynchronous_twin_does_the_same(worker: Service, installed_url: str, driver: str) -> None:
    """In an AsyncSession's transaction."""

    async def send() -> Any:
        engine = create_async_engine(sync_url(installed_url).set(drivername=driver))
        async with AsyncSession(engine) as session:
            await aenqueue(session, worker.add.s(0, 0))
            await session.rollback()
            result = await aenqueue(session, worker.add.s(1, 2), countdown=0)
            with pytest.raises(BindError, match=r"await aenqueue\("):
                enqueue(session, worker.add.s(1, 2))
            await session.commit()
        await engine.dispose()
        return result

    result = asyncio.run(send())
    assert worker.publish() == 1
    assert result.get(timeout=SECONDS) == 3


def test_a_bad_row_fails_alone(service: Service) -> None:
    """What psql has stored under the channel is failed with the reason, and holds nobody up."""
    with service.engine.begin() as connection:
        connection.exec_driver_sql("SELECT pgpubsub_notify('pgpubsub.enqueue', '{\"format\": 1}')")
    with Session(service.engine) as session:
        enqueue(session, service.add.s(1, 2))
        session.commit()
    assert service.publish() == 1
    (row,) = service.rows()
    assert row.state == "failed"
    assert "cannot be read" in row.error
