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
from pgpubsub_celery.watch import Watch
from tests.fixtures.notifications import Notifications
from tests.fixtures.processes import eventually

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
        looked = self.bridge.claim_and_dispatch(self.link, self.dispatcher, self.listeners)
        # What is published while the next look claims is told by the next; here each look is the last.
        self.bridge.finish(self.link, self.dispatcher)
        outage, self.bridge._outage = self.bridge._outage, None
        return dataclasses.replace(looked, outage=looked.outage or outage)

    @property
    def quota(self) -> int:
        (pace,) = self.bridge._claims.paces.values()
        return pace.quota


@pytest.fixture
def looking(
    installed_engine: Engine,
    installed_url: str,
    registry: None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Looking]:
    """One channel with one listener; parametrized: when its rows go."""
    app = Celery("looking", broker="memory://", set_as_current=False)

    @dataclasses.dataclass
    class Seen(Channel):
        channel_name = "looking.Seen"
        lock_notifications = True
        acknowledge = getattr(request, "param", "finished")

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


@pytest.mark.parametrize("looking", ["published"], indirect=True)
def test_what_goes_at_publication_is_claimed_while_others_are_published(
    looking: Looking, notifications: Notifications
) -> None:
    """Batches that the broker has not confirmed yet, this bridge's and others', leave room for the next."""
    (subscription,) = looking.listeners
    notifications.dispatch(3 * BATCH, subscription=subscription, channel="looking.Seen")
    others = notifications.ids()
    ids = notifications.add(3 * BATCH, subscription=subscription, channel="looking.Seen", ago=0)
    for number in (1, 2, 3):
        looked = looking.bridge.claim_and_dispatch(looking.link, looking.dispatcher, looking.listeners)
        assert looked.claimed == BATCH, f"look {number}"
    looking.bridge.finish(looking.link, looking.dispatcher)
    assert [id for (id,) in looking.published] == ids
    assert notifications.ids() == others


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


def test_without_a_broker_a_bridge_is_keeper_of_nothing(
    looking: Looking, notifications: Notifications, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Awake when it loses its broker, it would leave every writer silent: another must be able to keep the doors."""
    (subscription,) = looking.listeners
    assert looking.link.keep(["looking.Seen"]) == {"looking.Seen"}
    notifications.add(1, subscription=subscription, channel="looking.Seen", ago=0)
    looking.outage.append(ConnectionRefusedError("down"))
    stopping = looking.bridge.control.stopping
    monkeypatch.setattr(looking.bridge, "broker_failed", lambda error: stopping.set())
    engine = bridge_engine(notifications.engine.url)
    with Link(engine, engine, "public") as other:
        other.listen([looking.listeners[subscription].channel.listen_safe_name()])
        assert other.keep(["looking.Seen"]) == set()
        Watch(looking.bridge, looking.link, looking.dispatcher, looking.listeners).run()
        eventually(other.rung, "the other bridge was told to look", within=10)
        assert other.keep(["looking.Seen"]) == {"looking.Seen"}
        assert other.close_doors()


def test_one_listener_s_backlog_does_not_hold_up_another_s(looking: Looking, notifications: Notifications) -> None:
    """Each look begins with another listener: what comes late for one waits for a batch, not for a backlog."""
    (first,) = looking.listeners
    second = first + 1000
    looking.listeners[second] = dataclasses.replace(looking.listeners[first], name="looking.other")
    looking.dispatcher.know(looking.listeners)
    backlog = notifications.add(10 * BATCH, subscription=first, channel="looking.Seen", ago=0)
    for _ in range(2):
        looking.look()
    (late,) = notifications.add(1, subscription=second, channel="looking.Seen", ago=0)
    for _ in range(2):
        looking.look()
    published = [id for ids in looking.published for id in ids]
    assert late in published
    assert len(set(published) & set(backlog)) <= 4 * BATCH


def test_a_listener_at_its_quota_leaves_the_batch_to_others(looking: Looking, notifications: Notifications) -> None:
    """A listener without workers fills its quota once, and never the broker; the others go on."""
    (stuck,) = looking.listeners
    going = stuck + 1000
    looking.listeners[going] = dataclasses.replace(looking.listeners[stuck], name="looking.other")
    looking.dispatcher.know(looking.listeners)
    notifications.add(20 * FLOOR, subscription=stuck, channel="looking.Seen", ago=0)
    others = notifications.add(2 * FLOOR, subscription=going, channel="looking.Seen", ago=0)
    for _ in range(20 * FLOOR // BATCH):
        looking.look()
        # The other listener's worker finishes at once.
        notifications.execute(
            "DELETE FROM pgpubsub_notification WHERE subscription = :going AND state = 'dispatched'", going=going
        )
    published = [id for ids in looking.published for id in ids]
    assert set(others) <= set(published)
    assert len(published) - len(others) == FLOOR


def test_what_was_claimed_while_an_earlier_batch_failed_to_publish_is_given_back(
    looking: Looking, notifications: Notifications, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next claim overlaps publishing: an exception there must not leave what it claimed to its lease."""
    (subscription,) = looking.listeners
    ids = notifications.add(2 * BATCH, subscription=subscription, channel="looking.Seen", ago=0)

    def fail(broker: Broker, publications: Any) -> list[Exception | None]:
        raise SystemExit("a bug, while publishing")

    monkeypatch.setattr(Broker, "publish", fail)
    look = looking.bridge.claim_and_dispatch
    assert look(looking.link, looking.dispatcher, looking.listeners).full
    with pytest.raises(SystemExit):
        look(looking.link, looking.dispatcher, looking.listeners)
    assert notifications.ids("waiting") == ids
