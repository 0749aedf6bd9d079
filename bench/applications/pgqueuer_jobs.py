"""PgQueuer: `enqueue` on the transaction's own connection; asynchronous entrypoints, asyncpg, uvloop in the worker."""

from __future__ import annotations

import asyncio
import sys
import time

import asyncpg
import psycopg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, SyncPsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries, SyncQueries

from bench.applications.given import BULK, DATABASE, INSERT, KIND, noted


async def queuer() -> PgQueuer:
    """Return what a worker runs."""
    made = PgQueuer(AsyncpgDriver(await asyncpg.connect(DATABASE)))
    pool = await asyncpg.create_pool(DATABASE, min_size=2, max_size=10) if KIND == "insert" else None

    @made.entrypoint("work")
    async def work(job: Job) -> None:
        number = int(job.payload or b"0")
        if not noted(number) and pool is not None:
            await pool.execute("INSERT INTO effect (number) VALUES ($1)", number)

    return made


_writing: tuple[psycopg.Connection, SyncQueries] | None = None


def _writer() -> tuple[psycopg.Connection, SyncQueries]:
    global _writing
    if _writing is None:
        connection = psycopg.connect(DATABASE, autocommit=True)
        _writing = connection, SyncQueries(SyncPsycopgDriver(connection))
    return _writing


def prepare() -> None:
    """Install the tables; durable, as is the default."""

    async def installed() -> None:
        connection = await asyncpg.connect(DATABASE)
        await Queries(AsyncpgDriver(connection)).install()
        await connection.close()

    asyncio.run(installed())


def write(number: int) -> float:
    """One transaction with its job."""
    connection, queries = _writer()
    with connection.transaction():
        connection.execute(INSERT, [number])
        queries.enqueue("work", str(number).encode())
        at = time.time()
    return at


def write_plain(number: int) -> float:
    """The transaction alone."""
    connection, _ = _writer()
    with connection.transaction():
        connection.execute(INSERT, [number])
    return time.time()


def bulk(count: int) -> float:
    """One statement that inserts many rows, and one that enqueues a job for each."""
    connection, queries = _writer()
    begin = time.perf_counter()
    with connection.transaction():
        ids = [row[0] for row in connection.execute(BULK + " RETURNING id", [count])]
        queries.enqueue(["work"] * len(ids), [str(id).encode() for id in ids], [0] * len(ids))
    return time.perf_counter() - begin


def backlog(count: int) -> float:
    """One transaction with many jobs; return when its COMMIT was sent."""
    connection, queries = _writer()
    with connection.transaction():
        queries.enqueue(["work"] * count, [str(number).encode() for number in range(count)], [0] * count)
        at = time.time()
    return at


async def main() -> None:
    """Work until the process is ended, as `pgq run` does."""
    await (await queuer()).run(batch_size=int(sys.argv[1]))


if __name__ == "__main__":
    uvloop.run(main())
