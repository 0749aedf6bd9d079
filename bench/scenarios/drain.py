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

_KINDS = {NOTHING: "nothing", INSERT: "insert"}


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure everybody; sizes differ, because rates do."""
    record = Recorder("drain")
    for measure in (NOTHING, INSERT):
        _drain(ground, scale, record, measure, OURS, ours.variant("work"), scale.backlog)
        if "pgqueuer" in peers:
            for title, contestant in _pgqueuers(scale):
                _drain(ground, scale, record, measure, title, contestant, scale.backlog // 2)
        for name in ("plain_celery", "on_commit", "celery_outbox", "procrastinate"):
            if name in peers:
                _drain(ground, scale, record, measure, system(name).name, system(name), scale.small_backlog)
        if "django_pgpubsub" in peers:
            _drain(
                ground,
                scale,
                record,
                measure,
                f"{system('django_pgpubsub').name}, live",
                system("django_pgpubsub"),
                scale.small_backlog // 3,
            )
            _recover(ground, scale, record, measure)
    return record.outcome


def _pgqueuers(scale: Scale) -> list[tuple[str, System]]:
    """Which of its settings is the best depends on the machine."""
    found = [
        ("pgqueuer, batch 500", pgqueuer.batched(500)),
        ("pgqueuer, batch 500, 2 processes", pgqueuer.batched(500, 2)),
    ]
    if scale.name == "full":
        found.append(("pgqueuer, batch 1000, 2 processes", pgqueuer.batched(1000, 2)))
    return found


def _drain(
    ground: Ground, scale: Scale, record: Recorder, measure: str, title: str, contestant: System, count: int
) -> None:
    with record.measuring(f"{title}, {measure}"), contestant.staged(ground, kind=_KINDS[measure]) as staged:
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
    with record.measuring(f"{title}, {measure}"):
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
