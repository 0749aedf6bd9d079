"""The systems under test: how each is run, in which settings, and when its work is done.

One module for each, with `SYSTEM` (and variants). What users write for them is in `bench.applications`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from bench.ground import Ground, Stage
from bench.processes import Application, MeasurementError, Running, wait_until

READY_SECONDS = 60.0
TRY_SECONDS = 1.0

WORKER = ("worker", "--pool=prefork", "--concurrency=2", "--without-gossip", "--without-mingle", "--loglevel=WARNING")
"""One Celery worker, the same for all systems that have one: a child process for each core of a small machine."""

NAMES = (
    "ours",
    "plain_celery",
    "on_commit",
    "celery_outbox",
    "django_pgpubsub",
    "procrastinate",
    "pgqueuer",
)
"""Modules of this package."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A system in one way to run it."""

    name: str
    """As the report calls it."""
    application: str
    """Module of `bench.applications`."""
    consumers: Sequence[Sequence[str]]
    """Commands after `python -m`, of all that has to run."""
    unfinished: Callable[[Stage], bool]
    """Whether there is work left, in a table or in the broker."""
    settings: Mapping[str, str]
    """What was set and why, for the report."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stranded: str = ""
    """A statement that takes away what was written before it listened, where it would leave that alone for ever."""
    piled_up_paused: bool = False
    """Its backlog is made while its (first) consumer is stopped: nothing else holds it back until it is complete."""

    @contextlib.contextmanager
    def staged(
        self, ground: Ground, *, kind: str = "nothing", own_broker: bool = False, consumers: bool = True
    ) -> Iterator[Staged]:
        """Give the system on a stage of its own: prepared, and with consumers that have done a task each."""
        environment = {**self.environment, "BENCH_KIND": kind}
        with ground.stage(self.name, own_broker=own_broker, **environment) as stage:
            application = stage.application(self.application)
            application.call("prepare")
            staged = Staged(self, stage, application, [])
            if consumers:
                staged.start_consumers()
            yield staged


@dataclasses.dataclass
class Staged:
    """A system on its stage."""

    system: System
    stage: Stage
    application: Application
    consumers: list[Running]
    asked: int = 0
    """Commands that the broker has counted because of our own questions."""

    def start_consumers(self, *, beside_a_backlog: bool = False) -> None:
        """Start what does the work, and wait until it has done some; `beside_a_backlog` that it leaves alone."""
        self.consumers = [self.stage.start(command) for command in self.system.consumers]
        tries = 0

        def tried() -> bool:
            nonlocal tries
            tries += 1
            # Again and again: some systems hear nothing of what was written before they listened.
            self.application.call("write", -tries)
            with contextlib.suppress(MeasurementError):
                wait_until(self.stage.count_notes, "a task begins", within=TRY_SECONDS, alive=self.consumers)
                return True
            for consumer in self.consumers:
                consumer.require_alive()
            return False

        wait_until(tried, f"{self.system.name} does its first task", within=READY_SECONDS, alive=self.consumers)
        if not beside_a_backlog:
            if self.system.stranded:
                self.stage.execute(self.system.stranded)
            self.wait_until_finished()
        self.stage.forget_notes()

    def stop_consumers(self) -> None:
        """End them before the stage's end."""
        while self.consumers:
            self.stage.stop(self.consumers.pop())

    def start_listening(self, command: Sequence[str]) -> None:
        """Start a bridge of ours that has nothing to do yet, and wait until it listens."""
        bridge = self.stage.start(command)
        self.consumers = [bridge]
        wait_until(
            lambda: "listening to" in bridge.log.read_text(),
            "the bridge listens",
            within=30,
            alive=[bridge],
            every=0.05,
        )

    def wait_until_finished(self, *, within: float = READY_SECONDS) -> float:
        """Return the time at which nothing was left to do."""
        return wait_until(
            lambda: not self.system.unfinished(self.stage),
            f"{self.system.name} has finished",
            within=within,
            alive=self.consumers,
        )

    def drain(self, count: int, *, within: float) -> float:
        """Make a backlog, have it worked off, and return the seconds from its COMMIT to its end."""
        if self.system.piled_up_paused:
            self.consumers[0].pause()
            self.application.call("backlog", count)
            self.consumers[0].resume()
            began = time.time()
        else:
            began = self.application.call("backlog", count)
        return self.wait_until_finished(within=within) - began


def celery_unfinished(stage: Stage) -> bool:
    """Whether a worker has tasks left."""
    return stage.unfinished() > 0


def system(name: str) -> System:
    """Return a system by the name of its module."""
    found: System = importlib.import_module(f"bench.systems.{name}").SYSTEM
    return found
