"""What a worker process measures of its listeners, and tells the bridges now and then.

Owns the running means and when they are worth a statement. A bridge makes bundles by them (`bundles`), `status` shows
them. Losing one costs nothing: the next message brings another.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import NamedTuple

REPORT_SECONDS = 5.0
"""Seconds between two reports of one listener, while its mean stays about the same."""

CHANGED_SECONDS = 0.25
"""Seconds between two reports while it does not."""

REMEMBERED_RUNS = 500
"""Older runs fade from the mean."""


class Report(NamedTuple):
    """What one process tells of one listener."""

    mean_seconds: float
    runs: int
    """How many the mean is of."""
    per_second: float | None
    """Runs in a second since the report before; None in the first."""


@dataclasses.dataclass
class _Mean:
    seconds: float = 0.0
    runs: float = 0.0
    since: int = 0
    """Runs since the last report."""
    reported: float | None = None
    reported_at: float = float("-inf")

    @property
    def value(self) -> float:
        return self.seconds / self.runs


class Means:
    """The mean run times of one process, by subscription. May be shared by threads."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}
        self._lock = threading.Lock()

    def add(self, subscription: int, seconds: float, runs: int) -> Report | None:
        """Count `runs` that took `seconds` together; return a report when it is time for one."""
        now = time.monotonic()
        with self._lock:
            mean = self._means.setdefault(subscription, _Mean())
            if mean.runs > REMEMBERED_RUNS:
                kept = REMEMBERED_RUNS / mean.runs
                mean.seconds *= kept
                mean.runs *= kept
            mean.seconds += seconds
            mean.runs += runs
            mean.since += runs
            changed = mean.reported is None or not 0.5 <= mean.value / mean.reported <= 2.0
            if now - mean.reported_at < (CHANGED_SECONDS if changed else REPORT_SECONDS):
                return None
            per_second = None if mean.reported is None else mean.since / (now - mean.reported_at)
            mean.reported, mean.reported_at, mean.since = mean.value, now, 0
            return Report(mean.value, max(1, int(mean.runs)), per_second)
