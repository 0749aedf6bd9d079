"""What can go wrong, and who makes it go wrong: one fault after the other, dealt from a deck that has each of them.

Owns what a fault is, its record, and its undoing. Never looks at notifications; what became of them is `verdict`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import json
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import psutil
import psycopg2

from tests.chaos.steps import STEPS, order

if TYPE_CHECKING:
    from tests.chaos.harness import Chaos, Unit

T = TypeVar("T")

BRIDGE, WORKER, POSTGRES, BROKER = "bridge", "worker", "postgres", "broker"


@dataclasses.dataclass
class Fault:
    """Something that went wrong, and how long until what was stored at that time was done."""

    what: str
    side: str
    at: float
    until: float
    pids: frozenset[int] = frozenset()
    """Of processes that did not go on, or not for a while."""
    backlog: frozenset[int] = frozenset()
    caught_up: float | None = None

    def spoils(self, since: float, until: float) -> bool:
        """Whether it happened in that time, give or take what clocks and records are late by."""
        return self.at <= until + 0.5 and self.until >= since - 0.5


class Killer(threading.Thread):
    """Deals faults until there were enough."""

    def __init__(self, chaos: Chaos, random_: random.Random, wanted: int, pause: float, *, apart: bool = False) -> None:
        """`apart`: each fault waits until all is caught up with after the one before, so that each can be measured."""
        super().__init__(name="killer", daemon=True)
        self._chaos = chaos
        self._random = random_
        self._wanted = wanted
        self._pause = pause
        self._apart = apart
        self._enough = threading.Event()
        self._undo: list[tuple[float, int, str, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._busy: set[str] = set()
        self._deaths_read = 0
        self._decks = 0
        self.faults: list[Fault] = []
        """Written by this thread."""
        self.error: str | None = None

    @property
    def done(self) -> bool:
        """Whether there were enough."""
        return not self.is_alive()

    def run(self) -> None:
        try:
            self._deal()
        except Exception:  # noqa: BLE001 - whoever waits for this thread says it
            self.error = traceback.format_exc()
        finally:
            for path in (self._chaos.folder / "orders").iterdir():
                path.unlink(missing_ok=True)
            while self._undo:
                _, _, _, undo = heapq.heappop(self._undo)
                with contextlib.suppress(Exception):
                    undo()
            self._read_deaths()

    def stop(self) -> None:
        """End, with everything undone."""
        self._enough.set()
        self.join()

    def _deal(self) -> None:
        faults: list[Callable[[], None]] = []
        steps: list[tuple[str, str]] = []
        while self._decks < 2 or len(self.faults) < self._wanted:
            if not faults:
                self._decks += 1
                if self._decks == 2 and len(self.faults) >= self._wanted:
                    return
                faults = self._shuffled(self._all())
            if not steps:
                steps = self._shuffled([(role, step) for role, names in STEPS.items() for step in names])
            if not self._apart:
                order(self._chaos.folder, *steps.pop())
            faults.pop()()
            until = time.monotonic() + self._random.uniform(self._pause, 2 * self._pause)
            while (left := until - time.monotonic()) > 0 or (self._apart and not self._caught_up):
                if self._enough.wait(min(max(left, 0.0), 0.1) or 0.1):
                    return
                self._undo_due()
                self._read_deaths()

    @property
    def _caught_up(self) -> bool:
        """Whether every fault is over, and what was stored when it began is done."""
        return not self._undo and all(fault.caught_up is not None for fault in self.faults)

    def _shuffled(self, cards: Sequence[T]) -> list[T]:
        cards = list(cards)
        self._random.shuffle(cards)
        return cards

    def _undo_due(self, *, resource: str | None = None) -> None:
        """Undo what has lasted long enough, or what holds `resource`."""
        keep = []
        for entry in self._undo:
            at, _, held, undo = entry
            if at <= time.monotonic() or held == resource:
                undo()
                self._busy.discard(held)
            else:
                keep.append(entry)
        self._undo = keep
        heapq.heapify(keep)

    def _later(self, seconds: float, resource: str, undo: Callable[[], None]) -> None:
        self._busy.add(resource)
        heapq.heappush(self._undo, (time.monotonic() + seconds, next(self._numbers), resource, undo))

    def note(self, what: str, side: str, *, seconds: float = 0, pids: Iterable[int] = (), at: float = 0) -> None:
        """Record a fault."""
        at = at or time.time()
        fault = Fault(what, side, at, at + seconds, frozenset(pids), self._chaos.monitor.stored)
        self.faults.append(fault)
        self._chaos.say(f"fault {len(self.faults)}: {what} {sorted(fault.pids) or ''}")

    def _read_deaths(self) -> None:
        """Record what processes have done to themselves, on order."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self._chaos.folder / "deaths").read_text().splitlines()
            for line in lines[self._deaths_read :]:
                death = json.loads(line)
                role = death["step"].split()[0]
                side = BRIDGE if role == "bridge" else WORKER
                pids = {death["pid"]}
                if role == "worker":
                    pids |= self._chaos.monitor.children_of(death["pid"])
                self.note(f"at step: {death['step']}", side, pids=pids, at=death["at"])
            self._deaths_read = len(lines)

    def _all(self) -> list[Callable[[], None]]:
        return [
            self._kill_bridge_child,
            self._kill_supervisor,
            self._kill_lone_bridge,
            self._stop_bridge,
            self._ask_bridge_to_end,
            self._kill_worker,
            self._kill_worker_child,
            self._kill_worker_child,
            self._stop_worker_child,
            self._ask_worker_to_end,
            self._terminate_backend,
            self._kill_backend,
            self._kill_postgres,
            self._shut_down_postgres,
            self._cut_postgres,
            self._freeze_postgres,
            self._half_open_postgres,
            self._wipe_broker,
            self._pause_broker,
            self._cut_broker,
            self._freeze_broker,
        ]

    # Bridges

    def _kill_bridge_child(self) -> None:
        pids = self._chaos.bridge.children()
        if pids:
            self._kill("bridge child: SIGKILL", BRIDGE, self._random.choice(pids))

    def _kill_supervisor(self) -> None:
        self._kill("bridge supervisor: SIGKILL", BRIDGE, self._chaos.bridge.pid)

    def _kill_lone_bridge(self) -> None:
        self._kill("bridge --worker: SIGKILL", BRIDGE, self._chaos.lone.pid)

    def _stop_bridge(self) -> None:
        pids = [*self._chaos.bridge.children(), self._chaos.lone.pid]
        self._suspend("bridge: stopped longer than its lease", BRIDGE, self._random.choice(pids))

    def _ask_bridge_to_end(self) -> None:
        self._ask("bridge: SIGTERM", BRIDGE, self._random.choice([self._chaos.bridge, self._chaos.lone]))

    # Workers

    def _kill_worker(self) -> None:
        worker = self._random.choice(self._chaos.workers)
        self._kill("worker: SIGKILL", WORKER, worker.pid, also=worker.children())

    def _kill_worker_child(self) -> None:
        pids = [pid for worker in self._chaos.workers for pid in worker.children()]
        if pids:
            self._kill("worker child: SIGKILL", WORKER, self._random.choice(pids))

    def _stop_worker_child(self) -> None:
        pids = [pid for worker in self._chaos.workers for pid in worker.children()]
        if pids:
            self._suspend("worker child: stopped longer than its lease", WORKER, self._random.choice(pids))

    def _ask_worker_to_end(self) -> None:
        worker = self._random.choice(self._chaos.workers)
        self._ask("worker: SIGTERM", WORKER, worker)

    # Postgres

    def _terminate_backend(self) -> None:
        pid = self._backend()
        if pid is not None:
            connection = psycopg2.connect(self._chaos.direct_url)
            connection.autocommit = True
            with contextlib.closing(connection), connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
            self.note("backend: pg_terminate_backend", POSTGRES)

    def _kill_backend(self) -> None:
        self._thaw_first(POSTGRES)
        pid = self._backend()
        if pid is not None:
            self.note("backend: SIGKILL, all of Postgres recovers", POSTGRES, seconds=2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _backend(self) -> int | None:
        """Return one that is not the harness's own."""
        self._thaw_first(POSTGRES)
        try:
            connection = psycopg2.connect(self._chaos.direct_url, connect_timeout=5)
            with contextlib.closing(connection), connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                    "AND application_name <> 'chaos-monitor' AND pid <> pg_backend_pid() ORDER BY pid"
                )
                pids = [row[0] for row in cursor]
        except psycopg2.OperationalError:
            return None  # recovering
        return self._random.choice(pids) if pids else None

    def _kill_postgres(self) -> None:
        self._thaw_first(POSTGRES)
        self.note("Postgres: SIGKILL, started again", POSTGRES, seconds=3)
        self._chaos.postgres.kill()
        self._chaos.postgres.start()
        self.faults[-1].until = time.time()

    def _shut_down_postgres(self) -> None:
        self._thaw_first(POSTGRES)
        self.note("Postgres: immediate shutdown, started again", POSTGRES, seconds=3)
        self._chaos.postgres.restart(immediate=True)
        self.faults[-1].until = time.time()

    def _cut_postgres(self) -> None:
        self._thaw_first(POSTGRES)
        self.note("Postgres connections: cut", POSTGRES)
        self._chaos.to_postgres.cut()

    def _freeze_postgres(self) -> None:
        self._thaw_first(POSTGRES)
        seconds = self._random.uniform(1, 7)
        cut = self._random.random() < 0.5
        self.note(f"Postgres connections: frozen, then {'cut' if cut else 'thawed'}", POSTGRES, seconds=seconds)
        self._chaos.to_postgres.freeze()

        def undo() -> None:
            if cut:
                self._chaos.to_postgres.cut()
            self._chaos.to_postgres.thaw()

        self._later(seconds, POSTGRES, undo)

    def _half_open_postgres(self) -> None:
        self._thaw_first(POSTGRES)
        seconds = self._random.uniform(2, 6)
        self.note("Postgres connections: cut, unnoticed by the server", POSTGRES, seconds=seconds)
        self._chaos.to_postgres.cut_clients()
        self._later(seconds, "half-open", self._chaos.to_postgres.forget)

    # The broker

    def _wipe_broker(self) -> None:
        self._thaw_first(BROKER)
        self.note("broker: SIGKILL, its data gone", BROKER)
        self._chaos.valkey.kill()
        self._chaos.valkey.start()
        self.faults[-1].until = time.time()
        self._chaos.wipes.append(time.time())

    def _pause_broker(self) -> None:
        self._thaw_first(BROKER)
        seconds = self._random.uniform(1, 5)
        self.note("broker: paused", BROKER, seconds=seconds)
        self._chaos.valkey.pause()
        self._later(seconds, BROKER, self._chaos.valkey.resume)

    def _cut_broker(self) -> None:
        self._thaw_first(BROKER)
        self.note("broker connections: cut", BROKER)
        self._chaos.to_broker.cut()

    def _freeze_broker(self) -> None:
        self._thaw_first(BROKER)
        seconds = self._random.uniform(1, 5)
        cut = self._random.random() < 0.5
        self.note(f"broker connections: frozen, then {'cut' if cut else 'thawed'}", BROKER, seconds=seconds)
        self._chaos.to_broker.freeze()

        def undo() -> None:
            if cut:
                self._chaos.to_broker.cut()
            self._chaos.to_broker.thaw()

        self._later(seconds, BROKER, undo)

    # How

    def _thaw_first(self, resource: str) -> None:
        """A server that is frozen or paused goes on before it meets its next fault."""
        if resource in self._busy:
            self._undo_due(resource=resource)

    def _kill(self, what: str, side: str, pid: int, *, also: Iterable[int] = ()) -> None:
        self.note(what, side, pids={pid, *also})
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _suspend(self, what: str, side: str, pid: int) -> None:
        seconds = self._random.uniform(1.1, 2.0) * self._chaos.lease
        self.note(what, side, pids={pid}, seconds=seconds + 1)
        try:
            process = psutil.Process(pid)
            process.suspend()
        except psutil.NoSuchProcess:
            return

        def undo() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

        self._later(seconds, f"stopped {pid}", undo)

    def _ask(self, what: str, side: str, unit: Unit) -> None:
        self.note(what, side)
        unit.ask_to_end()
