"""procrastinate: `defer` on the transaction's own connection, asynchronous tasks."""

from __future__ import annotations

import time

import procrastinate
import psycopg
import psycopg_pool

from bench.applications.given import BULK, DATABASE, INSERT, KIND, noted

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DATABASE, max_size=12))
"""What the worker loads; its pool has a connection for each of its ten concurrent jobs."""

_pool: psycopg_pool.AsyncConnectionPool | None = None


async def pool() -> psycopg_pool.AsyncConnectionPool:
    """Return the pool that tasks write with."""
    global _pool
    if _pool is None:
        _pool = psycopg_pool.AsyncConnectionPool(DATABASE, min_size=2, max_size=10, open=False)
        await _pool.open()
    return _pool


@app.task(name="work")
async def work(number: int) -> None:
    """Do what the kind of measurement asks for, in a transaction of its own."""
    if not noted(number) and KIND == "insert":
        async with (await pool()).connection() as connection:
            await connection.execute("INSERT INTO effect (number) VALUES (%s)", [number])


_writing: tuple[psycopg.Connection, procrastinate.App] | None = None


def _writer() -> tuple[psycopg.Connection, procrastinate.App]:
    global _writing
    if _writing is None:
        deferring = app.with_connector(procrastinate.SyncPsycopgConnector(conninfo=DATABASE))
        deferring.open()
        _writing = psycopg.connect(DATABASE), deferring
    return _writing


def prepare() -> None:
    """Apply the schema."""
    _, deferring = _writer()
    deferring.schema_manager.apply_schema()


def write(number: int) -> float:
    """One transaction with its job."""
    connection, deferring = _writer()
    with connection.transaction():
        connection.execute(INSERT, [number])
        deferring.configure_task("work", connection=connection).defer(number=number)
        at = time.time()
    return at


def write_plain(number: int) -> float:
    """The transaction alone."""
    connection, _ = _writer()
    with connection.transaction():
        connection.execute(INSERT, [number])
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows, and one that defers a job for each."""
    connection, deferring = _writer()
    begin = time.perf_counter()
    with connection.transaction():
        ids = [row[0] for row in connection.execute(BULK + " RETURNING id", [count])]
        deferring.configure_task("work", connection=connection).batch_defer(*({"number": id} for id in ids))
    return time.perf_counter() - begin


def backlog(count: int) -> float:
    """One transaction with many jobs; return when its COMMIT was sent."""
    connection, deferring = _writer()
    with connection.transaction():
        jobs = ({"number": number} for number in range(count))
        deferring.configure_task("work", connection=connection).batch_defer(*jobs)
        at = time.time()
    return at
