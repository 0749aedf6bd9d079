"""The process supervisor of `listen`: keeps processes that run one *entry* alive, and ends them well.

Owns processes, signals, hand-over after a failure, backing off, draining and exit codes. Knows nothing of Postgres,
Celery or the command line: an entry is any importable function that works until it is asked to stop.
It exists because a listener must survive its own exceptions without a moment in which nobody listens,
and must leave no process behind, whatever gets killed.

Reading order: `plan` (what can be chosen, exit codes), `process` (inside a process that runs the entry),
`parent` (the process above them), `signals` (how both hear of signals), `health` (what probes see of them), `serving`
(the pages for that).

What happens when a process ends, and nobody asked the supervisor to stop:

- the entry raised: it is replaced, and ends once its replacement is ready (or has failed, or took too long);
- it was killed outright (SIGKILL, `os._exit`, segmentation fault): it is replaced at once;
- it got SIGTERM from somebody else: it finishes, ends, and is replaced, so `kill CHILD` means "restart this one";
- the entry returned by itself, unasked: it had finished, and is not replaced.

The first replacement starts at once, further ones back off. A slot never has more than two processes alive.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import TypeVar

from pgpubsub_celery.supervisor.health import State, Watcher, Watching
from pgpubsub_celery.supervisor.parent import supervise
from pgpubsub_celery.supervisor.plan import (
    EXIT_DRAIN_TIMEOUT,
    EXIT_FAILED,
    EXIT_SIGNAL_BASE,
    EXIT_STOPPED,
    START_METHODS,
    Plan,
)
from pgpubsub_celery.supervisor.process import Control, Job, Outcome, StopEvent, run_alone
from pgpubsub_celery.supervisor.serving import Page, Server, wait
from pgpubsub_celery.supervisor.signals import SUPERVISOR_SIGNALS, Signals

__all__ = [
    "EXIT_DRAIN_TIMEOUT",
    "EXIT_FAILED",
    "EXIT_SIGNAL_BASE",
    "EXIT_STOPPED",
    "START_METHODS",
    "Control",
    "Page",
    "Plan",
    "Server",
    "State",
    "StopEvent",
    "Watching",
    "run",
    "wait",
]

T = TypeVar("T")


def run(
    entry: Callable[[Control, T], None],
    argument: T,
    plan: Plan,
    *,
    initialise: Callable[[T], None] | None = None,
    watching: Watching | None = None,
) -> int:
    """Run `entry(control, argument)` as `plan` says, until a signal stops it; return the exit code for `sys.exit`.

    `entry` and `initialise` are module-level functions. With the start method spawn, `argument` is pickled and reaches
    the children through a pipe, never through their command line. `initialise(argument)` runs first in each process,
    this one included, and a second time in processes that were forked; it is the place to configure logging.
    `watching` shows probes whether the processes live; without it nobody asks them.

    Returns `EXIT_STOPPED`, `EXIT_FAILED`, `EXIT_DRAIN_TIMEOUT`, or `EXIT_SIGNAL_BASE` plus the second signal's number.
    Call it from the main thread (it handles SIGTERM and SIGINT; the previous handlers are back when it returns).

    Raises:
        TypeError, AttributeError, pickle.PicklingError: `entry` or `argument` cannot be pickled (spawn only); told
            before anything starts, not at the first failure.
        SettingsError: what `watching` asks for cannot be had: its port is taken, its file cannot be written.
    """
    job = Job(entry, argument, initialise)
    if plan.start_method == "spawn" and (plan.restart_on_failure or not plan.worker):
        ForkingPickler.dumps(job)
    if initialise is not None:
        initialise(argument)
    watcher = Watcher(watching)
    try:
        with Signals(*SUPERVISOR_SIGNALS) as signals:
            if not plan.worker:
                return supervise(job, plan, signals, watcher)
            outcome, control = run_alone(job, plan, signals, watcher)
            if outcome is not Outcome.FAILED:
                return EXIT_STOPPED
            if control.stopping.is_set() or not plan.restart_on_failure:
                return EXIT_FAILED
            # From here on this process runs no entry any more: it stays as the parent of its replacement.
            return supervise(job, plan, signals, watcher, failures=1, listened=control.is_ready)
    finally:
        watcher.close()
