"""(d) A backlog is worked off: tasks that do nothing, and tasks that insert one row.

From the COMMIT that makes the backlog (for plain Celery: from the moment that its worker may begin) until nothing is
left. Each system first does a few, so that nothing is started in the time that counts; then the median of the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from bench.ground import Ground, Stage
from bench.processes import MeasurementError, wait_until
from bench.results import Outcome
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.systems import System, ours, pgqueuer, system

NOTHING = "no-op"
INSERT = "one insert"
LIMIT = 150.0

LARGER = {"bundle_max": 500, "max_in_flight": 2000}
"""Our own settings for short listeners, where a crash may repeat more of them."""

PGQUEUERS = ((100, 1), (500, 1), (500, 2), (1000, 1))
"""Batch sizes and processes: which is its best setting depends on the machine."""


def pgqueuer_of(batch_size: int, processes: int) -> str:
    """Return what PgQueuer in one of its settings is called."""
    return f"pgqueuer, batch {batch_size}" + (f", {processes} processes" if processes > 1 else "")


_KINDS = {NOTHING: "nothing", INSERT: "insert"}


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure everybody; sizes differ, because rates do."""
    record = Recorder("drain")
    for measure, large in ((NOTHING, scale.backlog), (INSERT, scale.insert_backlog)):
        _drain(ground, scale, record, measure, OURS, ours.variant("work"), large)
        if scale.name == "full":
            title = f"{OURS}, " + ", ".join(f"{setting} {value:,}" for setting, value in LARGER.items())
            _drain(ground, scale, record, measure, title, ours.variant("work", **LARGER), large)
        if "pgqueuer" in peers:
            for setting, processes in PGQUEUERS if scale.name == "full" else PGQUEUERS[1:3]:
                contestant = pgqueuer.batched(setting, processes)
                _drain(ground, scale, record, measure, pgqueuer_of(setting, processes), contestant, large // 2)
        for name in ("plain_celery", "on_commit", "celery_outbox", "procrastinate"):
            if name in peers:
                _drain(ground, scale, record, measure, system(name).name, system(name), scale.small_backlog)
        if "django_pgpubsub" in peers:
            peer = system("django_pgpubsub")
            _drain(ground, scale, record, measure, f"{peer.name}, live", peer, scale.small_backlog // 3)
            _recover(ground, scale, record, measure)
    return record.outcome


def _drain(
    ground: Ground, scale: Scale, record: Recorder, measure: str, title: str, contestant: System, count: int
) -> None:
    with record.measuring(title, measure), contestant.staged(ground, kind=_KINDS[measure]) as staged:
        rates = []
        # The first only starts what has to be started.
        for size in (max(100, count // 10), *[count] * scale.repeats):
            rates.append(size / staged.drain(size, within=LIMIT))
            _require(staged.stage, measure, size)
            staged.stage.truncate("effect")
        record.add(measure, title, "tasks/s", rates[1:], f"{count:,}")


def _recover(ground: Ground, scale: Scale, record: Recorder, measure: str) -> None:
    """What django-pgpubsub had stored while nobody listened goes another, quicker way."""
    contestant, count = system("django_pgpubsub"), scale.small_backlog
    title = f"{contestant.name}, recovery"
    with record.measuring(title, measure):
        rates = []
        for _ in range(scale.repeats):
            with contestant.staged(ground, kind=_KINDS[measure], consumers=False) as staged:
                staged.application.call("backlog", count)
                staged.start_consumers(beside_a_backlog=True)
                began = staged.application.call("recover")
                rates.append(count / (staged.wait_until_finished(within=LIMIT) - began))
                _require(staged.stage, measure, count)
        record.add(measure, title, "tasks/s", rates, f"{count:,}, stored while nobody listened")


def _require(stage: Stage, measure: str, count: int) -> None:
    """Tasks that did not do their work have no rate."""

    def effects() -> int:
        return int(stage.scalar("SELECT count(*) FROM effect"))

    if measure == INSERT:
        with contextlib.suppress(MeasurementError):  # acknowledged early, the last may be at it still
            wait_until(lambda: effects() >= count, "all effects", within=2)
        if effects() != count:
            raise MeasurementError(f"{effects():,} rows were inserted by {count:,} tasks")
