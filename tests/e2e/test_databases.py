"""Two databases, a bridge for each, and one worker for both, as real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.settings import sync_url
from tests.e2e.test_listen import effects, emit, states
from tests.fixtures import branches
from tests.fixtures.processes import BIN, Shop, eventually
from tests.fixtures.shop import Base

APP = "tests.fixtures.branches"


@pytest.fixture
def billing_url(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[str]:
    """A second fresh, empty database."""
    name = f"billing_{tmp_path.name}".lower()[:60]
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
def firm(tmp_path: Path, database_url: str, billing_url: str, broker_url: str) -> Iterator[Shop]:
    """Processes that know where both are."""
    firm = Shop(tmp_path, database_url, broker_url)
    firm.environment["PGPUBSUB_DATABASE_URL_BILLING"] = billing_url
    yield firm
    firm.close()


@pytest.fixture
def engines(database_url: str, billing_url: str) -> Iterator[tuple[Engine, Engine]]:
    """Engines on the default database and on billing's, with a table for effects."""
    main, billing = create_engine(sync_url(database_url)), create_engine(sync_url(billing_url))
    for engine in (main, billing):
        Base.metadata.create_all(engine)
    branches.Base.metadata.create_all(billing)
    yield main, billing
    main.dispose()
    billing.dispose()


def test_each_database_has_its_bridge_and_one_worker_does_for_both(firm: Shop, engines: tuple[Engine, Engine]) -> None:
    """Installed, listened to and looked at by alias; what a lost child had is given back where it was."""
    main, billing = engines
    for words in ([], ["--database", "billing"]):
        done = firm.run("-A", APP, "install", *words)
        assert done.returncode == 0, done.stderr
    bridge = str(BIN / "pgpubsub-bridge")
    bridges = [
        firm.start([bridge, "-A", APP, "listen", "--worker"]),
        firm.start([bridge, "-A", APP, "listen", "--worker"], PGPUBSUB_DATABASE="billing"),
    ]
    bridges[0].wait_for(rf"listening to 1 channel\(s\): {APP}.Visit\n")
    bridges[1].wait_for(rf"listening to 2 channel\(s\): {APP}.AccountChanges, {APP}.Invoice\n")
    worker = firm.start(
        [str(BIN / "celery"), "-A", APP, "worker", "--loglevel=info", "--concurrency=1", "--without-mingle"]
    )
    worker.wait_for(r"ready\.")
    emit(main, *(branches.Visit(number=number) for number in range(20)))
    emit(billing, *(branches.Invoice(number=number) for number in range(100, 120)))
    with billing.begin() as connection:
        connection.execute(text("INSERT INTO account VALUES (7)"))
    eventually(lambda: not states(main) and not states(billing), "all done")
    assert effects(main) == {("visit", number): 1 for number in range(20)}
    assert effects(billing) == {("invoice", number): 1 for number in range(100, 120)} | {("account", 7): 1}
    status = json.loads(firm.run("-A", APP, "status", "--json").stdout)
    assert status["triggers"] == [], "those of billing are no trouble of the default database"
    emit(billing, branches.Invoice(number=branches.DEADLY))
    worker.wait_for("signal 9")
    eventually(lambda: states(billing) == {"failed": 1}, "failed in the end, in its own database")
    listed = firm.run("-A", APP, "list", "--json", "--database", "billing").stdout.splitlines()
    assert [json.loads(line)["channel"] for line in listed] == [branches.Invoice.name()]


def test_an_unknown_database_is_one_clear_line(firm: Shop) -> None:
    """With those that there are; and so is a channel that is in another one."""
    done = firm.run("-A", APP, "listen", "--database", "biling")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "There is no database 'biling': 'default', 'billing' is configured" in done.stderr
    done = firm.run("-A", APP, "listen", "--channels", branches.Invoice.name())
    assert done.returncode == 2
    assert "is not in the database 'default', but in 'billing': name that with --database" in done.stderr
