"""The application of the doorbell's stress: one channel, whose rows go as soon as the broker has them."""

from __future__ import annotations

import dataclasses
import os

from celery import Celery

from pgpubsub_celery import Channel, channel_task

QUEUE = "stress"
LEASE = 3.0
"""Seconds, after which what a killed bridge had claimed comes again."""

app = Celery("stress", broker=os.environ.get("STRESS_BROKER_URL", "memory://"))
app.conf.update(task_default_queue=QUEUE, task_ignore_result=True)


@dataclasses.dataclass
class Tick(Channel):
    """Stored; what is left in the table was not published."""

    channel_name = "doorbell.Tick"
    lock_notifications = True
    acknowledge = "published"
    lease = LEASE
    prepared: bool
    """Emitted by a transaction that was prepared, and so could not ring."""


@channel_task(Tick, name="doorbell.tick", bundle=200)
def tick(prepared: bool) -> None:
    """Never run: nobody takes the messages."""
