"""Two databases on one application: each has its own channels, and one worker runs the notifications of both."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, enqueue, install, notify, requests
from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.messages import Message
from pgpubsub_celery.migrations import check
from pgpubsub_celery.schemas import DATABASE_OPTION
from pgpubsub_celery.settings import sync_url
from tests.fixtures.deliveries import Deliveries


class Two:
    """The default database and billing's, on one server, with a worker for both."""

    def __init__(self, main: Engine, billing: Engine, *, schema: str = "public") -> None:
        self.engines = {"default": main, "billing": billing}
        self.app = Celery("two", broker="memory://")
        url, other = (engine.url.render_as_string(hide_password=False) for engine in (main, billing))
        self.app.conf.update(
            pgpubsub_database_url=url, pgpubsub_databases={"billing": {"database_url": other, "schema": schema}}
        )
        self.declare()
        for alias, engine in self.engines.items():
            install(engine, database=alias)
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE effect (id serial, listener text, number int)"))
        self.deliveries = {
            alias: Deliveries(self.app, engine, database=alias, schema=schema if alias == "billing" else "public")
            for alias, engine in self.engines.items()
        }

    def declare(self) -> None:
        @dataclasses.dataclass
        class Visit(Channel):
            lock_notifications = True
            number: int

        @dataclasses.dataclass
        class Invoice(Channel):
            lock_notifications = True
            database = "billing"
            number: int

        @dataclasses.dataclass
        class Audit(Channel):
            lock_notifications = True
            acknowledge = "published"
            database = "*"
            number: int

        self.visit, self.invoice, self.audit = Visit, Invoice, Audit

        def record(session: Session, listener: str, number: int) -> None:
            session.execute(text("INSERT INTO effect (listener, number) VALUES (:l, :n)"), {"l": listener, "n": number})

        @channel_task(Visit, app=self.app, name="two.count")
        def count(number: int, session: Session) -> None:
            record(session, "count", number)

        @channel_task(Invoice, app=self.app, name="two.pay")
        def pay(number: int, session: Session) -> None:
            record(session, "pay", number)

        @channel_task(Invoice, app=self.app, name="two.post")
        def post(number: int) -> None:
            self.posted.append(number)

        @channel_task(Audit, app=self.app, name="two.audit")
        def audit(number: int, session: Session) -> None:
            record(session, "audit", number)

        self.posted: list[int] = []
        self.pay: Any = pay

    def notify(self, alias: str, message: Channel) -> None:
        with self.engines[alias].begin() as connection:
            notify(connection, message)

    def effects(self, alias: str) -> list[tuple[str, int]]:
        with self.engines[alias].connect() as connection:
            found = connection.execute(text("SELECT listener, number FROM effect ORDER BY listener, number"))
            return [(row.listener, row.number) for row in found]

    def message(self, alias: str, task: str) -> Message:
        """Claim what is due; return the message of one listener."""
        (message,) = [one for one in self.deliveries[alias].claim() if one.task == task]
        return message


@pytest.fixture
def billing(postgres: EmbeddedPostgres, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine on a second fresh, empty database."""
    name = f"billing_{id(request)}"
    engine = create_engine(sync_url(postgres.create_database(name)))
    yield engine
    engine.dispose()
    postgres.drop_database(name)


@pytest.fixture
def two(nothing_declared: None, engine: Engine, billing: Engine) -> Two:
    """Both with tables in the schema public."""
    return Two(engine, billing)


def test_each_database_has_the_channels_that_are_in_it(two: Two) -> None:
    """And nothing is missing or unwanted in either; of the other's, all would be."""
    for alias, expected in (("default", {two.visit, two.audit}), ("billing", {two.invoice, two.audit})):
        with two.engines[alias].connect() as connection:
            found = connection.execute(text("SELECT DISTINCT channel FROM pgpubsub_subscription")).scalars()
            assert set(found) == {channel.name() for channel in expected} | {"pgpubsub.enqueue"}
            assert check(connection, database=alias) == []
    with two.engines["billing"].connect() as connection:
        assert any("Visit" in line for line in check(connection, database="default"))
    assert install(two.engines["billing"], database="billing", prune=True) == []


def test_one_worker_runs_the_notifications_of_both(two: Two) -> None:
    """Rows of one id in each: effect and acknowledgement are in the database of the message."""
    two.notify("default", two.visit(number=1))
    two.notify("billing", two.invoice(number=2))
    for alias in ("default", "billing"):
        two.notify(alias, two.audit(number=3))
        two.deliveries[alias].run()
    assert two.effects("default") == [("audit", 3), ("count", 1)]
    assert two.effects("billing") == [("audit", 3), ("pay", 2)]
    assert two.posted == [2]
    # Rows of `acknowledge="published"` go when a bridge has published them.
    assert {row["channel"] for alias in two.engines for row in two.deliveries[alias].rows()} == {two.audit.name()}


@pytest.mark.parametrize("told", [None, "renamed"])
def test_the_installation_decides_where_the_alias_does_not(two: Two, told: str | None) -> None:
    """Of a bridge of an earlier release, or one that calls the database by another name."""
    two.notify("default", two.visit(number=1))
    two.notify("billing", two.invoice(number=2))
    message = two.message("billing", "two.pay")
    two.deliveries["billing"].deliver(
        dataclasses.replace(message, envelope=dataclasses.replace(message.envelope, database=told))
    )
    assert two.effects("billing") == [("pay", 2)]
    assert two.effects("default") == []
    assert two.deliveries["default"].states() == ["waiting"]


def test_a_message_of_a_database_that_the_worker_does_not_know_is_refused(two: Two) -> None:
    """It says which it has; the notification is left to its lease, in whichever database it is."""
    two.notify("default", two.visit(number=1))
    message = two.message("default", "two.count")
    envelope = dataclasses.replace(
        message.envelope, database="crm", installation=two.deliveries["default"].fresh_installation()
    )
    result = two.deliveries["default"].deliver(dataclasses.replace(message, envelope=envelope))
    told = str(result.info.retval)
    assert (
        "(the bridge calls its database 'crm'), which none of this worker's databases has ('default', 'billing')"
        in told
    )
    assert two.deliveries["default"].states() == ["dispatched"]


def test_what_a_lost_child_had_is_given_back_in_its_own_database(two: Two) -> None:
    """The other one's row has the same id, and is nobody's lost run."""
    two.notify("default", two.visit(number=1))
    two.notify("billing", two.invoice(number=2))
    two.message("default", "two.count")
    envelope = two.message("billing", "two.pay").envelope
    (other,) = [row["id"] for row in two.deliveries["default"].rows()]
    assert envelope.ids == (other,)
    for told in ("billing", None):  # as a bridge of an earlier release has it
        one = dataclasses.replace(envelope, database=told)
        requests.settle_later(two.app, "giving back", requests._give_back(one), one)
        settled = threading.Event()
        requests.settle_later(two.app, "telling", functools.partial(_set, settled))
        assert settled.wait(30)
        assert two.deliveries["default"].states() == ["dispatched"]
        assert sorted(two.deliveries["billing"].states()) == ["dispatched", "waiting"]
        envelope = two.message("billing", "two.pay").envelope


def _set(settled: threading.Event, store: Any, connection: Any) -> None:
    settled.set()


def test_a_listener_called_as_a_task_has_a_session_of_its_channels_database(two: Two) -> None:
    """Directly, or by delay(): there is no message that could tell."""
    two.pay(number=9)
    assert two.effects("billing") == [("pay", 9)]


# Schemas


@pytest.fixture
def apart(nothing_declared: None, engine: Engine, billing: Engine) -> Two:
    """Billing's tables are in a schema of their own."""
    return Two(engine, billing, schema="queue")


def test_each_database_may_have_a_schema_of_its_own(apart: Two) -> None:
    """A channel's database tells where the functions are."""
    apart.notify("default", apart.visit(number=1))
    apart.notify("billing", apart.invoice(number=2))
    apart.deliveries["default"].run()
    apart.deliveries["billing"].run()
    assert apart.effects("default") == [("count", 1)]
    assert apart.effects("billing") == [("pay", 2)]


def test_where_schemas_differ_a_connection_says_which_database_it_is_of(apart: Two) -> None:
    """What is enqueued could be for any; without a word it is refused before anything is sent."""
    signature = apart.app.signature("some.task")
    with apart.engines["billing"].begin() as connection:
        with pytest.raises(SettingsError, match=r"different schemas \('default': 'public', 'billing': 'queue'\)"):
            enqueue(connection, signature)
        told = connection.execution_options(**{DATABASE_OPTION: "billing"})
        enqueue(told, signature)
    with apart.engines["billing"].connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM queue.pgpubsub_notification")).scalar() == 1
