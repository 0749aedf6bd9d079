"""A claim is published before it is on disk: what becomes of its messages when Postgres crashes in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, install, notify
from tests.fixtures.deliveries import Deliveries


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """A worker's application."""
    app = Celery("lost", broker="memory://", set_as_current=False)
    app.conf.pgpubsub_database_url = installed_url
    yield app
    app.close()


Make = Callable[[list[int]], Deliveries]


@pytest.fixture(params=["with a session", "without"])
def make(request: pytest.FixtureRequest, registry: None, app: Celery, installed_engine: Engine) -> Make:
    """Make a listener that notes its runs, and one notification for it."""

    def make(runs: list[int]) -> Deliveries:
        @dataclasses.dataclass
        class Lost(Channel):
            channel_name = "lost.Lost"
            lock_notifications = True
            number: int

        def with_session(number: int, session: Session) -> None:
            runs.append(number)

        def without(number: int) -> None:
            runs.append(number)

        function = with_session if request.param == "with a session" else without
        channel_task(Lost, app=app, name="lost.work")(function)
        install(installed_engine, channels=[Lost])
        with Session(installed_engine) as session, session.begin():
            notify(session, Lost(number=1))
        return Deliveries(app, installed_engine)

    return make


def crash(deliveries: Deliveries) -> None:
    """As after a crash: of what was not on disk nothing is left, and the row is as it was stored."""
    deliveries.execute("UPDATE pgpubsub_notification SET state = 'waiting', dispatches = 0, available_at = created_at")


@pytest.mark.parametrize("first", ["the lost claim's", "the next claim's"])
def test_of_two_messages_with_one_count_the_first_runs_and_the_other_finds_nothing(make: Make, first: str) -> None:
    """The lost claim's message and the next one's are alike; whichever comes first."""
    runs: list[int] = []
    deliveries = make(runs)
    (lost,) = deliveries.claim()
    crash(deliveries)
    (again,) = deliveries.claim()
    assert again.envelope == lost.envelope
    for message in (lost, again) if first == "the lost claim's" else (again, lost):
        deliveries.deliver(message)
    assert runs == [1]
    assert deliveries.states() == []


def test_a_message_of_a_lost_claim_finds_nothing_until_the_row_is_claimed_again(make: Make) -> None:
    """The row is waiting: nobody has given it to this message."""
    runs: list[int] = []
    deliveries = make(runs)
    (lost,) = deliveries.claim()
    crash(deliveries)
    deliveries.deliver(lost)
    assert runs == []
    assert deliveries.states() == ["waiting"]
    deliveries.run_until_idle()
    assert runs == [1]
    assert deliveries.states() == []
