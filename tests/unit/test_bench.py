"""The benchmark's arithmetic: ratios with their spread, what counts as worse, merging of runs, the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import comparison, report, results
from bench.ratios import RATIOS, Ratio
from bench.results import Failure, Outcome, Result, percentile
from bench.scenarios import Recorder

RATE = Ratio(name="rate", scenario="drain", figure=("no-op", "us"), against=[("no-op", "them")], at_least=3.0)
COST = Ratio(
    name="cost", scenario="bulk", figure=("insert", "us"), against=[("insert", "none")], at_most=2.5, tolerance=0.2
)
DELAY = Ratio(
    name="delay",
    scenario="latency",
    figure=("p50", "us"),
    against=[("p50", "them")],
    at_most=3.0,
    difference=True,
    tolerance=2.0,
)


def figure(scenario: str, measure: str, system: str, *runs: float) -> Result:
    """Return a figure with these runs."""
    return Result(scenario=scenario, measure=measure, system=system, unit="", runs=runs)


def drained(us: float, them: float) -> Outcome:
    """Return an outcome with two rates."""
    return Outcome(results=[figure("drain", "no-op", "us", us), figure("drain", "no-op", "them", them)])


def test_a_ratio_is_of_medians_and_its_spread_of_the_runs_furthest_apart() -> None:
    """Of (90, 100, 400) against (10, 20, 30): 100 / 20, from 90 / 30 to 400 / 10."""
    outcome = Outcome(
        results=[figure("drain", "no-op", "us", 400, 90, 100), figure("drain", "no-op", "them", 30, 10, 20)]
    )
    value = RATE.of(outcome)
    assert value is not None
    assert (value.value, value.low, value.high) == (5, 3, 40)


def test_a_ratio_is_against_the_best_of_the_alternatives() -> None:
    """For a rate that is the fastest, for a cost the cheapest."""
    rate = Ratio(name="", scenario="s", figure=("m", "us"), against=[("m", "a"), ("m", "b"), ("m", "c")], at_least=1)
    cost = Ratio(name="", scenario="s", figure=("m", "us"), against=[("m", "a"), ("m", "b"), ("m", "c")], at_most=1)
    outcome = Outcome(results=[figure("s", "m", "us", 100), figure("s", "m", "a", 10), figure("s", "m", "b", 50)])
    faster, cheaper = rate.of(outcome), cost.of(outcome)
    assert faster is not None
    assert cheaper is not None
    assert (faster.value, cheaper.value) == (2, 10)


def test_a_ratio_without_a_figure_is_none() -> None:
    """Nothing is invented for what failed."""
    assert RATE.of(Outcome(results=[figure("drain", "no-op", "us", 1)])) is None


@pytest.mark.parametrize(
    ("ratio", "stored", "just_passes", "is_worse"),
    [(RATE, 10.0, 7.1, 6.9), (COST, 2.0, 2.3, 2.5), (DELAY, -1.0, 0.9, 1.1)],
    ids=["a rate that falls", "a cost that rises", "a delay that grows"],
)
def test_worse_is_what_moves_the_wrong_way_beyond_the_tolerance(
    ratio: Ratio, stored: float, just_passes: float, is_worse: float
) -> None:
    """Better is never worse, however far it moves."""
    assert not comparison.is_worse(ratio, stored, just_passes)
    assert comparison.is_worse(ratio, stored, is_worse)
    better = 1000 * stored if ratio is RATE else stored - 1.5
    assert not comparison.is_worse(ratio, stored, better)


def test_a_comparison_names_what_got_worse_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both figures, and in the last line, which is what a reader of a log sees."""
    monkeypatch.setattr(comparison, "RATIOS", (COST, RATE))
    outcome = drained(us=20, them=10)
    outcome.results += [figure("bulk", "insert", "us", 20), figure("bulk", "insert", "none", 10)]
    verdicts = comparison.compare({"cost": 2.0, "rate": 5.0}, outcome, ["bulk", "drain"])
    told = comparison.told(verdicts).splitlines()
    assert told == ["WORSE  rate: 2.00×, stored 5.00×", "ok     cost: 2.00×, stored 2.00×", "1 got worse: rate"]


def test_what_could_not_be_measured_counts_as_worse_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that passes because a scenario fails would guard nothing."""
    monkeypatch.setattr(comparison, "RATIOS", (RATE,))
    failed = Outcome(failures=[Failure(scenario="drain", system="us", why="MeasurementError: not within 5 s\nmore")])
    (verdict,) = comparison.compare({"rate": 5.0}, failed, ["drain"])
    assert verdict.worse
    assert verdict.line == "WORSE  rate: not measured, stored 5.00× (us: MeasurementError: not within 5 s)"


def test_only_scenarios_that_were_asked_for_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left out on purpose is not missing."""
    monkeypatch.setattr(comparison, "RATIOS", (RATE, COST))
    verdicts = comparison.compare({"rate": 2.0, "cost": 2.0}, drained(us=20, them=10), ["drain"])
    assert [one.ratio.name for one in verdicts] == ["rate"]


def test_stored_ratios_of_some_scenarios_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline can be renewed scenario by scenario."""
    monkeypatch.setattr(comparison, "RATIOS", (RATE, COST))
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"ratios": {"cost": 2.25, "rate": 1.0}}))
    comparison.store(file, drained(us=50, them=10))
    assert comparison.load(file) == {"cost": 2.25, "rate": 5.0}


def test_a_missing_file_of_stored_ratios_says_how_to_make_one(tmp_path: Path) -> None:
    """Rather than that nothing got worse."""
    with pytest.raises(SystemExit, match="--quick --baseline"):
        comparison.load(tmp_path / "baseline.json")


def test_a_second_run_replaces_what_it_measured_again(tmp_path: Path) -> None:
    """Figures of other scenarios stay, through the file, and a failure that was overcome goes."""
    file = tmp_path / "results.json"
    first = drained(us=20, them=10)
    first.results.append(figure("bulk", "insert", "us", 3, 1, 2))
    first.failures.append(Failure(scenario="idle", system="us", why="it was"))
    first.scales = {"drain": "full", "bulk": "full"}
    results.write(file, first)
    second = Outcome(results=[figure("drain", "no-op", "us", 30), figure("idle", "CPU", "us", 1)])
    merged = results.read(file).merge(second)
    found = {one.key: one.runs for one in merged.results}
    assert found == {
        ("drain", "no-op", "them"): (10,),
        ("bulk", "insert", "us"): (3, 1, 2),
        ("drain", "no-op", "us"): (30,),
        ("idle", "CPU", "us"): (1,),
    }
    assert merged.failures == []
    assert merged.scales == {"drain": "full", "bulk": "full"}


def test_figures_that_a_failure_follows_are_kept_apart_from_it() -> None:
    """A system that failed in a new run has no figure of an old one."""
    failed = Outcome(failures=[Failure(scenario="drain", system="us", why="it hung")])
    merged = drained(us=20, them=10).merge(failed)
    assert merged.find("drain", "no-op", "us") is None
    assert merged.find("drain", "no-op", "them") is not None
    assert [one.why for one in merged.failures] == ["it hung"]


def test_a_percentile_is_a_value_that_occurred() -> None:
    """Of a hundred values the 99th is not the largest."""
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [50, 95, 99]
    assert percentile([7.0], 99) == 7.0


def test_the_report_goes_between_its_markers_and_touches_nothing_else() -> None:
    """Written twice it is the same page."""
    page = f"# Mine\n\nabove\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nbelow\n"
    once = report.inserted(page, "## New\n")
    assert once == f"# Mine\n\nabove\n\n{report.BEGIN}\n\n## New\n\n{report.END}\n\nbelow\n"
    assert report.inserted(once, "## New\n") == once


def test_a_page_without_markers_is_not_overwritten() -> None:
    """What somebody has written by hand is not ours."""
    with pytest.raises(ValueError, match="measured: begin"):
        report.inserted("# Mine\n", "## New\n")


def test_the_report_begins_with_the_ratios_beside_their_goals() -> None:
    """Reached or not, and whatever has no figure says so."""
    ratio = next(one for one in RATIOS if one.at_least == 35)
    outcome = Outcome(
        results=[
            figure(ratio.scenario, *ratio.figure, 300, 330, 360),
            figure(ratio.scenario, *ratio.against[0], 10, 10, 10),
        ],
        failures=[Failure(scenario="idle", system="a peer", why="ended with code 1: | trace")],
    )
    told = report.text(outcome)
    assert told.startswith("## Ratios\n")
    row = next(line for line in told.splitlines() if line.startswith(f"| {ratio.name}"))
    assert row == f"| {ratio.name} | 1× | at least 35× | 33.0× (30.0–36.0) | **not reached** |"
    assert "| not measured |" in told
    assert "- not measured: a peer: ended with code 1: / trace" in told


def test_a_measurement_of_which_one_run_failed_has_no_figure() -> None:
    """The runs before it say nothing of those that hang; other measures of the system stand."""

    def hang() -> None:
        raise TimeoutError("not within 30 s")

    record = Recorder("latency")
    record.add("20/s p50", "a peer", "ms", [3.0, 4.0, 5.0])
    with record.measuring("a peer", "500/s"):
        hang()
    record.add("500/s p50", "a peer", "ms", [9.0])
    assert [one.measure for one in record.outcome.results] == ["20/s p50"]
    assert [one.what for one in record.outcome.failures] == ["a peer, 500/s"]
