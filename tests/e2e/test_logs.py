"""Logs of bridges and workers: which notification each line is about, and nothing that is nobody's to read."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import notify_many
from tests.fixtures import shop as app
from tests.fixtures.processes import Running, Shop, eventually

SECRET = 918_273_645
"""A number that is in a payload only."""


def lines(process: Running) -> list[dict[str, Any]]:
    """Return what was logged as JSON; Celery's greeting is not."""
    return [json.loads(line) for line in process.log().splitlines() if line.startswith("{")]


def states(database: Engine) -> list[str]:
    with database.connect() as connection:
        return list(connection.execute(text("SELECT state FROM pgpubsub_notification")).scalars())


def test_a_worker_s_lines_say_which_notification_they_are_about(shop: Shop, database: Engine) -> None:
    """With `worker_logformat`: Celery's own lines of a run, and ours; in the main process and in its children."""
    worker = shop.worker("--pool=prefork", "--concurrency=1", ready=False, PGPUBSUB_WORKER_LOGFORMAT="json")
    worker.wait_for(r"ready\.")
    shop.bridge()
    with Session(database) as session, session.begin():
        notify_many(session, [app.Order(number=1), app.Entry(number=app.POISON)])
    eventually(lambda: states(database) == ["failed"], "one is done, one has failed")
    worker.wait_for("failed for good")
    told = lines(worker)
    assert {"time", "level", "logger", "process", "message"} <= set.intersection(*map(set, told))
    (failed,) = [line for line in told if "failed for good" in line["message"]]
    assert failed["channel"] == "tests.fixtures.shop.Entry"
    assert failed["listener"] == "tests.fixtures.shop.index"
    assert failed["notification_id"] > 0
    of_task = [line["message"] for line in told if line.get("task_id") == failed["task_id"]]
    assert any("received" in message for message in of_task)
    assert len({line["process"] for line in told}) == 2


def test_a_format_that_cannot_be_used_is_said_and_leaves_celery_s(shop: Shop) -> None:
    """A worker does not stay away for its log's sake."""
    worker = shop.worker("--pool=solo", PGPUBSUB_WORKER_LOGFORMAT="%(nope)s")
    assert "worker_logformat is not used" in worker.log()
    assert "'%(nope)s'" in worker.log()


def test_nothing_secret_is_logged_by_bridge_or_worker(shop: Shop, database: Engine) -> None:
    """No payload and no password, though everything is said: of what works, fails, and cannot be reached."""
    # Neither server asks for a password: each takes any.
    broker = shop.broker_url.replace("redis://", "redis://default:broker-s3cret@")
    assert "broker-s3cret@" in broker
    url = shop.database_url.replace("postgresql://postgres", "postgresql://postgres:db-s3cret")
    assert "db-s3cret" in url
    environment: dict[str, Any] = {"PGPUBSUB_DATABASE_URL": url, "SHOP_BROKER_URL": broker}
    # What loses its connection while it is taken waits for its lease.
    environment |= {"PGPUBSUB_LEASE": "2", "PGPUBSUB_HEARTBEAT_INTERVAL": "1"}
    worker = shop.worker(
        "--pool=prefork", "--concurrency=1", "--loglevel=debug", PGPUBSUB_WORKER_LOGFORMAT="json", **environment
    )
    bridge = shop.bridge(
        "--loglevel", "debug", "--logformat", "json", "--health-port", "0", "--database-url", url, **environment
    )
    with Session(database) as session, session.begin():
        notify_many(session, [app.Order(number=SECRET), app.Call(number=SECRET), app.Order(number=app.STUBBORN)])
    with database.begin() as connection:
        connection.execute(text("INSERT INTO author (id, name) VALUES (1, :secret)"), {"secret": f"name-{SECRET}"})
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND application_name LIKE 'pgpubsub-%' AND datname = current_database()"
            )
        )
    eventually(lambda: states(database) == [], "all is done")
    # What cannot be done is where values are quoted most readily.
    with database.begin() as connection:
        connection.execute(text("ALTER TABLE effect ADD CONSTRAINT small CHECK (value < 10) NOT VALID"))
    with Session(database) as session, session.begin():
        notify_many(session, [app.Order(number=SECRET)])
    eventually(lambda: states(database) == ["failed"], "it has failed")
    worker.wait_for("failed for good")
    assert bridge.stop() == 0
    told = [line for process in (worker, bridge) for line in process.log().splitlines()]
    # What a listener raises is its own, and Celery's to log: here Postgres quotes the row in it.
    by_us = [line for line in told if '"logger": "celery.app.trace", ' not in line or '"level": "error"' not in line]
    assert len(told) - len(by_us) == 1
    assert [line for line in by_us if str(SECRET) in line or "s3cret" in line] == []
