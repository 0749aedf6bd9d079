"""The metrics' names: in the code, the documentation and the dashboard the same; and the adding up of their numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.metrics import LAGS, METRICS, Collector, Tally, install_worker_metrics, page
from pgpubsub_celery.metrics.tallies import pieces
from pgpubsub_celery.supervisor import State

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "pgpubsub.json").read_text())
NAME = re.compile(r"\bpgpubsub_\w+")


def samples_of(metric: str) -> set[str]:
    """Return the names of a metric's samples."""
    suffixes = ("_bucket", "_sum", "_count") if METRICS[metric].kind == "histogram" else ("",)
    return {metric + suffix for suffix in suffixes}


SAMPLES = {sample for metric in METRICS for sample in samples_of(metric)}


def test_the_documentation_s_table_is_the_code_s() -> None:
    """Name, type, labels, who serves it and what it means, in the same order."""
    lines = (DOCS / "metrics.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| `pgpubsub_")]
    assert table == [
        f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {one.where} | {one.help} |"
        for one in METRICS.values()
    ]


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_each_panel_of_the_dashboard_asks_for_metrics_that_exist(panel: dict[str, list[dict[str, str]]]) -> None:
    """And for labels that they have."""
    for target in panel["targets"]:
        asked = set(NAME.findall(target["expr"]))
        assert asked
        assert asked <= SAMPLES
        labels = {label for name in asked for label in METRICS[re.sub(r"_(bucket|sum|count)$", "", name)].labels}
        wanted = {*re.findall(r"(\w+)=~?\"", target["expr"]), *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
        assert wanted <= labels | {"instance", "le"}


def test_the_dashboard_leaves_no_metric_out() -> None:
    """What is not worth a panel is not worth measuring."""
    asked = {
        name for panel in DASHBOARD["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])
    }
    assert [metric for metric in METRICS if not asked & samples_of(metric)] == []


def test_names_say_what_they_count_and_in_which_unit() -> None:
    """As Prometheus has it: counters end in _total, times in _seconds."""
    for one in METRICS.values():
        assert re.fullmatch(r"pgpubsub_[a-z]+(_[a-z]+)*", one.name)
        assert one.name.endswith("_total") == (one.kind == "counter")
        assert one.kind != "histogram" or one.name.endswith("_seconds")


def test_tallies_of_several_processes_add_up() -> None:
    """In pieces or whole, in any order; a process that begins anew takes nothing away."""
    total = Tally(LAGS)
    for number in (1, 2):
        process = Tally(LAGS)
        process.add("claimed", ("a", "b"), number)
        process.observe("lag", ("a",), [0.001, 7.0, 10_000.0, -1.0])
        taken = process.take()
        assert taken is not None
        assert process.take() is None
        for piece in pieces(taken, 20 if number == 1 else 10_000):
            total.merge(piece)
    assert total.counts() == [("claimed", ("a", "b"), 3)]
    ((name, labels, buckets, seconds),) = total.lags()
    assert (name, labels) == ("lag", ("a",))
    assert seconds == pytest.approx(2 * 10_007.001)
    assert [(bound, number) for bound, number in zip((*LAGS, None), buckets, strict=True) if number] == [
        (0.005, 4),
        (10.0, 2),
        (None, 2),
    ]


def test_the_page_has_what_was_counted() -> None:
    """Buckets add up as Prometheus wants them, gauges are the last ones read, processes those of now."""
    tally = Tally(LAGS)
    tally.add("pgpubsub_notifications_claimed_total", ('a "quoted" name', "b\nc"), 3)
    tally.observe("pgpubsub_publish_lag_seconds", ("a", "b"), [0.02, 2.0])
    tally.gauge([("pgpubsub_oldest_due_seconds", ("a", "b"), 1.0)])
    tally.gauge([("pgpubsub_oldest_due_seconds", ("a", "b"), 7.5)])
    collector = Collector(tally)
    collector.states = [State(0, 1, alive=True, ready=True), State(1, None, alive=True, ready=False)]
    shown = page(collector)
    assert shown.status == 200
    found = {
        (
            sample.name,
            *(sample.labels[name] for name in sorted(sample.labels, key="channel listener state le".find)),
        ): sample.value
        for family in text_string_to_metric_families(shown.body)
        for sample in family.samples
    }
    assert found["pgpubsub_notifications_claimed_total", 'a "quoted" name', "b\nc"] == 3
    assert found["pgpubsub_publish_lag_seconds_bucket", "a", "b", "0.01"] == 0
    assert found["pgpubsub_publish_lag_seconds_bucket", "a", "b", "0.025"] == 1
    assert found["pgpubsub_publish_lag_seconds_bucket", "a", "b", "+Inf"] == 2
    assert found["pgpubsub_publish_lag_seconds_count", "a", "b"] == 2
    assert found["pgpubsub_oldest_due_seconds", "a", "b"] == 7.5
    assert (found["pgpubsub_processes", "listening"], found["pgpubsub_processes", "not listening"]) == (1, 1)


def test_gauges_that_nobody_reads_any_more_are_not_shown() -> None:
    """A number of long ago would look like one of now."""
    tally = Tally(LAGS)
    tally.gauge([("pgpubsub_oldest_due_seconds", ("a", "b"), 1.0)])
    assert len(tally.gauges(younger_than=60)) == 1
    assert tally.gauges(younger_than=-1) == []


def test_metrics_that_nobody_could_see_are_refused() -> None:
    """Neither a port nor a registry."""
    with pytest.raises(SettingsError, match="pass port, or registry"):
        install_worker_metrics(object())
