"""Numbers that processes add up: counted where something happens, handed on as differences, summed where they are read.

Owns the adding, and the form in which one process's numbers travel to another. A process that is started anew begins at
nothing, and the sum keeps what the one before it has handed on: no counter ever goes down. Knows no names.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence

Labels = tuple[str, ...]
Key = tuple[str, Labels]
Gauge = tuple[str, Labels, float]


class Tally:
    """Counters, histograms and gauges. May be shared by threads."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the upper bounds of every histogram's buckets, ascending."""
        self._bounds = bounds
        self._lock = threading.Lock()
        self._counts: dict[Key, float] = {}
        self._lags: dict[Key, list[float]] = {}  # a number for each bucket, the last without bound; then the sum
        self._gauges: tuple[float, list[Gauge]] | None = None

    def add(self, name: str, labels: Labels, number: float = 1) -> None:
        """Count."""
        if number:
            with self._lock:
                self._counts[name, labels] = self._counts.get((name, labels), 0) + number

    def observe(self, name: str, labels: Labels, values: Iterable[float]) -> None:
        """Count values of a histogram; what clocks that differ make negative is nothing."""
        with self._lock:
            numbers = self._lags.setdefault((name, labels), [0.0] * (len(self._bounds) + 2))
            for value in values:
                numbers[bisect_left(self._bounds, value)] += 1
                numbers[-1] += max(0.0, value)

    def gauge(self, gauges: Iterable[Gauge]) -> None:
        """Replace all gauges."""
        with self._lock:
            self._gauges = (time.monotonic(), list(gauges))

    def take(self) -> bytes | None:
        """Return what has come since the last time, to be merged elsewhere; None when that is nothing."""
        with self._lock:
            if not (self._counts or self._lags or self._gauges):
                return None
            counts, lags, gauges = self._counts, self._lags, self._gauges
            self._counts, self._lags, self._gauges = {}, {}, None
        return json.dumps(
            [
                [[*key, number] for key, number in counts.items()],
                [[*key, numbers] for key, numbers in lags.items()],
                None if gauges is None else gauges[1],
            ],
            separators=(",", ":"),
        ).encode()

    def clear(self) -> None:
        """Begin anew, in a child that was forked while another thread may have been counting."""
        self._lock = threading.Lock()
        self._counts, self._lags, self._gauges = {}, {}, None

    def merge(self, taken: bytes) -> None:
        """Add what another tally, or this one, has given."""
        counts, lags, gauges = json.loads(taken)
        for name, labels, number in counts:
            self.add(name, tuple(labels), number)
        with self._lock:
            for name, labels, numbers in lags:
                known = self._lags.setdefault((name, tuple(labels)), [0.0] * len(numbers))
                known[:] = [one + other for one, other in zip(known, numbers, strict=True)]
        if gauges is not None:
            self.gauge((name, tuple(labels), value) for name, labels, value in gauges)

    def counts(self) -> list[tuple[str, Labels, float]]:
        """Return the counters."""
        with self._lock:
            return [(*key, number) for key, number in self._counts.items()]

    def lags(self) -> list[tuple[str, Labels, list[float], float]]:
        """Return the histograms: for each bucket how many, the last without bound; and the sum."""
        with self._lock:
            return [(*key, numbers[:-1], numbers[-1]) for key, numbers in self._lags.items()]

    def gauges(self, *, younger_than: float) -> list[Gauge]:
        """Return the gauges, unless they are older than so many seconds."""
        with self._lock:
            if self._gauges is None or time.monotonic() - self._gauges[0] > younger_than:
                return []
            return list(self._gauges[1])


def pieces(taken: bytes, most: int) -> list[bytes]:
    """Return the same in parts of fewer than `most` bytes each: of one number, where that is what it takes."""
    if len(taken) < most:
        return [taken]
    counts, lags, gauges = json.loads(taken)
    parts: list[object] = [[[one], [], None] for one in counts] + [[[], [one], None] for one in lags]
    parts += [] if gauges is None else [[[], [], gauges]]
    return [json.dumps(part, separators=(",", ":")).encode() for part in parts]
