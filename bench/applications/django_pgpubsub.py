"""django-pgpubsub: a trigger notifies, and stores; `listen` processes."""

from __future__ import annotations

import time

import django

django.setup()

from django.core.management import call_command  # noqa: E402 - after the setup
from django.db import connection, transaction  # noqa: E402

from bench.applications.given import BULK  # noqa: E402
from bench.applications.shop.models import create_item  # noqa: E402


def prepare() -> None:
    """Migrate, and install the triggers."""
    call_command("migrate", verbosity=0)
    call_command("pgtrigger", "install", verbosity=0)


def write(number: int) -> float:
    """One transaction that writes a row; its trigger does the rest."""
    with transaction.atomic():
        create_item(number)
        at = time.time()
    return at


def bulk(count: int) -> float:
    """One statement that inserts many rows."""
    begin = time.perf_counter()
    _insert(count)
    return time.perf_counter() - begin


def backlog(count: int) -> float:
    """One statement that inserts many rows; return when its COMMIT was sent."""
    return _insert(count)


def recover() -> float:
    """Have the listening process take up what is stored; return when it was asked to."""
    from pgpubsub import process_stored_notifications

    with transaction.atomic():
        process_stored_notifications()
        at = time.time()
    return at


def _insert(count: int) -> float:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(BULK, [count])
        at = time.time()
    return at
