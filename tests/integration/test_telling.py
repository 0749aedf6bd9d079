"""What Celery's monitors are told of the notifications of a bundle, and that nobody pays for it who does not ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.events import EventDispatcher
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, install, notify_many
from pgpubsub_celery.runs import Run
from pgpubsub_celery.telling import WANTED
from tests.fixtures.deliveries import Deliveries


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("telling", broker="memory://", set_as_current=False)
    app.conf.pgpubsub_database_url = installed_url
    app.conf.pgpubsub_bundle_target = 60  # a busy machine is not to cut a bundle short
    app.conf.task_default_queue = "telling"
    yield app
    app.close()


class Noted:
    """What is sent to monitors, in the place of a message to them."""

    def __init__(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[list[dict[str, Any]]] = []
        monkeypatch.setattr(EventDispatcher, "_publish", lambda _, told, *__, **___: self.messages.append(list(told)))

    def events(self) -> list[dict[str, Any]]:
        """Return all events, in order."""
        return [event for message in self.messages for event in message]


@pytest.fixture
def monitor(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Noted:
    """Somebody who listens to events."""
    return Noted(app, monkeypatch)


@pytest.fixture
def deliveries(registry: None, app: Celery, installed_engine: Engine) -> Deliveries:
    """Three notifications in one bundle: the second fails, the third is retried."""

    @dataclasses.dataclass
    class Told(Channel):
        channel_name = "telling.Told"
        lock_notifications = True
        number: int

    @channel_task(Told, app=app, name="telling.work", bundle=10, bind=True)
    def work(self: Any, number: int, session: Session) -> None:
        if number == 2:
            raise ValueError("two")
        if number == 3:
            raise self.retry(countdown=60)

    install(installed_engine, channels=[Told])
    deliveries = Deliveries(app, installed_engine)
    with Session(installed_engine) as session, session.begin():
        notify_many(session, [Told(number=number) for number in (1, 2, 3)])
    return deliveries


def test_each_notification_of_a_bundle_is_a_task_to_monitors(deliveries: Deliveries, monitor: Noted) -> None:
    """By its own task id: received, started, and how it ended; under the worker's name."""
    (message,) = deliveries.claim()
    ids = message.envelope.ids
    deliveries.deliver(message, {WANTED: True, "hostname": "celery@here"})
    assert len(monitor.messages) == 1
    events = monitor.events()
    told: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        told.setdefault(event["uuid"], []).append(event)
    assert [[event["type"] for event in each] for each in told.values()] == [
        ["task-received", "task-started", end] for end in ("task-succeeded", "task-failed", "task-retried")
    ]
    assert {event["hostname"] for event in events} == {"celery@here"}
    received = [each[0] for each in told.values()]
    assert {event["name"] for event in received} == {"telling.work"}
    assert [event["kwargs"] for event in received] == [f"<message notification {id} of telling.Told>" for id in ids]
    succeeded, failed, _ = (each[2] for each in told.values())
    assert succeeded["runtime"] >= 0
    assert failed["exception"] == "ValueError: two"
    assert "work" in failed["traceback"]
    assert all(each[0]["timestamp"] <= each[2]["timestamp"] for each in told.values())
    (row,) = (row for row in deliveries.rows() if row["state"] == "failed")
    assert row["task_id"] == failed["uuid"]


def test_without_monitors_nothing_is_told(deliveries: Deliveries, monitor: Noted) -> None:
    """The worker's parent says whether events are sent."""
    (message,) = deliveries.claim()
    deliveries.deliver(message)
    assert monitor.events() == []


def test_a_notification_alone_is_told_of_by_celery_itself(deliveries: Deliveries, monitor: Noted) -> None:
    """Its message is its task: to tell of it once more would count it twice."""
    deliveries.execute("UPDATE pgpubsub_notification SET dispatches = 1")
    for message in deliveries.claim():
        assert len(message.envelope.ids) == 1
        deliveries.deliver(message, {WANTED: True, "hostname": "celery@here"})
    assert monitor.events() == []


def test_events_that_cannot_be_sent_cost_no_notification(
    deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The effects are committed by then; the monitor misses something, and the log says so."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no broker")

    monkeypatch.setattr(deliveries.app.events, "Dispatcher", refuse)
    (message,) = deliveries.claim()
    deliveries.deliver(message, {WANTED: True, "hostname": "celery@here"})
    assert deliveries.states() == ["failed", "waiting"]
    assert "Events of 3 notification(s) were not sent: OSError: no broker" in caplog.text


def test_what_was_given_back_is_told_of_when_it_has_run(
    deliveries: Deliveries, monitor: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that circumstances ended is neither a success nor a failure: it comes again."""
    run = Run.run

    def interrupted(self: Run, *args: Any) -> Any:
        result = run(self, *args)
        self.outcome = "released"
        return result

    monkeypatch.setattr(Run, "run", interrupted)
    (message,) = deliveries.claim()
    deliveries.deliver(message, {WANTED: True, "hostname": "celery@here"})
    assert "task-succeeded" not in {event["type"] for event in monitor.events()}
