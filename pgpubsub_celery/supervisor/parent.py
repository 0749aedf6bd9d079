"""The process above the children: starts them, replaces those that fail, stops them all, leaves none behind.

Owns one event loop that waits for signals, reports and deadlines, in one thread and without polling. Never runs the
entry, and never starts a thread: it forks.

A *slot* is one of the N places for a process. In it are at most two processes: the current one and a failing
one that waits for it to be ready, or one that was told to leave and has not ended yet.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from pgpubsub_celery.supervisor.health import State, Watcher
from pgpubsub_celery.supervisor.plan import (
    EXIT_DRAIN_TIMEOUT,
    EXIT_FAILED,
    EXIT_SIGNAL_BASE,
    EXIT_STOPPED,
    Plan,
)
from pgpubsub_celery.supervisor.process import BEAT, FAILED, FINISHED, READY, STOP, TOLD, Job, Pulse, child_main
from pgpubsub_celery.supervisor.serving import wait
from pgpubsub_celery.supervisor.signals import STOP_SIGNALS, Signals, held_back

logger = logging.getLogger("pgpubsub_celery.supervisor")

# A failed process has nothing to finish; what may take time is what runs at the exit of its interpreter.
_EXIT_TIMEOUT = 10.0


@dataclass(eq=False)
class _Child:
    process: BaseProcess
    line: Connection | None
    """None once it was hung up, by either side."""
    pulse: Pulse
    ready_at: float | None = None
    failed: bool = False
    """It has told that the entry raised; its exit code says nothing new."""
    kill_at: float | None = None
    """When to kill it, after it was told to leave; None again once that was done."""

    @property
    def pid(self) -> int | None:
        return self.process.pid


@dataclass(eq=False)
class _Slot:
    index: int
    current: _Child | None = None
    failing: _Child | None = None
    """Has failed, and stays until its replacement is ready."""
    leaving: list[_Child] = field(default_factory=list)
    """Were told to stop or to end."""
    failures: int = 0
    """In a row."""
    start_at: float | None = None
    """When the next process is due."""
    hand_over_by: float | None = None
    """Until when `failing` waits for a replacement that has been started."""

    def children(self) -> list[_Child]:
        """Return all that are alive, as far as known."""
        return [child for child in (self.current, self.failing, *self.leaving) if child is not None]

    def deadlines(self) -> Iterator[float]:
        """Yield the times at which something is to be done."""
        for child in self.leaving:
            if child.kill_at is not None:
                yield child.kill_at
        if self.hand_over_by is not None:
            yield self.hand_over_by
        # With the place taken by processes that were killed, their end is what to wait for.
        if self.start_at is not None and not (self.is_full() and all(c.kill_at is None for c in self.leaving)):
            yield self.start_at

    def is_full(self) -> bool:
        """Return whether another process would be the third."""
        return len(self.children()) > 1


def supervise(
    job: Job, plan: Plan, signals: Signals, watcher: Watcher, *, failures: int = 0, listened: bool = False
) -> int:
    """Keep `plan.processes` processes running `job` until a signal stops them; return the exit code.

    `failures` and `listened` are what happened in this process before it became a parent: how often the entry failed,
    and whether it had been ready.
    """
    return _Supervisor(job, plan, signals, watcher, failures, listened).run()


class _Supervisor:
    def __init__(self, job: Job, plan: Plan, signals: Signals, watcher: Watcher, failures: int, listened: bool) -> None:
        self._job = job
        self._plan = plan
        self._signals = signals
        self._watcher = watcher
        self._context: Any = multiprocessing.get_context(plan.start_method)
        self._listened = listened
        self._stopping = False
        self._exit_code = EXIT_STOPPED  # only ever raised: the worst that happened is what is returned
        now = time.monotonic()
        self._slots = [_Slot(index, failures=failures, start_at=now) for index in range(plan.processes)]
        watcher.states = self._states

    def run(self) -> int:
        if self._plan.start_method == "spawn":
            # The first spawn would start it, and in doing so let the held back signals through.
            resource_tracker.ensure_running()
        try:
            while self._act_on_deadlines():
                self._wait()
        finally:
            # If this loop itself breaks, the children still hear of it.
            for _, child in self._children():
                self._hang_up(child)
        logger.info("stopped: exit code %d", self._exit_code)
        return self._exit_code

    def _children(self) -> list[tuple[_Slot, _Child]]:
        return [(slot, child) for slot in self._slots for child in slot.children()]

    def _states(self) -> list[State]:
        """Return each place's process; one that is being replaced is no reason to kill the others."""
        return [
            State(slot.index, None, alive=True, ready=False) if slot.current is None else slot.current.pulse.state
            for slot in self._slots
        ]

    # What is due

    def _act_on_deadlines(self) -> bool:
        """Do what is due, and return whether anything is left to wait for."""
        for slot in self._slots:
            now = time.monotonic()
            for child in slot.leaving:
                if child.kill_at is not None and now >= child.kill_at:
                    self._kill(slot, child, f"not ended after {self._patience(child):g} s")
                    if self._stopping and not child.failed:
                        self._end_with(EXIT_DRAIN_TIMEOUT)
            if slot.hand_over_by is not None and now >= slot.hand_over_by:
                self._give_up_hand_over(slot)
            if slot.start_at is not None and now >= slot.start_at:
                self._start_next(slot)
        return any(slot.children() or slot.start_at is not None for slot in self._slots)

    def _give_up_hand_over(self, slot: _Slot) -> None:
        """Let the failing process end. Its replacement stays: it may be waiting for a server that is down."""
        slot.hand_over_by = None
        if slot.failing is not None and slot.current is not None:
            logger.warning(
                "not ready after %g s: pid %s (process %d); letting failed pid %s end",
                self._plan.ready_timeout,
                slot.current.pid,
                slot.index,
                slot.failing.pid,
            )
            self._let_go(slot, slot.failing)

    def _start_next(self, slot: _Slot) -> None:
        if slot.is_full():
            for child in slot.leaving:
                if child.kill_at is not None:
                    self._kill(slot, child, "its place is needed")
            return  # its end will be told by SIGCHLD
        slot.start_at = None
        try:
            child = self._start(slot.index)
        except OSError as error:
            # No memory, no process or no descriptor to be had for now: that may pass.
            logger.error("failed to start process %d: %s", slot.index, error)
            if slot.failing is not None:
                self._let_go(slot, slot.failing)
            self._on_lost(slot, None)
            return
        slot.current = child
        logger.info("started pid %s (process %d)", child.pid, slot.index)
        if slot.failing is not None:
            slot.hand_over_by = time.monotonic() + self._plan.ready_timeout

    def _start(self, index: int) -> _Child:
        ours, theirs = Pipe()
        # A spawned process has no copies of these; asking it to close them would send them to it.
        forked = self._plan.start_method == "fork"
        lines = [ours, *(c.line for _, c in self._children() if c.line is not None)]
        inherited = [*lines, *self._watcher.sockets] if forked else []
        watched = self._watcher.active
        arguments = (self._job, theirs, index, self._listened, self._plan.drain_timeout, watched, inherited)
        process = self._context.Process(target=child_main, args=arguments, name=f"pgpubsub-{index}")
        try:
            with held_back():
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return _Child(process, ours, Pulse(index, process.pid))

    # What arrives

    def _wait(self) -> None:
        """Wait for a signal, a report, the end of a child or the next deadline, and act on what arrived."""
        deadline = min((self._watcher.due(), *(due for slot in self._slots for due in slot.deadlines())))
        lines = [child.line for _, child in self._children() if child.line is not None]
        ready = wait(
            [self._signals.fileno(), *lines, *self._watcher.readers()],
            self._watcher.writers(),
            None if deadline == float("inf") else max(0.0, deadline - time.monotonic()),
        )
        self._watcher.act(ready)
        # Signals first: when a whole process group is told to stop, no child that obeyed is to be replaced.
        for signum in self._signals.take():
            if signum in STOP_SIGNALS:
                self._on_stop_signal(signal.Signals(signum))
        for slot, child in self._children():
            self._read_reports(slot, child)
            if child.process.exitcode is not None:
                # It may have reported between the two lines above.
                self._read_reports(slot, child)
                self._on_end(slot, child, child.process.exitcode)

    def _on_stop_signal(self, signum: signal.Signals) -> None:
        if self._stopping:
            logger.warning("stopping at once: %s again", signum.name)
            self._end_with(EXIT_SIGNAL_BASE + signum)
            for slot, child in self._children():
                self._kill(slot, child, "second signal")
            return
        logger.info("stopping: %s, up to %g s to finish", signum.name, self._plan.drain_timeout)
        self._stopping = True
        for slot in self._slots:
            slot.start_at = None
        for slot, child in self._children():
            if child not in slot.leaving:
                self._let_go(slot, child)

    def _read_reports(self, slot: _Slot, child: _Child) -> None:
        while child.line is not None:
            try:
                if not child.line.poll():
                    return
                report = child.line.recv_bytes()
            except (EOFError, OSError):
                self._hang_up(child)
                return
            if report == READY:
                self._on_ready(slot, child)
            elif report == FAILED:
                self._on_failed(slot, child)
            elif report == FINISHED:
                self._let_go(slot, child)
            elif report.startswith(BEAT):
                child.pulse.heard(report)
            elif report.startswith(TOLD):
                self._watcher.told(slot.index, report[len(TOLD) :])

    def _on_ready(self, slot: _Slot, child: _Child) -> None:
        logger.info("ready pid %s (process %d)", child.pid, slot.index)
        child.ready_at = time.monotonic()
        self._listened = True
        if slot.failing is not None:
            logger.info("replaced pid %s by pid %s (process %d)", slot.failing.pid, child.pid, slot.index)
            self._let_go(slot, slot.failing)

    def _on_failed(self, slot: _Slot, child: _Child) -> None:
        """The entry of `child` raised; the process is alive and waits to be let go."""
        child.failed = True
        slot.current = None
        before, slot.failing = slot.failing, child
        if before is not None:
            self._let_go(slot, before)
        if not self._plan.restart_on_failure:
            self._let_go(slot, child)
        self._on_lost(slot, child)

    def _on_end(self, slot: _Slot, child: _Child, exit_code: int) -> None:
        """`child` is no more."""
        self._hang_up(child)
        how = _ending(exit_code)
        pid = child.pid
        child.process.close()
        if child in slot.leaving:
            slot.leaving.remove(child)
            logger.info("ended pid %s (process %d): %s", pid, slot.index, how)
            if self._stopping and not child.failed and exit_code != 0:
                self._end_with(EXIT_FAILED)
        elif child is slot.failing:
            slot.failing = slot.hand_over_by = None
            logger.info("ended pid %s (process %d): %s", pid, slot.index, how)
        else:
            logger.warning("ended pid %s (process %d) unasked: %s", pid, slot.index, how)
            slot.current = None
            if slot.failing is not None:
                self._let_go(slot, slot.failing)
            self._on_lost(slot, child, clean=exit_code == 0)

    def _on_lost(self, slot: _Slot, child: _Child | None, *, clean: bool = False) -> None:
        """The slot has no process that works any more: have another one started, now or after a delay."""
        slot.hand_over_by = None
        if not self._plan.restart_on_failure:
            if not clean:
                self._end_with(EXIT_FAILED)
            return
        now = time.monotonic()
        if child is not None and child.ready_at is not None and now - child.ready_at >= self._plan.backoff_reset:
            slot.failures = 0
        slot.failures += 1
        delay = self._plan.backoff(slot.failures)
        if delay:
            logger.info("backing off %.3f s (process %d): %d failures in a row", delay, slot.index, slot.failures)
        slot.start_at = now + delay

    # What is done to a child

    def _let_go(self, slot: _Slot, child: _Child) -> None:
        """Tell `child` to end, and see to it that it does."""
        if slot.current is child:
            slot.current = None
        if slot.failing is child:
            slot.failing = None
            slot.hand_over_by = None
        slot.leaving.append(child)
        child.kill_at = time.monotonic() + self._patience(child)
        self._hang_up(child, STOP)

    def _patience(self, child: _Child) -> float:
        return _EXIT_TIMEOUT if child.failed else self._plan.drain_timeout

    def _hang_up(self, child: _Child, message: bytes | None = None) -> None:
        if child.line is None:
            return
        line, child.line = child.line, None
        try:
            if message is not None:
                line.send_bytes(message)
        except OSError:
            pass  # it is gone already
        finally:
            line.close()

    def _kill(self, slot: _Slot, child: _Child, reason: str) -> None:
        logger.warning("killed pid %s (process %d): %s", child.pid, slot.index, reason)
        child.kill_at = None
        child.process.kill()

    def _end_with(self, exit_code: int) -> None:
        self._exit_code = max(self._exit_code, exit_code)


def _ending(exit_code: int) -> str:
    """Return an exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # real-time signals have no name
        return f"signal {-exit_code}"
