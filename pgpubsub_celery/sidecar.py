"""The bridge beside a worker: `celery worker --pgpubsub`, for development and for deployments of one machine.

Owns a `pgpubsub-bridge listen` below the worker's main process: starts it, starts it anew whenever it has ended
unasked, ends it with the worker. Never listens itself and never touches a notification: what it starts is the same
command, with the same supervisor, that others start by hand. It exists so that one command runs everything, as `-B`
does for beat. Other than beat, it may run beside any number of workers: several bridges are a matter of course.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from celery import bootsteps
from celery.exceptions import ImproperlyConfigured
from celery.utils.nodenames import node_format

from pgpubsub_celery.embedded import start_process
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.supervisor import Plan

logger = logging.getLogger(__name__)

# Its supervisor kills what has not finished after drain_timeout; that, and its own end, take a moment.
_GRACE_SECONDS = 5.0

_PLAN = Plan()
"""For its arithmetic of backing off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """What the worker's options have asked for."""

    app: str
    """The application, as for `-A`."""
    recover: str | None = None
    """None, "all" or "waiting", as for `listen`."""


class Sidecar:
    """A bridge that is kept alive until `stop`."""

    def __init__(self, beside: Beside, *, loglevel: str, log: str | None, patience: float) -> None:
        """Describe it. `log` is a file to append to, None for the worker's standard error; `patience` is seconds."""
        self._beside = beside
        self._loglevel = loglevel
        self._log = log
        self._patience = patience
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None  # written by the thread only, under the lock
        self._thread = threading.Thread(target=self._run, name="pgpubsub-sidecar", daemon=True)
        self.starts = 0
        """How often a bridge was started. Written by the thread only."""

    @property
    def pid(self) -> int | None:
        """Of the bridge's supervisor; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        """Start the bridge; does not wait until it listens."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Let the bridge finish its batch; start none any more."""
        with self._lock:
            self._stopping.set()
            self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Stop the bridge, and return when it has ended; killed, it leaves nothing undone that its leases do not."""
        self.ask_to_stop()
        if self._thread.ident is None:
            return
        self._thread.join(self._patience)
        if self._thread.is_alive():
            logger.error("the bridge has not ended after %g s: killing pid %s", self._patience, self.pid)
            with self._lock:
                self._signal(signal.SIGKILL)
            self._thread.join()

    def terminate(self) -> None:
        """Stop the bridge at once, its batch unfinished: the leases of what it had claimed run out."""
        with self._lock:
            self._stopping.set()
            # A second signal of another kind: two of one kind may arrive as one.
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGINT)
        self.stop()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            ended = self._live()
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > _PLAN.backoff_reset else failures + 1
            delay = _PLAN.backoff(failures)
            logger.error("the bridge %s: starting another in %.1f s", ended, delay)
            self._stopping.wait(delay)

    def _live(self) -> str:
        """Start a bridge, wait for its end, and return how it ended."""
        command = [sys.executable, "-m", "pgpubsub_celery.cli", "-A", self._beside.app, "listen"]
        command += ["--loglevel", self._loglevel]
        if self.starts:
            # What was stored while there was no bridge is not "before": the boundary was the first one's start.
            command.append("--resume")
        elif self._beside.recover is not None:
            command.append(f"--recover={self._beside.recover}")
        try:
            with contextlib.ExitStack() as stack:
                output: Any = stack.enter_context(open(self._log, "ab")) if self._log is not None else None
                process = start_process(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            # No memory, no process or no descriptor to be had for now: that may pass.
            return f"could not be started ({error})"
        with self._lock:
            self._process = process
            self.starts += 1
            if self._stopping.is_set():
                self._signal(signal.SIGTERM)
        code = process.wait()
        return f"(pid {process.pid}) has ended with {code}"


class SidecarStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """What makes the sidecar a part of Celery's worker: started after the pool, ended before it."""

    label = "pgpubsub bridge"
    conditional = True
    # Beside the pool's processes, whose forks shall have nothing of it; and what is claimed while the pool is finishing
    # would only wait for its lease.
    requires = ("celery.worker.components:Pool",)

    def __init__(self, w: Any, pgpubsub: Beside | None = None, **kwargs: Any) -> None:
        self._beside = pgpubsub
        self.enabled = pgpubsub is not None
        super().__init__(w, **kwargs)

    def create(self, w: Any) -> Sidecar:
        """Return the sidecar; Celery's bootsteps start and stop it."""
        pool = w.pool_cls if isinstance(w.pool_cls, str) else w.pool_cls.__module__
        if pool.endswith(("gevent", "eventlet")):
            raise ImproperlyConfigured(
                "--pgpubsub does not work with the pools gevent and eventlet: run `pgpubsub-bridge listen` by itself."
            )
        assert self._beside is not None
        settings = Settings.load(w.app.conf)
        log = node_format(w.logfile, w.hostname) if w.logfile else None
        level = logging.getLevelName(w.loglevel or logging.WARNING).lower()
        return Sidecar(
            self._beside,
            loglevel="critical" if level == "fatal" else level,
            log=log,
            patience=settings.drain_timeout + _GRACE_SECONDS,
        )

    def close(self, w: Any) -> None:
        """Called for all steps before the first one is stopped: the bridge finishes while the worker does."""
        if self.obj is not None:
            self.obj.ask_to_stop()

    def info(self, w: Any) -> dict[str, Any]:
        """Return what `celery inspect stats` shows of it."""
        return {"pgpubsub": {"pid": self.obj.pid, "starts": self.obj.starts}} if self.obj is not None else {}
