"""pgpubsub_celery: channels and listeners. `BENCH_VARIANT` says which channel a measurement is about."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
import uuid
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from bench.applications.given import BROKER, BULK, DATABASE, KIND, VARIANT, noted
from bench.applications.tables import Effect, Item, item
from pgpubsub_celery import Channel, TriggerChannel, channel_task, install, notify, notify_many
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.messages import Address, build_messages
from pgpubsub_celery.publishing import Publisher
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.store import Claimed

BATCH = 500
"""As many as a bridge claims, and publishes, at once."""
_SOME_TIME = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)

app = Celery("bench", broker=BROKER)
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)

engine = create_engine(sync_url(DATABASE))


class ItemRows(TriggerChannel[Item]):
    """Whole rows."""

    lock_notifications = True


class ItemKeys(TriggerChannel[Item]):
    """Primary keys alone."""

    lock_notifications = True
    include = "key"


class ItemOwned(TriggerChannel[Item]):
    """Whole rows, for a listener without `session`."""

    lock_notifications = True


class ItemDrained(TriggerChannel[Item]):
    """Gone as soon as the broker has them: what a bridge can drain without workers."""

    lock_notifications = True
    acknowledge = "published"
    include = "key"


@dataclasses.dataclass
class Work(Channel):
    """For a listener with `session`."""

    lock_notifications = True
    number: int


@dataclasses.dataclass
class Sent(Channel):
    """Gone as soon as the broker has them, one in a message."""

    lock_notifications = True
    acknowledge = "published"
    number: int


CHANNELS: dict[str, type[Channel]] = {
    "rows": ItemRows,
    "keys": ItemKeys,
    "floor": ItemKeys,
    "owned": ItemOwned,
    "drained": ItemDrained,
    "work": Work,
    "sent": Sent,
}


def handle(number: int, session: Session) -> None:
    """Do what the kind of measurement asks for."""
    if not noted(number) and KIND == "insert":
        session.add(Effect(number=number))


@channel_task(ItemRows, on="insert")
def on_row(new: Item, session: Session) -> None:
    """Runs in the transaction that acknowledges."""
    assert new.a is not None
    handle(new.a, session)


@channel_task(ItemOwned, on="insert")
def on_owned_row(new: Item) -> None:
    """Runs without a transaction."""
    assert new.a is not None
    noted(new.a)


@channel_task(ItemKeys, on="insert")
def on_key(new: Item) -> None:
    """Never run: what the trigger costs is measured."""


@channel_task(ItemDrained, on="insert", bundle=200)
def on_drained(new: Item) -> None:
    """Never run: what the bridge does is measured."""


@channel_task(Work)
def work(number: int, session: Session) -> None:
    """Runs in the transaction that acknowledges, in bundles by its measured run time."""
    handle(number, session)


@channel_task(Sent)
def sent(number: int) -> None:
    """Never run: what the bridge publishes is measured."""


def prepare() -> None:
    """Install the tables, and the triggers of the variant's channel."""
    install(engine, channels=[CHANNELS[VARIANT]])
    if VARIANT == "floor":
        _store_constants()


def _store_constants() -> None:
    """Let the trigger store a constant for each row, and do nothing else: less than that no stored row can cost."""
    with engine.begin() as connection:
        function, subscription = connection.execute(
            text(
                "SELECT t.tgfoid::regproc::text, s.id FROM pg_trigger t CROSS JOIN pgpubsub_subscription s "
                "WHERE t.tgrelid = 'item'::regclass AND t.tgnewtable IS NOT NULL AND t.tgoldtable IS NULL "
                "AND s.channel = :channel"
            ),
            {"channel": CHANNELS[VARIANT].name()},
        ).one()
        connection.exec_driver_sql(
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $function$ BEGIN "
            "INSERT INTO public.pgpubsub_notification (channel, subscription, operation, payload) "
            f"SELECT 'floor', {subscription}, 'insert', '{{}}' FROM pgpubsub_new; RETURN NULL; END $function$"
        )


def write(number: int) -> float:
    """One transaction that writes a row, and emits."""
    with Session(engine) as session, session.begin():
        session.add(item(number))
        if VARIANT == "work":
            notify(session, Work(number=number))
        session.flush()
        at = time.time()
    return at


def write_plain(number: int) -> float:
    """The same without anything for us."""
    with Session(engine) as session, session.begin():
        session.add(item(number))
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows; the table's trigger does the rest."""
    begin = time.perf_counter()
    with engine.begin() as connection:
        connection.exec_driver_sql(BULK, (count,))
    return time.perf_counter() - begin


def publish(count: int) -> float:
    """Publish as a bridge does, one message for each of so many claimed notifications; return the seconds."""
    rows = [
        Claimed(id=number, subscription=1, dispatches=1, retries=0, operation="message", created_at=_SOME_TIME)
        for number in range(1, count + 1)
    ]
    task: Any = sent
    address = Address(channel=Sent.name(), listener=task.name, task=task.name)
    broker, publisher = Broker(app, timeout=10), Publisher()
    begin = time.perf_counter()
    for first in range(0, count, BATCH):
        publisher.begin()
        messages = build_messages(rows[first : first + BATCH], {1: address}, uuid.UUID(int=1))
        outcomes = broker.publish([functools.partial(publisher.publish, message) for message in messages])
        assert not any(outcomes), outcomes
    seconds = time.perf_counter() - begin
    broker.close()
    return seconds


def backlog(count: int) -> float:
    """One transaction that emits many; return when its COMMIT was sent."""
    channel = CHANNELS[VARIANT]
    with Session(engine) as session, session.begin():
        if VARIANT in {"work", "sent"}:
            notify_many(session, [channel(number=number) for number in range(count)])  # type: ignore[call-arg]
        else:
            session.execute(text(BULK.replace("%s", ":count")), {"count": count})
        at = time.time()
    return at
