"""Processes beside a measurement: each has a log, a deadline for whatever is asked of it, and an end.

Owns starting and stopping, by process id and never by name, and the questions to an application's process. Nothing
here knows what is measured. A process that ends by itself makes the measurement fail, with the end of its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pgpubsub_celery.embedded import start_process

ROOT = Path(__file__).parents[1]
STOP_SECONDS = 5.0
ANSWER_SECONDS = 180.0
POLL_SECONDS = 0.005


class MeasurementError(Exception):
    """A measurement has no figure, and this is why."""


class Running:
    """A process of ours: `python -m …`, and whatever it starts itself."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], **options: Any) -> None:
        self.command = list(command)
        self.log = log
        with log.open("wb") as file:
            self.process = start_process(
                [sys.executable, "-m", *command],
                death_signal=signal.SIGKILL,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
                **{"stdin": subprocess.DEVNULL, "stdout": file, **options},
                stderr=file,
            )

    def tree(self) -> list[psutil.Process]:
        """Return it and all below it."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Return the CPU time of it and all below it, as far as they live."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
        return total

    def largest_rss(self) -> int:
        """Return the resident memory, in bytes, of the largest among it and those below it."""
        sizes = [0]
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
        return max(sizes)

    def pause(self) -> None:
        """SIGSTOP it, while its work is piled up."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def require_alive(self) -> None:
        """Raise MeasurementError if it has ended."""
        code = self.process.poll()
        if code is not None:
            raise MeasurementError(f"{' '.join(self.command[:6])} ended with code {code}: {self.log_tail()}")

    def log_tail(self, lines: int = 3) -> str:
        """Return the last lines of its log, in one."""
        written = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(written[-lines:])[-500:]

    def stop(self) -> None:
        """Ask it to end, and see to it."""
        tree = self.tree()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # paused, it would not notice
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(STOP_SECONDS)


class Application(Running):
    """A process of `bench.applications`, which does what it is told."""

    def __init__(self, name: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        super().__init__(
            ["bench.applications", name], log, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def tell(self, action: str, *arguments: Any) -> None:
        """Begin an action; `answer` waits for its end."""
        assert self.process.stdin is not None
        request = json.dumps({"action": action, "arguments": arguments}) + "\n"
        try:
            self.process.stdin.write(request.encode())
        except BrokenPipeError:
            self.require_alive()
            raise

    def answer(self, *, within: float = ANSWER_SECONDS) -> Any:
        """Return what the action that was begun has returned."""
        assert self.process.stdout is not None
        reply = b""
        deadline = time.monotonic() + within
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise MeasurementError(f"the application {self.name!r} has not answered within {within:g} s")
            part = self.process.stdout.read(1 << 20)
            if not part:
                self.process.wait(STOP_SECONDS)
                self.require_alive()
            reply += part
        answer = json.loads(reply)
        if "error" in answer:
            raise MeasurementError(f"the application {self.name!r}: {answer['error']}")
        return answer["value"]

    def call(self, action: str, *arguments: Any, within: float = ANSWER_SECONDS) -> Any:
        """Do an action, and return what it returned."""
        self.tell(action, *arguments)
        return self.answer(within=within)

    def stop(self) -> None:
        """End it; without more to read it ends by itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        super().stop()
        self.process.stdout.close()


def wait_until(
    holds: Callable[[], Any],
    what: str,
    *,
    within: float,
    every: float = POLL_SECONDS,
    alive: Sequence[Running] = (),
) -> float:
    """Return the time at which `holds` was true; raise when that takes too long, or a process ends meanwhile."""
    deadline = time.monotonic() + within
    while True:
        at = time.time()
        if holds():
            return at
        for running in alive:
            running.require_alive()
        if time.monotonic() > deadline:
            told = "".join(f"; {running.command[0]}: {running.log_tail()}" for running in alive)
            raise MeasurementError(f"not within {within:g} s: {what}{told}")
        time.sleep(every)
