"""Celery's events for each notification of a bundle, so that Flower and `celery events` see tasks, not only messages.

Owns what monitors are told of a bundle's notifications: received, started, and how each ended, sent in one message when
the bundle is done. The message itself has events of its own from Celery, in the worker's parent. Only where that sends
events (`-E`, or `celery control enable_events`): nothing is built or sent otherwise. Never decides anything, and never
fails a run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from celery import Celery

from pgpubsub_celery.runs import DONE, FAILED, RETRY, Run, one_line

logger = logging.getLogger(__name__)

WANTED = "pgpubsub_events"
"""In a request: the worker's parent sends events."""

_ENDS = {DONE: "task-succeeded", RETRY: "task-retried", FAILED: "task-failed"}


class Telling:
    """The events of one bundle."""

    def __init__(self, app: Celery, request: Mapping[str, Any]) -> None:
        self._app = app
        self._hostname = request.get("hostname")
        self._runs: list[tuple[Run, float, float]] = []

    def ran(self, run: Run, began: float) -> None:
        """Note a run that began at `began`, in seconds of `time.time()`, and has just ended."""
        self._runs.append((run, began, time.time() - began))

    def send(self) -> None:
        """Send the events of all runs that have come to an end. What was given back will run, and be told, again."""
        told = [(run, began, took) for run, began, took in self._runs if run.outcome in _ENDS]
        if not told:
            return
        try:
            with self._app.amqp.producer_pool.acquire(block=True) as producer:
                events = self._app.events.Dispatcher(
                    producer.connection,
                    hostname=self._hostname,
                    channel=producer.channel,
                    buffer_while_offline=False,
                    # Sent as one message.
                    buffer_group=frozenset({"task"}),
                    buffer_limit=3 * len(told) + 1,
                )
                for run, began, took in told:
                    _tell(events, run, began, took)
                events.flush()
        except Exception as exc:  # noqa: BLE001 - a monitor's trouble is no notification's
            logger.warning("Events of %d notification(s) were not sent: %s", len(told), one_line(exc))


def _tell(events: Any, run: Run, began: float, took: float) -> None:
    common = {"uuid": run.task_id, "root_id": run.task_id, "parent_id": None}
    events.send(
        "task-received",
        **common,
        name=run.task.name,
        args="()",
        kwargs=run.described,
        retries=run.taken.retries,
        timestamp=began,
    )
    events.send("task-started", uuid=run.task_id, timestamp=began)
    ended: dict[str, Any] = {"uuid": run.task_id, "timestamp": began + took}
    if run.outcome == DONE:
        ended |= {"runtime": took, "result": "None"}
    else:
        ended |= {"exception": run.told or run.outcome, "traceback": run.error_text}
    events.send(_ENDS[run.outcome], **ended)
