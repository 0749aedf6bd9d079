"""The report: what was measured, written into docs/benchmarks.md between two markers, the ratios first.

Owns everything between the markers; what stands around them is written by hand. Whatever has no figure says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from bench import scenarios
from bench.ratios import RATIOS, Ratio
from bench.results import Outcome, Result, formatted
from bench.scale import SCALES
from bench.systems import NAMES, system

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN = "<!-- measured: begin (written by `make bench`) -->"
END = "<!-- measured: end -->"

TITLES = {
    "bulk": "Bulk insert",
    "writers": "Single-row transactions",
    "publish": "Backlog to broker",
    "drain": "Backlog to finished",
    "latency": "Latency",
    "idle": "Idle",
    "backlog": "Long backlogs",
    "memory": "Memory of the bridge",
}


def write(outcome: Outcome, drawn: Sequence[tuple[str, Path]], page: Path = PAGE) -> None:
    """Put the report into the page."""
    page.write_text(inserted(page.read_text(), text(outcome, drawn)))


def inserted(page: str, measured: str) -> str:
    """Return the page with what stood between the markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{measured.strip()}\n\n{END}{after}"


def text(outcome: Outcome, drawn: Sequence[tuple[str, Path]] = ()) -> str:
    """Return the report."""
    parts = ["## Ratios", _ratios(outcome), "## Machine", _machine(outcome)]
    for name in scenarios.NAMES:
        found = [_table(outcome.of(name))] if outcome.of(name) else []
        found += [f"![{TITLES[name]}](benchmarks/{path.name})" for scenario, path in drawn if scenario == name]
        missing = [
            f"- not measured: {one.what}: {_cell(one.why.splitlines()[0])}"
            for one in outcome.failures
            if one.scenario == name
        ]
        found += ["\n".join(missing)] if missing else []
        if found:
            parts += [f"## {TITLES[name]}", _purpose(name), *found]
    parts += ["## Settings", _settings()]
    return "\n\n".join(parts)


def _ratios(outcome: Outcome) -> str:
    rows = [_ratio_row(ratio, outcome) for ratio in RATIOS if _shown(ratio, outcome)]
    return "\n".join(["| | before | goal | measured | |", "|---|---|---|---|---|", *rows])


def _shown(ratio: Ratio, outcome: Outcome) -> bool:
    """A ratio that only the guard has is shown where there is nothing else."""
    return not ratio.guard_only or ratio.of(outcome) is not None


def _ratio_row(ratio: Ratio, outcome: Outcome) -> str:
    value = ratio.of(outcome)
    measured = "not measured" if value is None else ratio.text(value)
    verdict = "" if value is None else "reached" if ratio.reached(value.value) else "**not reached**"
    return f"| {ratio.name} | {ratio.before or '–'} | {ratio.goal} | {measured} | {verdict} |"


def _machine(outcome: Outcome) -> str:
    machine = outcome.machine
    if not machine:
        return "Unknown."
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    postgres = machine["postgres"]
    settings = ", ".join(f"`{name}` {value}" for name, value in postgres.items() if name != "server_version")
    scales = sorted(set(outcome.scales.values()))
    repeats = min((SCALES[name].repeats for name in scales), default=0)
    furthest = "of ratios the furthest that single runs are apart"
    quick = [f"not the full one but {name}" for name in scales if name != "full"]
    return "\n".join(
        [
            f"- {machine['cores']} cores, {machine['cpu']}, {machine['memory_gib']} GiB; {machine['system']}",
            f"- measured {machine['at']}; load before it {machine['load_before']}",
            f"- Postgres {postgres['server_version']}: {settings}",
            f"- Valkey {machine['valkey']['version']}: appendonly {machine['valkey']['appendonly']}",
            f"- Python {machine['python']}; {packages}",
            f"- medians of at least {repeats} runs; in parentheses the smallest and the largest; {furthest}",
            *([f"- scale: {', '.join(quick)}"] if quick else []),
        ]
    )


def _table(results: Sequence[Result]) -> str:
    measures = list(dict.fromkeys(one.measure for one in results))
    rows = [_row(one) for one in sorted(results, key=lambda one: measures.index(one.measure))]
    return "\n".join(["| | | | | |", "|---|---|---|---|---|", *rows])


def _row(result: Result) -> str:
    low, high = map(formatted, result.spread)
    figure = f"{formatted(result.value)} ({low}–{high})"
    return f"| {result.measure} | {result.system} | {figure} | {result.unit} | {_cell(result.note)} |"


def _purpose(name: str) -> str:
    """Return what the scenario's module says it is about."""
    told = importlib.import_module(f"bench.scenarios.{name}").__doc__ or ""
    return " ".join(told.split())


def _settings() -> str:
    rows = []
    for name in NAMES:
        one = system(name)
        rows.append(f"- **{one.name}**: " + "; ".join(f"{what}: {value}" for what, value in one.settings.items()))
    return "\n".join(rows)


def _cell(told: str) -> str:
    return told.replace("|", "/")
