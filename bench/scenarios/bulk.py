"""(a) One statement inserts many rows, and each is to become a task: what does the writer pay?

With triggers that is the statement alone; without, a call for each row or one for all. Rounds are interleaved, so that
whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from bench.ground import Ground
from bench.results import Outcome
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.systems import NAMES, Staged, System, ours, system
from bench.systems.bare import SYSTEM as BARE

MEASURE = "bulk insert"
WAL = "WAL"
FLOOR = "a constant stored for each row"
"""What the least that any trigger could do costs: a row in the table of notifications and its two indexes."""


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure everybody who can."""
    record = Recorder("bulk")
    slow = ("plain_celery", "on_commit", "celery_outbox")
    contestants: list[tuple[str, System, int]] = [
        ("no trigger", BARE, scale.bulk_repeats),
        (OURS, ours.variant("rows"), scale.bulk_repeats),
        (f'{OURS}, include="key"', ours.variant("keys"), scale.bulk_repeats),
        (FLOOR, ours.variant("floor"), scale.bulk_repeats),
    ]
    for name in NAMES[1:]:
        if name in peers:
            contestants.append((system(name).name, system(name), scale.repeats if name in slow else scale.bulk_repeats))
    with contextlib.ExitStack() as stack:
        staged: dict[str, Staged] = {}
        for title, contestant, _ in contestants:
            with record.measuring(title):
                staged[title] = stack.enter_context(contestant.staged(ground, consumers=False))
                staged[title].application.call("bulk", 100)
        seconds: dict[str, list[float]] = {title: [] for title in staged}
        wal: dict[str, list[float]] = {title: [] for title in staged}
        for round_number in range(max(repeats for _, _, repeats in contestants)):
            for title, _, repeats in contestants:
                if title in staged and round_number < repeats and not record.failed(title):
                    with record.measuring(title):
                        before = ground.scalar("SELECT pg_current_wal_insert_lsn()")
                        seconds[title].append(staged[title].application.call("bulk", scale.bulk_rows))
                        written = ground.scalar("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)", before)
                        wal[title].append(float(written) / scale.bulk_rows)
                        _clear(staged[title])
        for title in staged:
            record.add(MEASURE, title, "ms", [1000 * one for one in seconds[title]], f"{scale.bulk_rows:,} rows")
            record.add(WAL, title, "bytes/row", wal[title])
    return record.outcome


def _clear(staged: Staged) -> None:
    """Make the next round like this one."""
    staged.stage.truncate(
        "item", "pgpubsub_notification", "procrastinate_jobs", "procrastinate_events", "pgqueuer", "celery_outbox"
    )
    staged.stage.broker.flushall()
