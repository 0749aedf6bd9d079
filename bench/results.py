"""Figures, each with all its runs; a run's file; and the merging of several.

Owns the form of the JSON. A measurement that failed is kept beside the figures, with the reason: it has no number.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One figure: the median of its runs."""

    scenario: str
    measure: str
    """What was measured, such as "8 writers"."""
    system: str
    """Whose figure it is, with its variant."""
    unit: str
    runs: tuple[float, ...]
    note: str = ""
    """What a reader has to know: the size, the setting."""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.runs)

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.scenario, self.measure, self.system

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest run."""
        return min(self.runs), max(self.runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A measurement without a figure."""

    scenario: str
    system: str
    why: str
    measure: str = ""
    """How the names of its measures begin; nothing for all of the system's in the scenario."""

    def explains(self, result: Result) -> bool:
        """Whether such a figure is one that there is not."""
        same = (self.scenario, self.system) == (result.scenario, result.system)
        return same and result.measure.startswith(self.measure)

    @property
    def what(self) -> str:
        """What failed, for a reader."""
        return f"{self.system}, {self.measure}" if self.measure else self.system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """What changed over time, for a plot."""

    scenario: str
    name: str
    x: str
    y: str
    points: tuple[tuple[float, float], ...]


@dataclasses.dataclass
class Outcome:
    """All that one scenario, or a whole run, has found."""

    results: list[Result] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    series: list[Series] = dataclasses.field(default_factory=list)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    """For each scenario the scale that it was measured at."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """How long each scenario took."""

    def find(self, scenario: str, measure: str, system: str) -> Result | None:
        """Return a figure, or None."""
        return next((one for one in self.results if one.key == (scenario, measure, system)), None)

    def of(self, scenario: str) -> list[Result]:
        """Return a scenario's figures."""
        return [one for one in self.results if one.scenario == scenario]

    def merge(self, newer: Outcome) -> Outcome:
        """Return this with what is newer put in place of what it measured again."""
        measured = {one.key for one in newer.results}

        def failed(one: Result) -> bool:
            # An old figure would hide that there is no new one.
            return any(failure.explains(one) for failure in newer.failures)

        def overcome(failure: Failure) -> bool:
            again = {(one.scenario, one.system, one.measure) for one in newer.failures}
            key = (failure.scenario, failure.system, failure.measure)
            return key in again or any(failure.explains(one) for one in newer.results)

        drawn = {(one.scenario, one.name) for one in newer.series}
        return Outcome(
            results=[*(one for one in self.results if one.key not in measured and not failed(one)), *newer.results],
            failures=[*(one for one in self.failures if not overcome(one)), *newer.failures],
            series=[*(one for one in self.series if (one.scenario, one.name) not in drawn), *newer.series],
            machine=newer.machine or self.machine,
            scales={**self.scales, **newer.scales},
            seconds={**self.seconds, **newer.seconds},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON keeps it."""
        return {
            "format": FORMAT,
            "machine": self.machine,
            "scales": self.scales,
            "seconds": self.seconds,
            "results": [{**dataclasses.asdict(one), "value": one.value} for one in self.results],
            "failures": [dataclasses.asdict(one) for one in self.failures],
            "series": [dataclasses.asdict(one) for one in self.series],
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Outcome:
        """Read it back."""
        if stored.get("format") != FORMAT:
            raise ValueError(f"the results have format {stored.get('format')!r}, not {FORMAT}: measure again")
        results = [{key: value for key, value in one.items() if key != "value"} for one in stored["results"]]
        return cls(
            results=[Result(**{**one, "runs": tuple(one["runs"])}) for one in results],
            failures=[Failure(**one) for one in stored["failures"]],
            series=[Series(**{**one, "points": tuple(map(tuple, one["points"]))}) for one in stored["series"]],
            machine=stored["machine"],
            scales=stored["scales"],
            seconds=stored["seconds"],
        )


def read(path: Path) -> Outcome:
    """Return what a file has; an empty outcome where there is none."""
    return Outcome.from_json(json.loads(path.read_text())) if path.exists() else Outcome()


def write(path: Path, outcome: Outcome) -> None:
    """Write a file, one figure a line, so that a change of one is a change of one line."""
    stored = outcome.to_json()
    lines = []
    for key, value in stored.items():
        if isinstance(value, list) and value:
            items = ",\n".join("  " + json.dumps(one, ensure_ascii=False) for one in value)
            lines.append(f"{json.dumps(key)}: [\n{items}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(percent / 100 * len(ordered)) - 1))]


def formatted(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def names(results: Iterable[Result]) -> list[str]:
    """Return the systems in the order in which they were measured."""
    return list(dict.fromkeys(one.system for one in results))
