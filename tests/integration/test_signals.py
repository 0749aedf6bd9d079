"""Signals of our own: each step of a notification's life is told once, of as many as it was, where it happened."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.utils.dispatch import Signal
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, install, notify, notify_many, signals, upkeep
from pgpubsub_celery.bridge import Bridge
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.migrations import register_subscriptions
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.store import Store
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.upkeep import Selection
from pgpubsub_celery.wakeups import Link, bridge_engine
from tests.fixtures.deliveries import Deliveries

ALL: dict[str, Signal] = {name: getattr(signals, name) for name in signals.__all__}


class Heard:
    """All that was sent, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, signal: Signal, **told: Any) -> None:
        self.sent.append((signal.name, told))

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return what came with one signal."""
        return [told for sent, told in self.sent if sent == name]

    def counts(self) -> dict[str, int]:
        """Return how many notifications each signal told of, since the last time."""
        counts: Counter[str] = Counter()
        for name, told in self.sent:
            assert not told.get("ids") or told["count"] == len(told["ids"])
            counts[name.removeprefix("notification_")] += told["count"]
        self.sent.clear()
        return dict(counts)


@pytest.fixture
def heard() -> Iterator[Heard]:
    """A receiver of every signal."""
    heard = Heard()
    for signal in ALL.values():
        signal.connect(heard, weak=False)
    yield heard
    for signal in ALL.values():
        signal.disconnect(heard)


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("signals", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    app.conf.pgpubsub_bundle_target = 60  # a busy machine is not to cut a bundle short
    yield app
    app.close()


def test_every_outcome_of_a_run_is_told_once_it_is_committed(
    app: Celery, installed_engine: Engine, registry: None, heard: Heard
) -> None:
    """With a session and without, bundled and alone: acknowledged, retried, failed, given back, dropped."""

    @dataclasses.dataclass
    class Told(Channel):
        channel_name = "signals.Told"
        lock_notifications = True
        value: int

    def behave(self: Any, value: int) -> None:
        if value == 2:
            raise self.retry(countdown=60, exc=OSError("no route"))
        if value == 3:
            raise ValueError("poison")

    @channel_task(Told, app=app, name="signals.with_session", bundle=10, bind=True, max_retries=5)
    def with_session(self: Any, value: int, session: Session) -> None:
        behave(self, value)
        if heard.of("notification_acknowledged"):
            raise AssertionError("told before it was committed")

    @channel_task(Told, app=app, name="signals.without", bind=True, max_retries=5)
    def without(self: Any, value: int) -> None:
        behave(self, value)

    install(installed_engine, channels=[Told])
    with Session(installed_engine) as session, session.begin():
        notify_many(session, [Told(value=value) for value in range(4)])
        notify(session, Told(value=4))
    assert heard.counts() == {"emitted": 5}

    deliveries = Deliveries(app, installed_engine)
    messages = deliveries.claim()
    for message in messages:
        deliveries.deliver(message)
    failed = {told["sender"]: told for told in heard.of("notification_failed")}
    assert set(failed) == {"signals.with_session", "signals.without"}
    for told in failed.values():
        assert (told["channel"], told["error"]) == ("signals.Told", "ValueError: poison")
    acknowledged = [told["count"] for told in heard.of("notification_acknowledged")]
    assert sorted(acknowledged) == [1, 1, 1, 3], "a bundle is told at once"
    assert heard.counts() == {"acknowledged": 6, "retried": 2, "failed": 2}

    for message in messages:
        deliveries.deliver(message)
    assert heard.counts() == {"dropped": 10}
    assert len(deliveries.rows()) == 4

    with installed_engine.begin() as connection:
        upkeep.retry_batch(connection, "public", Selection(states=("failed",)), after=0, last=10**6)
    with installed_engine.begin() as connection:
        upkeep.discard_batch(connection, "public", Selection(channels=("signals.Told",)), after=0, last=10**6)
    assert heard.counts() == {"recovered": 2, "discarded": 4}


def test_a_bridge_tells_what_it_claims_and_what_the_broker_took(
    app: Celery,
    installed_engine: Engine,
    installed_url: str,
    registry: None,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By listener; what it could not publish is given back, what goes at publication is acknowledged."""

    @dataclasses.dataclass
    class Kept(Channel):
        channel_name = "signals.Kept"
        lock_notifications = True

    @dataclasses.dataclass
    class Passed(Channel):
        channel_name = "signals.Passed"
        lock_notifications = True
        acknowledge = "published"

    @channel_task(Kept, app=app, name="signals.keep")
    def keep() -> None: ...

    @channel_task(Passed, app=app, name="signals.passed")
    def passed() -> None: ...

    install(installed_engine, channels=[Kept, Passed])
    app.finalize()
    engine = bridge_engine(sync_url(installed_url))
    settings = Settings(database_url=installed_url)
    with Link(engine, engine, "public") as link:
        mine = [keep.listener, passed.listener]  # type: ignore[attr-defined]
        listeners = register_subscriptions(link.claims, "public", mine)
        store = Store("public")
        dispatcher = Dispatcher(app, store, Broker(app, timeout=1.0), store.installation(link.claims), settings)
        dispatcher.know(listeners)
        bridge = Bridge(app, settings, [Kept, Passed], Control())

        def look() -> dict[str, int]:
            with Session(installed_engine) as session, session.begin():
                notify_many(session, [Kept(), Kept(), Passed()])
            heard.sent.clear()
            bridge.claim_and_dispatch(link, dispatcher, listeners)
            bridge.finish(link, dispatcher)
            return heard.counts()

        assert look() == {"claimed": 3, "published": 3, "acknowledged": 1}
        with monkeypatch.context() as patch:
            down: Any = lambda broker, publications: [ConnectionRefusedError("down")] * len(publications)  # noqa: E731
            patch.setattr(Broker, "publish", down)
            assert look() == {"claimed": 3, "released": 3}
        with monkeypatch.context() as patch:
            wrong: Any = lambda broker, publications: [TypeError("not JSON")] * len(publications)  # noqa: E731
            patch.setattr(Broker, "publish", wrong)
            assert look() == {"claimed": 6, "failed": 6}


def test_a_receiver_that_raises_harms_nobody(
    app: Celery, installed_engine: Engine, registry: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Celery logs it; the notification is acknowledged all the same."""

    @dataclasses.dataclass
    class Harmless(Channel):
        channel_name = "signals.Harmless"
        lock_notifications = True

    @channel_task(Harmless, app=app, name="signals.harmless")
    def harmless(session: Session) -> None:
        session.execute(text("SELECT 1"))

    def harm(**_: Any) -> None:
        raise RuntimeError("a bug in somebody's receiver")

    install(installed_engine, channels=[Harmless])
    signals.notification_acknowledged.connect(harm)
    try:
        with Session(installed_engine) as session, session.begin():
            notify(session, Harmless())
        deliveries = Deliveries(app, installed_engine)
        deliveries.run()
    finally:
        signals.notification_acknowledged.disconnect(harm)
    assert deliveries.rows() == []
    assert "a bug in somebody's receiver" in caplog.text


def test_all_signals_are_documented() -> None:
    """Each in its page's table, with the arguments that it is sent with."""
    from pathlib import Path

    page = Path(__file__).parents[2].joinpath("docs/signals.md").read_text()
    for name, signal in ALL.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        for argument in signal.providing_args - {"channel", "ids", "count"}:
            assert f"`{argument}`" in line, name
