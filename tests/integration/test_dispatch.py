"""From claimed rows to messages, with a broker that the test looks into: what is published, failed, given back."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any, cast

import pytest
from amqp.exceptions import MessageNacked
from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, enqueue, notify, notify_many, subscriptions
from pgpubsub_celery.broker import Broker, Publication
from pgpubsub_celery.dispatch import REFUSED_DELAY, Dispatcher, Standing
from pgpubsub_celery.emit import ENQUEUE_LISTENER
from pgpubsub_celery.listeners import listeners_of
from pgpubsub_celery.measuring import Report
from pgpubsub_celery.messages import Message
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.store import Quota, Store


class Outage(Exception):
    """What a broker that is down raises."""


class Shelf:
    """A broker that keeps what it is given, builds it, and can be down."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.down = False
        self.kept: list[dict[str, Any]] = []
        self.published: list[Message] = []

    def publish(self, publications: Sequence[Publication]) -> list[BaseException | None]:
        if self.down:
            return [Outage("down")] * len(publications)
        outcomes: list[BaseException | None] = []
        with self.app.connection_for_write() as connection, self.app.amqp.Producer(connection) as producer:
            for publication in publications:
                try:
                    publication(self.app, producer)
                    outcomes.append(None)
                    told = getattr(publication, "args", (None,))[0]
                    self.published += [told] if isinstance(told, Message) else []
                except Exception as exc:  # noqa: BLE001 - an outcome for each message, as the real one
                    outcomes.append(exc)
        self.kept += [{}] * outcomes.count(None)
        return outcomes

    def is_outage(self, error: BaseException) -> bool:
        return isinstance(error, Outage)

    is_refusal = staticmethod(Broker.is_refusal)


class House:
    """A dispatcher on the test's database."""

    def __init__(self, engine: Engine) -> None:
        self.app = Celery("dispatch", broker="memory://", set_as_current=False)
        self.app.conf.task_default_queue = "dispatch"  # memory is shared with whoever else tests here

        @dataclasses.dataclass
        class Stored(Channel):
            lock_notifications = True
            value: int

        @dataclasses.dataclass
        class Heard(Channel):
            value: int

        @channel_task(Stored, app=self.app, name="dispatch.stored")
        def stored(value: int) -> None:
            """Never run here."""

        @channel_task(Heard, app=self.app, name="dispatch.one")
        def one(value: int) -> None:
            """Never run here."""

        @channel_task(Heard, app=self.app, name="dispatch.other")
        def other(value: int) -> None:
            """Never run here."""

        self.stored, self.heard = Stored, Heard
        self.store = Store("public")
        self.engine = engine
        self.connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        known = subscriptions.register(self.connection, "public", [*listeners_of(Stored), ENQUEUE_LISTENER])
        self.broker = Shelf(self.app)
        self.installation = self.store.installation(self.connection)
        self.dispatcher = Dispatcher(self.app, self.store, cast("Broker", self.broker), self.installation, Settings())
        self.dispatcher.know(known)
        self.quotas = [
            Quota(
                subscription=id,
                limit=100,
                lease=60.0,
                lease_max=600.0,
                with_payload=listener is ENQUEUE_LISTENER,
            )
            for id, listener in known.items()
        ]

    def dispatch(self) -> Any:
        claim = self.store.claim(self.connection, self.quotas, batch_size=100, max_starts=3)
        return self.dispatcher.dispatch(self.connection, claim.rows)

    def rows(self) -> list[Any]:
        return list(
            self.connection.execute(text("SELECT state, dispatches, error FROM pgpubsub_notification ORDER BY id"))
        )


def test_rows_are_dispatched_and_enqueued_tasks_are_gone_once_published(
    installed_engine: Engine, registry: None
) -> None:
    """The one waits for its listener, the other's promise is the broker's."""
    house = House(installed_engine)
    with Session(installed_engine) as session, session.begin():
        notify(session, house.stored(value=1))
        enqueue(session, house.app.signature("any.task", args=(1,)))
    assert house.dispatch().published == 2
    assert [row.state for row in house.rows()] == ["dispatched"]
    house.connection.close()


def test_a_measured_listener_with_a_session_is_bundled_by_itself(installed_engine: Engine, registry: None) -> None:
    """Alone while nothing is known, together once a worker has said that its runs are short; others stay alone."""
    house = House(installed_engine)

    @dataclasses.dataclass
    class Written(Channel):
        lock_notifications = True
        value: int

    @channel_task(Written, app=house.app, name="dispatch.written")
    def written(session: Session) -> None:
        """Never run here."""

    @channel_task(Written, app=house.app, name="dispatch.limited", rate_limit="10/s")
    def limited(session: Session) -> None:
        """Never run here."""

    @channel_task(Written, app=house.app, name="dispatch.called")
    def called(value: int) -> None:
        """Never run here."""

    known = subscriptions.register(house.connection, "public", listeners_of(Written))
    house.dispatcher.know(known)
    ids = {listener.name: id for id, listener in known.items()}
    house.quotas = [Quota(subscription=id, limit=100, lease=60.0, lease_max=600.0) for id in known]

    def sizes(more: bool) -> dict[str, list[int]]:
        with Session(installed_engine) as session, session.begin():
            notify_many(session, [Written(value=value) for value in range(10)])
        claim = house.store.claim(house.connection, house.quotas, batch_size=100, max_starts=3)
        house.broker.published.clear()
        house.dispatcher.measured = house.store.run_times(house.connection, list(known))
        house.dispatcher.dispatch(house.connection, claim.rows, {id: Standing(more=more) for id in known})
        found: dict[str, list[int]] = {}
        for message in house.broker.published:
            found.setdefault(message.task, []).append(len(message.envelope.ids))
        return found

    alone = [1] * 10
    assert sizes(True) == {"dispatch.written": alone, "dispatch.limited": alone, "dispatch.called": alone}
    for id in known:
        house.store.report_run_time(house.connection, id, uuid.uuid4(), Report(0.02, 100, None))
        house.store.report_run_time(house.connection, id, uuid.uuid4(), Report(0.03, 100, None))
    measured = house.store.run_times(house.connection, list(known))[ids["dispatch.written"]]
    assert measured.mean_seconds == pytest.approx(0.025)
    assert measured.processes == 2
    assert sizes(True) == {"dispatch.written": [4, 4, 2], "dispatch.limited": alone, "dispatch.called": alone}
    assert sizes(False)["dispatch.written"] == [3, 3, 3, 1]  # over two messages for each process
    house.connection.close()


def test_what_the_broker_refuses_waits_a_little_and_holds_up_nobody(
    installed_engine: Engine, registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full queue is no outage: others are published, and these are not tried again in the same moment."""
    house = House(installed_engine)
    publish = house.app.send_task

    def refusing(name: str, *args: Any, **options: Any) -> Any:
        if name == "dispatch.stored":
            raise MessageNacked
        return publish(name, *args, **options)

    monkeypatch.setattr(house.app, "send_task", refusing)
    with Session(installed_engine) as session, session.begin():
        notify(session, house.stored(value=1))
        enqueue(session, house.app.signature("any.task"))
    outcome = house.dispatch()
    assert (outcome.published, outcome.outage) == (1, None)
    (row,) = house.connection.execute(
        text(
            "SELECT state, dispatches, extract(epoch FROM available_at - clock_timestamp()) AS wait "
            "FROM pgpubsub_notification"
        )
    )
    assert (row.state, row.dispatches) == ("waiting", 0)
    assert REFUSED_DELAY / 2 < row.wait <= REFUSED_DELAY
    assert house.dispatch().published == 0
    house.connection.close()


def test_a_listener_s_queue_and_priority_are_those_of_its_task(installed_engine: Engine, registry: None) -> None:
    """As for any task of the application: routed by its options, and by task_routes."""
    house = House(installed_engine)
    house.app.conf.task_routes = {
        "dispatch.urgent": {"queue": "urgent", "priority": 7},
        "dispatch.routed": {"queue": "elsewhere"},
    }

    @dataclasses.dataclass
    class Sorted(Channel):
        lock_notifications = True

    @channel_task(Sorted, app=house.app, name="dispatch.urgent", expires=60)
    def urgent() -> None:
        """Never run here."""

    @channel_task(Sorted, app=house.app, name="dispatch.routed")
    def routed() -> None:
        """Never run here."""

    known = subscriptions.register(house.connection, "public", listeners_of(Sorted))
    house.dispatcher.know(known)
    house.quotas = [Quota(subscription=id, limit=100, lease=60.0, lease_max=600.0) for id in known]
    with Session(installed_engine) as session, session.begin():
        notify(session, Sorted())
    assert house.dispatch().published == 2
    with house.app.connection_for_read() as connection:
        for queue, task, priority in (("urgent", "dispatch.urgent", 7), ("elsewhere", "dispatch.routed", 0)):
            message = connection.SimpleQueue(queue).get(block=False)
            assert message.headers["task"] == task
            assert message.properties["priority"] == priority
            assert (message.headers["expires"] is not None) == (task == "dispatch.urgent")
    house.connection.close()


def test_an_outage_gives_back_what_was_claimed(installed_engine: Engine, registry: None) -> None:
    """As if it had never been claimed."""
    house = House(installed_engine)
    house.broker.down = True
    with Session(installed_engine) as session, session.begin():
        notify(session, house.stored(value=1))
        enqueue(session, house.app.signature("any.task"))
    assert house.dispatch().outage is not None
    assert [(row.state, row.dispatches) for row in house.rows()] == [("waiting", 0), ("waiting", 0)]
    house.connection.close()


def test_what_can_never_be_published_fails_alone(installed_engine: Engine, registry: None) -> None:
    """A malformed stored task is marked with the reason; the others are published."""
    house = House(installed_engine)
    with Session(installed_engine) as session, session.begin():
        enqueue(session, house.app.signature("any.task"))
        enqueue(session, house.app.signature("any.task"))
        session.execute(
            text(
                "UPDATE pgpubsub_notification SET payload = '{\"format\": 1}' "
                "WHERE id = (SELECT min(id) FROM pgpubsub_notification)"
            )
        )
    assert house.dispatch().published == 1
    (row,) = house.rows()
    assert row.state == "failed"
    assert "cannot be published" in row.error
    house.connection.close()


def test_an_unstored_message_goes_to_the_listeners_that_want_it(installed_engine: Engine, registry: None) -> None:
    """Not to those whose conditions its trigger has found unmet, and not for another installation."""
    house = House(installed_engine)
    message = {
        "installation": str(house.installation),
        "channel": house.heard.name(),
        "operation": "message",
        "payload": {"value": 1},
        "context": None,
        "created_at": "2026-01-01T00:00:00+00:00",
        "db_version": None,
    }
    assert house.dispatcher.dispatch_unstored(message, [house.heard]) is None
    assert len(house.broker.kept) == 2
    house.dispatcher.dispatch_unstored({**message, "unwanted": ["dispatch.other"]}, [house.heard])
    assert len(house.broker.kept) == 3
    house.dispatcher.dispatch_unstored({**message, "installation": str(uuid.uuid4())}, [house.heard])
    assert len(house.broker.kept) == 3
    house.connection.close()
