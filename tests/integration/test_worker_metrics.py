"""What a worker and a writer count, within one process: the pipe, a registry of somebody's own, and nothing twice."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import pytest
from celery import Celery
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, install, notify_many, signals
from pgpubsub_celery.metrics import Collector, install_writer_metrics
from pgpubsub_celery.metrics.worker import WorkerMetrics
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.processes import eventually


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("counting", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    yield app
    app.close()


@pytest.fixture
def counting() -> Iterator[WorkerMetrics]:
    """A worker's metrics, counted and not served."""
    metrics = WorkerMetrics()
    metrics.start("", None)
    yield metrics
    metrics.stop()


def test_a_registry_of_one_s_own_has_what_runs_and_what_is_emitted(
    app: Celery, installed_engine: Engine, registry: None, counting: WorkerMetrics
) -> None:
    """By channel and listener, with lags; and what does not fit into the pipe at once comes later."""

    @dataclasses.dataclass
    class Counted(Channel):
        channel_name = "counting.Counted"
        lock_notifications = True
        value: int

    @channel_task(Counted, app=app, name="counting.count", bundle=5)
    def count(value: int, session: Session) -> None:
        if value == 3:
            raise ValueError("poison")

    install(installed_engine, channels=[Counted])
    own = CollectorRegistry()
    own.register(Collector(counting.tally))
    before = list(signals.notification_emitted.receivers or [])
    install_writer_metrics(own)
    try:
        with Session(installed_engine) as session, session.begin():
            notify_many(session, [Counted(value=value) for value in range(10)])
    finally:
        signals.notification_emitted.receivers = before
    labels = {"channel": "counting.Counted", "listener": "counting.count"}

    def value_of(name: str) -> float | None:
        return own.get_sample_value(name, labels)

    assert own.get_sample_value("pgpubsub_notifications_emitted_total", {"channel": "counting.Counted"}) == 10
    # As if the main process had not read for long.
    full = os.pipe()
    os.set_blocking(full[1], False)
    with contextlib.suppress(BlockingIOError):
        while os.write(full[1], b" " * 4096):
            pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_writer", full[1])
        Deliveries(app, installed_engine).run_until_idle()
        assert value_of("pgpubsub_notifications_acknowledged_total") is None
    for descriptor in full:
        os.close(descriptor)
    with Session(installed_engine) as session, session.begin():
        notify_many(session, [Counted(value=10)])
    Deliveries(app, installed_engine).run_until_idle()
    eventually(lambda: value_of("pgpubsub_notifications_acknowledged_total") == 10, "what was kept has come")
    assert value_of("pgpubsub_notifications_failed_total") == 1
    assert value_of("pgpubsub_finish_lag_seconds_count") == 10


def test_a_forked_child_hands_on_only_what_is_its_own(counting: WorkerMetrics) -> None:
    """What its parent has counted and not handed on yet is its parent's."""
    counting.pending.add("pgpubsub_notifications_dropped_total", ("a", "b"), 5)
    child = os.fork()
    if child == 0:
        counting.pending.add("pgpubsub_notifications_dropped_total", ("a", "b"), 2)
        counting.hand_on()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    eventually(counting.tally.counts, "the child's numbers have come")
    assert counting.tally.counts() == [("pgpubsub_notifications_dropped_total", ("a", "b"), 2)]
