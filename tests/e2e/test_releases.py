"""Two releases side by side: nothing lost, nothing doubled, nothing failed because an old process did not know it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from pgpubsub_celery.settings import sync_url
from tests.e2e.test_listen import effects, states
from tests.fixtures.processes import BIN, Running, Shop, eventually
from tests.fixtures.shop import Base

APP = "tests.fixtures.releases"


@pytest.fixture
def shop(tmp_path: Path, installed_url: str, broker_url: str) -> Iterator[Shop]:
    """Processes of either release, on one database and one broker."""
    engine = create_engine(sync_url(installed_url))
    Base.metadata.create_all(engine)
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


def deploy(shop: Shop, release: str) -> tuple[Running, Running]:
    """Install a release, and start its worker and its bridge beside whatever runs."""
    done = shop.run("-A", APP, "install", RELEASE=release)
    assert done.returncode == 0, done.stderr
    worker = shop.start(
        [str(BIN / "celery"), "-A", APP, "worker", "--loglevel=info", "--concurrency=1", "--without-mingle"],
        RELEASE=release,
    )
    bridge = shop.start([str(BIN / "pgpubsub-bridge"), "-A", APP, "listen", "--worker"], RELEASE=release)
    worker.wait_for(r"ready\.")
    bridge.wait_for("listening to")
    return worker, bridge


def sell(database: Engine, first: int, count: int) -> None:
    """Emit as any writer of any release does: in SQL."""
    with database.begin() as connection:
        for number in range(first, first + count):
            connection.execute(
                text("SELECT pgpubsub_notify('tests.fixtures.releases.Sale', jsonb_build_object('number', :number))"),
                {"number": number},
            )


def test_a_rolling_deploy_loses_and_doubles_nothing(shop: Shop, database: Engine) -> None:
    """Old alone, both at once on the same queue, new alone: each listener of each emit ran once, or is still stored."""
    old_worker, old_bridge = deploy(shop, "old")
    sell(database, 0, 20)
    eventually(lambda: not states(database), "the old release's sales are done")

    deploy(shop, "new")
    sell(database, 20, 20)
    eventually(
        lambda: not set(states(database)) - {"dispatched", "waiting"} and len(effects(database)) >= 3 * 20 + 3 * 20,
        "most of it is done while both run",
    )
    assert old_bridge.stop() == 0
    assert old_worker.stop() == 0

    sell(database, 40, 20)

    def told(kind: str) -> dict[int, int]:
        return {value: times for (k, value), times in effects(database).items() if k == kind}

    def left() -> int:
        return sum(states(database).values())

    eventually(
        lambda: len(told("kept")) == 60 and len(told("renamed")) == 60 and len(told("added")) == 40,
        f"all that the new release knows is done; there is {states(database)}",
        within=90,
    )
    assert told("kept") == dict.fromkeys(range(60), 1)
    assert told("renamed") == dict.fromkeys(range(60), 1)
    assert told("added") == dict.fromkeys(range(20, 60), 1)
    # The removed listener's notifications wait for whoever knows it, until `install --prune`.
    assert len(told("removed")) + left() == 60
    assert set(told("removed").values()) == {1}
    assert "failed" not in states(database)


def test_what_is_emitted_before_any_listener_exists_waits_for_the_first(shop: Shop, database: Engine) -> None:
    """A writer's release may be out before the listeners' is."""
    sell(database, 0, 3)
    assert states(database) == {"waiting": 3}
    done = shop.run("-A", APP, "install", RELEASE="old")
    assert done.returncode == 0, done.stderr
    shop.start([str(BIN / "celery"), "-A", APP, "worker", "--concurrency=1", "--without-mingle"], RELEASE="old")
    shop.start([str(BIN / "pgpubsub-bridge"), "-A", APP, "listen", "--worker", "--recover"], RELEASE="old")
    eventually(lambda: not states(database), f"all of it is done; there is {states(database)}")
    assert sum(effects(database).values()) == 3


def test_rows_of_listeners_that_nobody_knows_stay(shop: Shop, database: Engine) -> None:
    """They are somebody else's; the others go on."""
    deploy(shop, "old")
    with database.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO pgpubsub_subscription (channel, listener, operations) "
                "VALUES ('tests.fixtures.releases.Sale', 'another.release', '{message}')"
            )
        )
    sell(database, 0, 5)
    eventually(lambda: sum(effects(database).values()) == 15, "the known listeners have run")
    assert states(database) == {"waiting": 5}
