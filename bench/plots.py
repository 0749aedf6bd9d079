"""Plots of the results, as PNG beside the report: bars for each measure, and lines for what changed over time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from bench import scenarios
from bench.results import Outcome, Result, Series, formatted

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"

OURS_COLOUR, OTHERS_COLOUR = "#1f6f54", "#a9b4bd"
MOST_MEASURES = 6
"""Of a scenario, in one plot."""


def draw(outcome: Outcome) -> list[tuple[str, Path]]:
    """Write all plots; return for each its scenario and file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    drawn = []
    for scenario in scenarios.NAMES:
        results = outcome.of(scenario)
        if results:
            drawn.append((scenario, _bars(scenario, results)))
    drawn += [(series.scenario, _line(series)) for series in outcome.series if series.points]
    return drawn


def _bars(scenario: str, results: Sequence[Result]) -> Path:
    """Draw a panel for each measure: a bar for each system, its spread, on a logarithmic axis where rates differ."""
    measures = list(dict.fromkeys(one.measure for one in results))[:MOST_MEASURES]
    heights = [1.0 + 0.32 * sum(one.measure == measure for one in results) for measure in measures]
    figure, axes = plt.subplots(
        len(measures), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, measure in zip(axes[:, 0], measures, strict=True):
        shown = [one for one in results if one.measure == measure]
        values = [one.value for one in shown]
        errors = [
            [one.value - one.spread[0] for one in shown],
            [one.spread[1] - one.value for one in shown],
        ]
        colours = [OURS_COLOUR if one.system.startswith(scenarios.OURS) else OTHERS_COLOUR for one in shown]
        axis.barh([one.system for one in shown], values, xerr=errors, color=colours, ecolor="#444444", capsize=2)
        axis.invert_yaxis()
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_xscale("log")
        for position, one in enumerate(shown):
            axis.annotate(
                f" {formatted(one.value)}", (one.spread[1], position), va="center", fontsize=8, color="#222222"
            )
        axis.margins(x=0.12)
        axis.set_title(f"{measure}, {shown[0].unit}", loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, scenario)


def _line(series: Series) -> Path:
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    axis.plot([x for x, _ in series.points], [y for _, y in series.points], color=OURS_COLOUR)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(series.x)
    axis.set_ylabel(series.y)
    axis.set_title(series.name, loc="left", fontsize=10)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, f"{series.scenario}-{series.name}")


def _saved(figure: plt.Figure, name: str) -> Path:
    path = FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path
