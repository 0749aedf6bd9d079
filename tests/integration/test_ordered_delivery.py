"""Ordering keys in a worker: inside one message, and when the next of a key may follow."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, NotificationInfo, channel_task, install, notify, notify_many
from pgpubsub_celery.drivers import wire
from pgpubsub_celery.messages import Message
from pgpubsub_celery.upkeep import Selection, discard_batch, retry_batch
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.notifications import until


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("ordered", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    app.conf.pgpubsub_bundle_target = 60.0
    yield app
    app.close()


class Work:
    """An ordered channel and one listener of it, of any kind, whose behaviour each test chooses."""

    def __init__(
        self, app: Celery, engine: Engine, *, kind: str = "locked", failed_key: str = "holds", **options: Any
    ) -> None:
        @dataclasses.dataclass
        class Step(Channel):
            channel_name = "ordered.Step"
            lock_notifications = True
            ordering_key = "key"
            key: str
            value: int

        Step.failed_key = failed_key  # type: ignore[assignment]
        self.channel = Step
        self.engine = engine
        self.ran: list[Any] = []
        self.does: dict[int, Callable[[Any], Any]] = {}
        options = {"app": app, "bind": True, "name": "ordered.handle", **options}

        def run(task: Any, value: int) -> None:
            self.ran.append(value)
            self.act(task, value)

        if kind == "locked":

            @channel_task(Step, **{"bundle": 10, **options})
            def handle(task: Any, value: int, session: Session) -> None:
                self.session = session
                run(task, value)

        elif kind == "owned":

            @channel_task(Step, **{"bundle": 10, **options})
            def handle_apart(task: Any, value: int, notification: NotificationInfo) -> None:
                self.notification = notification
                run(task, value)

        else:

            @channel_task(Step, batch=10, **options)
            def handle_list(task: Any, steps: list[Any]) -> None:
                self.ran.append([step.value for step in steps])
                for step in steps:
                    self.act(task, step.value)

        install(engine, channels=[Step])
        self.deliveries = Deliveries(app, engine)

    def act(self, task: Any, value: int) -> None:
        """Do what the test wants to happen with this value, if anything."""
        if value in self.does:
            self.does[value](task)

    def emit(self, keys: str) -> None:
        """Emit a step for each letter, which is its key; values count from 1."""
        with Session(self.engine) as session, session.begin():
            notify_many(session, [self.channel(key=key, value=n) for n, key in enumerate(keys, 1)])

    def deliver(self) -> None:
        """Claim, and deliver the one message that there is."""
        (message,) = self.deliveries.claim()
        self.deliveries.deliver(message)

    def left(self) -> dict[int, str]:
        """Return the state of what is stored, by its value."""
        return {row["payload"]["value"]: row["state"] for row in self.deliveries.rows()}


@pytest.fixture(params=["locked", "owned"])
def kind(request: pytest.FixtureRequest) -> str:
    """A listener with `session`, or without."""
    return str(request.param)


def fail(task: Any) -> None:
    raise ValueError("no")


def give_back(task: Any) -> None:
    raise Reject("not now", requeue=True)


def retry(task: Any) -> None:
    raise task.retry(countdown=60)


@pytest.mark.parametrize(
    ("ends", "state"), [(fail, "failed"), (give_back, "waiting"), (retry, "waiting")], ids=["fails", "back", "retry"]
)
def test_what_comes_behind_one_that_is_not_finished_is_given_back(
    app: Celery, installed_engine: Engine, registry: None, kind: str, ends: Callable[[Any], None], state: str
) -> None:
    """In the same message, of the same key; other keys go on."""
    work = Work(app, installed_engine, kind=kind)
    work.emit("abababa")
    work.does[3] = ends
    work.deliver()
    assert work.ran == [1, 2, 3, 4, 6]
    assert work.left() == {3: state, 5: "waiting", 7: "waiting"}


def test_where_failed_ones_let_their_key_pass_the_bundle_goes_on(
    app: Celery, installed_engine: Engine, registry: None, kind: str
) -> None:
    """But not past one that is retried."""
    work = Work(app, installed_engine, kind=kind, failed_key="passes")
    work.emit("aaaa")
    work.does = {1: fail, 3: retry}
    work.deliver()
    assert work.ran == [1, 2, 3]
    assert work.left() == {1: "failed", 3: "waiting", 4: "waiting"}


def test_what_was_given_back_follows_in_its_order(
    app: Celery, installed_engine: Engine, registry: None, kind: str
) -> None:
    """When the one that held it up is done, each alone."""
    work = Work(app, installed_engine, kind=kind)
    work.emit("aaa")
    work.does[1] = retry
    work.deliver()
    assert work.deliveries.claim() == []
    work.does.clear()
    work.deliveries.make_due()
    for _ in range(3):
        work.deliver()
    assert (work.ran, work.left()) == ([1, 1, 2, 3], {})


def test_a_poisonous_one_in_a_list_holds_back_its_key_alone(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """The halves run in order, without those behind it."""
    work = Work(app, installed_engine, kind="batch")
    work.emit("abababab")
    work.does[3] = fail
    work.deliver()
    assert work.ran == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4], [1, 2], [3, 4], [3], [4], [6, 8]]
    assert work.left() == {3: "failed", 5: "waiting", 7: "waiting"}


def test_a_message_runs_nothing_that_comes_behind_another_messages(
    app: Celery, installed_engine: Engine, registry: None, kind: str
) -> None:
    """A message whose publication was in doubt may come beside the one that was made of its rows afterwards."""
    work = Work(app, installed_engine, kind=kind)
    work.emit("aaa")
    (first,) = work.deliveries.claim()
    with work.deliveries.autocommit.connect() as connection:
        work.deliveries.store.release_unpublished(connection, first.claimed)
    work.emit("ab")
    (second,) = work.deliveries.claim()
    assert set(first.envelope.ids) < set(second.envelope.ids)

    def deliver_second(task: Any) -> None:
        work.does.clear()
        work.deliveries.deliver(second)

    work.does[2] = deliver_second
    work.deliveries.deliver(first)
    # The second brings a further one of `a`, which is not run beside the first's, and one of `b`.
    assert work.ran == [1, 2, 2, 3]
    assert [(row["payload"]["key"], row["state"]) for row in work.deliveries.rows()] == [("a", "waiting")]


def test_a_transaction_that_is_not_committed_ends_the_message(
    app: Celery, installed_engine: Engine, registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had done is given back, so the next transaction's would run before it."""
    monkeypatch.setattr("pgpubsub_celery.locked.SAVEPOINTS", 2)
    work = Work(app, installed_engine)
    with installed_engine.begin() as connection:
        connection.execute(text("CREATE TABLE parent (id int PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"))
    monkeypatch.setattr("pgpubsub_celery.runtime.Runtime.has_deferrable", lambda self, connection: False)

    work.does = dict.fromkeys(range(1, 5), lambda task: work.session.execute(text("INSERT INTO child VALUES (1)")))
    work.emit("aaaa")
    work.deliver()
    assert work.ran == [1, 2]
    assert work.left() == dict.fromkeys(range(1, 5), "waiting")


# When the next may follow


class Door:
    """A bridge asleep: it has closed the channel's door, and hears who rings."""

    def __init__(self, engine: Engine, channel: type[Channel]) -> None:
        self._engine = engine
        self._name = channel.listen_safe_name()
        self._connection = engine.execution_options(isolation_level="AUTOCOMMIT").connect()
        self._wire = wire(self._connection)
        self._connection.execute(text(f'LISTEN "{self._name}"'))
        self._connection.execute(
            text("SELECT pg_advisory_lock(pgpubsub_lock_key('door', :name))"), {"name": channel.name()}
        )

    def rung(self) -> int:
        """Return how often somebody has rung since: what was committed before a ring of its own comes before that."""
        with self._engine.begin() as connection:
            connection.execute(text("SELECT pg_notify(:name, 'until here')"), {"name": self._name})
        heard: list[Any] = []

        def until_here() -> bool:
            self._wire.poll()
            heard.extend(self._wire.take())
            return any(notify.payload for notify in heard)

        until(until_here)
        return len(heard) - 1

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def doors() -> Iterator[Callable[[Engine, type[Channel]], Door]]:
    """Makes doors."""
    made: list[Door] = []

    def make(engine: Engine, channel: type[Channel]) -> Door:
        made.append(Door(engine, channel))
        return made[-1]

    yield make
    for door in made:
        door.close()


def claimed(work: Work) -> Message:
    (message,) = work.deliveries.claim()
    return message


@pytest.mark.parametrize("keys", ["a", "ab"], ids=["alone", "bundle"])
def test_who_finishes_one_rings_for_the_next(
    app: Celery,
    installed_engine: Engine,
    registry: None,
    kind: str,
    keys: str,
    doors: Callable[[Engine, type[Channel]], Door],
) -> None:
    """In the transaction that acknowledges it: no key waits for the sweep."""
    work = Work(app, installed_engine, kind=kind)
    work.emit(keys)
    message = claimed(work)
    door = doors(installed_engine, work.channel)
    work.deliveries.deliver(message)
    assert work.left() == {}
    assert door.rung() >= 1


@pytest.mark.parametrize(("failed_key", "rings"), [("holds", False), ("passes", True)])
def test_a_failed_one_rings_where_it_lets_its_key_pass(
    app: Celery,
    installed_engine: Engine,
    registry: None,
    kind: str,
    failed_key: str,
    rings: bool,
    doors: Callable[[Engine, type[Channel]], Door],
) -> None:
    """Where it holds it, there is nothing to come for."""
    work = Work(app, installed_engine, kind=kind, failed_key=failed_key)
    work.emit("a")
    work.does[1] = fail
    message = claimed(work)
    door = doors(installed_engine, work.channel)
    work.deliveries.deliver(message)
    assert work.left() == {1: "failed"}
    assert bool(door.rung()) is rings


def test_a_listeners_own_acknowledgement_rings(
    app: Celery, installed_engine: Engine, registry: None, doors: Callable[[Engine, type[Channel]], Door]
) -> None:
    """`notification.acknowledge(session)`, at the session's commit."""
    work = Work(app, installed_engine, kind="owned")
    work.emit("a")

    def acknowledge(task: Any) -> None:
        with Session(installed_engine) as session:
            work.notification.acknowledge(session)
            assert not door.rung()
            session.commit()
            assert door.rung()

    work.does[1] = acknowledge
    message = claimed(work)
    door = doors(installed_engine, work.channel)
    work.deliveries.deliver(message)
    assert work.left() == {}


def test_discarding_what_held_a_key_rings(
    app: Celery, installed_engine: Engine, registry: None, doors: Callable[[Engine, type[Channel]], Door]
) -> None:
    """The operator need not wait either."""
    work = Work(app, installed_engine)
    work.emit("aa")
    work.does[1] = fail
    work.deliver()
    door = doors(installed_engine, work.channel)
    with installed_engine.begin() as connection:
        discard_batch(connection, "public", Selection(states=("failed",)), after=0, last=10**9)
    assert door.rung()
    work.deliver()
    assert (work.ran, work.left()) == ([1, 2], {})


# Anything, in any order


class Turmoil:
    """Messages late, lost, doubled or in doubt, leases that run out, listeners that fail, operators that mend."""

    def __init__(self, work: Work, chance: random.Random, *, passes: bool) -> None:
        self.work = work
        self.chance = chance
        self.passes = passes
        self.calm = False
        """From now on everything succeeds."""
        self.keys: list[str] = []
        """Of what was emitted, in the order of the values, which count from 1."""
        self.finished: set[int] = set()
        self.running: list[int] = []
        """What has succeeded in the message that is being delivered."""
        self.failed: set[int] = set()
        """What has failed in it, and lets its key pass."""
        self.wrong: list[str] = []
        """What must not be. An error raised in a listener would only make its notification fail."""
        self.messages: list[Message] = []
        work.act = self.run  # type: ignore[method-assign]

    def stored(self) -> dict[int, str]:
        return self.work.left()

    def run(self, task: Any, value: int) -> None:
        """The listener: whatever is before it in its key must be done, or failed where that lets it pass."""
        if value in self.finished:
            self.wrong.append(f"{value} ran again")
        mine = [other for other in range(1, value) if self.keys[other - 1] == self.keys[value - 1]]
        for earlier in set(mine) - self.finished - set(self.running) - self.failed:
            if not self.passes or self.before[earlier] != "failed":
                self.wrong.append(f"{value} ran before {earlier}, which was {self.before.get(earlier)}")
        outcome = "done" if self.calm else self.chance.choice(["done"] * 6 + ["fail", "retry", "back"])
        if outcome == "done":
            self.running.append(value)
        else:
            self.failed |= {value} if outcome == "fail" and self.passes else set()
            {"fail": fail, "retry": retry, "back": give_back}[outcome](task)

    def emit(self) -> None:
        letters = [self.chance.choice("abc") for _ in range(self.chance.randint(1, 5))]
        with Session(self.work.engine) as session, session.begin():
            for letter in letters:
                self.keys.append(letter)
                notify(session, self.work.channel(key=letter, value=len(self.keys)))

    def claim(self) -> None:
        self.messages += self.work.deliveries.claim(lease=self.chance.choice([0.0, 100.0]))

    def deliver(self) -> None:
        if not self.messages:
            return
        again = self.chance.random() < 0.2
        message = self.chance.choice(self.messages) if again else self.messages.pop(0)
        self.before = self.stored()
        self.running.clear()
        self.failed.clear()
        self.work.deliveries.deliver(message)
        assert self.wrong == []
        assert not set(self.stored()) & set(self.running)
        self.finished |= set(self.running)

    def doubt(self) -> None:
        if self.messages:
            with self.work.deliveries.autocommit.connect() as connection:
                claimed = self.chance.choice(self.messages).claimed
                self.work.deliveries.store.release_unpublished(connection, claimed)

    def lose(self) -> None:
        if self.messages:
            self.messages.pop(self.chance.randrange(len(self.messages)))

    def wait(self) -> None:
        self.work.deliveries.make_due()

    def mend(self) -> None:
        before = self.stored()
        change = discard_batch if self.chance.random() < 0.2 else retry_batch
        with self.work.engine.begin() as connection:
            change(connection, "public", Selection(states=("failed",)), after=0, last=10**9)
        self.finished |= set(before) - set(self.stored())

    def settle(self) -> None:
        """Mend everything, and go on until nothing is left."""
        self.calm = True
        for _ in range(500):
            if not self.stored():
                return
            for step in (self.mend, self.wait, self.claim):
                step()
            while self.messages:
                self.deliver()
        raise AssertionError(f"something is left: {self.stored()}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("failed_key", ["holds", "passes"])
def test_whatever_happens_nothing_overtakes_in_its_key(
    app: Celery, installed_engine: Engine, registry: None, kind: str, failed_key: str, seed: int
) -> None:
    """Whenever one runs, those before it are done or let it pass; and in the end all are done."""
    work = Work(app, installed_engine, kind=kind, failed_key=failed_key, bundle=3)
    turmoil = Turmoil(work, random.Random(f"{kind} {failed_key} {seed}"), passes=failed_key == "passes")
    often = [turmoil.emit, turmoil.claim, turmoil.deliver, turmoil.deliver, turmoil.wait]
    for _ in range(120):
        turmoil.chance.choice([*often, *often, turmoil.doubt, turmoil.lose, turmoil.mend])()
    turmoil.settle()
    assert turmoil.finished == set(range(1, len(turmoil.keys) + 1))
