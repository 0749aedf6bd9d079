"""Metrics of real processes: what is scraped adds up, whatever is killed, and goes down never."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections import defaultdict

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import notify_many
from tests.fixtures import shop as app
from tests.fixtures.commands import done
from tests.fixtures.processes import Running, Shop, eventually

ORDERS = "tests.fixtures.shop.take_order"


def port_of(process: Running, what: str) -> int:
    """Return the port that it says it serves."""
    process.wait_for(what + r" on port \d+")
    found = re.search(what + r" on port (\d+)", process.log())
    assert found is not None
    return int(found[1])


def scraped(port: int, listener: str | None = None) -> dict[str, float]:
    """Return the samples of a page, added up over labels; of one listener, where it is named."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        page = response.read().decode()
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if listener in (None, sample.labels.get("listener")) and not sample.name.endswith("_bucket"):
                state = sample.labels.get("state")
                found[f"{sample.name}:{state}" if state else sample.name] += sample.value
    return found


@pytest.mark.parametrize("pool", [["--pool=prefork", "--concurrency=2"], ["--pool=solo"]])
def test_what_was_emitted_is_acknowledged_failed_discarded_or_stored(
    shop: Shop, database: Engine, pool: list[str]
) -> None:
    """By the metrics of two listening processes and of a worker's children: each of the two serves one page."""
    worker = shop.worker(*pool, PGPUBSUB_WORKER_METRICS_PORT="0")
    bridge = shop.bridge("--processes", "2", "--health-port", "0")
    serving, working = port_of(bridge, "health"), port_of(worker, "metrics")
    with Session(database) as session, session.begin():
        notify_many(session, [app.Order(number=n) for n in range(100)])
        notify_many(session, [app.Order(number=app.STUBBORN)])
        notify_many(session, [app.Order(number=n) for n in range(7)], countdown=3600)
    with database.begin() as connection:
        # As somebody's mistake would: nothing can read it.
        connection.execute(
            text("UPDATE pgpubsub_notification SET payload = '{}' WHERE payload->>'number' IN ('98', '99')")
        )

    def adds_up() -> bool:
        of_bridge, of_worker = scraped(serving, ORDERS), scraped(working, ORDERS)
        return (
            of_worker["pgpubsub_notifications_acknowledged_total"],
            of_worker["pgpubsub_notifications_failed_total"],
            of_bridge["pgpubsub_stored_notifications:failed"],
            of_bridge["pgpubsub_stored_notifications:delayed"],
            of_bridge["pgpubsub_stored_notifications:waiting"] + of_bridge["pgpubsub_stored_notifications:in_flight"],
        ) == (99, 2, 2, 7, 0)

    eventually(adds_up, "108 emitted = 99 acknowledged + 2 failed + 7 stored")
    told = json.loads(done(shop.run("discard", "--state", "failed", "--yes", "--json")))
    assert told["changed"] == 2
    eventually(lambda: scraped(serving)["pgpubsub_stored_notifications:failed"] == 0, "discarded ones are gone")
    of_bridge, of_worker = scraped(serving), scraped(working)
    assert of_worker["pgpubsub_notifications_retried_total"] == 1
    assert of_bridge["pgpubsub_notifications_claimed_total"] == 102
    assert of_bridge["pgpubsub_notifications_published_total"] == 102
    assert of_bridge["pgpubsub_publish_lag_seconds_count"] == 102
    assert of_worker["pgpubsub_finish_lag_seconds_count"] == 99
    assert of_worker["pgpubsub_notifications_dropped_total"] == 0
    assert of_bridge["pgpubsub_processes:listening"] == 2
    assert of_bridge["pgpubsub_wakeups_total"] >= 1


def kill_child(process: Running) -> None:
    """Kill the one child that it has, and wait until it has another."""
    (child,) = process.children()
    child.send_signal(signal.SIGKILL)
    eventually(lambda: [one.pid for one in process.children()] not in ([], [child.pid]), "replaced")


def test_no_counter_goes_down_when_a_process_is_killed(shop: Shop, database: Engine) -> None:
    """Of the bridge and of the worker: who was killed had handed on what it had counted, and its successor goes on."""
    worker = shop.worker("--pool=prefork", "--concurrency=1", PGPUBSUB_WORKER_METRICS_PORT="0")
    bridge = shop.bridge("--health-port", "0")
    serving, working = port_of(bridge, "health"), port_of(worker, "metrics")

    def emit(numbers: range) -> None:
        with Session(database) as session, session.begin():
            notify_many(session, [app.Order(number=n) for n in numbers])

    def finished(number: int) -> bool:
        return (
            scraped(working)["pgpubsub_notifications_acknowledged_total"] == number
            and scraped(serving)["pgpubsub_notifications_published_total"] == number
        )

    emit(range(10))
    eventually(lambda: finished(10), "ten are done")
    for process in (bridge, worker):
        kill_child(process)
    bridge.wait_for("listening to", count=2)
    assert scraped(serving)["pgpubsub_notifications_published_total"] == 10
    assert scraped(working)["pgpubsub_notifications_acknowledged_total"] == 10
    emit(range(10, 20))
    eventually(lambda: finished(20), "twenty are done")


def test_doorbells_sweeps_and_reconnects_are_counted(shop: Shop, database: Engine) -> None:
    """What wakes a bridge, and what interrupts it."""
    bridge = shop.bridge("--health-port", "0", "--poll-interval", "0.3")
    port = port_of(bridge, "health")
    eventually(lambda: scraped(port)["pgpubsub_wakeups_total"] >= 2, "swept")
    with database.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pgpubsub-bridge%'"
            )
        )
    eventually(lambda: scraped(port)["pgpubsub_reconnects_total"] >= 1, "reconnected")
    assert scraped(port)["pgpubsub_interruptions_total"] >= 1
