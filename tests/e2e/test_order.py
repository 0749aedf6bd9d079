"""Ordering keys with real bridges and workers, which fail and are killed: per key one after the other, none lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import install, notify_many
from pgpubsub_celery.settings import sync_url
from tests.fixtures import accounts
from tests.fixtures.processes import BIN, Running, Shop, eventually

ACCOUNTS = 6
EACH = 40


@pytest.fixture
def shop(tmp_path: Path, installed_url: str, broker_url: str) -> Iterator[Shop]:
    """Processes on a database with the accounts' tables; whatever is started has ended after the test."""
    engine = create_engine(sync_url(installed_url))
    accounts.Base.metadata.create_all(engine)
    install(engine, channels=[accounts.Booking])
    engine.dispose()
    shop = Shop(tmp_path, installed_url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def database(shop: Shop) -> Iterator[Engine]:
    """An engine on their database."""
    engine = create_engine(sync_url(shop.database_url))
    yield engine
    engine.dispose()


def bridge(shop: Shop) -> Running:
    """Start a bridge, and wait until it listens."""
    command = [str(BIN / "pgpubsub-bridge"), "-A", "tests.fixtures.accounts", "listen", "--poll-interval", "5"]
    running = shop.start(command)
    running.wait_for("listening to")
    return running


def worker(shop: Shop) -> Running:
    """Start a worker with two processes, and wait until it is ready."""
    command = [str(BIN / "celery"), "-A", "tests.fixtures.accounts", "worker", "--loglevel=warning"]
    running = shop.start([*command, "--concurrency=2", "--without-gossip", "--without-mingle"])
    eventually(lambda: len(running.children()) >= 2, "the worker's processes are there")
    return running


def marks(database: Engine, kinds: tuple[str, ...]) -> dict[int, list[tuple[str, int]]]:
    """Return what was marked of each account, in its order."""
    statement = text("SELECT account, kind, number FROM mark WHERE kind = ANY (:kinds) ORDER BY id")
    found: dict[int, list[tuple[str, int]]] = {}
    with database.connect() as connection:
        for account, kind, number in connection.execute(statement, {"kinds": list(kinds)}):
            found.setdefault(account, []).append((kind, number))
    return found


def count(database: Engine) -> int:
    """Return how many notifications are stored."""
    with database.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM pgpubsub_notification")).scalar_one())


@pytest.mark.timeout(240)
def test_per_key_one_runs_after_the_other_whatever_fails_and_dies(shop: Shop, database: Engine) -> None:
    """Two bridges, workers of two processes each; listeners that fail, processes, a worker and a bridge killed."""
    first, _ = bridge(shop), bridge(shop)
    doomed, _ = worker(shop), worker(shop)
    for number in range(EACH):
        with Session(database) as session, session.begin():
            notify_many(session, [accounts.Booking(account=account, number=number) for account in range(ACCOUNTS)])
    total = 2 * ACCOUNTS * EACH
    eventually(lambda: count(database) < total * 3 // 4, f"a quarter is done; {count(database)} of {total} are stored")
    doomed.destroy()
    eventually(lambda: count(database) < total // 2, f"half is done; {count(database)} of {total} are stored")
    first.destroy()
    worker(shop)
    eventually(lambda: not count(database), f"all is done; {count(database)} of {total} are stored", within=150)

    booked = marks(database, ("booked",))
    assert booked == {account: [("booked", number) for number in range(EACH)] for account in range(ACCOUNTS)}
    told = marks(database, ("begun", "ended"))
    assert sorted(told) == list(range(ACCOUNTS))
    for account in range(ACCOUNTS):
        # A run may begin again, when it failed or its process died; never a later one before it has ended.
        runs = [number for number, _ in itertools.groupby(told[account], key=lambda mark: mark[1])]
        assert runs == list(range(EACH))
        assert [number for kind, number in told[account] if kind == "ended"] == sorted(
            number for kind, number in told[account] if kind == "ended"
        )
        for earlier, later in itertools.pairwise(told[account]):
            assert earlier[1] == later[1] or earlier[0] == "ended", (account, earlier, later)
