"""How much of everything: enough to believe for `make bench`, little enough to wait for in `make bench-check`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and durations of one run of the benchmark."""

    name: str
    repeats: int = 3
    """Of each measurement; the median counts."""
    bulk_rows: int = 10_000
    bulk_repeats: int = 9
    """Of what takes less than a second."""
    writer_seconds: float = 2.0
    writers: tuple[int, ...] = (1, 8)
    backlog: int = 40_000
    """For systems that drain thousands in a second."""
    insert_backlog: int = 20_000
    """The same, of tasks that insert a row."""
    small_backlog: int = 3_000
    """For those that drain hundreds."""
    rates: tuple[int, ...] = (20, 500)
    """Transactions in a second whose latency is measured."""
    latency_seconds: float = 5.0
    latency_limit: float = 30.0
    """Seconds that a system may need to catch up."""
    idle_seconds: float = 20.0
    waiting: tuple[int, ...] = (1_000, 100_000, 5_000_000)
    drained: tuple[int, ...] = (1_000, 100_000)
    """Which of these are also drained."""
    claims: int = 9
    memory: int = 1_000_000


FULL = Scale(name="full")

QUICK = Scale(
    name="quick",
    bulk_rows=10_000,
    bulk_repeats=5,
    writer_seconds=1.5,
    writers=(8,),
    backlog=15_000,
    insert_backlog=4_000,
    small_backlog=1_000,
    rates=(20,),
    latency_seconds=3.0,
    idle_seconds=5.0,
    waiting=(1_000, 300_000),
    drained=(),
    claims=5,
    memory=50_000,
)

TINY = Scale(
    name="tiny",
    repeats=1,
    bulk_rows=500,
    bulk_repeats=2,
    writer_seconds=0.5,
    writers=(1, 2),
    backlog=1_000,
    insert_backlog=500,
    small_backlog=200,
    rates=(20, 100),
    latency_seconds=1.0,
    idle_seconds=2.0,
    waiting=(1_000, 5_000),
    drained=(1_000,),
    claims=2,
    memory=5_000,
)
"""Says nothing but that the benchmark works."""

SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
