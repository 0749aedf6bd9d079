"""What is measured. Each module has `run(ground, scale, peers)`, which returns an `Outcome`.

A measurement that fails leaves its reason there and the others go on.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Collection, Iterator

from bench.ground import Ground
from bench.results import Failure, Outcome, Result, formatted
from bench.scale import Scale

NAMES = ("bulk", "writers", "publish", "drain", "latency", "idle", "backlog", "memory")
"""Modules of this package, in the order of the report."""

OURS = "pgpubsub_celery"

Run = Callable[[Ground, Scale, Collection[str]], Outcome]
"""`peers`: module names of `bench.systems` to measure beside this package."""


def scenario(name: str) -> Run:
    """Return a scenario by its name."""
    run: Run = importlib.import_module(f"bench.scenarios.{name}").run
    return run


def say(text: str) -> None:
    """Tell whoever waits."""
    print(f"  {time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


class Recorder:
    """Collects the figures of one scenario."""

    def __init__(self, scenario: str) -> None:
        self.scenario = scenario
        self.outcome = Outcome()

    def add(self, measure: str, system: str, unit: str, runs: list[float], note: str = "") -> None:
        """Keep a figure; one of which a run has failed is none."""
        result = Result(scenario=self.scenario, measure=measure, system=system, unit=unit, runs=tuple(runs), note=note)
        if not runs or any(failure.explains(result) for failure in self.outcome.failures):
            return
        self.outcome.results.append(result)
        low, high = result.spread
        say(
            f"{self.scenario}: {measure}, {system}: {formatted(result.value)} {unit} "
            f"({formatted(low)}–{formatted(high)})"
        )

    def failed(self, system: str) -> bool:
        """Whether a system has failed in this scenario before."""
        return any(failure.system == system for failure in self.outcome.failures)

    @contextlib.contextmanager
    def measuring(self, system: str, measure: str = "") -> Iterator[None]:
        """Turn whatever goes wrong into a failure with its reason; the figures added before stay."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - a peer may fail in its own ways: it has no figure, and this is why
            why = f"{type(exc).__name__}: {exc}"[:2000]
            failure = Failure(scenario=self.scenario, system=system, measure=measure, why=why)
            say(f"{self.scenario}: {failure.what} FAILED: {why}")
            self.outcome.failures.append(failure)
