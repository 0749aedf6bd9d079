"""(e) From COMMIT (for plain Celery: from `delay()`) to the first line of the task, at a steady rate.

Each system writes the same row in a transaction that also causes the task. Percentiles of each repetition; the median
of these counts. A system that cannot keep up shows it: what waits is waited for, up to a limit.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from bench.ground import Ground
from bench.processes import MeasurementError, wait_until
from bench.results import Outcome, percentile
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.systems import NAMES, Staged, System, ours, system

PERCENTS = (50, 95, 99)
LISTENING_ALONE = f"{OURS}, without session"


def measure_of(rate: int, percent: int) -> str:
    """Return what a figure is called."""
    return f"{rate}/s p{percent}"


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure everybody."""
    record = Recorder("latency")
    contestants = [(OURS, ours.variant("rows"))]
    if scale.name != "quick":
        contestants.append((LISTENING_ALONE, ours.variant("owned")))
    contestants += [(system(name).name, system(name)) for name in NAMES[1:] if name in peers]
    for title, contestant in contestants:
        with record.measuring(title):
            _measure(ground, scale, record, title, contestant)
    return record.outcome


def _measure(ground: Ground, scale: Scale, record: Recorder, title: str, contestant: System) -> None:
    with contestant.staged(ground, kind="start") as staged:
        for rate in scale.rates:
            with record.measuring(title, f"{rate}/s"):
                _at(staged, scale, record, title, rate)


def _at(staged: Staged, scale: Scale, record: Recorder, title: str, rate: int) -> None:
    found: dict[int, list[float]] = {percent: [] for percent in PERCENTS}
    staged.application.call("paced", rate, 0.5, 0)
    staged.wait_until_finished()
    for _ in range(scale.repeats):
        latencies = _latencies(staged, rate, scale)
        for percent in PERCENTS:
            found[percent].append(1000 * percentile(latencies, percent))
    count = int(rate * scale.latency_seconds)
    for percent in PERCENTS:
        record.add(measure_of(rate, percent), title, "ms", found[percent], f"{count:,} transactions")


def _latencies(staged: Staged, rate: int, scale: Scale) -> list[float]:
    staged.stage.forget_notes()
    begin = time.monotonic()
    sent = dict(staged.application.call("paced", rate, scale.latency_seconds, 1))
    took = time.monotonic() - begin
    if took > 2 * scale.latency_seconds:
        raise MeasurementError(f"the writer itself is too slow: {len(sent)} transactions took {took:.1f} s")
    wait_until(
        # Reading all of them takes longer than counting.
        lambda: staged.stage.count_notes() >= len(sent) and staged.stage.notes().keys() >= sent.keys(),
        f"all {len(sent)} tasks at {rate}/s have begun",
        within=scale.latency_limit,
        every=0.1,
        alive=staged.consumers,
    )
    begun = staged.stage.notes()
    staged.wait_until_finished()
    return [begun[number] - at for number, at in sent.items()]
