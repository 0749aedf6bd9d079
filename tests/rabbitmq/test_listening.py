"""Bridge, worker and RabbitMQ as real processes: what is emitted is done once, whichever of them dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from pgpubsub_celery import install
from pgpubsub_celery.settings import sync_url
from tests.e2e.conftest import SHOP_CHANNELS
from tests.e2e.test_listen import all_done, effects, emit, states
from tests.fixtures import shop as app
from tests.fixtures.processes import Shop, eventually
from tests.rabbitmq.server import RabbitMQ

QUICK: dict[str, Any] = {"PGPUBSUB_PUBLISH_TIMEOUT": "2", "PGPUBSUB_POLL_INTERVAL": "300"}
"""No sweep comes to the rescue of a bridge that does not go on by itself."""

KINDS = ["classic", "quorum"]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def shop(tmp_path: Path, installed_url: str, queue: str) -> Iterator[Shop]:
    """The shop's database with tables and triggers, its queue a fresh one; the test says which node."""
    engine = create_engine(sync_url(installed_url))
    app.Base.metadata.create_all(engine)
    install(engine, channels=SHOP_CHANNELS)
    engine.dispose()
    shop = Shop(tmp_path, installed_url, "memory://")
    shop.environment["SHOP_QUEUE"] = queue
    yield shop
    shop.close()


@pytest.fixture
def database(shop: Shop) -> Iterator[Engine]:
    """An engine on the shop's database."""
    engine = create_engine(sync_url(shop.database_url))
    yield engine
    engine.dispose()


def on(shop: Shop, node: RabbitMQ, kind: str = "classic") -> None:
    shop.environment |= {"SHOP_BROKER_URL": node.url, "SHOP_QUEUE_TYPE": kind}


def orders(numbers: range) -> dict[tuple[str, int], int]:
    return {("order", number): 1 for number in numbers}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_emitted_is_done_once(shop: Shop, database: Engine, rabbitmq: RabbitMQ, kind: str) -> None:
    """Listeners with and without `session`, lists, retries, and messages that are not stored."""
    on(shop, rabbitmq, kind)
    shop.worker("--pool=prefork", "--concurrency=2")
    shop.bridge(**QUICK)
    emit(
        database,
        *(app.Order(number=number) for number in range(300)),
        *(app.Entry(number=number) for number in range(20)),
        app.Order(number=app.STUBBORN),
        app.Call(number=1),
        app.Ping(number=1),
    )
    eventually(lambda: not states(database) and ("ping", 1) in effects(database), "all done")
    found = effects(database)
    lists = {effect for effect in found if effect[0] == "list"}
    expected = orders(range(300)) | {("order", app.STUBBORN): 1} | {("entry", number): 1 for number in range(20)}
    expected |= {("call-begun", 1): 1, ("call", 1): 1, ("ping", 1): 1}
    assert {effect: count for effect, count in found.items() if effect not in lists} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_is_killed_in_the_middle_costs_nothing(
    shop: Shop, database: Engine, own: RabbitMQ, kind: str
) -> None:
    """The bridge says so once; what was not confirmed comes again, and what had arrived after all is done once."""
    on(shop, own, kind)
    shop.worker()
    bridge = shop.bridge("--worker", **QUICK)
    emit(database, *(app.Order(number=number) for number in range(2000)))
    eventually(lambda: len(effects(database)) > 100, "some are done")
    own.kill()
    emit(database, *(app.Order(number=number) for number in range(2000, 2100)))
    bridge.wait_for("broker unavailable")
    own.start()
    bridge.wait_for("broker available again")
    # What a message was lost of comes again after its lease at the latest: make that now.
    eventually(lambda: not states(database)["waiting"], "everything is published")
    with database.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_notification SET available_at = now() WHERE state = 'dispatched'"))
        connection.execute(text("SELECT pgpubsub_ring('tests.fixtures.shop.Order')"))
    all_done(database, orders(range(2100)))
    assert bridge.log().count("broker unavailable") == 1
    assert "Traceback" not in bridge.log()


def test_an_alarm_is_said_once_and_waited_out(shop: Shop, database: Engine, own: RabbitMQ) -> None:
    """While the node's memory is full nothing is published; nobody has to do anything when it is over."""
    on(shop, own)
    shop.worker()
    bridge = shop.bridge("--worker", **QUICK)
    emit(database, app.Order(number=1))
    all_done(database, orders(range(1, 2)))
    own.evaluate("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1}).")
    # The first of them may still be taken.
    for number in (2, 3):
        emit(database, app.Order(number=number))
    bridge.wait_for("broker unavailable.*memory or its disk is full")
    eventually(lambda: states(database)["waiting"] > 0, "given back")
    own.evaluate("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 4000000000}).")
    bridge.wait_for("broker available again")
    all_done(database, orders(range(1, 4)))
    assert bridge.log().count("broker unavailable") == 1


def test_a_worker_that_is_killed_leaves_its_notifications_to_the_next(
    shop: Shop, database: Engine, rabbitmq: RabbitMQ
) -> None:
    """The node delivers again what the worker had only fetched, the lease what it had begun."""
    on(shop, rabbitmq, "quorum")
    shop.environment |= {"PGPUBSUB_LEASE": "2", "PGPUBSUB_HEARTBEAT_INTERVAL": "0.5"}
    shop.bridge("--worker", PGPUBSUB_POLL_INTERVAL="1")
    worker = shop.worker("--pool=prefork", "--concurrency=2")
    emit(database, *(app.Order(number=number) for number in range(500)), app.Call(number=1, seconds=30))
    eventually(lambda: ("call-begun", 1) in effects(database), "one is running")
    worker.destroy()
    # As slow as it was, it would be the second time.
    with database.begin() as connection:
        connection.execute(
            text("UPDATE pgpubsub_notification SET payload = payload || '{\"seconds\": 0}' WHERE payload ? 'seconds'")
        )
    shop.worker("--pool=prefork", "--concurrency=2")
    all_done(database, orders(range(500)) | {("call-begun", 1): 2, ("call", 1): 1})


def test_a_full_queue_holds_up_no_other(shop: Shop, database: Engine, rabbitmq: RabbitMQ, queue: str) -> None:
    """Its notifications wait in the table, and are published when there is room again."""
    on(shop, rabbitmq)
    bridge = shop.bridge("--worker", SHOP_FULL="1", **QUICK)
    emit(database, *(app.Call(number=number) for number in range(3)))
    emit(database, *(app.Order(number=number) for number in range(20)))
    bridge.wait_for("the broker has refused")
    shop.worker("--pool=prefork", "--concurrency=1", f"--queues={queue}", "--hostname=others", SHOP_FULL="1")
    eventually(lambda: set(effects(database)) == set(orders(range(20))), "the others are done")
    assert states(database).total() == 3
    shop.worker("--pool=prefork", "--concurrency=1", f"--queues={queue}-full", "--hostname=full", SHOP_FULL="1")
    expected = orders(range(20)) | {(kind, n): 1 for kind in ("call-begun", "call") for n in range(3)}
    all_done(database, expected)
    assert "broker unavailable" not in bridge.log()
