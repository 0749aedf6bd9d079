"""From claimed rows to messages, with a broker that the test looks into: what is published, failed, given back."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any, cast

from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, enqueue, notify, subscriptions
from pgpubsub_celery.broker import Broker, Publication
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.emit import ENQUEUE_LISTENER
from pgpubsub_celery.listeners import listeners_of
from pgpubsub_celery.store import Quota, Store


class Outage(Exception):
    """What a broker that is down raises."""


class Shelf:
    """A broker that keeps what it is given, builds it, and can be down."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.down = False
        self.kept: list[dict[str, Any]] = []

    def publish(self, publications: Sequence[Publication]) -> list[BaseException | None]:
        if self.down:
            return [Outage("down")] * len(publications)
        outcomes: list[BaseException | None] = []
        with self.app.connection_for_write() as connection, self.app.amqp.Producer(connection) as producer:
            for publication in publications:
                try:
                    publication(self.app, producer)
                    outcomes.append(None)
                except Exception as exc:  # noqa: BLE001 - an outcome for each message, as the real one
                    outcomes.append(exc)
        self.kept += [{}] * outcomes.count(None)
        return outcomes

    def is_outage(self, error: BaseException) -> bool:
        return isinstance(error, Outage)


class House:
    """A dispatcher on the test's database."""

    def __init__(self, engine: Engine) -> None:
        self.app = Celery("dispatch", broker="memory://", set_as_current=False)

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
        self.dispatcher = Dispatcher(self.app, self.store, cast("Broker", self.broker), self.installation)
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
