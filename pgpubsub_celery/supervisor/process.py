"""Inside a process that runs the entry: how it hears that it should stop, and how it tells what became of it.

Owns `Control` (what an entry gets), the watch that turns signals, orders and the supervisor's death into one stop, and
the life of a child from its first to its last line. Never starts a process.

A child and its supervisor are joined by a *line*, a pair of sockets. The child reports on it (ready, failed,
finished, and, where somebody watches, that its loop turns and whatever else its entry tells). The supervisor says one
thing only, STOP, and hangs up; a line that ends without STOP means that the supervisor is gone. Both mean: finish and
end.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from pgpubsub_celery.supervisor.health import STARTING_SECONDS, State, Watcher
from pgpubsub_celery.supervisor.plan import EXIT_DRAIN_TIMEOUT, EXIT_FAILED, EXIT_SIGNAL_BASE, Plan
from pgpubsub_celery.supervisor.serving import wait
from pgpubsub_celery.supervisor.signals import (
    STOP_SIGNALS,
    Signals,
    ask_for_sigterm_when_parent_dies,
    let_through,
)

logger = logging.getLogger("pgpubsub_celery.supervisor")

# What travels on a line: all but the last upwards.
READY = b"ready"
FAILED = b"failed"
FINISHED = b"finished"
BEAT = b"beat "
"""Then the seconds until the next one, at the latest, and 1 or 0 for ready or not."""
TOLD = b"told "
"""Then what the entry tells."""
STOP = b"stop"

BEAT_SECONDS = 1.0
"""Beats that say nothing new are sent no more often than this."""

# A supervisor kills after drain_timeout. A child waits this much longer before it ends itself, which it has to do only
# when there is no supervisor any more.
_ORPHAN_GRACE = 2.0


class StopEvent(threading.Event):
    """A `threading.Event` that can also be waited for with select(): `fileno()` is readable once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._reader, self._writer = Pipe(duplex=False)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a stop is requested. Only wait for it; never read it."""
        return self._reader.fileno()

    def set(self) -> None:
        """Request the stop; harmless when repeated."""
        if not self.is_set():
            super().set()
            self._writer.send_bytes(STOP)


class Control:
    """What an entry is given: when to stop, and whom to tell that it is ready."""

    stopping: StopEvent
    """Set when the entry should finish what it has begun and return. Set by the watch only."""
    replacement: bool
    """A process of this run has been ready before: this one replaces or follows it, and must not begin anew."""
    index: int
    """Which of the processes this is, from 0; a replacement has the index of the process it replaces."""
    drain_timeout: float
    """Seconds that the entry has to finish in, once `stopping` is set, before it is killed."""
    watched: bool
    """Somebody wants to know whether this process is alive, and what it tells: `beat` and `tell` do something."""

    def __init__(
        self,
        *,
        index: int = 0,
        replacement: bool = False,
        drain_timeout: float = 30.0,
        report: Callable[[bytes], None] | None = None,
        offer: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.stopping = StopEvent()
        self.replacement = replacement
        self.index = index
        self.drain_timeout = drain_timeout
        self.is_ready = False
        self.watched = offer is not None
        self._report = report
        self._offer = offer
        self._beat_at = float("-inf")
        self._within = 0.0
        self._serves: bool | None = None

    def ready(self) -> None:
        """Tell that the entry does its work from now on; what was waiting for that may end. Repeating is harmless."""
        if not self.is_ready:
            self.is_ready = True
            if self._report is not None:
                self._report(READY)

    def beat(self, within: float, *, ready: bool) -> None:
        """Tell that the loop turns, does so again within so many seconds, and whether it does its work meanwhile.

        Cheap, and never waits. Whoever misses the next beat takes this process for one that hangs.
        """
        now = time.monotonic()
        news = (ready, within) != (self._serves, self._within) or now - self._beat_at >= BEAT_SECONDS
        if self._offer is not None and news and self._offer(BEAT + f"{within:.3f} {ready:d}".encode()):
            self._beat_at, self._within, self._serves = now, within, ready

    def tell(self, message: bytes) -> bool:
        """Hand a message to whoever watches all processes; False when that cannot be done now without waiting."""
        return self._offer is not None and self._offer(TOLD + message)


class Pulse:
    """What a process's beats say of it. Written by whoever hears them."""

    def __init__(self, process: int, pid: int | None) -> None:
        self.process = process
        self.pid = pid
        self._alive_until = time.monotonic() + STARTING_SECONDS
        self._ready = False

    def heard(self, beat: bytes) -> None:
        """Note a beat."""
        within, ready = beat[len(BEAT) :].split()
        self._alive_until = time.monotonic() + float(within)
        self._ready = ready == b"1"

    @property
    def state(self) -> State:
        """The process, as a probe sees it."""
        return State(self.process, self.pid, time.monotonic() < self._alive_until, self._ready)


@dataclass(frozen=True)
class Job:
    """What every process is to run."""

    entry: Callable[[Control, Any], None]
    argument: Any
    initialise: Callable[[Any], None] | None


class Outcome(enum.Enum):
    """How an entry ended."""

    STOPPED = "returned after a stop request"
    FINISHED = "returned unasked"
    FAILED = "raised"


def run_alone(job: Job, plan: Plan, signals: Signals, watcher: Watcher) -> tuple[Outcome, Control]:
    """Run the entry in this process; return how it ended and the control that it had.

    A second signal, or running over `drain_timeout`, ends the process here and now.
    """

    def report(message: bytes) -> None:
        logger.info("ready pid %d (process 0)", os.getpid())

    pulse = Pulse(0, os.getpid())

    def hear(message: bytes) -> bool:
        if message.startswith(BEAT):
            pulse.heard(message)
        else:
            watcher.told(0, message[len(TOLD) :])
        return True

    control = Control(drain_timeout=plan.drain_timeout, report=report, offer=hear if watcher.active else None)
    watcher.states = lambda: [pulse.state]
    logger.info("started pid %d (process 0)", os.getpid())
    watch = _Watch(control, signals, line=None, limit=plan.drain_timeout, watcher=watcher)
    watch.start()
    try:
        outcome = _perform(job.entry, job.argument, control)
    finally:
        # Before this returns: whoever forks next must not do so beside a thread.
        watch.close()
    return outcome, control


def child_main(
    job: Job,
    line: Connection,
    index: int,
    replacement: bool,
    drain_timeout: float,
    watched: bool,
    inherited: list[Any],
) -> None:
    """Be a child: run the entry, report on `line`, and after a failure stay until the supervisor hangs up.

    `inherited` are the supervisor's ends of all lines and its sockets, which a forked child has copies of. It has to
    close them: a copy in any process would keep a line, or a port, open after the supervisor's death.
    """
    for connection in inherited:
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A terminal sends Ctrl-C to every process of the foreground group. It is the supervisor's to act on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    speaking = threading.Lock()

    def report(message: bytes) -> None:
        # The supervisor may have hung up meanwhile, or be gone; the watch sees that too.
        with speaking, contextlib.suppress(OSError):
            line.send_bytes(message)

    def offer(message: bytes) -> bool:
        # Not to a supervisor that does not listen: an entry that waited for it would hang with it.
        with speaking, contextlib.suppress(OSError, ValueError):
            if line in wait((), (line,), 0):
                line.send_bytes(message)
                return True
        return False

    control = Control(
        index=index,
        replacement=replacement,
        drain_timeout=drain_timeout,
        report=report,
        offer=offer if watched else None,
    )
    # Neither signals nor watch are ever closed: they have to see this process to its end.
    signals = Signals(signal.SIGTERM).__enter__()
    _Watch(control, signals, line, limit=drain_timeout + _ORPHAN_GRACE).start()
    ask_for_sigterm_when_parent_dies()
    let_through()

    outcome = _perform(job.entry, job.argument, control, job.initialise)
    if outcome is Outcome.FINISHED:
        report(FINISHED)
    elif outcome is Outcome.FAILED:
        report(FAILED)
        control.stopping.wait()
        sys.exit(EXIT_FAILED)


def _perform(
    entry: Callable[[Control, Any], None],
    argument: Any,
    control: Control,
    initialise: Callable[[Any], None] | None = None,
) -> Outcome:
    """Run the entry and return how it ended. A failure is logged here, with its traceback, and nowhere else."""
    try:
        if initialise is not None:
            initialise(argument)
        if not control.stopping.is_set():
            entry(control, argument)
    except BaseException:
        # Also SystemExit and the like: whatever ends a listener unasked is a failure of it.
        logger.exception("failed pid %d (process %d)", os.getpid(), control.index)
        return Outcome.FAILED
    return Outcome.STOPPED if control.stopping.is_set() else Outcome.FINISHED


class _Watch:
    """Sets `control.stopping` on a signal, on STOP, and when the line ends; then sees that the process ends in time.

    A thread, because the main thread belongs to the entry, which may be inside a call that takes long. Without a line
    this process is its own master: there a second signal ends it at once.
    """

    def __init__(
        self,
        control: Control,
        signals: Signals,
        line: Connection | None,
        limit: float,
        watcher: Watcher | None = None,
    ) -> None:
        self._watcher = Watcher(None) if watcher is None else watcher
        self._control = control
        self._signals = signals
        self._line = line
        self._limit = limit
        self._deadline: float | None = None
        self._closing, self._close = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name="pgpubsub-stop", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait until it has ended."""
        self._close.send_bytes(STOP)
        self._thread.join()

    def _run(self) -> None:
        alone = self._line is None
        while True:
            readable = wait(self._sources(), self._watcher.writers(), self._remaining())
            if self._closing in readable:
                return
            self._watcher.act(readable)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                logger.error("killed pid %d: not finished %g s after the stop request", os.getpid(), self._limit)
                os._exit(EXIT_DRAIN_TIMEOUT)
            for signum in self._signals.take():
                if signum in STOP_SIGNALS:
                    if alone and self._deadline is not None:
                        os._exit(EXIT_SIGNAL_BASE + signum)
                    self._stop(signal.Signals(signum).name)
            if self._line in readable:
                self._stop(self._hear())

    def _sources(self) -> list[Any]:
        own = [source for source in (self._closing, self._signals, self._line) if source is not None]
        return own + self._watcher.readers()

    def _remaining(self) -> float | None:
        due = self._watcher.due() if self._deadline is None else min(self._deadline, self._watcher.due())
        return None if due == float("inf") else max(0.0, due - time.monotonic())

    def _hear(self) -> str | None:
        """Return why the line fell silent: None when the supervisor asked for a stop, which it logs itself."""
        assert self._line is not None
        line, self._line = self._line, None  # STOP is the last there is; what ended stays readable for ever
        try:
            line.recv_bytes()
        except (EOFError, OSError):
            return "the supervisor is gone"
        return None

    def _stop(self, reason: str | None) -> None:
        if self._deadline is None:
            if reason is not None:
                logger.info("stopping pid %d: %s", os.getpid(), reason)
            self._deadline = time.monotonic() + self._limit
            self._control.stopping.set()
