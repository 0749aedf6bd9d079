"""How much, and how soon again: quotas from the rate of acknowledgement, and backing off in an outage.

Pure arithmetic over counts and times that it is given. It exists because rows published faster than workers finish them
only wait in the broker instead of in Postgres, until their leases run out and the broker fills with duplicates.
"""

from __future__ import annotations

import dataclasses
import math
import random

FLOOR = 16
"""In flight for each listener, at least: what a new or slow one gets."""

LEASE_SHARE = 4
"""In flight is at most what finishes in this part (a quarter) of the lease, at the measured rate."""

MEMORY_SECONDS = 10.0
"""How far back the measured rate looks."""


@dataclasses.dataclass
class Pace:
    """The rate at which one subscription's notifications are finished, and the quota that follows."""

    max_in_flight: int
    lease: float
    rate: float = 0.0
    """Finished each second, smoothed."""
    _in_flight: int = 0
    _at: float | None = None

    @property
    def quota(self) -> int:
        """Return how many may be in flight."""
        return max(min(FLOOR, self.max_in_flight), min(self.max_in_flight, int(self.rate * self.lease / LEASE_SHARE)))

    def observe(self, in_flight: int, claimed: int, now: float) -> None:
        """Learn from a claim that found `in_flight` and added `claimed`, at `now` (monotonic seconds)."""
        if self._at is not None and self._in_flight > 0 and now > self._at:
            seconds = now - self._at
            sample = max(0, self._in_flight - in_flight) / seconds
            weight = 1 - math.exp(-seconds / MEMORY_SECONDS)
            if in_flight == 0 or in_flight < self._in_flight / 2:
                # They ran out of work: they may be faster than this, never slower.
                self.rate = max(self.rate, sample)
            else:
                self.rate += weight * (sample - self.rate)
        self._in_flight = in_flight + claimed
        self._at = now


class Backoff:
    """Delays that double, with jitter, until something works again."""

    def __init__(self, initial: float = 0.25, most: float = 30.0) -> None:
        """`initial` and `most` are seconds."""
        self._initial = initial
        self._most = most
        self.failures = 0

    def next(self) -> float:
        """Return the seconds to wait after one more failure."""
        nominal = min(self._most, self._initial * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return nominal * random.uniform(0.5, 1.0)

    def reset(self) -> bool:
        """Note that it works; whether it had failed before."""
        failed, self.failures = self.failures > 0, 0
        return failed
