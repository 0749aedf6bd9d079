"""A bridge and keys: what it publishes together, when it looks again, and that blocked notifications let it sleep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, text

from pgpubsub_celery import Channel, channel_task, install, signals
from pgpubsub_celery.bridge import Bridge
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.migrations import register_subscriptions
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.store import Store
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.wakeups import Link, bridge_engine
from pgpubsub_celery.watch import MOMENT
from tests.fixtures.notifications import TABLE, Notifications

BATCH = 10


@dataclasses.dataclass
class Looking:
    """A bridge that looks when it is told to, at an ordered, a unique and a plain channel."""

    bridge: Bridge
    link: Link
    dispatcher: Dispatcher
    listeners: dict[int, Listener]
    published: list[tuple[int, ...]]
    notifications: Notifications

    def look(self) -> Any:
        looked = self.bridge.claim_and_dispatch(self.link, self.dispatcher, self.listeners)
        self.bridge.finish(self.link, self.dispatcher)
        return looked

    def look_to_the_end(self) -> int:
        """Look for as long as the bridge would without waiting; return how many looks that took."""
        for looks in range(1, 100):
            if not self.look().unfinished:
                return looks
        raise AssertionError("it would look for ever")

    def next_due(self) -> float | None:
        return self.bridge.next_due(self.link, self.listeners)

    def add(self, listener: str, count: int = 1, **columns: Any) -> list[int]:
        """Insert rows for a listener."""
        (id,) = [id for id, one in self.listeners.items() if one.name == listener]
        return self.notifications.add(count, subscription=id, channel=self.listeners[id].channel.name(), **columns)


@pytest.fixture
def looking(
    installed_engine: Engine, installed_url: str, registry: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Looking]:
    """One listener each."""
    app = Celery("looking", broker="memory://", set_as_current=False)

    @dataclasses.dataclass
    class Ordered(Channel):
        lock_notifications = True
        ordering_key = "key"
        key: str

    @dataclasses.dataclass
    class Unique(Channel):
        lock_notifications = True
        unique_key = "key"
        key: str

    @dataclasses.dataclass
    class Plain(Channel):
        lock_notifications = True
        key: str

    @channel_task(Ordered, app=app, name="ordered", bundle=3)
    def ordered(key: str) -> None: ...

    @channel_task(Unique, app=app, name="unique")
    def unique(key: str) -> None: ...

    @channel_task(Plain, app=app, name="plain")
    def plain(key: str) -> None: ...

    channels: list[type[Channel]] = [Ordered, Unique, Plain]
    install(installed_engine, channels=channels)
    published: list[tuple[int, ...]] = []

    def publish(broker: Broker, publications: Any) -> list[Exception | None]:
        published.extend(publication.args[0].envelope.ids for publication in publications)
        return [None] * len(publications)

    monkeypatch.setattr(Broker, "publish", publish)
    settings = Settings(database_url=installed_url, batch_size=BATCH, lease=1000.0)
    engine = bridge_engine(sync_url(installed_url))
    with Link(engine, engine, "public") as link:
        tasks: list[Any] = [ordered, unique, plain]
        listeners = register_subscriptions(link.claims, "public", [task.listener for task in tasks])
        store = Store("public")
        dispatcher = Dispatcher(app, store, Broker(app, timeout=1.0), store.installation(link.claims), settings)
        dispatcher.know(listeners)
        bridge = Bridge(app, settings, channels, Control())
        yield Looking(bridge, link, dispatcher, listeners, published, Notifications(installed_engine))
    app.close()


def test_consecutive_ones_of_a_key_share_a_message(looking: Looking) -> None:
    """As many as the listener's bundle, beside others; the rest waits for them."""
    a = looking.add("ordered", 4, ordering_key="a")
    b = looking.add("ordered", 2, ordering_key="b")
    assert looking.look().claimed == 5
    assert looking.published == [tuple(a[:3]), tuple(b)]


def test_what_waits_for_its_turn_lets_the_bridge_sleep(looking: Looking) -> None:
    """Nothing is due but what comes behind another: until a lease ends there is nothing to look for."""
    looking.add("ordered", 20, ordering_key="a")
    assert looking.look().claimed == 3
    looked = looking.look()
    assert (looked.claimed, looked.unfinished, looked.limited, looked.full) == (0, False, False, False)
    due = looking.next_due()
    assert due is not None
    assert due > 500
    looking.add("ordered", ordering_key="b", ago=-100)
    due = looking.next_due()
    assert due is not None
    assert due == pytest.approx(100, abs=30)


def test_what_has_become_due_since_the_last_look_is_due_now(looking: Looking) -> None:
    """Between a claim and the question when to look again, time passes."""
    looking.look()
    looking.add("ordered", ordering_key="a", ago=0)
    assert looking.next_due() == 0


def test_while_another_bridge_claims_it_looks_again_soon(looking: Looking) -> None:
    """And claims of the other channels meanwhile."""
    (a,) = looking.add("ordered", ordering_key="a")
    (plain,) = looking.add("plain")
    (subscription,) = [id for id, one in looking.listeners.items() if one.name == "ordered"]
    with looking.notifications.transaction() as other:
        lock = text("SELECT pg_advisory_xact_lock(pgpubsub_lock_key('claim', :id))")
        other.execute(lock, {"id": str(subscription)})
        looked = looking.look()
        assert (looked.claimed, looked.limited, looked.soon) == (1, True, MOMENT)
    assert looking.look().claimed == 1
    assert looking.published == [(plain,), (a,)]


def test_channels_with_and_without_keys_share_the_batches(looking: Looking) -> None:
    """Neither's backlog holds up the other."""
    for number in range(4 * BATCH):
        looking.add("ordered", ordering_key=str(number))
    plain = set(looking.add("plain", 4 * BATCH))
    for _ in range(6):
        assert looking.look().claimed == BATCH
        looking.notifications.execute(f"DELETE FROM {TABLE} WHERE state = 'dispatched'")
    mine = [id for ids in looking.published for id in ids if id in plain]
    assert BATCH <= len(mine) <= 5 * BATCH


def test_a_walk_through_many_keys_ends_and_begins_anew_when_something_happened(looking: Looking) -> None:
    """A key that became free behind the walk is found, without a look too many when nothing happened."""
    for number in range(250):
        looking.add("ordered", ordering_key=f"k{number:03}", state="held")
        looking.add("ordered", ordering_key=f"k{number:03}")
    first = looking.look_to_the_end()
    assert first >= 3
    assert looking.look().unfinished
    looking.notifications.execute(f"DELETE FROM {TABLE} WHERE ordering_key = 'k000' AND state = 'held'")
    looking.bridge.something_happened()
    assert looking.look_to_the_end() > first
    assert len(looking.published) == 1


def test_superseded_ones_are_told_by_a_signal(looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their ids, and the bridge looks on at once."""
    told: list[dict[str, Any]] = []

    def receive(sender: Any, **arguments: Any) -> None:
        told.append({"sender": sender, **{name: arguments[name] for name in ("ids", "count")}})

    signals.notification_superseded.connect(receive)
    try:
        older = looking.add("unique", 2, unique_key="a")
        (newest,) = looking.add("unique", unique_key="a", ago=-100)
        looked = looking.look()
    finally:
        signals.notification_superseded.disconnect(receive)
    assert (looked.claimed, looked.unfinished) == (0, True)
    assert [{**one, "ids": sorted(one["ids"])} for one in told] == [{"sender": "unique", "ids": older, "count": 2}]
    assert looking.notifications.ids() == [newest]
    assert not looking.look().unfinished
