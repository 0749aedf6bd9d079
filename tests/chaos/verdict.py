"""What became of it all: effects counted in the database, against the promises, and against the faults.

Owns what counts as a violation, and the report. Reads only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import statistics
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import psycopg2

from pgpubsub_celery.messages import notification_task_id
from tests.chaos.faults import POSTGRES, WORKER, Fault

if TYPE_CHECKING:
    from tests.chaos.harness import Chaos

LOCKED = ("single", "bundled", "retrying", "leading", "author")
OWNED = ("owned", "owned5")
SHOWN = 10
ACKNOWLEDGING = 1.0
"""Seconds that a finished run has for its acknowledgement, on a machine that is busy with faults."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of `run`."""

    kind: str
    number: int
    notification: int
    pid: int
    begun_at: float
    finished_at: float | None


class Verdict:
    """Everything that was counted, and what of it must not be."""

    def __init__(self, chaos: Chaos, endings: Sequence[str]) -> None:
        self._chaos = chaos
        self.violations: list[str] = list(endings)
        self.facts: dict[str, Any] = {}
        with contextlib.closing(psycopg2.connect(chaos.direct_url)) as connection:
            self._judge(connection)

    def _judge(self, connection: psycopg2.extensions.connection) -> None:
        self._installation = uuid.UUID(rows(connection, "SELECT id::text FROM pgpubsub_installation")[0][0])
        emitted: dict[str, set[int]] = collections.defaultdict(set)
        for kind, number in rows(connection, "SELECT kind, number FROM emitted"):
            emitted[kind].add(number)
        self._judge_locked(connection, emitted)
        runs = [
            Run(*row)
            for row in rows(
                connection,
                "SELECT kind, number, notification, pid, begun_at, finished_at FROM run ORDER BY begun_at",
            )
        ]
        self._judge_owned(runs, emitted)
        self._judge_plain(connection, runs, emitted["plain"])
        self._measure(connection)
        left = rows(
            connection,
            "SELECT id, channel, state, available_at, now(), dispatches, starts, retries, owner, error "
            "FROM pgpubsub_notification ORDER BY id",
        )
        failed = [row for row in left if row[2] == "failed"]
        self.violates("failed", failed)
        self.violates("still stored", [row for row in left if row[2] != "failed"])
        self.violates("bridge processes that outlived their supervisor", self._chaos.monitor.bridges_left_behind)
        self.facts |= {
            "emitted and committed": sum(map(len, emitted.values())),
            "notifications": sum(map(len, emitted.values())) + len(emitted["leading"]),
            "rolled back": sum(writer.rolled_back for writer in self._chaos.writers),
            "unknown to their writer": sum(writer.unknown for writer in self._chaos.writers),
            "failed": len(failed),
            "pool children that outlived their worker": len(self._chaos.monitor.reaped),
            "ended with an error of their own": [e for unit in self._chaos.units for e in unit.endings],
            "did not end when asked": [e for unit in self._chaos.units for e in unit.insisted],
        }

    def _judge_locked(self, connection: psycopg2.extensions.connection, emitted: dict[str, set[int]]) -> None:
        effects: collections.Counter[tuple[str, int]] = collections.Counter()
        notifications = collections.defaultdict(list)
        for kind, number, notification in rows(connection, "SELECT kind, number, notification FROM effect"):
            effects[kind, number] += 1
            notifications[kind, number].append(notification)
        expected = {(kind, number) for kind in LOCKED for number in emitted[kind]}
        expected |= {("following", number) for number in emitted["leading"]}
        self.violates("without effect", sorted(expected - effects.keys()))
        twice = [(*key, notifications[key]) for key, count in sorted(effects.items()) if count > 1]
        self.violates("applied twice", twice, (id for *_, ids in twice for id in ids))
        self.violates("never committed, and yet with an effect", sorted(effects.keys() - expected))

    def _judge_owned(self, runs: Sequence[Run], emitted: dict[str, set[int]]) -> None:
        expected = {(kind, number) for kind in OWNED for number in emitted[kind]}
        of: dict[tuple[str, int], list[Run]] = collections.defaultdict(list)
        for run in runs:
            if run.kind in OWNED:
                of[run.kind, run.number].append(run)
        finished = {key for key, those in of.items() if any(run.finished_at is not None for run in those)}
        self.violates("without effect", sorted(expected - finished))
        self.violates("never committed, and yet with a run", sorted(of.keys() - expected))
        unexplained, overlapping, again = [], [], 0
        for those in of.values():
            for one, next_ in itertools.pairwise(those):
                again += 1
                if not self._explained(one, next_):
                    unexplained.append((one, next_))
                if next_.begun_at < (one.finished_at or 0) and not self._explained(one, next_, overlap=True):
                    overlapping.append((one, next_))
        ids = [one.notification for one, _ in unexplained]
        self.violates("run twice without a fault that explains it", unexplained, ids)
        self.violates("run twice at the same time without a fault that explains it", overlapping, ids)
        self.facts["runs of listeners without session"] = sum(map(len, of.values()))
        self.facts["of these second ones, each explained by a fault"] = again - len(unexplained)

    def _explained(self, one: Run, next_: Run, *, overlap: bool = False) -> bool:
        """Whether the first run's worker was killed or stopped, or Postgres was out of its reach, while it mattered.

        That is from its beginning until it was acknowledged, which it is at once when it has finished: what happened
        later, before the second run, explains nothing. Both at the same time is explained by less: who was killed does
        not go on.
        """
        acknowledged = next_.begun_at if one.finished_at is None else one.finished_at + ACKNOWLEDGING
        return any(
            fault.spoils(one.begun_at, min(next_.begun_at, acknowledged))
            for fault in self._chaos.killer.faults
            if fault.side == POSTGRES
            or (fault.side == WORKER and one.pid in fault.pids and ("stopped" in fault.what or not overlap))
        )

    def _judge_plain(self, connection: psycopg2.extensions.connection, runs: Sequence[Run], emitted: set[int]) -> None:
        ran = {run.number for run in runs if run.kind == "plain" and run.finished_at is not None}
        missing = plain_missing(connection, self._chaos)
        self.violates("plain tasks that the broker cannot have forgotten, without a run", missing)
        self.violates("plain tasks never committed, and yet with a run", sorted(ran - emitted))
        self.facts["plain tasks that a broker forgot"] = len(emitted - ran) - len(missing)

    def _measure(self, connection: psycopg2.extensions.connection) -> None:
        took = rows(
            connection,
            "SELECT min(done.at) - e.at, e.kind, e.number, min(done.notification), e.at FROM emitted e JOIN "
            "(SELECT kind, number, at, notification FROM effect UNION ALL "
            "SELECT kind, number, finished_at, notification FROM run WHERE finished_at IS NOT NULL) done "
            "USING (kind, number) WHERE e.kind <> 'plain' GROUP BY e.at, e.kind, e.number ORDER BY 1",
        )
        seconds = [row[0] for row in took]
        self.facts["seconds until the effect: median, 99 %, all"] = ", ".join(
            f"{seconds[min(len(seconds) - 1, int(share * len(seconds)))]:.1f}" for share in (0.5, 0.99, 1.0)
        )
        with (self._chaos.folder / "slowest.txt").open("w") as file:
            for row in took[: -SHOWN - 1 : -1]:
                file.write("\n".join([f"{row}", *self._history(row[3]), ""]))

    def violates(self, what: str, found: Sequence[Any], notifications: Iterable[int] = ()) -> None:
        """Note what must not be there."""
        if not found:
            return
        lines = [f"{len(found)} {what}:", *(f"  {one}" for one in found[:SHOWN])]
        for id in list(notifications)[:3]:
            lines += [f"  history of notification {id}:", *self._history(id)]
        self.violations.append("\n".join(lines))

    def _history(self, notification: int) -> list[str]:
        """Return all lines of the logs about a notification."""
        task_id = notification_task_id(self._installation, notification)
        found = []
        for path in sorted(self._chaos.folder.glob("*.log")):
            found += [
                f"    {path.name}: {line}"
                for line in path.read_text(errors="replace").splitlines()
                if task_id in line or f"otification {notification} " in line
            ]
        return found[:40]

    def report(self) -> str:
        """Return what is worth knowing, whether it went well or not."""
        chaos = self._chaos
        faults = chaos.killer.faults
        by_what: dict[str, list[Fault]] = collections.defaultdict(list)
        for fault in faults:
            by_what[fault.what].append(fault)
        seconds = (chaos.monitor.idle_since or chaos.ended) - chaos.began
        lines = [
            f"seed {chaos.plan.seed}: {len(faults)} faults in {chaos.ended - chaos.began:.0f} s",
            f"idle {(chaos.monitor.idle_since or float('nan')) - chaos.ended:.1f} s after the last fault",
            *(f"{name}: {value}" for name, value in self.facts.items()),
            f"throughput: {self.facts.get('notifications', 0) / seconds:.0f}/s over all, faults included",
            f"{'fault':56} {'count':>5} {'caught up, median':>18} {'max':>6}",
        ]
        for what, those in sorted(by_what.items()):
            known = [fault.caught_up for fault in those if fault.caught_up is not None]
            if known:
                lines.append(f"{what:56} {len(those):5} {statistics.median(known):16.1f} s {max(known):4.1f} s")
            else:
                lines.append(f"{what:56} {len(those):5} {'-':>18} {'-':>6}")
        return "\n".join(lines)


def plain_missing(connection: psycopg2.extensions.connection, chaos: Chaos) -> list[int]:
    """Return the enqueued tasks that never ran, although no broker can have forgotten them.

    Once a broker has confirmed a task, it is the broker's: what it was given before it lost its data may be gone.
    """
    published: dict[int, float] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (chaos.folder / "published").read_text().splitlines():
            number, at = line.split()
            published[int(number)] = max(float(at), published.get(int(number), 0.0))
    missing = rows(
        connection,
        "SELECT number FROM emitted e WHERE kind = 'plain' AND NOT EXISTS "
        "(SELECT 1 FROM run WHERE run.kind = 'plain' AND run.number = e.number AND finished_at IS NOT NULL)",
    )
    forgotten = max(chaos.wipes, default=0.0)
    return [number for (number,) in missing if published.get(number, math.inf) > forgotten]


def rows(connection: psycopg2.extensions.connection, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Return a statement's rows."""
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall()
