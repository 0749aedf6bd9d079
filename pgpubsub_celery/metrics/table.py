"""The metrics: their names, what they mean, and who feeds them.

Owns the one table that the code, the documentation and the dashboard agree upon (a test holds that). Measures nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

LAGS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""Upper bounds of the buckets of every histogram, in seconds."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One of them."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    where: str
    """In whose `/metrics` it is."""
    help: str


_OF_LISTENER = ("channel", "listener")
_BRIDGE, _WORKER, _BOTH, _WRITER = "bridge", "worker", "bridge, worker", "writer"

EMITTED = "pgpubsub_notifications_emitted_total"
CLAIMED = "pgpubsub_notifications_claimed_total"
EXPIRED = "pgpubsub_leases_expired_total"
PUBLISHED = "pgpubsub_notifications_published_total"
PUBLISH_LAG = "pgpubsub_publish_lag_seconds"
RELEASED = "pgpubsub_notifications_released_total"
ACKNOWLEDGED = "pgpubsub_notifications_acknowledged_total"
FINISH_LAG = "pgpubsub_finish_lag_seconds"
RETRIED = "pgpubsub_notifications_retried_total"
FAILED = "pgpubsub_notifications_failed_total"
DROPPED = "pgpubsub_notifications_dropped_total"
SUPERSEDED = "pgpubsub_notifications_superseded_total"
DISCARDED = "pgpubsub_notifications_discarded_total"
RECOVERED = "pgpubsub_notifications_recovered_total"
WAKEUPS = "pgpubsub_wakeups_total"
INTERRUPTIONS = "pgpubsub_interruptions_total"
RECONNECTS = "pgpubsub_reconnects_total"
PROCESSES = "pgpubsub_processes"
STORED = "pgpubsub_stored_notifications"
OLDEST = "pgpubsub_oldest_due_seconds"
RUN_TIME = "pgpubsub_run_time_seconds"

TABLE = (
    Metric(EMITTED, "counter", ("channel",), _WRITER, "Messages emitted; their transaction may be rolled back later."),
    Metric(CLAIMED, "counter", _OF_LISTENER, _BRIDGE, "Notifications put under lease, to be published."),
    Metric(EXPIRED, "counter", _OF_LISTENER, _BRIDGE, "Of those claimed: published before, and their lease ran out."),
    Metric(PUBLISHED, "counter", _OF_LISTENER, _BRIDGE, "Notifications whose message the broker has confirmed."),
    Metric(
        PUBLISH_LAG,
        "histogram",
        _OF_LISTENER,
        _BRIDGE,
        "Seconds from the beginning of a notification's transaction to the broker's confirmation.",
    ),
    Metric(
        RELEASED,
        "counter",
        (*_OF_LISTENER, "reason"),
        _BOTH,
        "Notifications given back: unpublished, refused, circumstances or lost.",
    ),
    Metric(ACKNOWLEDGED, "counter", _OF_LISTENER, _BOTH, "Notifications finished, committed and gone."),
    Metric(
        FINISH_LAG,
        "histogram",
        _OF_LISTENER,
        _BOTH,
        "Seconds from the beginning of a notification's transaction to its acknowledgement.",
    ),
    Metric(RETRIED, "counter", _OF_LISTENER, _WORKER, "Runs after which a notification waits for its next attempt."),
    Metric(FAILED, "counter", _OF_LISTENER, _BOTH, "Notifications failed for good."),
    Metric(DROPPED, "counter", _OF_LISTENER, _WORKER, "Duplicates that a message told of, and that were recognised."),
    Metric(
        SUPERSEDED,
        "counter",
        _OF_LISTENER,
        _BRIDGE,
        "Notifications deleted unpublished: a newer one of their `unique_key` waits.",
    ),
    Metric(DISCARDED, "counter", ("channel",), _BRIDGE, "Failed notifications deleted after `failed_retention`."),
    Metric(RECOVERED, "counter", ("channel",), _BRIDGE, "Held and failed notifications made due by `--recover`."),
    Metric(WAKEUPS, "counter", ("reason",), _BRIDGE, "Times a bridge was rung (doorbell), or looks unasked (sweep)."),
    Metric(
        INTERRUPTIONS, "counter", ("what",), _BRIDGE, "Attempts to reach the database, or the broker, that have failed."
    ),
    Metric(RECONNECTS, "counter", (), _BRIDGE, "Times a bridge listens again after it had lost the database."),
    Metric(PROCESSES, "gauge", ("state",), _BRIDGE, "Processes of this `listen`: listening, or not."),
    Metric(
        STORED,
        "gauge",
        (*_OF_LISTENER, "state"),
        _BRIDGE,
        "Notifications in the table: waiting (due), delayed, in_flight, held or failed; counted up to 10,000.",
    ),
    Metric(OLDEST, "gauge", _OF_LISTENER, _BRIDGE, "For how long the oldest due notification has been due."),
    Metric(RUN_TIME, "gauge", _OF_LISTENER, _BRIDGE, "Mean seconds of a run, as workers have measured it lately."),
)

METRICS = {metric.name: metric for metric in TABLE}
