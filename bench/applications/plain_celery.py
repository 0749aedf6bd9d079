"""Plain Celery: the transaction commits, then `delay()`. Whatever dies in between is lost."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from bench.applications.given import BROKER, BULK, DATABASE, KIND, noted
from bench.applications.tables import Effect, item
from pgpubsub_celery.settings import sync_url

app = Celery("bench", broker=BROKER)
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)

_engine: tuple[int, Engine] | None = None


def engine() -> Engine:
    """Return this process's engine: a worker forks."""
    global _engine
    if _engine is None or _engine[0] != os.getpid():
        _engine = (os.getpid(), create_engine(sync_url(DATABASE)))
    return _engine[1]


@app.task
def work(number: int) -> None:
    """Do what the kind of measurement asks for, in a transaction of its own."""
    if not noted(number) and KIND == "insert":
        with Session(engine()) as session, session.begin():
            session.add(Effect(number=number))


def prepare() -> None:
    """Nothing to prepare."""


def write(number: int) -> float:
    """One transaction, then its task; return when that was sent."""
    with Session(engine()) as session, session.begin():
        session.add(item(number))
    at = time.time()
    work.delay(number)
    return at


def write_plain(number: int) -> float:
    """The transaction alone."""
    with Session(engine()) as session, session.begin():
        session.add(item(number))
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows, and a task for each."""
    begin = time.perf_counter()
    with engine().begin() as connection:
        ids = connection.exec_driver_sql(BULK + " RETURNING id", (count,)).scalars().all()
    for id in ids:
        work.delay(id)
    return time.perf_counter() - begin


def backlog(count: int) -> float:
    """Queue many tasks; return when the last was."""
    publish(count)
    return time.time()


def publish(count: int) -> float:
    """Loop over `apply_async` with one producer; return the seconds."""
    begin = time.perf_counter()
    with app.producer_or_acquire() as producer:
        for number in range(count):
            work.apply_async((number,), producer=producer)
    return time.perf_counter() - begin


def publish_by_delay(count: int) -> float:
    """Loop over `delay()`; return the seconds."""
    delay: Any = work.delay
    begin = time.perf_counter()
    for number in range(count):
        delay(number)
    return time.perf_counter() - begin
