"""(h) The bridge's memory while it hands on many notifications, one in a message, to a consumer without any work."""

from __future__ import annotations

import time
from collections.abc import Collection

from bench.ground import Ground
from bench.results import Outcome, Series
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.scenarios.backlog import fill
from bench.scenarios.writers import emptied
from bench.systems import Staged, ours

LIMIT = 400.0
EARLY, LATE, MOST = "after a tenth", "at the end", "at most"
MIB = 1 << 20


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure the bridge alone."""
    record = Recorder("memory")
    with record.measuring(OURS):
        with ours.variant("sent").staged(ground, consumers=False) as staged:
            fill(staged.stage, scale.memory, "%sent")
            points = _watch(staged, scale.memory)
        note = f"{scale.memory:,} notifications in {points[-1][0]:.0f} s"
        early = next(size for _, done, size in points if done >= scale.memory / 10)
        record.add(EARLY, OURS, "MiB", [early], note)
        record.add(LATE, OURS, "MiB", [points[-1][2]], note)
        record.add(MOST, OURS, "MiB", [max(size for _, _, size in points)], note)
        record.outcome.series.append(
            Series(
                scenario="memory",
                name="resident memory of the bridge",
                x="notifications handed on",
                y="MiB",
                points=tuple((float(done), round(size, 2)) for _, done, size in points),
            )
        )
    return record.outcome


def _watch(staged: Staged, count: int) -> list[tuple[float, int, float]]:
    """Return seconds, notifications handed on, and MiB, from time to time until all are."""
    points: list[tuple[float, int, float]] = []
    with emptied(staged.stage.broker):
        staged.start_listening(ours.bridge("sent", "--recover"))
        (bridge,) = staged.consumers
        begin = time.monotonic()
        while not points or points[-1][1] < count:
            bridge.require_alive()
            if time.monotonic() - begin > LIMIT:
                raise TimeoutError(f"{points[-1][1]:,} of {count:,} notifications within {LIMIT:g} s")
            done = count - staged.stage.scalar("SELECT count(*) FROM pgpubsub_notification")
            points.append((time.monotonic() - begin, done, bridge.largest_rss() / MIB))
            time.sleep(0.5)
    return points
