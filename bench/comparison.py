"""The guard: ratios of a quick run against stored ones of an earlier quick run, and what got worse.

Owns the file of stored ratios and what counts as worse. Absolute figures are never compared: they are the machine's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from bench.ratios import RATIOS, Ratio
from bench.results import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one ratio."""

    ratio: Ratio
    stored: float
    measured: float | None
    """None where there was no figure; `why` tells."""
    worse: bool
    why: str = ""

    @property
    def line(self) -> str:
        """It in one line."""
        word = "WORSE" if self.worse else "ok"
        measured = "not measured" if self.measured is None else self._figure(self.measured)
        told = f" ({self.why})" if self.why else ""
        return f"{word:5}  {self.ratio.name}: {measured}, stored {self._figure(self.stored)}{told}"

    def _figure(self, value: float) -> str:
        return f"{value:+.2f} ms" if self.ratio.difference else f"{value:.2f}×"


def store(path: Path, outcome: Outcome) -> None:
    """Keep the ratios of a run."""
    found = {ratio.name: value.value for ratio in RATIOS if (value := ratio.of(outcome)) is not None}
    earlier = load(path) if path.exists() else {}
    stored = {"machine": outcome.machine, "ratios": {**earlier, **{key: round(one, 3) for key, one in found.items()}}}
    path.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n")


def load(path: Path) -> dict[str, float]:
    """Return the stored ratios by name."""
    if not path.exists():
        raise SystemExit(f"there are no stored ratios in {path}: store some with `python -m bench --quick --baseline`")
    ratios: dict[str, float] = json.loads(path.read_text())["ratios"]
    return ratios


def compare(stored: Mapping[str, float], outcome: Outcome, scenarios: Collection[str]) -> list[Verdict]:
    """Return a verdict for each stored ratio of these scenarios; one that is missing now counts as worse."""
    return [
        _verdict(ratio, stored[ratio.name], outcome)
        for ratio in RATIOS
        if ratio.name in stored and ratio.scenario in scenarios
    ]


def _verdict(ratio: Ratio, stored: float, outcome: Outcome) -> Verdict:
    value = ratio.of(outcome)
    if value is None:
        reasons = [
            f"{one.what}: {one.why.splitlines()[0]}" for one in outcome.failures if one.scenario == ratio.scenario
        ]
        why = "; ".join(reasons) or "a figure is missing"
        return Verdict(ratio=ratio, stored=stored, measured=None, worse=True, why=why)
    return Verdict(ratio=ratio, stored=stored, measured=value.value, worse=is_worse(ratio, stored, value.value))


def is_worse(ratio: Ratio, stored: float, measured: float) -> bool:
    """Whether a ratio is worse than it was by more than its tolerance."""
    if ratio.difference:
        return measured > stored + ratio.tolerance
    if ratio.smaller_is_better:
        return measured > stored * (1 + ratio.tolerance)
    return measured < stored * (1 - ratio.tolerance)


def told(verdicts: Collection[Verdict]) -> str:
    """Return it all, the worst first, with a last line that says how it ended."""
    ordered = sorted(verdicts, key=lambda one: not one.worse)
    worse = [one.ratio.name for one in verdicts if one.worse]
    end = f"{len(worse)} got worse: {'; '.join(worse)}" if worse else f"none of {len(ordered)} ratios got worse"
    return "\n".join([*(one.line for one in ordered), end])
