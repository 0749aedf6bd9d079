"""`celery worker --pgpubsub`: one command runs bridge and worker, and neither outlives the other."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import psutil
import pytest
from celery import Celery
from sqlalchemy import Engine, text

from pgpubsub_celery.messages import notification_task_id
from tests.e2e.test_listen import all_done, emit, states
from tests.fixtures import shop as app
from tests.fixtures.monitors import Monitor
from tests.fixtures.processes import APP, BIN, ROOT, Running, Shop, eventually

POOL: tuple[str, ...] = ("--pool=prefork", "--concurrency=1")


def bridges(worker: Running) -> list[psutil.Process]:
    """Return the bridge's processes below the worker."""
    return [one for one in worker.children() if "pgpubsub_celery.cli" in " ".join(one.cmdline())]


@pytest.mark.timeout(180)
def test_a_worker_with_a_bridge_beside_it_does_everything_and_ends_as_one(shop: Shop, database: Engine) -> None:
    """What is committed is done; a bridge that dies is started anew and holds nothing back; a warm stop ends both."""
    emit(database, app.Order(number=1))
    with database.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_notification SET state = 'held'"))
    worker = shop.worker(*POOL, "--pgpubsub", "--pgpubsub-recover", ready=False)
    worker.wait_for("recovered 1 stored notification")
    emit(database, app.Order(number=2))
    all_done(database, {("order", 1): 1, ("order", 2): 1})

    (supervisor, *_) = bridges(worker)
    supervisor.kill()
    emit(database, app.Order(number=3))
    worker.wait_for("listening to", count=2)
    emit(database, app.Order(number=4))
    all_done(database, {("order", n): 1 for n in (1, 2, 3, 4)})
    assert "held" not in worker.log()

    mine = worker.children()
    assert len(mine) > 2
    assert worker.stop() == 0
    eventually(lambda: not any(one.is_running() for one in mine), "nothing of it is left")


def test_a_killed_worker_takes_its_bridge_along(shop: Shop, database: Engine) -> None:
    """Nobody would look after it any more."""
    worker = shop.worker(*POOL, "--pgpubsub")
    worker.wait_for("listening to")
    mine = worker.children()
    assert bridges(worker)
    worker.signal(signal.SIGKILL)
    worker.code()
    eventually(lambda: not any(one.is_running() and one.status() != "zombie" for one in mine), "nothing of it is left")
    emit(database, app.Order(number=1))
    assert states(database) == {"waiting": 1}


def test_without_the_option_a_worker_is_a_worker(shop: Shop) -> None:
    """Other workers of an application that has this package are left alone."""
    assert not bridges(shop.worker(*POOL))


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (["--pgpubsub"], {"PGPUBSUB_DATABASE_URL": ""}, "No database is configured"),
        (["--pgpubsub-recover=some"], {}, "'some' is not one of"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(
    shop: Shop, words: list[str], environment: dict[str, str], told: str
) -> None:
    """Before anything runs."""
    result: Any = subprocess.run(
        [str(BIN / "celery"), "-A", APP, "worker", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **shop.environment, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    assert told in result.stdout + result.stderr


def test_monitors_see_each_notification_of_a_bundle(shop: Shop, database: Engine) -> None:
    """`-E`: Flower and `celery events` are told of tasks by their own ids, beside the message that carried them."""
    last = 340
    emit(database, *(app.Order(number=number) for number in range(1, 41)))
    with database.connect() as connection:
        installation = connection.execute(text("SELECT id FROM pgpubsub_installation")).scalar_one()
    wanted = {notification_task_id(installation, id) for id in range(1, last + 1)}
    with Celery("monitor", broker=shop.broker_url, set_as_current=False) as celery, Monitor(celery).listening() as told:
        shop.worker(*POOL, "-E", "--pgpubsub", "--pgpubsub-recover")
        all_done(database, {("order", n): 1 for n in range(1, 41)})
        # How long they take is known now, so that these are bundled.
        emit(database, *(app.Order(number=number) for number in range(41, last + 1)))

        def ended() -> set[str]:
            return {event["uuid"] for event in told if event["type"] == "task-succeeded"}

        eventually(lambda: wanted <= ended(), "each notification has been told of")
        all_done(database, {("order", n): 1 for n in range(1, last + 1)})
        assert ended() > wanted, "the bundles are told of, too"


def test_without_events_a_worker_tells_monitors_nothing_of_bundles(shop: Shop, database: Engine) -> None:
    """As of any task: a worker that does not send their events sends those of itself alone, and pays for no others."""
    emit(database, *(app.Order(number=number) for number in range(1, 41)))
    with Celery("monitor", broker=shop.broker_url, set_as_current=False) as celery, Monitor(celery).listening() as told:
        shop.worker(*POOL, "--pgpubsub", "--pgpubsub-recover")
        all_done(database, {("order", n): 1 for n in range(1, 41)})
        eventually(lambda: told, "the worker tells of itself")
    assert not [event["type"] for event in told if event["type"].startswith("task-")]
