"""Waking and sleeping: who rings, who need not, and that nobody is forgotten when connections and writers go."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.errors import ConnectionLostError, NotInstalledError
from pgpubsub_celery.migrations import install
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.wakeups import Assembler, Link, bridge_engine
from tests.conftest import POSTGRES_BIN
from tests.fixtures.notifications import until

A, B = "doors.A", "doors.B"
BELL_A, BELL_B = "bell_a", "bell_b"
SOON = 10.0
"""Seconds in which a wait that has reason to end must have ended."""
LONG = 3600.0


class House:
    """A database with two channels, and everybody who meets at their doors."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(sync_url(url))
        self._links: list[Link] = []
        self._url = url
        with self.engine.begin() as connection:
            for name, bell in ((A, BELL_A), (B, BELL_B)):
                connection.execute(
                    text("INSERT INTO pgpubsub_channel (name, listen_name, stored) VALUES (:name, :bell, true)"),
                    {"name": name, "bell": bell},
                )

    def link(self, *bells: str) -> Link:
        """Return a bridge's connections, which listen."""
        engine = bridge_engine(sync_url(self._url))
        link = Link(engine, engine, "public")
        self._links.append(link)
        link.listen(bells or (BELL_A, BELL_B))
        return link

    @contextlib.contextmanager
    def writer(self, channel: str | None = A) -> Iterator[Connection]:
        """A transaction that has emitted to a channel; rolled back at the end unless it ended before."""
        with self.engine.connect() as connection:
            if channel is not None:
                ring(connection, channel)
            yield connection

    def write(self, channel: str = A) -> None:
        """Emit to a channel, and commit."""
        with self.writer(channel) as connection:
            connection.commit()

    def terminate(self, link: Link, which: str) -> None:
        """End one of a bridge's backends, as an administrator can."""
        with self.engine.connect() as connection:
            pid = backend(link.claims if which == "claims" else link._listens)
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    def close(self) -> None:
        for link in self._links:
            link.close()
        self.engine.dispose()


def ring(connection: Connection, channel: str) -> None:
    connection.execute(text("SELECT pgpubsub_ring(:channel)"), {"channel": channel})


def backend(connection: Connection) -> int:
    driver: Any = connection.connection.driver_connection
    pid: int = driver.info.backend_pid
    return pid


def rings(link: Link, seconds: float = 0.0) -> list[str]:
    """Return the bells that have rung; wait for the first up to `seconds`."""
    link.wait(seconds, Control().stopping)
    return [notify.channel for notify in link.rung()]


@pytest.fixture
def house(installed_url: str) -> Iterator[House]:
    """Two channels' doors, all open."""
    house = House(installed_url)
    yield house
    house.close()


@pytest.fixture
def asleep(house: House) -> Link:
    """A bridge that sleeps behind the closed doors of both channels."""
    link = house.link()
    assert link.keep([A, B]) == {A, B}
    assert link.close_doors()
    return link


# Waiting


def test_wait_ends_with_a_ring(house: House) -> None:
    """What has come is told once, and only of channels that are listened to."""
    link = house.link(BELL_A)
    with house.engine.begin() as connection:
        connection.execute(text("SELECT pg_notify(:bell, 'payload')"), {"bell": BELL_A})
        connection.execute(text("SELECT pg_notify(:bell, 'other')"), {"bell": BELL_B})
    link.wait(LONG, Control().stopping)
    (notify,) = link.rung()
    assert (notify.channel, notify.payload) == (BELL_A, "payload")
    assert link.rung() == []


def test_wait_ends_at_once_with_a_ring_that_came_during_a_statement(house: House) -> None:
    """A notify that the driver has read already is not waited for again."""
    link = house.link()
    with house.engine.begin() as connection:
        connection.execute(text("SELECT pg_notify(:bell, '')"), {"bell": BELL_A})
    link.keep([A])  # a statement on the listening connection brings the notify with it
    link.wait(LONG, Control().stopping)
    assert [notify.channel for notify in link.rung()] == [BELL_A]


def test_wait_ends_with_a_stop(house: House) -> None:
    """A stop that comes during the wait, and one that came before."""
    link = house.link()
    control = Control()
    threading.Timer(0.05, control.stopping.set).start()
    link.wait(LONG, control.stopping)
    assert control.stopping.is_set()
    link.wait(LONG, control.stopping)


def test_wait_ends_in_time(house: House) -> None:
    """Without a ring it takes as long as was asked, not less; no time at all is no error."""
    link = house.link()
    began = time.monotonic()
    link.wait(0.2, Control().stopping)
    assert time.monotonic() - began >= 0.2
    link.wait(0.0, Control().stopping)
    link.wait(-1.0, Control().stopping)
    assert link.rung() == []


def watch(link: Link) -> None:
    """Do what a bridge does, a few times: wait, hear, claim."""
    for _ in range(3):
        link.wait(LONG, Control().stopping)
        link.rung()
        link.claims.execute(text("SELECT 1"))


@pytest.mark.parametrize("which", ["listens", "claims"])
@pytest.mark.parametrize("when", ["during", "before"])
def test_wait_ends_with_either_connection(house: House, asleep: Link, which: str, when: str) -> None:
    """Asleep, losing either connection is losing the doors, the ears or the hands: it must not wait for the sweep."""
    began = time.monotonic()
    timer = threading.Timer(0.05 if when == "during" else 0.0, house.terminate, (asleep, which))
    timer.start()
    if when == "before":
        timer.join()
    with pytest.raises((ConnectionLostError, DBAPIError)):
        watch(asleep)
    assert time.monotonic() - began < SOON
    timer.join()


def test_a_link_can_be_closed_whatever_state_it_is_in(house: House) -> None:
    """Lost, closed already: closing is how a bridge begins anew."""
    link = house.link()
    house.terminate(link, "listens")
    link.close()
    link.close()


def test_a_reload_of_the_servers_configuration_disturbs_nobody(house: House, asleep: Link) -> None:
    """What the server says unasked on an idle connection is neither a ring nor a loss."""
    with house.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            connection.execute(text("ALTER SYSTEM SET timezone = 'Asia/Tokyo'"))
            connection.execute(text("SELECT pg_reload_conf()"))
            asleep.wait(0.5, Control().stopping)
        finally:
            connection.execute(text("ALTER SYSTEM RESET timezone"))
            connection.execute(text("SELECT pg_reload_conf()"))
    asleep.wait(0.1, Control().stopping)
    house.write()
    assert rings(asleep, SOON) == [BELL_A]


def test_a_link_needs_an_installation_of_its_version(house: House, database_url: str) -> None:
    """An empty database and an older schema are told apart from an outage, with the command to run."""
    link = house.link()
    assert link.require_installed(VERSION) == link.require_installed(0)
    with pytest.raises(NotInstalledError, match=rf"needs {VERSION + 1}: run .*install"):
        link.require_installed(VERSION + 1)
    engine = bridge_engine(sync_url(database_url))
    with Link(engine, engine, "public") as empty, pytest.raises(NotInstalledError, match=r"has no table.*install"):
        empty.require_installed(VERSION)


# Doors


def test_writers_are_silent_while_the_bridge_is_awake(house: House) -> None:
    """A commit with a NOTIFY serialises all such commits of the server: none where nobody sleeps."""
    link = house.link()
    link.keep([A, B])
    house.write()
    assert rings(link, 0.1) == []


def test_writers_ring_while_the_bridge_sleeps(house: House, asleep: Link) -> None:
    """At their commit, on the bell of their channel."""
    with house.writer(B) as writer:
        assert rings(asleep, 0.1) == []
        writer.commit()
    assert rings(asleep, SOON) == [BELL_B]


def test_a_writer_that_rolls_back_does_not_ring(house: House, asleep: Link) -> None:
    """Nothing was stored."""
    with house.writer() as writer:
        writer.rollback()
    house.write(B)
    assert rings(asleep, SOON) == [BELL_B]


def test_writers_are_silent_again_once_the_doors_are_open(house: House, asleep: Link) -> None:
    """Awake means that nobody has to ring."""
    asleep.open_doors()
    assert not asleep.asleep
    house.write()
    assert rings(asleep, 0.1) == []


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_the_bridge_cannot_fall_asleep_before_registered_writers_end(house: House, end: str) -> None:
    """A silent writer counts on a look after its end; only its own channel's door is kept open by it."""
    link = house.link()
    link.keep([A, B])
    with house.writer() as writer:
        assert link.close_doors() is False
        assert link.asleep is False
        house.write(B)
        assert rings(link, SOON) == [BELL_B]
        getattr(writer, end)()
        assert link.close_doors() is True
    assert link.asleep is True


def test_a_writer_that_comes_while_another_is_registered_registers_too(house: House) -> None:
    """Trying to sleep changes nothing for writers until it succeeds."""
    link = house.link()
    link.keep([A])
    with house.writer() as first:
        assert link.close_doors() is False
        with house.writer() as second:
            first.commit()
            assert link.close_doors() is False
            second.commit()
    assert link.close_doors() is True
    assert rings(link, 0.1) == []


def test_what_a_registered_writer_has_committed_is_visible_once_the_door_is_closed(house: House) -> None:
    """Postgres makes a transaction visible before it releases its locks: the look after closing sees it."""
    link = house.link()
    link.keep([A])
    registered: set[int] = set()
    lock = threading.Lock()
    done = threading.Event()
    mine = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
    store = text("INSERT INTO pgpubsub_notification (channel, operation, payload) VALUES ('a', 'm', to_jsonb(:number))")
    seen = text("SELECT CAST(payload AS int) FROM pgpubsub_notification")

    def write() -> None:
        for number in range(50):
            with house.writer() as writer:
                writer.execute(store, {"number": number})
                if writer.execute(mine).scalar_one():  # else it was refused, and rings
                    with lock:
                        registered.add(number)
                writer.commit()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    closed = 0
    while not done.is_set():
        with lock:
            before = set(registered)
        if link.close_doors():
            closed += 1
            # Whoever had registered before the door was closed is seen by a statement that begins now.
            assert before <= set(link.claims.execute(seen).scalars())
            link.open_doors()
    thread.join(SOON)
    assert closed > 0
    assert len(list(link.claims.execute(seen).scalars())) == 50
    assert len(registered) > 0


def test_a_rollback_to_a_savepoint_releases(house: House) -> None:
    """What was emitted inside it was not stored, so nobody has to wait for it."""
    link = house.link()
    link.keep([A])
    with house.writer(None) as writer:
        savepoint = writer.begin_nested()
        ring(writer, A)
        assert link.close_doors() is False
        savepoint.rollback()
        assert link.close_doors() is True
        # The doors are closed now: what it emits after that rings.
        ring(writer, A)
        writer.commit()
    assert rings(link, SOON) == [BELL_A]


def test_a_released_savepoint_stays_registered(house: House) -> None:
    """What was emitted inside it comes with the transaction's commit."""
    link = house.link()
    link.keep([A])
    with house.writer(None) as writer:
        with writer.begin_nested():
            ring(writer, A)
        assert link.close_doors() is False
        writer.commit()
    assert link.close_doors() is True


def test_foreign_holders_of_the_lock_cost_only_rings_and_wakefulness(house: House) -> None:
    """Somebody else's advisory lock can have the same key: writers ring needlessly, or the bridge stays awake."""
    link = house.link()
    link.keep([A])
    key = f"pgpubsub_lock_key('door', '{A}')"
    with house.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as foreign:
        foreign.execute(text(f"SELECT pg_advisory_lock({key})"))
        house.write()
        assert rings(link, SOON) == [BELL_A]
        assert link.close_doors() is False
        foreign.execute(text(f"SELECT pg_advisory_unlock({key}), pg_advisory_lock_shared({key})"))
        house.write()
        assert rings(link, 0.1) == []
        assert link.close_doors() is False
        foreign.execute(text(f"SELECT pg_advisory_unlock_shared({key})"))
    assert link.close_doors() is True


def test_losing_the_connection_opens_the_doors(house: House, asleep: Link) -> None:
    """Writers register silently again; the bridge, which notices, begins awake."""
    house.terminate(asleep, "listens")
    until(lambda: not _locked_doors(house))
    other = house.link()
    house.write()
    assert rings(other, 0.1) == []


def test_a_prepared_transaction_keeps_the_bridge_awake() -> None:
    """Its row comes with COMMIT PREPARED, from whichever session: until then the door stays open."""
    with EmbeddedPostgres(
        bin_dir=os.environ.get(POSTGRES_BIN), fsync=False, options={"max_prepared_transactions": "5"}
    ) as server:
        engine = create_engine(sync_url(server.url))
        install(engine, channels=())
        engine.dispose()
        house = House(server.url)
        link = house.link()
        link.keep([A])
        with house.writer(None) as writer:
            writer.execute(text("SELECT txid_current()"))
            ring(writer, A)
            writer.execute(text("PREPARE TRANSACTION 'later'"))
            writer.rollback()
        assert link.close_doors() is False
        with house.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            other.execute(text("COMMIT PREPARED 'later'"))
        assert link.close_doors() is True
        house.close()


# Several bridges


def test_a_channel_has_one_keeper(house: House) -> None:
    """Only the keeper closes the door; a bridge that keeps nothing may always sleep."""
    first, second = house.link(), house.link()
    assert first.keep([A]) == {A}
    assert second.keep([A, B]) == {B}
    assert second.close_doors()
    house.write(A)
    assert rings(second, 0.1) == []
    assert first.keep([A, B]) == {A}


def test_the_keepers_death_frees_the_channel(house: House) -> None:
    """Another bridge keeps it from then on, and is not asleep before its door is closed."""
    first, second = house.link(), house.link()
    first.keep([A, B])
    assert first.close_doors()
    assert second.keep([A, B]) == set()
    assert second.asleep
    house.terminate(first, "listens")
    until(lambda: second.keep([A, B]) == {A, B})
    awake = not second.asleep
    assert awake
    assert second.close_doors()


def test_a_bridge_rings_the_others_and_not_itself(house: House) -> None:
    """All that listen to the bell hear it."""
    first, second, deaf = house.link(), house.link(BELL_B), house.link(BELL_A)
    first.ring([BELL_B])
    assert rings(second, SOON) == [BELL_B]
    assert rings(first, 0.1) == []
    assert rings(deaf, 0.0) == []


def test_the_first_alive_is_alone_until_it_announces(house: House) -> None:
    """Others wait for it, briefly: it is deciding what was stored before."""
    first, second = house.link(), house.link()
    assert first.first_alive(A) is True
    assert second.first_alive(A) is False
    announced = threading.Event()

    def announce() -> None:
        second.announce(A, first=False)
        announced.set()

    thread = threading.Thread(target=announce)
    thread.start()
    assert not announced.wait(0.1)
    first.announce(A, first=True)
    assert announced.wait(SOON)
    thread.join()


def test_a_channel_has_somebody_alive_until_the_last_is_gone(house: House) -> None:
    """Bridges that come and go one after another leave nobody the first."""
    first, second, third = house.link(), house.link(), house.link()
    for link, alone in ((first, True), (second, False)):
        assert link.first_alive(A) is alone
        link.announce(A, first=alone)
    house.terminate(first, "listens")
    assert third.first_alive(A) is False
    house.terminate(second, "listens")
    until(lambda: third.first_alive(A))
    assert third.first_alive(B) is True


# Messages of channels that are not stored


def send(house: House, *messages: Any, bell: str = BELL_A) -> None:
    with house.engine.begin() as connection:
        for message in messages:
            connection.execute(
                text("SELECT pgpubsub_send(:bell, CAST(:message AS jsonb))"),
                {"bell": bell, "message": json.dumps(message)},
            )


def test_a_long_text_of_many_bytes_a_character_arrives_as_it_was_sent(house: House) -> None:
    """100 kB in characters of one to four bytes, cut into chunks at any place, and short messages beside it."""
    link = house.link()
    generator = random.Random(20)
    long = {"text": "".join(generator.choice('aß€😀"\\\n') for _ in range(50_000))}
    assert len(json.dumps(long, ensure_ascii=False).encode()) > 100_000
    send(house, {"n": 1}, long, {"n": 1})
    assembler = Assembler()
    whole: list[Any] = []
    until(lambda: bool(_assemble(link, assembler, whole)) and len(whole) == 3)
    assert whole == [{"n": 1}, long, {"n": 1}]


def _assemble(link: Link, assembler: Assembler, whole: list[Any]) -> list[Any]:
    link.wait(0.1, Control().stopping)
    whole += [message for notify in link.rung() if (message := assembler.add(notify.payload)) is not None]
    return whole


def chunks(id: str, message: Any, count: int) -> list[str]:
    body = json.dumps(message)
    size = -(-len(body) // count)
    return [f"{id} {i + 1} {count} {body[i * size : (i + 1) * size]}" for i in range(count)]


def test_chunks_may_come_in_any_order_and_between_others() -> None:
    """Each message is whole with its last missing chunk, whichever that is."""
    one, two = chunks("1", {"one": "x" * 50}, 5), chunks("2", {"two": "y" * 50}, 4)
    mixed = [*one, *two]
    random.Random(7).shuffle(mixed)
    assembler = Assembler()
    whole = [message for chunk in mixed if (message := assembler.add(chunk)) is not None]
    assert sorted(whole, key=str) == [{"one": "x" * 50}, {"two": "y" * 50}]


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "hello",
        "a b c d",
        "id 1 1 not json",
        "id 1 1 [1, 2]",
        "id 1 1 null",
        "id x 2 {}",
        "id 1 0 {}",
        "id 7 1 ",
        "id 1 1 " + "[" * 7000,
        'id 1 1 {"a":' * 600,
    ],
)
def test_what_is_not_a_message_of_ours_is_ignored(payload: str, caplog: pytest.LogCaptureFixture) -> None:
    """Anybody may NOTIFY on any channel: it is said, without what it was, and nothing ends."""
    assembler = Assembler()
    assert assembler.add(payload) is None
    assert f"A NOTIFY of {len(payload)} characters" in caplog.text
    assert payload not in caplog.text or not payload
    assert assembler.add('id 1 1 {"a": 1}') == {"a": 1}


def test_chunks_with_a_wrong_number_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """As many chunks as announced, but not those."""
    assembler = Assembler()
    assert assembler.add("id 1 2 {}") is None
    assert assembler.add("id 3 2 {}") is None
    assert "is not one of our messages" in caplog.text
    assert assembler.add("id 1 2 {") is None
    assert assembler.add("id 2 2 }") == {}


def test_a_message_that_is_never_completed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks of a message come at one commit: what misses one after a minute will always miss it."""
    assembler = Assembler()
    now = time.monotonic()
    assembler.add("old 1 2 {")
    monkeypatch.setattr("pgpubsub_celery.wakeups.time.monotonic", lambda: now + Assembler.MAXIMUM_AGE / 2)
    assembler.add("new 1 2 {")
    assert set(assembler._parts) == {"old", "new"}
    monkeypatch.setattr("pgpubsub_celery.wakeups.time.monotonic", lambda: now + Assembler.MAXIMUM_AGE + 1)
    assembler.add("other 1 2 {")
    assert set(assembler._parts) == {"new", "other"}


def _locked_doors(house: House) -> bool:
    with house.engine.connect() as connection:
        statement = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        return bool(connection.execute(text(statement)).scalar_one())
