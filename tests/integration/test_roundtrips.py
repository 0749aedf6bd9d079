"""What a notification costs between worker and Postgres: round trips are what a database far away makes long."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, install, notify_many
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.transactions import Transaction, guarding
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.trips import CountingProxy


@pytest.fixture
def proxy(installed_url: str) -> Iterator[CountingProxy]:
    """Between a worker and Postgres."""
    proxy = CountingProxy(installed_url)
    yield proxy
    proxy.close()


@pytest.fixture
def app(proxy: CountingProxy) -> Iterator[Celery]:
    """A worker's application."""
    app = Celery("trips", broker="memory://", set_as_current=False)
    app.conf.pgpubsub_database_url = proxy.url
    app.conf.pgpubsub_bundle_target = 60  # a busy machine is not to cut a bundle short
    yield app
    Runtime.of(app).engine.dispose()
    app.close()


@pytest.fixture
def trips(
    registry: None, app: Celery, proxy: CountingProxy, installed_engine: Engine
) -> Callable[[Callable[..., Any], int], int]:
    """Return how many round trips the delivery of a message with so many notifications takes, the pool being warm."""

    @dataclasses.dataclass
    class Trip(Channel):
        channel_name = "trips.Trip"
        lock_notifications = True
        number: int

    def count(function: Callable[..., Any], notifications: int) -> int:
        channel_task(Trip, app=app, name="trips.work", bundle=notifications)(function)
        install(installed_engine, channels=[Trip])
        deliveries = Deliveries(app, installed_engine)
        with Session(installed_engine) as session, session.begin():
            notify_many(session, [Trip(number=number) for number in range(2 * notifications)])
        warm, counted = deliveries.claim()
        deliveries.deliver(warm)
        before = proxy.trips
        deliveries.deliver(counted)
        assert deliveries.states() == []
        return proxy.trips - before

    return count


def idle(number: int, session: Session) -> None: ...


def insert(number: int, session: Session) -> None:
    session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": number})


def without(number: int) -> None: ...


@pytest.mark.parametrize("notifications", [1, 50])
@pytest.mark.parametrize("listener", [idle, without])
def test_a_message_costs_two_round_trips(
    trips: Callable[[Callable[..., Any], int], int], listener: Callable[..., Any], notifications: int
) -> None:
    """Taking and acknowledging, for one notification as for many. Each without `session` is acknowledged by itself."""
    expected = 2 if listener is idle else 1 + notifications
    assert trips(listener, notifications) == expected


def test_what_a_listener_does_costs_its_savepoint_besides(
    trips: Callable[[Callable[..., Any], int], int], installed_engine: Engine
) -> None:
    """Its own round trip, and none for its savepoint."""
    with installed_engine.begin() as connection:
        connection.execute(text("CREATE TABLE effect (value int)"))
    assert trips(insert, 10) == 2 + 10


# A connection that saves round trips is one of psycopg2's to everybody else.


@pytest.fixture
def guard(installed_url: str) -> Iterator[Engine]:
    """As a worker's."""
    engine = create_engine(sync_url(installed_url), pool_size=1, isolation_level="SERIALIZABLE")
    yield guarding(engine)
    engine.dispose()


@pytest.fixture
def _effects(installed_engine: Engine) -> None:
    with installed_engine.begin() as connection:
        connection.execute(text("CREATE TABLE effect (value int)"))


def values(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT value FROM effect ORDER BY value")).scalars())


@pytest.mark.usefixtures("_effects")
def test_a_cursor_at_the_server_is_part_of_the_transaction(guard: Engine, installed_engine: Engine) -> None:
    """The driver refuses one outside of a transaction of its own: it is told of ours."""
    with guard.connect() as connection:
        transaction = Transaction(connection)
        with transaction.guarded():
            connection.execute(text("INSERT INTO effect VALUES (1)"))
            streamed = text("SELECT generate_series(1, 5000)").execution_options(stream_results=True)
            assert len(connection.execute(streamed).all()) == 5000
            connection.execute(text("INSERT INTO effect VALUES (2)"))
            assert values(installed_engine) == []
            transaction.commit()
    assert values(installed_engine) == [1, 2]


@pytest.mark.usefixtures("_effects")
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("first", ["many", "streamed", "savepoint"])
def test_any_statement_may_be_a_transactions_first(
    guard: Engine, installed_engine: Engine, first: str, guarded: bool
) -> None:
    """What nothing can be put before is begun by itself; the level is READ COMMITTED, whoever asks."""
    with guard.connect() as connection, contextlib.ExitStack() as stack:
        transaction = Transaction(connection)
        if guarded:
            stack.enter_context(transaction.guarded())
        if first == "many":
            connection.execute(text("INSERT INTO effect VALUES (:value)"), [{"value": 1}, {"value": 2}])
        elif first == "streamed":
            streamed = text("SELECT generate_series(1, 3000)").execution_options(stream_results=True)
            assert len(connection.execute(streamed).all()) == 3000
        else:
            connection.begin_nested().rollback()
        assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
        connection.execute(text("INSERT INTO effect VALUES (3)"))
        assert values(installed_engine) == []
        transaction.commit() if guarded else connection.commit()
    assert values(installed_engine) == ([1, 2, 3] if first == "many" else [3])


@pytest.mark.usefixtures("_effects")
@pytest.mark.parametrize("ending", ["rollback", "commit"])
def test_the_drivers_own_methods_end_the_transaction(guard: Engine, installed_engine: Engine, ending: str) -> None:
    """Whoever calls them gets what they say; that it was not theirs to end is seen by the transaction's id."""
    with guard.connect() as connection:
        transaction = Transaction(connection)
        with transaction.guarded():
            connection.execute(text("INSERT INTO effect VALUES (1)"))
            raw: Any = connection.connection.driver_connection
            assert raw.autocommit is False
            getattr(raw, ending)()
            transaction.lose()
    assert values(installed_engine) == ([1] if ending == "commit" else [])


@pytest.mark.usefixtures("_effects")
def test_a_connection_goes_back_to_the_pool_as_it_came(guard: Engine, installed_engine: Engine) -> None:
    """Without a transaction, and not in autocommit, whatever happened to it."""
    with guard.connect() as connection:
        transaction = Transaction(connection)
        with transaction.guarded():
            connection.execute(text("INSERT INTO effect VALUES (1)"))
    with guard.connect() as connection:
        raw: Any = connection.connection.driver_connection
        assert (raw.autocommit, raw.by_text, raw.info.transaction_status) == (False, False, 0)
        connection.execute(text("INSERT INTO effect VALUES (2)"))
        connection.rollback()
    assert values(installed_engine) == []


def test_an_application_keeps_the_kind_of_connection_that_it_has_chosen(installed_url: str) -> None:
    """Then nothing is saved, and everything else is as it was."""
    from psycopg2.extensions import connection as plain

    engine = create_engine(
        sync_url(installed_url), connect_args={"connection_factory": plain}, isolation_level="SERIALIZABLE"
    )
    guard = guarding(engine)
    with guard.connect() as connection:
        transaction = Transaction(connection)
        with transaction.guarded():
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
            assert not transaction.ends_by_text
            transaction.commit()
    engine.dispose()
