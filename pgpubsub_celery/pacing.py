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

SHORTEST = 1.0
"""Seconds that a rate is measured over, at least: many that finish in the same moment are no rate."""


@dataclasses.dataclass
class Pace:
    """The rate at which one subscription's notifications are finished, and the quota that follows."""

    max_in_flight: int
    lease: float
    _finished: float = 0.0
    """Notifications finished, those of long ago counting less."""
    _busy: float = 0.0
    """Seconds in which some were in flight, weighted likewise."""
    _in_flight: int = 0
    _at: float | None = None

    @property
    def rate(self) -> float:
        """Return how many are finished each second, while there is something to do."""
        return self._finished / max(self._busy, SHORTEST)

    def seconds_for(self, count: float) -> float:
        """Return the seconds in which so many should be finished; infinite while nothing is known."""
        return count / self.rate if self.rate > 0 else float("inf")

    @property
    def quota(self) -> int:
        """Return how many may be in flight.

        Never more than twice what was seen to finish within memory: a few quick ones say little of those to come.
        """
        allowed = min(self.rate * self.lease / LEASE_SHARE, 2 * self._finished)
        return max(min(FLOOR, self.max_in_flight), min(self.max_in_flight, int(allowed)))

    def observe(self, in_flight: int, claimed: int, now: float) -> None:
        """Learn from a claim that found `in_flight` and added `claimed`, at `now` (monotonic seconds).

        Notifications whose lease ran out were in flight already: they do not count as claimed.
        """
        if self._at is not None and now > self._at:
            self._remember(max(0, self._in_flight - in_flight), in_flight, now - self._at)
        self._in_flight = in_flight + claimed
        self._at = now

    def disregard(self) -> None:
        """Learn nothing from what happens until the next claim: what went was in flight, and nobody finished it."""
        self._at = None

    def _remember(self, finished: int, left: int, seconds: float) -> None:
        """Count what happened in the last `seconds`; what is older fades within the part of a lease that is planned."""
        memory = self.lease / LEASE_SHARE
        kept = math.exp(-seconds / memory)
        rate = self.rate
        self._finished *= kept
        self._busy *= kept
        # Where the workers ran out of work they may be faster than this, never slower.
        ran_out = left < self._in_flight / 2
        if self._in_flight > 0 and (not ran_out or finished / seconds > rate):
            weight = (1 - kept) * memory / seconds
            self._finished += finished * weight
            self._busy += seconds * weight


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
