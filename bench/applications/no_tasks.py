"""No tasks at all: what the same statements cost alone."""

from __future__ import annotations

import time

import psycopg2

from bench.applications.given import BULK, DATABASE, INSERT

_connection = psycopg2.connect(DATABASE)


def prepare() -> None:
    """Nothing to prepare."""


def write(number: int) -> float:
    """One transaction."""
    with _connection, _connection.cursor() as cursor:
        cursor.execute(INSERT, (number,))
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows."""
    begin = time.perf_counter()
    with _connection, _connection.cursor() as cursor:
        cursor.execute(BULK, (count,))
    return time.perf_counter() - begin
