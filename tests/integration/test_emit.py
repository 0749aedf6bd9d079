"""notify() and enqueue(): what a committed transaction has stored or sent, and a rolled back one has not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import os
import select
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from pgpubsub_celery import Channel, Notification, TriggerChannel, channels, install, notify, notify_many
from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.emit import anotify, anotify_many, set_notification_context, suppress_notifications
from pgpubsub_celery.errors import BindError, ChannelError, NotInstalledError, PayloadError, PgPubSubError
from pgpubsub_celery.listeners import Listener, register_listener
from pgpubsub_celery.migrations import grant_emit
from pgpubsub_celery.payload import decode_message
from pgpubsub_celery.schema import quote_identifier
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.wakeups import Assembler
from tests.conftest import POSTGRES_BIN, libpq_url

pytestmark = pytest.mark.usefixtures("registry")

UTC = datetime.timezone.utc
DAY = datetime.date(2026, 1, 1)


@dataclasses.dataclass
class Reads(Channel):
    """A stored channel."""

    channel_name = "test_emit.Reads"
    lock_notifications = True
    model_id: int
    date: datetime.date = DAY


@dataclasses.dataclass
class Other(Channel):
    """A second stored channel."""

    channel_name = "test_emit.Other"
    lock_notifications = True
    value: str


@dataclasses.dataclass
class Sent(Channel):
    """A channel whose messages are not stored."""

    channel_name = "test_emit.Sent"
    text: str


def stored(engine: Engine) -> list[Any]:
    """The rows that are committed, in order."""
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT * FROM pgpubsub_notification ORDER BY id")))


def payloads(engine: Engine) -> list[Any]:
    return [row.payload for row in stored(engine)]


def subscribe(engine: Engine, channel: str, *listeners: str, operation: str = "message") -> None:
    with engine.begin() as connection:
        for listener in listeners:
            connection.execute(
                text(
                    "INSERT INTO pgpubsub_subscription (channel, listener, operations) "
                    "VALUES (:channel, :listener, ARRAY[:operation])"
                ),
                {"channel": channel, "listener": listener, "operation": operation},
            )


@contextlib.contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """What is sent to the database."""
    sent: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


class Ear:
    """A connection that listens."""

    def __init__(self, url: str, *names: str) -> None:
        self.connection = psycopg2.connect(libpq_url(url))
        self.connection.autocommit = True
        with self.connection.cursor() as cursor:
            for name in names:
                cursor.execute(f"LISTEN {quote_identifier(name)}")

    def hear(self, count: int, *, seconds: float = 10.0) -> list[Any]:
        """Return the notifies that have come, at least `count`."""
        deadline = time.monotonic() + seconds
        self.connection.poll()
        while len(self.connection.notifies) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"heard {len(self.connection.notifies)} of {count}"
            select.select([self.connection], [], [], left)
            self.connection.poll()
        heard = list(self.connection.notifies)
        self.connection.notifies.clear()
        return heard


@pytest.fixture
def ear(installed_url: str) -> Iterator[Ear]:
    """Listens to Sent and to Reads' doorbell."""
    ear = Ear(installed_url, Sent.listen_safe_name(), Reads.listen_safe_name(), "end")
    yield ear
    ear.connection.close()


def heard_until_end(ear: Ear, engine: Engine) -> list[Any]:
    """All notifies of what has committed before now."""
    with engine.begin() as connection:
        connection.execute(text('NOTIFY "end"'))
    heard: list[Any] = []
    while not heard or heard[-1].channel != "end":
        heard += ear.hear(1)
    return heard[:-1]


# The caller's transaction


def test_a_committed_message_is_stored_and_a_rolled_back_one_is_not(installed_engine: Engine) -> None:
    """The notification exists if and only if the transaction that made it committed."""
    with Session(installed_engine) as session:
        assert notify(session, Reads(model_id=1)) == 1
        assert stored(installed_engine) == []
        session.rollback()
        notify(session, Reads(model_id=2))
        session.commit()
    assert payloads(installed_engine) == [{"model_id": 2, "date": "2026-01-01"}]


def test_a_savepoint_that_is_rolled_back_takes_its_messages_with_it(installed_engine: Engine) -> None:
    """What is outside of it stays."""
    with Session(installed_engine) as session:
        notify(session, Reads(model_id=1))
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            notify(session, Reads(model_id=2))
            raise ZeroDivisionError
        session.commit()
    assert [payload["model_id"] for payload in payloads(installed_engine)] == [1]


def test_notify_never_commits_and_begins_what_has_not_begun(installed_engine: Engine) -> None:
    """A session or connection without transaction begins one, as with any statement; closing it rolls back."""
    with Session(installed_engine) as session:
        notify(session, Reads(model_id=1))
        assert session.in_transaction()
    with installed_engine.connect() as connection:
        notify(connection, Reads(model_id=2))
        assert connection.in_transaction()
    assert stored(installed_engine) == []


def test_the_message_is_in_the_transaction_of_what_the_session_has_written(installed_engine: Engine) -> None:
    """One transaction: both are there, or neither."""
    with installed_engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (id int)"))
    with Session(installed_engine) as session:
        session.execute(text("INSERT INTO work VALUES (1)"))
        notify(session, Reads(model_id=1))
        session.commit()
        transactions = session.execute(text("SELECT xmin FROM work UNION SELECT xmin FROM pgpubsub_notification")).all()
    assert len(transactions) == 1


@pytest.mark.parametrize("kind", ["session", "scoped_session", "connection"])
def test_each_kind_of_bind_is_joined(installed_engine: Engine, kind: str) -> None:
    """Session, scoped_session and Connection."""
    if kind == "connection":
        with installed_engine.begin() as connection:
            notify(connection, Reads(model_id=1))
    else:
        factory = sessionmaker(installed_engine)
        session: Any = factory() if kind == "session" else scoped_session(factory)
        notify(session, Reads(model_id=1))
        session.commit()
        session.remove() if kind == "scoped_session" else session.close()
    assert payloads(installed_engine) == [{"model_id": 1, "date": "2026-01-01"}]


def test_notify_does_not_flush(installed_engine: Engine) -> None:
    """What is pending stays pending: a flush at an unexpected place can fail, or fire hooks too early."""
    with Session(installed_engine) as session:
        pending = Notification(channel="pending", operation="message", payload={})
        session.add(pending)
        notify(session, Reads(model_id=1))
        assert pending in session.new


def test_one_message_is_one_round_trip(installed_engine: Engine) -> None:
    """A writer in a hot path pays for one statement."""
    with installed_engine.begin() as connection, statements(installed_engine) as sent:
        notify(connection, Reads(model_id=1))
    assert len(sent) == 1


def test_an_engine_is_refused(installed_engine: Engine) -> None:
    """It has no transaction of the caller's."""
    with pytest.raises(BindError, match=r"notify\(\) was given an Engine.*engine\.begin\(\)"):
        notify(installed_engine, Reads(model_id=1))


@pytest.mark.parametrize("how", ["engine", "connection", "driver"])
def test_autocommit_is_refused(installed_engine: Engine, how: str) -> None:
    """Whether SQLAlchemy was told so or only the driver."""
    driver: Any = None
    with contextlib.ExitStack() as stack:
        if how == "engine":
            engine = create_engine(installed_engine.url, isolation_level="AUTOCOMMIT")
            stack.callback(engine.dispose)
            connection = stack.enter_context(engine.connect())
        else:
            connection = stack.enter_context(installed_engine.connect())
            if how == "connection":
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            else:
                driver = connection.connection.dbapi_connection
                driver.autocommit = True
        with pytest.raises(BindError, match="AUTOCOMMIT: each statement would be a transaction of its own"):
            notify(connection, Reads(model_id=1))
        with pytest.raises(BindError, match="AUTOCOMMIT"):
            notify(Session(connection), Reads(model_id=1))
        if how == "driver":
            driver.autocommit = False
    assert stored(installed_engine) == []


@pytest.mark.parametrize("bind", [None, "postgresql://localhost/blog", sessionmaker()])
def test_anything_else_is_refused_with_what_it_is(bind: Any) -> None:
    """The message shows the kind of what was given and what is expected."""
    with pytest.raises(
        BindError, match=f"given a {type(bind).__name__}: expected a Session, scoped_session or Connection"
    ):
        notify(bind, Reads(model_id=1))


# Sessions with several databases


def test_a_session_with_several_databases_emits_to_the_one_that_has_the_tables(
    installed_engine: Engine, engine: Engine
) -> None:
    """The database that Notification is bound to, else the one of bind_arguments, else the session's own."""

    class Base(DeclarativeBase):
        pass

    class Author(Base):
        __tablename__ = "author"
        id: Mapped[int] = mapped_column(primary_key=True)

    with Session(binds={Base: engine, Notification: installed_engine}) as session:
        notify(session, Reads(model_id=1))
        session.commit()
    with Session(binds={Author: installed_engine, Notification: engine}) as session:
        notify(session, Reads(model_id=2), bind_arguments={"mapper": Author})
        session.commit()
    with Session(installed_engine, binds={Author: engine}) as session:
        notify(session, Reads(model_id=3))
        session.commit()
    assert [payload["model_id"] for payload in payloads(installed_engine)] == [1, 2, 3]
    with (
        Session(binds={Author: installed_engine}) as session,
        pytest.raises(BindError, match=r"pass bind_arguments=\{'mapper': YourModel\}"),
    ):
        notify(session, Reads(model_id=4))


def test_a_session_that_reads_from_a_replica_emits_to_the_primary(installed_engine: Engine, engine: Engine) -> None:
    """SQLAlchemy's own recipe: writes are recognised by their statement."""
    from sqlalchemy import Delete, Update

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Any:
            return installed_engine if self._flushing or isinstance(clause, (Update, Delete)) else engine

    with Routing() as session:
        notify(session, Reads(model_id=1))
        session.commit()
    assert len(stored(installed_engine)) == 1


# What is stored


def test_one_row_is_stored_for_each_listener(installed_engine: Engine) -> None:
    """The set of listeners is exact at commit, and the result says how many."""
    subscribe(installed_engine, Reads.name(), "first", "second")
    subscribe(installed_engine, Other.name(), "third")
    with installed_engine.begin() as connection:
        assert notify(connection, Reads(model_id=1)) == 2
        assert notify_many(connection, [Reads(model_id=2), Other(value="x")]) == 3
    rows = stored(installed_engine)
    assert [(row.channel, row.payload.get("model_id")) for row in rows] == [
        (Reads.name(), 1),
        (Reads.name(), 1),
        (Reads.name(), 2),
        (Reads.name(), 2),
        (Other.name(), None),
    ]
    assert {row.operation for row in rows} == {"message"}
    assert len({row.subscription for row in rows}) == 3
    assert {(row.state, row.dispatches, row.starts, row.retries) for row in rows} == {("waiting", 0, 0, 0)}


def test_a_channel_without_listener_stores_one_row_for_the_first_to_come(installed_engine: Engine) -> None:
    """Nothing is lost between the release that emits and the one that listens."""
    with installed_engine.begin() as connection:
        assert notify(connection, Reads(model_id=1)) == 1
    (row,) = stored(installed_engine)
    assert row.subscription is None


def test_fields_can_be_given_with_the_channel_or_its_path(installed_engine: Engine) -> None:
    """A message, its class, or its module path with the fields as keyword arguments."""
    with installed_engine.begin() as connection:
        notify(connection, Reads, model_id=1)
        notify(connection, Reads.name(), model_id=2, date=datetime.date(2025, 5, 5))
        notify(connection, f"{__name__}.Reads", model_id=3)
    assert payloads(installed_engine) == [
        {"model_id": 1, "date": "2026-01-01"},
        {"model_id": 2, "date": "2025-05-05"},
        {"model_id": 3, "date": "2026-01-01"},
    ]


def test_what_does_not_fit_is_refused_and_the_transaction_goes_on(installed_engine: Engine) -> None:
    """Found in Python, before the database could abort the transaction."""
    with Session(installed_engine) as session:
        with pytest.raises(PayloadError, match="model_id"):
            notify(session, Reads, model_id="one")
        with pytest.raises(PayloadError, match="pass the message alone"):
            notify(session, Reads(model_id=1), model_id=2)
        notify(session, Reads(model_id=3))
        session.commit()
    assert [payload["model_id"] for payload in payloads(installed_engine)] == [3]


@pytest.mark.parametrize("value", ["", "é 🐘", "\\u0000", "a\x00b", "\ud800", "%s :name {}", "\\", "'\"$$"])
def test_any_text_arrives_as_it_was(installed_engine: Engine, value: str) -> None:
    """Also what jsonb has no form for, and what a driver might take for a parameter."""
    with installed_engine.begin() as connection:
        notify(connection, Other(value=value))
    (payload,) = payloads(installed_engine)
    assert decode_message(Other, payload) == Other(value=value)


def test_what_is_no_message_is_refused(installed_engine: Engine) -> None:
    """Any other class or object."""
    with Session(installed_engine) as session:
        for given in (1, object(), dict, {"model_id": 1}):
            with pytest.raises(ChannelError, match="expected a message, or its channel"):
                notify(session, given)  # type: ignore[arg-type]


def test_the_channel_of_enqueue_is_refused(installed_engine: Engine) -> None:
    """Its payload is a signature, which only enqueue() makes."""
    with Session(installed_engine) as session, pytest.raises(ChannelError, match=r"call enqueue\(bind, signature\)"):
        notify(session, "pgpubsub.enqueue")


def test_many_messages_go_in_few_statements_and_in_order(installed_engine: Engine) -> None:
    """One round trip for some thousand messages, whatever their channels."""
    messages: list[Channel] = []
    for n in range(2500):
        messages += [Reads(model_id=n), Other(value=str(n))]
    with installed_engine.begin() as connection, statements(installed_engine) as sent:
        assert notify_many(connection, messages) == 5000
    assert len(sent) == 3
    rows = stored(installed_engine)
    assert [row.payload["model_id"] for row in rows if row.channel == Reads.name()] == list(range(2500))
    assert [row.payload["value"] for row in rows if row.channel == Other.name()] == [str(n) for n in range(2500)]


def test_large_messages_are_split_into_statements_by_their_size(installed_engine: Engine) -> None:
    """No statement grows without bound."""
    with installed_engine.begin() as connection, statements(installed_engine) as sent:
        notify_many(connection, [Other(value="x" * 1_500_000) for _ in range(5)])
    assert len(sent) == 3
    assert [len(payload["value"]) for payload in payloads(installed_engine)] == [1_500_000] * 5


def test_no_messages_are_no_statement(installed_engine: Engine) -> None:
    """And not an error."""
    with installed_engine.begin() as connection, statements(installed_engine) as sent:
        assert notify_many(connection, []) == 0
    assert sent == []


def test_one_message_that_does_not_fit_keeps_all_from_being_stored(installed_engine: Engine) -> None:
    """All are checked before the first is sent."""
    with Session(installed_engine) as session:
        with pytest.raises(PayloadError):
            notify_many(session, [Other(value="fits"), Other(value=1)])  # type: ignore[arg-type]
        session.commit()
    assert stored(installed_engine) == []


# When


def test_eta_and_countdown_say_when_a_row_is_due(installed_engine: Engine) -> None:
    """A countdown counts from the call by the database's clock, not from the beginning of the transaction."""
    eta = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    with installed_engine.begin() as connection:
        begun, _ = connection.execute(text("SELECT now(), pg_sleep(0.2)")).one()
        before = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        notify(connection, Reads(model_id=1), eta=eta)
        notify(connection, Reads(model_id=2), countdown=60)
        notify(connection, Reads(model_id=3), countdown=datetime.timedelta(minutes=1))
        notify(connection, Reads(model_id=4), countdown=0)
        notify(connection, Reads(model_id=5))
        after = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    due = {row.payload["model_id"]: row.available_at for row in stored(installed_engine)}
    minute = datetime.timedelta(seconds=60)
    assert due[1] == eta
    assert before + minute <= due[2] <= due[3] <= after + minute
    assert before <= due[4] <= after
    assert due[5] == begun


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ({"eta": datetime.datetime(2030, 1, 1)}, "no time zone"),  # noqa: DTZ001
        ({"eta": "2030-01-01"}, "expected a datetime"),
        ({"countdown": -1}, "expected 0 to"),
        ({"countdown": float("inf")}, "expected seconds"),
        ({"countdown": 1e30}, "expected 0 to"),
        ({"countdown": "10"}, "expected seconds"),
        ({"countdown": True}, "expected seconds"),
        ({"countdown": 1, "eta": datetime.datetime(2030, 1, 1, tzinfo=UTC)}, "both given"),
    ],
)
def test_a_time_that_cannot_be_is_refused(installed_engine: Engine, when: dict[str, Any], problem: str) -> None:
    """By name, before anything is sent."""
    with Session(installed_engine) as session, pytest.raises(PayloadError, match=problem):
        notify(session, Reads(model_id=1), **when)


def test_an_unstored_message_cannot_wait(installed_engine: Engine) -> None:
    """There is no row that could."""
    with Session(installed_engine) as session, pytest.raises(ChannelError, match="lock_notifications = True"):
        notify(session, Sent(text="x"), countdown=10)


# Unstored messages


@pytest.mark.parametrize("size", [1, 1_900, 7_900, 8_000, 20_000, 300_000])
@pytest.mark.parametrize("character", ["x", "é", "€", "🐘"])
def test_an_unstored_message_of_any_size_arrives_whole(
    installed_engine: Engine, ear: Ear, size: int, character: str
) -> None:
    """NOTIFY takes 8,000 bytes: chunks are cut between characters, whatever bytes these have."""
    message = character * size + "end"
    with installed_engine.begin() as connection:
        assert notify(connection, Sent(text=message), context={"by": "é"}) == 0
    assert stored(installed_engine) == []
    assembler = Assembler()
    arrived = [found for heard in heard_until_end(ear, installed_engine) if (found := assembler.add(heard.payload))]
    assert len(arrived) == 1
    assert arrived[0]["payload"] == {"text": message}
    assert arrived[0]["channel"] == Sent.name()
    assert arrived[0]["context"] == {"by": "é"}
    assert arrived[0]["operation"] == "message"


def test_equal_unstored_messages_of_one_transaction_all_arrive(installed_engine: Engine, ear: Ear) -> None:
    """Postgres drops equal NOTIFYs of one transaction; ours differ."""
    with installed_engine.begin() as connection:
        notify_many(connection, [Sent(text="same")] * 5)
    assert len(heard_until_end(ear, installed_engine)) == 5


def test_a_rolled_back_unstored_message_is_never_sent(installed_engine: Engine, ear: Ear) -> None:
    """Nor one of a savepoint that was rolled back."""
    with Session(installed_engine) as session:
        notify(session, Sent(text="one"))
        session.rollback()
        notify(session, Sent(text="two"))
        with session.begin_nested() as savepoint:
            notify(session, Sent(text="three"))
            savepoint.rollback()
        session.commit()
    assembler = Assembler()
    heard = [assembler.add(one.payload) for one in heard_until_end(ear, installed_engine)]
    assert [message["payload"]["text"] for message in heard if message] == ["two"]


# The doorbell


def hold_door(connection: Connection, channel: str) -> None:
    connection.execute(text("SELECT pg_advisory_lock(pgpubsub_lock_key('door', :channel))"), {"channel": channel})


def test_the_doorbell_rings_only_while_a_bridge_sleeps(installed_engine: Engine, ear: Ear) -> None:
    """An awake bridge needs no NOTIFY, whose commits wait for each other."""
    install(installed_engine, channels=[Reads])
    with installed_engine.begin() as writer:
        notify(writer, Reads(model_id=1))
    assert heard_until_end(ear, installed_engine) == []
    with installed_engine.connect() as sleeping:
        hold_door(sleeping, Reads.name())
        with installed_engine.begin() as writer:
            notify_many(writer, [Reads(model_id=2), Reads(model_id=3)])
            notify(writer, Reads(model_id=4))
        heard = heard_until_end(ear, installed_engine)
    assert [(one.channel, one.payload) for one in heard] == [(Reads.listen_safe_name(), "")]


def test_a_silent_writer_keeps_the_door_open_until_its_transaction_ends(installed_engine: Engine) -> None:
    """The bridge cannot fall asleep before it can see what the writer has stored, nor after a released savepoint."""
    install(installed_engine, channels=[Reads])

    def can_close() -> bool:
        with installed_engine.connect() as bridge:
            return bool(
                bridge.execute(
                    text("SELECT pg_try_advisory_xact_lock(pgpubsub_lock_key('door', :c))"), {"c": Reads.name()}
                ).scalar()
            )

    assert can_close()
    for how in ("plain", "savepoint released", "savepoint rolled back"):
        with installed_engine.connect() as writer:
            if how == "plain":
                notify(writer, Reads(model_id=1))
            else:
                savepoint = writer.begin_nested()
                notify(writer, Reads(model_id=1))
                savepoint.rollback() if how == "savepoint rolled back" else savepoint.commit()
            writer.execute(text("SELECT 1"))
            assert can_close() is (how == "savepoint rolled back")
            writer.commit()
        assert can_close()


def test_both_names_of_a_renamed_channel_are_rung(installed_engine: Engine, installed_url: str) -> None:
    """During a deployment bridges of both releases may be asleep, each under the name that it knows."""
    install(installed_engine, channels=[Reads])
    channels._registry.clear()  # it is another release that declares this

    @dataclasses.dataclass
    class Renamed(Channel):
        channel_name = "test_emit.Renamed"
        aliases = (Reads.name(),)
        lock_notifications = True
        model_id: int

    install(installed_engine, channels=[Renamed])
    ear = Ear(installed_url, Reads.listen_safe_name(), Renamed.listen_safe_name(), "end")
    with contextlib.closing(ear.connection), installed_engine.connect() as sleeping:
        hold_door(sleeping, Reads.name())
        hold_door(sleeping, Renamed.name())
        for message in (Renamed(model_id=1), Reads(model_id=1)):
            with installed_engine.begin() as writer:
                notify(writer, message)
            heard = {one.channel for one in heard_until_end(ear, installed_engine)}
            assert heard == {Reads.listen_safe_name(), Renamed.listen_safe_name()}


def test_a_transaction_that_must_not_notify_does_without_the_doorbell(installed_engine: Engine, ear: Ear) -> None:
    """Its rows are left to the sweep, and its unstored messages are dropped."""
    install(installed_engine, channels=[Reads])
    with installed_engine.connect() as sleeping:
        hold_door(sleeping, Reads.name())
        with installed_engine.connect() as writer:
            writer.execute(text("SET LOCAL pgpubsub.notify = 'off'"))
            notify(writer, Reads(model_id=1))
            notify(writer, Sent(text="x"))
            writer.commit()
    assert heard_until_end(ear, installed_engine) == []
    assert len(stored(installed_engine)) == 1


def test_two_phase_transactions_can_be_prepared_and_stay_registered(two_phase_engine: Engine) -> None:
    """Postgres does not prepare what has notified; who is asleep must not miss what is prepared and not committed."""
    install(two_phase_engine, channels=[Reads])
    with two_phase_engine.connect() as bridge:
        hold_door(bridge, Reads.name())
        bridge.commit()
        with Session(two_phase_engine, twophase=True) as session:
            notify(session, Reads(model_id=1))
            session.commit()
        assert len(stored(two_phase_engine)) == 1
        bridge.execute(text("SELECT pg_advisory_unlock_all()"))
        with two_phase_engine.connect() as writer:
            transaction = writer.begin_twophase()
            notify(writer, Reads(model_id=2))
            transaction.prepare()
            door = text("SELECT pg_try_advisory_xact_lock(pgpubsub_lock_key('door', :channel))")
            assert bridge.execute(door, {"channel": Reads.name()}).scalar() is False
            transaction.commit()
            assert bridge.execute(door, {"channel": Reads.name()}).scalar() is True
    assert len(stored(two_phase_engine)) == 2


@pytest.fixture
def two_phase_engine() -> Iterator[Engine]:
    """A server of its own, that allows what the default configuration does not."""
    with EmbeddedPostgres(
        bin_dir=os.environ.get(POSTGRES_BIN), fsync=False, options={"max_prepared_transactions": "4"}
    ) as server:
        engine = create_engine(sync_url(server.url))
        yield engine
        engine.dispose()


# Context


def test_the_context_of_the_transaction_and_of_the_call_are_merged(installed_engine: Engine, ear: Ear) -> None:
    """The call's has the last word."""
    with Session(installed_engine) as session:
        notify(session, Reads(model_id=1))
        set_notification_context(session, {"user": 1, "way": "web"})
        notify(session, Reads(model_id=2))
        notify(session, Reads(model_id=3), context={"way": "api", "x": [1, {"y": None}]})
        notify(session, Sent(text="x"))
        set_notification_context(session, {"other": True})
        notify(session, Reads(model_id=4))
        set_notification_context(session, {})
        notify(session, Reads(model_id=5))
        session.commit()
        notify(session, Reads(model_id=6))
        session.commit()
    assert [row.context for row in stored(installed_engine)] == [
        None,
        {"user": 1, "way": "web"},
        {"user": 1, "way": "api", "x": [1, {"y": None}]},
        {"other": True},
        None,
        None,
    ]
    (sent,) = (Assembler().add(one.payload) for one in heard_until_end(ear, installed_engine))
    assert sent is not None
    assert sent["context"] == {"user": 1, "way": "web"}


def test_the_context_of_a_session_holds_for_all_its_transactions_and_no_other(installed_url: str) -> None:
    """With a pool of one connection, nothing of it is left for the next session."""
    engine = create_engine(sync_url(installed_url), pool_size=1, max_overflow=0)
    with Session(engine) as session:
        set_notification_context(session, {"user": 1}, scope="session")
        notify(session, Reads(model_id=1))
        session.commit()
        notify(session, Reads(model_id=2))
        session.rollback()
        set_notification_context(session, {"way": "web"})
        with session.begin_nested():
            notify(session, Reads(model_id=3))
        session.commit()
        notify(session, Reads(model_id=4))
        set_notification_context(session, {"user": 2}, scope="session")
        notify(session, Reads(model_id=5))
        session.commit()
    with Session(engine) as session:
        notify(session, Reads(model_id=6))
        session.commit()
    assert {row.payload["model_id"]: row.context for row in stored(engine)} == {
        1: {"user": 1},
        3: {"user": 1, "way": "web"},
        4: {"user": 1},
        5: {"user": 2},
        6: None,
    }
    engine.dispose()


@pytest.mark.parametrize(
    ("context", "problem"),
    [
        ([1], "expected a dict"),
        ("x", "expected a dict"),
        ({"a": {"b": object()}}, r"\['a'\]\['b'\] is a object"),
        ({"when": DAY}, r"\['when'\] is a date"),
        ({"a": float("nan")}, "is nan"),
        ({"a": ["\x00"]}, r"\['a'\]\[0\] contains the character NUL"),
        ({("a",): 1}, "has the key"),
    ],
)
def test_a_context_that_is_not_json_is_refused(installed_engine: Engine, context: Any, problem: str) -> None:
    """Where it is, before anything is sent; the transaction goes on."""
    with Session(installed_engine) as session:
        with pytest.raises(PayloadError, match=problem):
            set_notification_context(session, context)
        with pytest.raises(PayloadError, match=problem):
            notify(session, Reads(model_id=1), context=context)
        notify(session, Reads(model_id=1))
        session.commit()


def test_a_session_context_needs_a_session(installed_engine: Engine) -> None:
    """A connection goes back to its pool, and on to somebody else."""
    with installed_engine.connect() as connection, pytest.raises(BindError, match="was given a Connection"):
        set_notification_context(connection, {"user": 1}, scope="session")


def test_a_malformed_context_setting_never_fails_the_writer(installed_engine: Engine) -> None:
    """Anybody can SET pgpubsub.context by hand."""
    with installed_engine.begin() as connection:
        for value in ("{", "[1]", '"text"', '{"a": "\\u0000"}', "[" * 100_000):
            connection.execute(text("SELECT set_config('pgpubsub.context', :value, true)"), {"value": value})
            notify(connection, Reads(model_id=1), context={"kept": True})
    assert [row.context for row in stored(installed_engine)] == [{"kept": True}] * 5


def test_alembics_revision_is_stored_with_what_was_emitted_under_it(installed_engine: Engine) -> None:
    """A worker of another release can tell which columns a payload is about."""
    with installed_engine.begin() as connection:
        notify(connection, Reads(model_id=1))
        connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('abc'), ('abd')"))
        notify(connection, Reads(model_id=2))
    assert [row.db_version for row in stored(installed_engine)] == [None, "abc,abd"]


def test_a_version_table_of_another_role_is_not_read(installed_engine: Engine) -> None:
    """It may be a view that does something else, with the rights of the role that installed us."""
    with installed_engine.begin() as connection:
        role = f"planter_{connection.execute(text('SELECT current_database()')).scalar()}"
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text("CREATE VIEW alembic_version AS SELECT (1 / 0)::text AS version_num"))
        connection.execute(text(f"ALTER VIEW alembic_version OWNER TO {role}"))
        notify(connection, Reads(model_id=1))
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))
    assert [row.db_version for row in stored(installed_engine)] == [None]


# Silent triggers


class Base(DeclarativeBase):
    pass


class Author(Base):
    """A table with triggers."""

    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


class Book(Base):
    """Another."""

    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)


class AuthorChanges(TriggerChannel[Author]):
    """Of the first."""

    channel_name = "test_emit.AuthorChanges"
    lock_notifications = True


class BookChanges(TriggerChannel[Book]):
    """Of the other."""

    channel_name = "test_emit.BookChanges"
    lock_notifications = True


@pytest.fixture
def library(installed_engine: Engine) -> Engine:
    """A database with both tables and their triggers."""
    Base.metadata.create_all(installed_engine)
    for channel in (AuthorChanges, BookChanges):
        register_listener(
            Listener(
                name=f"on_{channel.__name__}",
                channel=channel,
                operations=("insert", "update"),
                fields=("new",),
                injected=frozenset(),
            )
        )
    install(installed_engine, channels=[AuthorChanges, BookChanges])
    return installed_engine


def emitted(engine: Engine) -> list[tuple[str, int]]:
    """Class names of the channels, and the ids of the rows that they tell of."""
    return [(row.channel.rpartition(".")[2], int(row.payload["new"]["id"])) for row in stored(engine)]


def test_suppressed_channels_are_silent_within_the_block_alone(library: Engine) -> None:
    """What is pending is flushed at both ends, so that it counts where it was written."""
    with Session(library) as session:
        session.add(Author(id=1))
        with suppress_notifications(session, AuthorChanges):
            session.add_all([Author(id=2), Book(id=1)])
        session.add(Author(id=3))
        session.commit()
    assert emitted(library) == [("AuthorChanges", 1), ("BookChanges", 1), ("AuthorChanges", 3)]


@pytest.mark.parametrize("channels", [(), (AuthorChanges, BookChanges), ("test_emit.AuthorChanges", BookChanges)])
def test_all_channels_can_be_suppressed_or_several(library: Engine, channels: tuple[Any, ...]) -> None:
    """None given means all; messages are not concerned."""
    with Session(library) as session:
        with suppress_notifications(session, *channels):
            session.add_all([Author(id=1), Book(id=1)])
            notify(session, Reads(model_id=1))
        session.commit()
    assert [row.channel for row in stored(library)] == [Reads.name()]


def test_blocks_can_be_nested(library: Engine) -> None:
    """The inner one's end leaves the outer one's."""
    with library.begin() as connection, suppress_notifications(connection, AuthorChanges):
        with suppress_notifications(connection, BookChanges):
            connection.execute(text("INSERT INTO author VALUES (1, ''); INSERT INTO book VALUES (1)"))
        connection.execute(text("INSERT INTO author VALUES (2, ''); INSERT INTO book VALUES (2)"))
    assert emitted(library) == [("BookChanges", 2)]


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_a_backfill_may_commit_as_often_as_it_likes(library: Engine, kind: str) -> None:
    """Transactions that begin within the block are silent, too; those after it are not, in the same connection."""
    engine = create_engine(library.url, pool_size=1, max_overflow=0)
    with Session(engine) if kind == "session" else engine.connect() as bind:
        with suppress_notifications(bind, AuthorChanges):
            for id in range(3):
                bind.execute(text("INSERT INTO author VALUES (:id, '')"), {"id": id})
                bind.commit()
            bind.execute(text("INSERT INTO author VALUES (3, '')"))
            bind.rollback()
        bind.execute(text("INSERT INTO author VALUES (4, '')"))
        bind.commit()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO author VALUES (5, '')"))
    engine.dispose()
    assert emitted(library) == [("AuthorChanges", 4), ("AuthorChanges", 5)]


def test_an_error_in_the_block_ends_it(library: Engine) -> None:
    """Of Python's, or of the database's, after which the transaction can only be rolled back."""
    with Session(library) as session:
        with contextlib.suppress(ZeroDivisionError), suppress_notifications(session):
            raise ZeroDivisionError
        session.add(Author(id=1))
        session.flush()
        savepoint = session.begin_nested()
        with pytest.raises(DBAPIError, match="division by zero"), suppress_notifications(session):
            session.execute(text("SELECT 1 / 0"))
        savepoint.rollback()
        session.add(Author(id=2))
        session.commit()
        with pytest.raises(DBAPIError, match="division by zero"), suppress_notifications(session):
            session.execute(text("SELECT 1 / 0"))
        session.rollback()
        session.add(Author(id=3))
        session.commit()
    assert emitted(library) == [("AuthorChanges", 1), ("AuthorChanges", 2), ("AuthorChanges", 3)]


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
def test_asynchronous_sessions_and_connections_suppress_too(library: Engine, installed_url: str, driver: str) -> None:
    """With `async with`, across their commits."""

    async def write(engine: Any) -> None:
        async with AsyncSession(engine) as session:
            async with suppress_notifications(session, AuthorChanges):
                session.add(Author(id=1))
                await session.commit()
                session.add(Author(id=2))
            session.add(Author(id=3))
            await session.commit()
        async with engine.connect() as connection:
            async with suppress_notifications(connection):
                await connection.execute(text("INSERT INTO author VALUES (4, '')"))
                await connection.commit()
                await connection.execute(text("INSERT INTO author VALUES (5, '')"))
            await connection.execute(text("INSERT INTO author VALUES (6, '')"))
            await connection.commit()

    run_async(installed_url, driver, write)
    assert emitted(library) == [("AuthorChanges", 3), ("AuthorChanges", 6)]


def test_a_flush_that_fails_at_the_end_says_why(library: Engine) -> None:
    """And leaves nothing suppressed behind."""
    with Session(library) as session:
        session.add(Author(id=1))
        session.commit()
        with pytest.raises(DBAPIError, match="duplicate key"), suppress_notifications(session):
            session.add(Author(id=1))
        session.rollback()
        session.add(Author(id=2))
        session.commit()
    assert emitted(library) == [("AuthorChanges", 1), ("AuthorChanges", 2)]


def test_a_session_with_several_databases_says_which_to_suppress(library: Engine, engine: Engine) -> None:
    """By the same bind_arguments as for notify()."""
    with Session(binds={Author: library, Notification: engine}) as session:
        with suppress_notifications(session, bind_arguments={"mapper": Author}):
            session.add(Author(id=1))
        session.add(Author(id=2))
        session.commit()
    assert emitted(library) == [("AuthorChanges", 2)]


def test_only_trigger_channels_can_be_suppressed(installed_engine: Engine) -> None:
    """A message is not emitted by not emitting it."""
    with Session(installed_engine) as session, pytest.raises(ChannelError, match="not a trigger channel"):
        suppress_notifications(session, Reads)


def test_a_trigger_channel_is_not_emitted_by_notify(library: Engine) -> None:
    """Nor from psql: what its listeners are told has happened."""
    with Session(library) as session, pytest.raises(ChannelError, match="its table emits"):
        notify(session, AuthorChanges)
    with library.connect() as connection, pytest.raises(DBAPIError, match="carries the changes of the table author"):
        connection.exec_driver_sql("SELECT pgpubsub_notify('test_emit.AuthorChanges', '{}')")


def test_the_transactions_context_reaches_what_triggers_emit(library: Engine) -> None:
    """As what notify() emits."""
    with Session(library) as session:
        set_notification_context(session, {"user": 1}, scope="session")
        session.add(Author(id=1))
        session.commit()
        set_notification_context(session, {"way": "web"})
        session.add(Author(id=2))
        session.commit()
    assert [row.context for row in stored(library)] == [{"user": 1}, {"user": 1, "way": "web"}]


# What goes wrong in the database


def test_a_database_without_the_functions_says_what_to_run(engine: Engine) -> None:
    """The statement has failed, and with it the transaction: nothing else can be done about it."""
    with Session(engine) as session, pytest.raises(NotInstalledError, match=r"pgpubsub-bridge -A your\.app install"):
        notify(session, Reads(model_id=1))


def test_other_database_errors_stay_what_they_are(installed_engine: Engine) -> None:
    """Only what we can explain is explained."""
    with installed_engine.connect() as connection:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DBAPIError, match="read-only"):
            notify(connection, Reads(model_id=1))


# SQL and roles


@pytest.fixture
def roles(installed_engine: Engine) -> Iterator[dict[str, str]]:
    """Two roles that can log in: one that may emit, one that may not."""
    database = installed_engine.url.database
    names = {"writer": f"writer_{database}", "stranger": f"stranger_{database}"}
    with installed_engine.begin() as connection:
        for name in names.values():
            connection.execute(text(f"CREATE ROLE {name} LOGIN"))
        grant_emit(connection, names["writer"])
    yield names
    with installed_engine.begin() as connection:
        for name in names.values():
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))


def engine_of(engine: Engine, role: str) -> Engine:
    return create_engine(engine.url.set(username=role))


def test_a_role_with_the_grant_emits_and_reads_nothing(installed_engine: Engine, roles: dict[str, str]) -> None:
    """EXECUTE on two functions is all it needs, and all it has."""
    writer = engine_of(installed_engine, roles["writer"])
    with writer.begin() as connection:
        notify(connection, Reads(model_id=1))
        assert (
            connection.exec_driver_sql(
                """SELECT pgpubsub_notify('test_emit.Reads', '{"model_id": 2, "date": "2026-01-01"}')"""
            ).scalar()
            == 1
        )
    with writer.connect() as connection, pytest.raises(DBAPIError, match="permission denied"):
        connection.execute(text("SELECT * FROM pgpubsub_notification"))
    writer.dispose()
    assert [payload["model_id"] for payload in payloads(installed_engine)] == [1, 2]


def test_a_role_without_the_grant_is_refused(installed_engine: Engine, roles: dict[str, str]) -> None:
    """By name of the option that grants it; none of our functions does anything for it."""
    stranger = engine_of(installed_engine, roles["stranger"])
    with stranger.connect() as connection, pytest.raises(PgPubSubError, match="install --grant-emit ROLE"):
        notify(connection, Reads(model_id=1))
    for call in (
        "pgpubsub_notify('x', '{}')",
        "pgpubsub_emit('x', '[{}]', NULL, NULL, true, NULL)",
        "pgpubsub_ring('x')",
        "pgpubsub_send('x', '{}')",
        "pgpubsub_db_version()",
    ):
        with stranger.connect() as connection, pytest.raises(DBAPIError, match="permission denied"):
            connection.execute(text(f"SELECT {call}"))
    stranger.dispose()
    assert stored(installed_engine) == []


def test_a_writers_search_path_and_operators_change_nothing(installed_engine: Engine, roles: dict[str, str]) -> None:
    """Functions with the rights of the installing role must not run what a writer puts in their way."""
    role = roles["writer"]
    with installed_engine.begin() as connection:
        connection.execute(text(f"GRANT CREATE ON DATABASE {installed_engine.url.database} TO {role}"))
    writer = engine_of(installed_engine, role)
    with writer.begin() as connection:
        connection.execute(text("CREATE SCHEMA evil"))
        for function in ("now() RETURNS timestamptz", "jsonb_array_elements(jsonb) RETURNS SETOF jsonb"):
            connection.execute(
                text(f"CREATE FUNCTION evil.{function} LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$")
            )
        connection.execute(
            text(
                "CREATE FUNCTION evil.concat(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$"
            )
        )
        connection.execute(text("CREATE OPERATOR evil.|| (FUNCTION = evil.concat, LEFTARG = text, RIGHTARG = text)"))
        connection.execute(text("CREATE TEMP TABLE pgpubsub_subscription (channel text)"))
        connection.execute(text("SET search_path = evil, pg_temp, public, pg_catalog"))
        notify(connection, Reads(model_id=1))
        notify(connection, Sent(text="x"))
        connection.execute(text("SELECT public.pgpubsub_lock_key('door', 'x'), public.pgpubsub_suppressed('x')"))
    writer.dispose()
    assert len(stored(installed_engine)) == 1


def test_psql_can_emit_with_eta_and_context(installed_engine: Engine) -> None:
    """Services in other languages have one function."""
    with installed_engine.begin() as connection:
        connection.exec_driver_sql(
            "SELECT pgpubsub_notify('test_emit.Reads', '{\"model_id\": 1}', '2030-01-01 12:00+00', '{\"user\": 1}')"
        )
    (row,) = stored(installed_engine)
    assert row.available_at == datetime.datetime(2030, 1, 1, 12, tzinfo=UTC)
    assert row.context == {"user": 1}


def test_psql_sends_what_an_installed_channel_does_not_store(installed_engine: Engine, ear: Ear) -> None:
    """SQL knows from the installation which channels are stored."""
    install(installed_engine, channels=[Sent])
    with installed_engine.begin() as connection:
        connection.exec_driver_sql("SELECT pgpubsub_notify('test_emit.Sent', '{\"text\": \"x\"}')")
    assert stored(installed_engine) == []
    (heard,) = heard_until_end(ear, installed_engine)
    message = Assembler().add(heard.payload)
    assert message is not None
    assert message["payload"] == {"text": "x"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("'', '{}'", "the channel is empty"),
        ("NULL, '{}'", "the channel is empty"),
        ("'x', '[]'", "the payload of x is array: expected a JSON object"),
        ("'x', NULL", "the payload of x is NULL"),
        ("'x', '{}', NULL, '1'", "the context is a JSON number"),
    ],
)
def test_psql_is_told_what_is_wrong(installed_engine: Engine, arguments: str, problem: str) -> None:
    """In the words of the function, not of a constraint."""
    with installed_engine.connect() as connection, pytest.raises(DBAPIError, match=problem):
        connection.exec_driver_sql(f"SELECT pgpubsub_notify({arguments})")


def test_psql_is_warned_of_an_unknown_channel_whose_message_is_kept(
    installed_engine: Engine, installed_url: str
) -> None:
    """It may be a typing error, or a release that is yet to come."""
    with (
        contextlib.closing(psycopg2.connect(libpq_url(installed_url))) as connection,
        connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SELECT pgpubsub_notify('test_emit.Redas', '{}')")
        assert any("no channel named test_emit.Redas is installed" in notice for notice in connection.notices)
    assert len(stored(installed_engine)) == 1


# Asynchronous


ASYNC_DRIVERS = ["postgresql+asyncpg", "postgresql+psycopg"]


def run_async(url: str, driver: str, function: Any) -> None:
    async def run() -> None:
        engine = create_async_engine(sync_url(url).set(drivername=driver))
        try:
            await function(engine)
        finally:
            await engine.dispose()

    asyncio.run(run())


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
def test_the_asynchronous_twins_do_the_same(installed_engine: Engine, installed_url: str, driver: str) -> None:
    """AsyncSession, async_scoped_session and AsyncConnection, with asyncpg and psycopg."""
    eta = datetime.datetime(2030, 1, 1, 12, tzinfo=UTC)

    async def emit(engine: Any) -> None:
        async with AsyncSession(engine) as session:
            assert await anotify(session, Reads(model_id=1), eta=eta, context={"user": 1}) == 1
            await session.commit()
            await anotify(session, Reads(model_id=2))
            await session.rollback()
            assert await anotify_many(session, [Reads(model_id=3), Other(value="x")], countdown=5) == 2
            assert await anotify(session, Sent(text="x")) == 0
            await session.commit()
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        await anotify(scoped, Reads, model_id=4)
        await scoped.commit()
        await scoped.remove()
        async with engine.begin() as connection:
            await anotify(connection, Reads.name(), model_id=5)

    run_async(installed_url, driver, emit)
    rows = stored(installed_engine)
    assert [row.payload.get("model_id") for row in rows] == [1, 3, None, 4, 5]
    assert (rows[0].available_at, rows[0].context) == (eta, {"user": 1})
    assert rows[1].available_at - rows[1].created_at >= datetime.timedelta(seconds=5)


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
def test_asynchronous_autocommit_and_missing_functions_are_recognised(database_url: str, driver: str) -> None:
    """The drivers say both in their own ways."""

    async def emit(engine: Any) -> None:
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(BindError, match="AUTOCOMMIT"):
                await anotify(connection, Reads(model_id=1))
        async with AsyncSession(engine) as session:
            with pytest.raises(NotInstalledError):
                await anotify(session, Reads(model_id=1))

    run_async(database_url, driver, emit)


def test_the_wrong_twin_is_refused_with_the_right_one(installed_engine: Engine, installed_url: str) -> None:
    """An AsyncSession given to notify() would otherwise never be awaited."""

    async def emit(engine: Any) -> None:
        async with AsyncSession(engine) as session:
            with pytest.raises(BindError, match=r"await anotify\("):
                notify(session, Reads(model_id=1))
        with Session(installed_engine) as synchronous, pytest.raises(BindError, match=r"use notify\("):
            await anotify(synchronous, Reads(model_id=1))
        with pytest.raises(BindError, match="expected an AsyncSession"):
            await anotify(engine, Reads(model_id=1))

    run_async(installed_url, "postgresql+asyncpg", emit)
