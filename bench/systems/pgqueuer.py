"""PgQueuer: its `run()`, with asyncpg and uvloop.

Not by its command: `pgq run` of 1.6.0 takes the name of its log level for the level, and ends at once.
"""

from __future__ import annotations

import dataclasses

from bench.ground import Stage
from bench.systems import System


def _unfinished(stage: Stage) -> bool:
    return stage.last("pgqueuer") is not None


def batched(size: int, processes: int = 1) -> System:
    """Return it with another batch size, or several processes."""
    command = ["bench.applications.pgqueuer_jobs", str(size)]
    return dataclasses.replace(SYSTEM, consumers=[command] * processes)


SYSTEM = System(
    name="pgqueuer",
    application="pgqueuer_jobs",
    consumers=[],
    unfinished=_unfinished,
    settings={
        "worker": "`PgQueuer.run()` with asyncpg and uvloop, asynchronous entrypoint, the better of the settings named",
        "durability": "`durable`, the default",
    },
)
SYSTEM = batched(500)
