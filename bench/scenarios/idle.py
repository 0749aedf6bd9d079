"""(f) Nothing to do: CPU, transactions and broker commands that a system costs all the same, in a minute.

All systems are idle at once, each with a database and a broker of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Collection

from bench.ground import Ground
from bench.results import Outcome
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.systems import NAMES, Staged, ours, system

CPU, TRANSACTIONS, COMMANDS = "CPU", "transactions", "broker commands"
SETTLING_SECONDS = 12.0
"""Postgres counts what a connection did when that has been idle for ten seconds, at the latest."""


@dataclasses.dataclass(frozen=True)
class _Counted:
    cpu: float
    transactions: int
    commands: int


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure everybody."""
    record = Recorder("idle")
    contestants = [(OURS, ours.variant("rows"))]
    contestants += [(system(name).name, system(name)) for name in NAMES[1:] if name in peers]
    with contextlib.ExitStack() as stack:
        staged: dict[str, Staged] = {}
        for title, contestant in contestants:
            with record.measuring(title):
                staged[title] = stack.enter_context(contestant.staged(ground, own_broker=True))
                # Only what has to run is measured, not who writes.
                staged[title].stage.stop(staged[title].application)
        time.sleep(min(SETTLING_SECONDS, 2 * scale.idle_seconds))
        counted = {title: [_count(ground, one)] for title, one in staged.items()}
        for _ in range(scale.repeats):
            time.sleep(scale.idle_seconds)
            for title, one in staged.items():
                counted[title].append(_count(ground, one))
        for title, one in staged.items():
            for consumer in one.consumers:
                with record.measuring(title):
                    consumer.require_alive()
            _record(record, title, counted[title], 60 / scale.idle_seconds)
    return record.outcome


def _record(record: Recorder, title: str, counted: list[_Counted], minute: float) -> None:
    pairs = list(itertools.pairwise(counted))
    record.add(CPU, title, "ms/min", [1000 * minute * (after.cpu - before.cpu) for before, after in pairs])
    record.add(
        TRANSACTIONS, title, "per min", [minute * (after.transactions - before.transactions) for before, after in pairs]
    )
    record.add(COMMANDS, title, "per min", [minute * (after.commands - before.commands) for before, after in pairs])


def _count(ground: Ground, staged: Staged) -> _Counted:
    name = staged.stage.url.rpartition("/")[2]
    # Our own questions are the only command that the broker counts too much.
    commands = staged.stage.broker.info("stats")["total_commands_processed"] - staged.asked
    staged.asked += 1
    return _Counted(
        cpu=sum(consumer.cpu_seconds() for consumer in staged.consumers),
        transactions=ground.scalar("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s", name),
        commands=commands,
    )
