"""The bridge's look: what it remembers from one claim to the next, and what an outage makes of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine

from pgpubsub_celery import Channel, channel_task, install
from pgpubsub_celery.bridge import Bridge
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.migrations import register_subscriptions
from pgpubsub_celery.pacing import FLOOR
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.store import Store
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.wakeups import Link, bridge_engine
from tests.fixtures.notifications import Notifications

BATCH = 5


@dataclasses.dataclass
class Looking:
    """A bridge that looks when it is told to, and a broker that may be down."""

    bridge: Bridge
    link: Link
    dispatcher: Dispatcher
    listeners: dict[int, Listener]
    published: list[tuple[int, ...]]
    outage: list[Exception]

    def look(self) -> Any:
        return self.bridge.claim_and_dispatch(self.link, self.dispatcher, self.listeners)

    @property
    def quota(self) -> int:
        (pace,) = self.bridge._paces.values()
        return pace.quota


@pytest.fixture
def looking(
    installed_engine: Engine, installed_url: str, registry: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Looking]:
    """One channel with one listener."""
    app = Celery("looking", broker="memory://", set_as_current=False)

    @dataclasses.dataclass
    class Seen(Channel):
        channel_name = "looking.Seen"
        lock_notifications = True

    @channel_task(Seen, app=app, name="looking.see")
    def see() -> None: ...

    install(installed_engine, channels=[Seen])
    published: list[tuple[int, ...]] = []
    outage: list[Exception] = []

    def publish(broker: Broker, publications: Any) -> list[Exception | None]:
        if outage:
            return [outage[0]] * len(publications)
        published.extend(publication.args[0].envelope.ids for publication in publications)
        return [None] * len(publications)

    monkeypatch.setattr(Broker, "publish", publish)
    settings = Settings(database_url=installed_url, batch_size=BATCH)
    engine = bridge_engine(sync_url(installed_url))
    with Link(engine, engine, "public") as link:
        listeners = register_subscriptions(link.claims, "public", [see.listener])  # type: ignore[attr-defined]
        store = Store("public")
        dispatcher = Dispatcher(app, store, Broker(app, timeout=1.0), store.installation(link.claims), settings)
        dispatcher.know(listeners)
        yield Looking(Bridge(app, settings, [Seen], Control()), link, dispatcher, listeners, published, outage)
    app.close()


def test_what_an_outage_gave_back_comes_first_when_it_is_over(looking: Looking, notifications: Notifications) -> None:
    """A drain goes on where it left off, but not past what was not published."""
    (subscription,) = looking.listeners
    ids = notifications.add(3 * BATCH, subscription=subscription, channel="looking.Seen", ago=0)
    assert looking.look().full
    looking.outage.append(ConnectionRefusedError("down"))
    assert looking.look().outage is not None
    looking.outage.clear()
    looking.look()
    assert looking.published == [(id,) for id in ids[: 2 * BATCH]]


def test_what_an_outage_gave_back_is_not_taken_for_finished(looking: Looking, notifications: Notifications) -> None:
    """A broker that comes back must not be flooded, as if the workers had been quick."""
    (subscription,) = looking.listeners
    notifications.add(4 * BATCH, subscription=subscription, channel="looking.Seen", ago=0)
    looking.outage.append(ConnectionRefusedError("down"))
    for _ in range(5):
        looking.look()
    looking.outage.clear()
    looking.look()
    assert looking.quota == FLOOR
