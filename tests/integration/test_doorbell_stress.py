"""Many writers against a bridge that falls asleep and wakes up all the time: nobody is left to the sweep."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, install, notify, watch
from pgpubsub_celery.bridge import Bridge
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.wakeups import Link
from tests.fixtures.notifications import TABLE, together, until

WRITERS = 6
ROUNDS = 100
MOMENTS = 300
HOUR = 3600.0
SOON = 10.0
"""Seconds in which a committed notification must be published, on a machine that has a lot to do; never an hour."""


@dataclasses.dataclass
class Bridges:
    """Real bridges in threads, which never sweep, on a broker in memory."""

    app: Celery
    settings: Settings
    channels: list[type[Channel]]
    running: list[tuple[Control, threading.Thread]] = dataclasses.field(default_factory=list)
    errors: list[BaseException] = dataclasses.field(default_factory=list)

    def start(self) -> None:
        """Return when one more listens."""
        ready = threading.Event()
        control = Control(replacement=bool(self.running), report=lambda _: ready.set())

        def run() -> None:
            try:
                Bridge(self.app, self.settings, self.channels, control).run()
            except BaseException as exc:  # noqa: BLE001 - shown by the test
                self.errors.append(exc)
                ready.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(SOON)
        self.running.append((control, thread))

    def stop(self, which: int = 0) -> None:
        """Stop one."""
        control, thread = self.running.pop(which)
        control.stopping.set()
        thread.join(SOON)
        assert not thread.is_alive()


@pytest.fixture
def channel(registry: None) -> type[Channel]:
    """A stored channel whose rows go when they are published, so that what is left was not."""

    @dataclasses.dataclass
    class Tick(Channel):
        channel_name = "stress.Tick"
        lock_notifications = True
        acknowledge = "published"
        number: int

    return Tick


@pytest.fixture
def bridges(channel: type[Channel], installed_engine: Engine, installed_url: str) -> Iterator[Bridges]:
    """None yet."""
    app = Celery("stress", broker="memory://", set_as_current=False)
    app.conf.task_ignore_result = True

    @channel_task(channel, app=app, name="stress.tick")
    def tick(number: int) -> None: ...

    install(installed_engine, channels=[channel])
    bridges = Bridges(app, Settings(database_url=installed_url, poll_interval=HOUR), [channel])
    yield bridges
    while bridges.running:
        bridges.stop()
    app.close()
    assert bridges.errors == []


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of the doors, one after another; bridges open and close them as often as possible."""
    events: list[str] = []
    close_doors, open_doors = Link.close_doors, Link.open_doors

    def close(link: Link) -> bool:
        closed = close_doors(link)
        events.append("closed" if closed else "kept open")
        return closed

    def open_(link: Link) -> None:
        if link._closed:
            events.append("opened")
        open_doors(link)

    monkeypatch.setattr(Link, "close_doors", close)
    monkeypatch.setattr(Link, "open_doors", open_)
    # A bridge opens its doors under load only: here the first ring is that.
    monkeypatch.setattr(watch, "RINGS_UNDER_LOAD", 0)
    return events


class Writer:
    """Commits, now and then not, at random moments."""

    def __init__(self, url: str, channel: type[Channel], seed: int) -> None:
        self._engine = create_engine(sync_url(url), pool_size=1)
        self._channel = channel
        self._random = random.Random(seed)
        self.committed = 0

    def write(self) -> None:
        """A few transactions, with pauses about as long as a bridge takes to fall asleep."""
        with Session(self._engine) as session:
            for number in range(self._random.randint(1, 4)):
                self._pause()
                emitted = self._emit(session, number)
                if self._random.random() < 0.3:
                    self._pause()
                if self._random.random() < 0.1:
                    session.rollback()
                else:
                    session.commit()
                    self.committed += emitted

    def write_once(self) -> None:
        """One transaction, after a pause in which a bridge may or may not have fallen asleep."""
        pause(self._random.uniform(0.0, 0.04))
        with Session(self._engine) as session, session.begin():
            self._notify(session, 0)

    def _emit(self, session: Session, number: int) -> int:
        emitted = 0
        if self._random.random() < 0.3:
            savepoint = session.begin_nested()
            self._notify(session, number)
            if self._random.random() < 0.5:
                savepoint.rollback()
            else:
                savepoint.commit()
                emitted += 1
        if emitted == 0 or self._random.random() < 0.5:
            self._notify(session, number)
            emitted += 1
        return emitted

    def _notify(self, session: Session, number: int) -> None:
        notify(session, self._channel(number=number))  # type: ignore[call-arg]

    def _pause(self) -> None:
        pause(self._random.choice([0.0, 0.002, 0.02, 0.03]) * self._random.random())

    def close(self) -> None:
        self._engine.dispose()


def pause(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.0005)


def stored(engine: Engine) -> int:
    with engine.connect() as connection:
        count: int = connection.execute(text(f"SELECT count(*) FROM {TABLE}")).scalar_one()
        return count


def write_rounds(
    bridges: Bridges, engine: Engine, rounds: int, between: Callable[[int], None] = lambda number: None
) -> int:
    """Let all writers write, wait until nothing is left, and again; return how many notifications there were."""
    (channel,) = bridges.channels
    url = str(bridges.settings.database_url)
    writers = [Writer(url, channel, seed) for seed in range(WRITERS)]
    for number in range(rounds):
        between(number)
        together(*(writer.write for writer in writers))
        until(lambda: stored(engine) == 0, timeout=SOON)
    for writer in writers:
        writer.close()
    return sum(writer.committed for writer in writers)


def test_no_commit_waits_for_the_sweep(bridges: Bridges, installed_engine: Engine, doors: list[str]) -> None:
    """Whenever a writer registers, rings, rolls back or commits: the bridge is awake, or it is rung."""
    bridges.start()

    def fall_asleep_first(number: int) -> None:
        if number % 2:
            until(lambda: doors[-1:] == ["closed"])

    committed = write_rounds(bridges, installed_engine, ROUNDS, fall_asleep_first)
    assert committed > ROUNDS * WRITERS
    # It did sleep and wake up, and was kept from it by registered writers, too: else this would have tried nothing.
    assert min(doors.count("closed"), doors.count("opened")) > ROUNDS / 4
    assert "kept open" in doors


def test_no_moment_of_falling_asleep_misses_a_commit(
    bridges: Bridges, installed_engine: Engine, doors: list[str]
) -> None:
    """One commit at a time, anywhere between the last look and sleep: no later one would wake the bridge for it."""
    bridges.start()
    (channel,) = bridges.channels
    writer = Writer(str(bridges.settings.database_url), channel, seed=1)
    for _ in range(MOMENTS):
        writer.write_once()
        until(lambda: stored(installed_engine) == 0, timeout=SOON)
    writer.close()
    assert min(doors.count("closed"), doors.count("opened")) > MOMENTS / 10


def test_no_commit_waits_for_the_sweep_while_bridges_come_and_go(
    bridges: Bridges, installed_engine: Engine, doors: list[str]
) -> None:
    """The keeper's end leaves the door to another, and nothing behind it."""
    bridges.start()
    bridges.start()
    gone: list[threading.Timer] = []

    def replace_the_eldest(number: int) -> None:
        if number % 4 == 3:
            bridges.start()
            gone.append(threading.Timer(0.02, bridges.stop))
            gone[-1].start()

    committed = write_rounds(bridges, installed_engine, ROUNDS // 4, replace_the_eldest)
    for timer in gone:
        timer.join(SOON)
    assert committed > ROUNDS // 4 * WRITERS
    assert "closed" in doors
