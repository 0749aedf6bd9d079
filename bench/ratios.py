"""What is compared with what, and how far it is meant to get.

Owns the ratios of the report and of the guard, with their goals. A ratio is of figures of one run on one machine, or it
says nothing. Pure arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.results import Outcome, Result, formatted
from bench.scenarios import OURS
from bench.scenarios.backlog import claim_of
from bench.scenarios.bulk import MEASURE as BULK
from bench.scenarios.drain import INSERT, NOTHING, PGQUEUERS, pgqueuer_of
from bench.scenarios.latency import measure_of as latency
from bench.scenarios.publish import ALONE, APPLY_ASYNC, TWO_PROCESSES
from bench.scenarios.publish import MEASURE as PUBLISH
from bench.scenarios.writers import DRAINED, NOTIFIES_DRAINED, STORES_DRAINED, measure_of

Figure = tuple[str, str]
"""Measure and system."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """A ratio of medians, and how far single runs could move it."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure against another of the same scenario."""

    name: str
    scenario: str
    figure: Figure
    against: Sequence[Figure]
    """The alternatives, of which the best counts, as that is whom we want to beat."""
    at_most: float | None = None
    at_least: float | None = None
    before: str = ""
    """What the same ratio was for a peer, or before."""
    difference: bool = False
    """Milliseconds more instead of times as many."""
    guard_only: bool = False
    """Of sizes that the full run does not have."""
    tolerance: float = 0.3
    """How much worse than stored the guard lets pass: a share, or milliseconds for a difference."""

    @property
    def smaller_is_better(self) -> bool:
        """Whether less is better."""
        return self.at_most is not None

    @property
    def goal(self) -> str:
        """What it is meant to be, for a reader."""
        if self.difference:
            return f"at most +{self.at_most:g} ms"
        return f"at most {self.at_most:g}×" if self.smaller_is_better else f"at least {self.at_least:g}×"

    def of(self, outcome: Outcome) -> Value | None:
        """Return it; None when a figure is missing."""
        ours = outcome.find(self.scenario, *self.figure)
        theirs = [found for one in self.against if (found := outcome.find(self.scenario, *one)) is not None]
        if ours is None or not theirs:
            return None
        # Times and sizes: the smallest is the best; rates: the largest.
        best = (min if self.smaller_is_better else max)(theirs, key=lambda one: one.value)
        return self._between(ours, best)

    def _between(self, ours: Result, theirs: Result) -> Value:
        (low, high), (their_low, their_high) = ours.spread, theirs.spread
        if self.difference:
            return Value(value=ours.value - theirs.value, low=low - their_high, high=high - their_low)
        return Value(
            value=ours.value / theirs.value,
            low=low / their_high if their_high else float("inf"),
            high=high / their_low if their_low else float("inf"),
        )

    def reached(self, value: float) -> bool:
        """Whether the goal is."""
        if self.at_most is not None:
            return value <= self.at_most
        assert self.at_least is not None
        return value >= self.at_least

    def text(self, value: Value) -> str:
        """Return it as people write it, with its spread."""
        if self.difference:
            return f"{value.value:+.2f} ms ({value.low:+.2f} to {value.high:+.2f})"
        return f"{formatted(value.value)}× ({formatted(value.low)}–{formatted(value.high)})"

    def line(self, outcome: Outcome) -> str:
        """Return it in one line, with its goal."""
        value = self.of(outcome)
        if value is None:
            return f"{self.name}: not measured (goal: {self.goal})"
        verdict = "reached" if self.reached(value.value) else "NOT reached"
        return f"{self.name}: {self.text(value)}, goal {self.goal}: {verdict}"


_LARGE, _QUICK_LARGE, _SMALL = 5_000_000, 300_000, 1_000
_PGQUEUERS = {
    several: [(NOTHING, pgqueuer_of(*setting)) for setting in PGQUEUERS if (setting[1] > 1) == several]
    for several in (False, True)
}

RATIOS: tuple[Ratio, ...] = (
    Ratio(
        name="bulk insert of 10,000 rows, against no trigger",
        scenario="bulk",
        figure=(BULK, OURS),
        against=[(BULK, "no trigger")],
        at_most=2.5,
        before="django-pgpubsub 22× (17–42)",
    ),
    Ratio(
        name='the same with include="key", against no trigger',
        scenario="bulk",
        figure=(BULK, f'{OURS}, include="key"'),
        against=[(BULK, "no trigger")],
        at_most=1.8,
    ),
    Ratio(
        name="8 writers with the bridge draining all, against a trigger that only stores",
        scenario="writers",
        figure=(measure_of(8), DRAINED),
        against=[(measure_of(8), STORES_DRAINED)],
        at_least=0.95,
        before="a statement trigger with NOTIFY 0.29×",
        tolerance=0.2,
    ),
    Ratio(
        name="8 writers with the bridge draining all, against a trigger with NOTIFY",
        scenario="writers",
        figure=(measure_of(8), DRAINED),
        against=[(measure_of(8), NOTIFIES_DRAINED)],
        at_least=3.0,
        before="1×",
    ),
    Ratio(
        name="backlog to broker with one id a message, against a loop of apply_async",
        scenario="publish",
        figure=(PUBLISH, OURS),
        against=[(PUBLISH, APPLY_ASYNC)],
        at_least=7.0,
        before="1×",
    ),
    Ratio(
        name="the same by two processes of a bridge",
        scenario="publish",
        figure=(PUBLISH, TWO_PROCESSES),
        against=[(PUBLISH, APPLY_ASYNC)],
        at_least=7.0,
        before="1×",
    ),
    Ratio(
        name="the same by one, of what is claimed already",
        scenario="publish",
        figure=(PUBLISH, ALONE),
        against=[(PUBLISH, APPLY_ASYNC)],
        at_least=7.0,
        before="1×",
    ),
    Ratio(
        name="backlog to finished, no-op listener with session, against plain Celery on the same worker",
        scenario="drain",
        figure=(NOTHING, OURS),
        against=[(NOTHING, "Celery delay()")],
        at_least=35.0,
        before="1×",
    ),
    Ratio(
        name="backlog to finished, no-op listener with session, against pgqueuer's best setting, one worker each",
        scenario="drain",
        figure=(NOTHING, OURS),
        against=_PGQUEUERS[False],
        at_least=2.5,
        before="1×",
    ),
    Ratio(
        name="the same against two processes of pgqueuer",
        scenario="drain",
        figure=(NOTHING, OURS),
        against=_PGQUEUERS[True],
        at_least=2.5,
        before="1×",
    ),
    Ratio(
        name="one-insert listener with session, exactly once, against plain Celery doing that insert",
        scenario="drain",
        figure=(INSERT, OURS),
        against=[(INSERT, "Celery delay()")],
        at_least=10.0,
        before="1×",
    ),
    Ratio(
        name="latency commit to start at 20/s, p50, against apply_async to start",
        scenario="latency",
        figure=(latency(20, 50), OURS),
        against=[(latency(20, 50), "Celery delay()")],
        at_most=3.0,
        difference=True,
        before="1×",
        tolerance=2.0,
    ),
    Ratio(
        name="cost of a claim with 5,000,000 waiting, against 1,000 waiting",
        scenario="backlog",
        figure=(claim_of(_LARGE), OURS),
        against=[(claim_of(_SMALL), OURS)],
        at_most=1.2,
    ),
    Ratio(
        name="cost of a claim with 300,000 waiting, against 1,000 waiting",
        scenario="backlog",
        figure=(claim_of(_QUICK_LARGE), OURS),
        against=[(claim_of(_SMALL), OURS)],
        at_most=1.2,
        guard_only=True,
        tolerance=0.4,
    ),
    Ratio(
        name="memory of the bridge at the end, against after a tenth",
        scenario="memory",
        figure=("at the end", OURS),
        against=[("after a tenth", OURS)],
        at_most=1.1,
        tolerance=0.2,
    ),
)
