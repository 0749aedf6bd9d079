"""Both drivers, psycopg2 and psycopg 3: bridge and worker are the same with either, which the URL chooses.

The other tests of this folder run on one of them: on psycopg2, or with PGPUBSUB_TEST_DRIVER=psycopg on psycopg 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import Channel, NotificationInfo, TriggerChannel, channel_task, install, notify_many
from pgpubsub_celery.drivers import connect_arguments, sqlstate
from pgpubsub_celery.errors import ConnectionLostError
from pgpubsub_celery.migrations import uninstall
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.wakeups import Link, bridge_engine
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.notifications import until

LONG = 60.0


@pytest.fixture(params=["psycopg2", "psycopg"])
def url(request: pytest.FixtureRequest, installed_url: str) -> str:
    """A database with our tables, to be reached with each driver."""
    chosen = sync_url(installed_url).set(drivername=f"postgresql+{request.param}")
    return chosen.render_as_string(hide_password=False)


@pytest.fixture
def driver(url: str) -> Iterator[Engine]:
    """An engine of that driver."""
    engine = create_engine(sync_url(url))
    assert url.startswith(f"postgresql+{engine.dialect.driver}:")
    yield engine
    engine.dispose()


@pytest.fixture
def app(url: str, registry: None) -> Iterator[Celery]:
    """An application on that database."""
    app = Celery("drivers", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = url
    yield app
    Runtime.of(app).engine.dispose()
    app.close()


@dataclasses.dataclass
class Numbers(Channel):
    """Stored."""

    channel_name = "drivers.Numbers"
    lock_notifications = True
    number: int


def test_listeners_of_both_kinds_end_in_every_way(app: Celery, driver: Engine) -> None:
    """Acknowledged, retried, failed, given back and acknowledged by themselves: every statement of a worker."""
    done: list[tuple[str, int]] = []

    @channel_task(Numbers, app=app, bind=True, name="drivers.locked", bundle=10)
    def locked(self: Any, number: int, session: Session) -> None:
        session.execute(text("INSERT INTO effect VALUES (:n)"), {"n": number})
        _end(self, number)

    @channel_task(Numbers, app=app, bind=True, name="drivers.owned")
    def owned(self: Any, number: int, notification: NotificationInfo) -> None:
        with Session(driver) as session:
            if number == 4:
                notification.acknowledge(session)
            session.commit()
        _end(self, number)

    def _end(task: Any, number: int) -> None:
        done.append((task.name, number))
        if number == 2 and not task.request.retries:
            raise task.retry(countdown=0)
        if number == 3:
            raise ValueError("three")

    with driver.begin() as connection:
        connection.execute(text("CREATE TABLE effect (value int)"))
    deliveries = Deliveries(app, driver)
    with Session(driver) as session, session.begin():
        assert notify_many(session, [Numbers(n) for n in (1, 2, 3, 4)]) == 8
    deliveries.run_until_idle()
    ran = [1, 2, 2, 3, 4]
    assert sorted(done) == [(name, n) for name in ("drivers.locked", "drivers.owned") for n in ran]
    assert deliveries.states() == ["failed", "failed"]
    assert sorted(deliveries.scalars("SELECT value FROM effect")) == [1, 2, 4]


class Base(DeclarativeBase):
    """Of the model."""


class Thing(Base):
    """A table with values of many types."""

    __tablename__ = "drivers_thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[float | None]


def test_changes_of_a_table_arrive_as_its_model(app: Celery, driver: Engine, url: str) -> None:
    """Tables, functions and triggers are installed, changes decoded, and all removed again."""

    class Things(TriggerChannel[Thing]):
        channel_name = "drivers.Things"
        lock_notifications = True

    seen: list[tuple[str | None, str | None]] = []

    @channel_task(Things, on=("insert", "update"), app=app, name="drivers.follow")
    def follow(old: Thing | None, new: Thing | None, session: Session) -> None:
        seen.append((None if old is None else old.name, None if new is None else new.name))

    Base.metadata.create_all(driver)
    install(driver, channels=[Things])
    deliveries = Deliveries(app, driver)
    with Session(driver) as session, session.begin():
        session.add(Thing(id=1, name="100 %", price=1.5))
    with driver.begin() as connection:
        connection.execute(text("UPDATE drivers_thing SET name = 'it''s'"))
    deliveries.run_until_idle()
    assert seen == [(None, "100 %"), ("100 %", "it's")]
    uninstall(driver)


def test_a_bridge_hears_what_comes_while_it_waits_and_with_an_answer(url: str, driver: Engine) -> None:
    """Not its own rings; payloads arrive as they were sent."""
    with Link(bridge_engine(sync_url(url)), bridge_engine(sync_url(url)), "public") as link:
        link.listen(["bell"])
        link.ring(["bell"])
        assert link.rung() == []
        ring = text("SELECT pg_notify('bell', :payload)")
        later = threading.Timer(0.05, _committed, (driver, ring, "wäit"))
        later.start()
        link.wait(LONG, Control().stopping)
        later.join()
        assert [(one.channel, one.payload) for one in link.rung()] == [("bell", "wäit")]
        _committed(driver, ring, "answer")
        link.keep(["a.channel"])
        link.wait(LONG, Control().stopping)
        assert [one.payload for one in link.rung()] == ["answer"]
        assert link.rung() == []


@pytest.mark.parametrize("which", ["claims", "_listens"])
def test_a_lost_connection_ends_the_wait(url: str, driver: Engine, which: str) -> None:
    """Whichever of the two is lost, and then the other is closed as well."""
    with Link(bridge_engine(sync_url(url)), bridge_engine(sync_url(url)), "public") as link:
        lost: Any = getattr(link, which).connection.driver_connection
        with driver.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": lost.info.backend_pid})

        def noticed() -> bool:
            try:
                link.wait(LONG, Control().stopping)
                link.claims.execute(text("SELECT 1"))
                link.ring(["bell"])
            except (ConnectionLostError, DBAPIError):
                return True
            return False

        until(noticed)


def test_errors_say_their_state(driver: Engine) -> None:
    """And what never reached a server has none."""
    with driver.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text("SELECT 1/0"))
    assert sqlstate(caught.value) == "22012"
    nowhere = create_engine(driver.url.set(port=1))
    with pytest.raises(DBAPIError) as caught:
        nowhere.connect()
    assert sqlstate(caught.value) is None


def test_nothing_is_prepared_on_connections_of_ours(url: str, app: Celery) -> None:
    """A pooler between transactions would give the next one another server process."""
    with Runtime.of(app).autocommit() as connection:
        for _ in range(20):
            connection.execute(text("SELECT 1"))
        assert connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar() == 0
        name = connection.execute(text("SELECT current_setting('application_name')")).scalar()
    assert name == connect_arguments(sync_url(url), "pgpubsub-worker")["application_name"]


def test_a_soft_time_limit_in_the_middle_of_a_query_fails_that_run_alone(
    app: Celery, driver: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its transaction goes on: what the limit's handler interrupts is cancelled, or has ended."""

    @channel_task(Numbers, app=app, name="drivers.slow")
    def slow(number: int, session: Session) -> None:
        with contextlib.closing(_Alarm(0.2)):
            session.execute(text("SELECT pg_sleep(0.5)"))

    deliveries = Deliveries(app, driver)
    with Session(driver) as session, session.begin():
        notify_many(session, [Numbers(1)])
    deliveries.run()
    (row,) = deliveries.rows()
    assert (row["state"], row["error"]) == ("failed", "SoftTimeLimitExceeded: SoftTimeLimitExceeded()")
    assert "was not committed" not in caplog.text


class _Alarm:
    """Raises what a worker's child raises when its soft limit is over, in this thread, after some seconds."""

    def __init__(self, seconds: float) -> None:
        self._before = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _ring(self, *_: object) -> None:
        raise SoftTimeLimitExceeded

    def close(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


def _committed(engine: Engine, statement: Any, payload: str) -> None:
    with engine.begin() as connection:
        connection.execute(statement, {"payload": payload})
