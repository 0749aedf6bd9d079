"""Everything that runs in a chaos test: servers behind proxies, bridges, workers, writers, the killer, and who watches.

Owns their lives: what is killed for good is started again, and at the end nothing is left. What the outcome means is
`verdict`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kombu
import psutil
import psycopg2
from sqlalchemy import create_engine

from pgpubsub_celery import install
from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.supervisor import EXIT_DRAIN_TIMEOUT, EXIT_FAILED
from tests.chaos import app
from tests.chaos.faults import WORKER, Killer
from tests.chaos.proxy import FaultProxy
from tests.chaos.verdict import plain_missing
from tests.chaos.writers import Writer
from tests.fixtures.processes import BIN, Running

APP = "tests.chaos.app"
ORPHAN_SECONDS = 20.0
"""How long a process may live on after its parent was killed."""
STUCK_SECONDS = 60.0
"""Without any progress."""
GRACE_SECONDS = 12.0
"""Between SIGTERM and SIGKILL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of it."""

    notifications: int
    faults: int
    seed: int
    pause: float = 1.0
    """Seconds from one fault to the next, up to twice as long."""
    apart: bool = False
    """One fault at a time, all caught up with before the next."""
    writers: int = 3


class Unit:
    """A process tree that is started again whenever it has ended."""

    def __init__(self, chaos: Chaos, name: str, role: str, command: list[str]) -> None:
        self._chaos = chaos
        self.name = name
        self.role = role
        self._command = command
        self._lock = threading.Lock()
        self._asked_at: float | None = None
        self._started_at = 0.0
        self.running: Running | None = None
        self.endings: list[str] = []
        """With an error, of their own."""
        self.insisted: list[str] = []

    @property
    def log_path(self) -> Path:
        """Of all its lives."""
        return self._chaos.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """Of its first process."""
        assert self.running is not None
        return self.running.pid

    def children(self) -> list[int]:
        """Return those that do the work."""
        running = self.running
        return [] if running is None else sorted(child.pid for child in running.children())

    def start(self) -> None:
        """Start it."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        self._asked_at = None
        self._started_at = time.monotonic()
        self.running = Running(
            self._command, self.log_path, {**self._chaos.environment, "CHAOS_ROLE": self.role, "CHAOS_UNIT": self.name}
        )

    def look(self) -> None:
        """Start it again if it has ended."""
        with self._lock:
            if self.running is None:
                return
            code = self.running.process.poll()
            if code is None:
                if self._asked_at is not None and time.monotonic() - self._asked_at > GRACE_SECONDS:
                    self._insist()
                return
            # Asked to end while it starts, it just ends; it may have been asked and been killed, too; and what cannot
            # finish its batch in time says so.
            excused = code == EXIT_FAILED and self._lost_a_child_while_stopping()
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM, EXIT_DRAIN_TIMEOUT) and not excused:
                self.endings.append(f"{self.name} ended with {code} after {time.monotonic() - self._started_at:.1f} s")
            self._chaos.say(f"{self.name} ended with {code}: starting it again")
            self._start()

    def _lost_a_child_while_stopping(self) -> bool:
        """Whether it was asked to end, and one of its own was killed before it could: that is to show in its code."""
        assert self.running is not None
        _, asked, since = self.running.log().rpartition("stopping: SIGTERM")
        return bool(asked) and re.search(r"ended pid \d+ \(process \d+\): SIGKILL", since) is not None

    def _insist(self) -> None:
        """As whoever asks processes to end does in the end."""
        assert self.running is not None
        self.insisted.append(f"{self.name} did not end within {GRACE_SECONDS:g} s of SIGTERM")
        self._chaos.say(self.insisted[-1])
        self._chaos.killer.note(
            f"{self.role}: SIGKILL after SIGTERM", self.role, pids={self.running.pid, *self.children()}
        )
        for pid in (self.running.pid, *self.children()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)  # shows where it is
        time.sleep(0.2)
        self.running.process.kill()

    def ask_to_end(self) -> None:
        """SIGTERM."""
        with self._lock:
            assert self.running is not None
            self._asked_at = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self.running.process.terminate()

    def end(self) -> int | None:
        """SIGTERM, and wait; None when that was not enough."""
        self.ask_to_end()
        with self._lock:
            assert self.running is not None
            try:
                return self.running.process.wait(GRACE_SECONDS)
            except Exception:  # noqa: BLE001 - subprocess.TimeoutExpired; then by force
                self.running.destroy()
                return None
            finally:
                self.running = None


class Monitor(threading.Thread):
    """Watches rows and processes: what is stored, who has ended, who was left behind."""

    def __init__(self, chaos: Chaos) -> None:
        super().__init__(name="monitor", daemon=True)
        self._chaos = chaos
        self._stopping = threading.Event()
        self.stored: frozenset[int] = frozenset()
        """The ids, when last looked. Written by this thread."""
        self.idle_since: float | None = None
        self.states: dict[str, int] = {}
        self.reaped: list[str] = []
        self.bridges_left_behind: list[str] = []
        self._orphans: dict[int, float] = {}
        self._families: dict[int, frozenset[int]] = {}

    def run(self) -> None:
        connection = None
        looked_at_orphans = 0.0
        while not self._stopping.wait(0.2):
            for unit in self._chaos.units:
                unit.look()
                running = unit.running
                if running is not None:
                    self._families[running.pid] = self._families.get(running.pid, frozenset()) | set(unit.children())
            if time.monotonic() - looked_at_orphans > 2:
                looked_at_orphans = time.monotonic()
                self._look_at_orphans()
            try:
                if connection is None:
                    connection = psycopg2.connect(
                        self._chaos.direct_url, application_name="chaos-monitor", connect_timeout=5
                    )
                    connection.autocommit = True
                self._look_at_rows(connection)
            except psycopg2.Error:
                if connection is not None:
                    connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        self.join()

    def children_of(self, pid: int) -> frozenset[int]:
        """Return all children that a process had, when it was looked at."""
        return self._families.get(pid, frozenset())

    def _look_at_rows(self, connection: psycopg2.extensions.connection) -> None:
        now = time.time()
        with connection.cursor() as cursor:
            cursor.execute("SELECT id, state FROM pgpubsub_notification")
            rows = cursor.fetchall()
        stored = frozenset(id for id, _ in rows)
        states: dict[str, int] = {}
        for _, state in rows:
            states[state] = states.get(state, 0) + 1
        self.states = states
        self.stored = stored
        if stored:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        for fault in self._chaos.killer.faults:
            if fault.caught_up is None and not fault.backlog & stored:
                fault.caught_up = now - fault.at
                fault.backlog = frozenset()

    def _look_at_orphans(self) -> None:
        kept = {unit.running.pid for unit in self._chaos.units if unit.running is not None}
        alive = {}
        for process in self._chaos.processes():
            with contextlib.suppress(psutil.Error):
                above = {process.pid, *(parent.pid for parent in process.parents())}
                if not above & kept:
                    alive[process.pid] = process
        now = time.monotonic()
        self._orphans = {pid: self._orphans.get(pid, now) for pid in alive}
        for pid, since in self._orphans.items():
            if now - since < ORPHAN_SECONDS:
                continue
            with contextlib.suppress(psutil.Error):
                role, what = alive[pid].environ()["CHAOS_ROLE"], f"{pid} {' '.join(alive[pid].cmdline())}"
                if alive[pid].status() == psutil.STATUS_STOPPED:
                    continue
                (self.bridges_left_behind if role == "bridge" else self.reaped).append(what)
                self._chaos.killer.note("left behind", WORKER if role == "worker" else role, pids={pid})
                alive[pid].kill()


class Chaos:
    """A chaos test's world. A context manager; its body runs with everything started."""

    lease = app.LEASE

    def __init__(self, plan: Plan, folder: Path, *, bin_dir: str | None = None) -> None:
        self.plan = plan
        self.folder = folder
        (folder / "orders").mkdir()
        self.random = random.Random(plan.seed)
        self.postgres = EmbeddedPostgres(
            bin_dir=bin_dir,
            fsync=False,  # what is killed are processes, not the machine
            options={"synchronous_commit": "on", "max_connections": "100", "log_lock_waits": "on"},
        )
        self.valkey = EmbeddedValkey()
        self.wipes: list[float] = []
        self.began = 0.0
        self.ended = 0.0
        self._log = threading.Lock()

    def __enter__(self) -> Chaos:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.postgres)
            stack.enter_context(self.valkey)
            self.direct_url = self.postgres.create_database("chaos")
            self.to_postgres = FaultProxy(self.postgres.port)
            stack.callback(self.to_postgres.close)
            self.to_broker = FaultProxy(self.valkey.port)
            stack.callback(self.to_broker.close)
            self.url = f"postgresql://postgres@127.0.0.1:{self.to_postgres.port}/chaos"
            self._install()
            self.environment = self._environment()
            self.bridge = Unit(self, "bridge", "bridge", self._bridge("--processes", "2"))
            self.lone = Unit(self, "lone-bridge", "bridge", self._bridge("--worker"))
            self.workers = [Unit(self, f"worker-{n}", "worker", self._worker(n)) for n in (1, 2)]
            self.units = [self.bridge, self.lone, *self.workers]
            stack.callback(self._destroy)
            for unit in self.units:
                unit.start()
            for unit, sign in ((self.bridge, "listening to"), (self.lone, "listening to")):
                assert unit.running is not None
                unit.running.wait_for(sign)
            for unit in self.workers:
                assert unit.running is not None
                unit.running.wait_for(r"ready\.")
            self.monitor = Monitor(self)
            self.killer = Killer(self, self.random, self.plan.faults, self.plan.pause, apart=self.plan.apart)
            self.writers = [
                Writer(self.url, self.random.randrange(2**32), self._may_emit) for _ in range(self.plan.writers)
            ]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def say(self, what: str) -> None:
        """Write to the log of the test."""
        with self._log, (self.folder / "chaos.log").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {time.time():.3f} {what}\n")

    def run(self) -> None:
        """Write and kill until there was enough of both; then wait until nothing is stored, and end everything."""
        self.began = time.time()
        self.monitor.start()
        try:
            with self._running():
                while not (self.killer.done and self._committed() >= self.plan.notifications):
                    time.sleep(0.1)
            self.killer.stop()
            self.say("no more faults")
            self.ended = time.time()
            self._wait_until_idle()
        finally:
            self.killer.stop()
            self.monitor.stop()
        assert self.killer.error is None, self.killer.error

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.killer.start()
        for writer in self.writers:
            writer.start()
        try:
            yield
        finally:
            for writer in self.writers:
                writer.stop()

    def end(self) -> list[str]:
        """Ask everything to end; return what did not, or not well."""
        # A pool that loses a child while it shuts down waits for ever: Celery's affair. A bridge always ends.
        wrong = [message for unit in self.units if unit.role == "bridge" for message in unit.endings + unit.insisted]
        for unit in self.units:
            code = unit.end()
            if code != 0 and not (code is None and unit.role == "worker"):
                wrong.append(f"{unit.name} ended with {code} at the end")
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.Error):
                wrong.append(f"left behind at the end: {process.pid} {' '.join(process.cmdline())}")
        return wrong

    def processes(self) -> list[psutil.Process]:
        """Return all of ours that are alive, whoever started them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.pid != os.getpid() and process.environ().get("CHAOS_FOLDER") == str(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def log_tails(self, lines: int = 40) -> str:
        """Return the last lines of every log."""
        paths = [*sorted(self.folder.glob("*.log")), self.postgres.log_path]
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) for path in paths
        )

    def _committed(self) -> int:
        return sum(writer.committed for writer in self.writers)

    def _may_emit(self) -> bool:
        """Writers and killer keep step, so that there is something at every fault."""
        share = self._committed() / self.plan.notifications
        return share < 0.05 + len(self.killer.faults) / self.plan.faults or self.killer.done

    def _wait_until_idle(self) -> None:
        """Return when nothing is stored and no task is on its way any more, or when nothing gets less for too long."""
        least, since = math.inf, time.monotonic()
        while time.monotonic() - since < STUCK_SECONDS:
            idle = self.monitor.idle_since
            left: float = len(self.monitor.stored)
            if idle is not None and idle > self.ended and time.time() - idle > 1:
                missing = self._plain_missing()
                if missing == 0:
                    return
                left = -1 / missing  # less than with any row, and less with fewer
            if left < least:
                least, since = left, time.monotonic()
            time.sleep(0.2)
        self.say(f"not idle in time: {self.monitor.states}")

    def _plain_missing(self) -> int:
        # Kombu's workers look every 100 s for what a dead one had reserved.
        with kombu.Connection(self.valkey.url, transport_options=app.TRANSPORT_OPTIONS) as broker:
            broker.default_channel.qos.restore_visible(num=1000)
        with contextlib.closing(psycopg2.connect(self.direct_url)) as connection:
            return len(plain_missing(connection, self))

    def _install(self) -> None:
        engine = create_engine(sync_url(self.direct_url))
        app.Base.metadata.create_all(engine)
        install(engine, channels=app.CHANNELS)
        engine.dispose()

    def _environment(self) -> dict[str, str]:
        return {
            "PGPUBSUB_DATABASE_URL": self.url,
            "CHAOS_BROKER_URL": f"redis://127.0.0.1:{self.to_broker.port}/0",
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_CHANCE": os.environ.get("CHAOS_CHANCE", "0.2"),
            "PGPUBSUB_LEASE": f"{app.LEASE:g}",
            "PGPUBSUB_LEASE_MAX": f"{2 * app.LEASE:g}",
            "PGPUBSUB_HEARTBEAT_INTERVAL": "1",
            "PGPUBSUB_POLL_INTERVAL": "3",
            "PGPUBSUB_MAX_STARTS": "50",
            "PGPUBSUB_PUBLISH_TIMEOUT": "2",
            "PGPUBSUB_DRAIN_TIMEOUT": "5",
        }

    @staticmethod
    def _bridge(*options: str) -> list[str]:
        # Without --recover a bridge that is first alive would hold what was stored while there was none.
        return [str(BIN / "pgpubsub-bridge"), "-A", APP, "listen", "--recover=waiting", *options]

    @staticmethod
    def _worker(number: int) -> list[str]:
        command = [str(BIN / "celery"), "-A", APP, "worker", "--loglevel=info", "--pool=prefork", "--concurrency=2"]
        return [*command, "--without-gossip", "--without-mingle", f"--hostname=chaos{number}@localhost"]

    def _destroy(self) -> None:
        for unit in self.units:
            running, unit.running = unit.running, None
            if running is not None:
                running.destroy()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
