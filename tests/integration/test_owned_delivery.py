"""Listeners without `session`: an owner token, no transaction open, at least once and never twice at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, signals
from celery.exceptions import Ignore, Reject
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, NotificationInfo, channel_task, notify_many
from pgpubsub_celery.errors import LeaseLostError, ListenerError
from pgpubsub_celery.runs import Run
from pgpubsub_celery.runtime import Runtime
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.garbage import collected

DEADLINE = 30.0


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database, with a quick heartbeat."""
    app = Celery("owned", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    app.conf.pgpubsub_heartbeat_interval = 0.05
    yield app
    app.close()


class Work:
    """One channel, one listener whose behaviour each test chooses."""

    def __init__(self, app: Celery, engine: Engine, **options: Any) -> None:
        @dataclasses.dataclass
        class Call(Channel):
            channel_name = "work.Call"
            lock_notifications = True
            value: int

        self.channel = Call
        self.engine = engine
        self.app = app
        self.calls: list[tuple[int, int]] = []
        self.do: Any = lambda task, value, notification: None

        @channel_task(Call, app=app, bind=True, name="work.call", **options)
        def call(task: Any, value: int, notification: NotificationInfo) -> Any:
            self.calls.append((value, task.request.retries))
            return self.do(task, value, notification)

        self.task: Any = call
        self.deliveries = Deliveries(app, engine)

    def emit(self, *values: int) -> None:
        with Session(self.engine) as session, session.begin():
            notify_many(session, [self.channel(value=value) for value in values])

    @property
    def states(self) -> list[str]:
        return self.deliveries.states()


@pytest.fixture
def work(app: Celery, installed_engine: Engine, registry: None) -> Work:
    """A listener without `session`."""
    return Work(app, installed_engine)


@pytest.fixture
def bundled(app: Celery, installed_engine: Engine, registry: None) -> Work:
    """The same, several in a message."""
    return Work(app, installed_engine, bundle=10)


def test_a_finished_run_is_acknowledged(work: Work) -> None:
    """The row goes when the listener returns."""
    work.emit(1)
    work.deliveries.run()
    assert work.calls == [(1, 0)]
    assert work.states == []


def test_a_bundle_leaves_nothing_to_the_garbage_collector(bundled: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run has a reference to itself."""
    # Whoever else has been imported into this process may watch.
    for signal in (signals.task_prerun, signals.task_postrun, signals.task_success):
        monkeypatch.setattr(signal, "receivers", [])
    bundled.emit(*range(10))
    bundled.deliveries.run()
    bundled.emit(*range(10, 20))
    (message,) = bundled.deliveries.claim()
    with collected() as garbage:
        bundled.deliveries.deliver(message)
    assert not [one for one in garbage if isinstance(one, Run)]
    assert len(bundled.calls) == 20


def test_while_it_runs_the_row_is_running_and_no_transaction_is_open(work: Work) -> None:
    """What a listener takes its time for holds nothing in Postgres."""
    seen: dict[str, Any] = {}

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        (seen["row"],) = work.deliveries.rows()
        seen["open"] = work.deliveries.scalars(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgpubsub-worker' AND state LIKE 'idle in%'"
        )

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert seen["row"]["state"] == "running"
    assert seen["row"]["owner"] is not None
    assert seen["row"]["starts"] == 1
    assert seen["open"] == [0]


def test_a_second_delivery_of_the_same_message_does_nothing(work: Work) -> None:
    """Neither while the first one runs nor afterwards."""
    work.emit(1)
    (message,) = work.deliveries.claim()
    work.do = lambda task, value, notification: work.calls == [(1, 0)] and work.deliveries.deliver(message)
    work.deliveries.deliver(message)
    work.deliveries.deliver(message)
    assert work.calls == [(1, 0)]
    assert work.states == []


def test_the_heartbeat_renews_the_lease_while_the_listener_runs(work: Work) -> None:
    """However long it takes."""

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        for _ in range(3):
            work.deliveries.execute("UPDATE pgpubsub_notification SET available_at = now() - interval '1 second'")
            deadline = threading.Event()
            while not work.deliveries.rows()[0]["later"]:
                assert not deadline.wait(0.01)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.states == []


def test_a_run_that_lost_its_lease_does_not_acknowledge_the_other_ones_row(work: Work) -> None:
    """Two workers: the first one comes too late, and says so."""
    again: list[Any] = []

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        if not again:
            Runtime.of(work.app).heartbeat.remove(notification.id or 0)
            work.deliveries.make_due()
            again.extend(work.deliveries.claim())

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.states == ["dispatched"]
    work.deliveries.deliver(again[0])
    assert len(work.calls) == 2
    assert work.states == []


def test_failures_retries_and_rejects_write_the_row(bundled: Work) -> None:
    """Each of a bundle as it ends."""

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        if value == 1:
            raise ValueError("broken")
        if value == 2 and task.request.retries == 0:
            raise task.retry(countdown=300)
        if value == 3:
            raise Reject("no", requeue=False)
        if value == 4:
            raise Ignore

    bundled.do = do
    bundled.emit(1, 2, 3, 4, 5)
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    assert bundled.states == ["failed", "waiting", "failed"]
    broken, waiting, _ = bundled.deliveries.rows()
    assert broken["error"] == "ValueError: broken"
    assert waiting["retries"] == 1
    assert waiting["owner"] is None
    assert 290 < waiting["seconds"] <= 300
    bundled.deliveries.make_due()
    bundled.deliveries.run()
    assert bundled.states == ["failed", "failed"]
    assert (2, 1) in bundled.calls


def test_a_crash_in_a_bundle_leaves_at_most_one_run_unacknowledged(bundled: Work) -> None:
    """The finished ones are gone, the rest has not begun; starts count the one that died."""

    class Killed(BaseException):
        pass

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        if value == 2:
            raise Killed

    bundled.do = do
    bundled.emit(1, 2, 3)
    (message,) = bundled.deliveries.claim()
    with pytest.raises(Killed):
        bundled.deliveries.deliver(message)
    died, rest = bundled.deliveries.rows()
    assert (died["state"], died["starts"]) == ("running", 1)
    assert (rest["state"], rest["starts"]) == ("waiting", 0)


def test_a_payload_that_cannot_be_decoded_fails_alone(bundled: Work) -> None:
    """The others of its bundle run."""
    bundled.deliveries.execute("CREATE TABLE alembic_version AS SELECT 'r7' AS version_num")
    bundled.emit(1, 2, 3)
    bundled.deliveries.execute("UPDATE alembic_version SET version_num = 'r9'")
    bundled.deliveries.execute("UPDATE pgpubsub_notification SET payload = '{}' WHERE payload->>'value' = '2'")
    bundled.deliveries.run()
    assert [value for value, _ in bundled.calls] == [1, 3]
    assert bundled.states == ["failed"]
    (row,) = bundled.deliveries.rows()
    assert "stored at version r7 of the database, which is now at r9" in row["error"]


def test_acknowledge_makes_result_and_acknowledgement_one(work: Work) -> None:
    """Slow work first, then one short transaction."""
    work.deliveries.execute("CREATE TABLE result (value int)")

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        with Session(work.engine) as session, session.begin():
            session.execute(text("INSERT INTO result VALUES (:value)"), {"value": value})
            notification.acknowledge(session)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.deliveries.scalars("SELECT value FROM result") == [1]
    assert work.states == []


def test_acknowledge_after_the_lease_was_lost_is_refused(work: Work) -> None:
    """The listener rolls back; the other worker's result is the one that counts."""
    errors: list[Exception] = []

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        work.deliveries.make_due()
        work.deliveries.execute("UPDATE pgpubsub_notification SET owner = gen_random_uuid()")
        with Session(work.engine) as session:
            try:
                notification.acknowledge(session)
            except LeaseLostError as exc:
                errors.append(exc)
                raise

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert len(errors) == 1
    assert work.states == ["running"]


def test_acknowledge_without_a_commit_fails_the_notification(work: Work) -> None:
    """Otherwise the result would be lost without a word."""

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        with Session(work.engine) as session:
            notification.acknowledge(session)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    (row,) = work.deliveries.rows()
    assert row["state"] == "failed"
    assert "commit" in row["error"]


def test_an_error_after_a_committed_acknowledgement_does_not_run_it_again(work: Work) -> None:
    """It is done: the row went with the result."""

    def do(task: Any, value: int, notification: NotificationInfo) -> None:
        with Session(work.engine) as session, session.begin():
            notification.acknowledge(session)
        raise ValueError("afterwards")

    work.do = do
    work.emit(1)
    (result,) = work.deliveries.run()
    assert result.info.state == "FAILURE"
    assert work.states == []


def test_acknowledge_is_refused_where_the_session_is_the_workers(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """A listener with `session` is acknowledged with it."""
    errors: list[Exception] = []

    @dataclasses.dataclass
    class Other(Channel):
        lock_notifications = True
        value: int

    @channel_task(Other, app=app, name="work.other")
    def other(value: int, session: Session, notification: NotificationInfo) -> None:
        try:
            notification.acknowledge(session)
        except ListenerError as exc:
            errors.append(exc)

    deliveries = Deliveries(app, installed_engine)
    with Session(installed_engine) as session, session.begin():
        notify_many(session, [Other(value=1)])
    deliveries.run()
    assert len(errors) == 1
    assert deliveries.states() == []
