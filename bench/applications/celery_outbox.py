"""django-celery-outbox: `delay()` stores a row in the transaction, a relay publishes it."""

from __future__ import annotations

import logging
import time

import django
import structlog

# A line for each message would cost as much as the message.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
django.setup()

from django.core.management import call_command  # noqa: E402 - after the setup
from django.db import connection, transaction  # noqa: E402
from django_celery_outbox import OutboxCelery  # noqa: E402

from bench.applications.given import BROKER, BULK, KIND, noted  # noqa: E402
from bench.applications.shop.models import Effect, create_item  # noqa: E402

app = OutboxCelery("bench", broker=BROKER)
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
# Celery closes Django's connections after each task otherwise, persistent or not.
app.conf.update(CELERY_DB_REUSE_MAX=100_000)


@app.task
def work(number: int) -> None:
    """Do what the kind of measurement asks for, in a transaction of its own."""
    if not noted(number) and KIND == "insert":
        Effect.objects.create(number=number)


def prepare() -> None:
    """Migrate."""
    call_command("migrate", verbosity=0)


def write(number: int) -> float:
    """One transaction with its task."""
    with transaction.atomic():
        create_item(number)
        work.delay(number)
        at = time.time()
    return at


def write_plain(number: int) -> float:
    """The transaction alone."""
    with transaction.atomic():
        create_item(number)
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows, and a task for each, in one transaction."""
    begin = time.perf_counter()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(BULK + " RETURNING id", [count])
        for (id,) in cursor.fetchall():
            work.delay(id)
    return time.perf_counter() - begin


def backlog(count: int) -> float:
    """One transaction with many tasks; return when its COMMIT was sent."""
    with transaction.atomic():
        for number in range(count):
            work.delay(number)
        at = time.time()
    return at
