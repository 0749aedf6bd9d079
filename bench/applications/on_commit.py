"""Django's `transaction.on_commit` and Celery's `delay()`. Whatever dies between the two is lost."""

from __future__ import annotations

import functools
import time

import django

django.setup()

from celery import Celery  # noqa: E402 - after the setup
from django.db import connection, transaction  # noqa: E402

from bench.applications.given import BROKER, BULK, KIND, noted  # noqa: E402
from bench.applications.shop.models import Effect, create_item  # noqa: E402

app = Celery("bench", broker=BROKER)
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
# Celery closes Django's connections after each task otherwise, persistent or not.
app.conf.update(CELERY_DB_REUSE_MAX=100_000)


@app.task
def work(number: int) -> None:
    """Do what the kind of measurement asks for, in a transaction of its own."""
    if not noted(number) and KIND == "insert":
        Effect.objects.create(number=number)


def prepare() -> None:
    """Nothing to prepare."""


def write(number: int) -> float:
    """One transaction, and its task once that is committed."""
    with transaction.atomic():
        create_item(number)
        transaction.on_commit(functools.partial(work.delay, number))
        at = time.time()
    return at


def write_plain(number: int) -> float:
    """The transaction alone."""
    with transaction.atomic():
        create_item(number)
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows, and a task for each."""
    begin = time.perf_counter()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(BULK + " RETURNING id", [count])
        for (id,) in cursor.fetchall():
            transaction.on_commit(functools.partial(work.delay, id))
    return time.perf_counter() - begin


def backlog(count: int) -> float:
    """One transaction with many tasks; return when its COMMIT was sent."""
    with transaction.atomic():
        for number in range(count):
            transaction.on_commit(functools.partial(work.delay, number))
        at = time.time()
    return at
