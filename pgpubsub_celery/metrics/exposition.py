"""Numbers as Prometheus wants them.

Owns the page `/metrics`, and everything that is imported of prometheus_client, which is an extra.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pgpubsub_celery.metrics import table
from pgpubsub_celery.metrics.tallies import Gauge, Tally
from pgpubsub_celery.supervisor import Page, State

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

GAUGES_SECONDS = 60.0
"""How old gauges may be. Those that nobody reads any more are left out rather than shown as they once were."""


def available() -> bool:
    """Whether prometheus_client is installed."""
    return importlib.util.find_spec("prometheus_client") is not None


class Collector:
    """What a `prometheus_client` registry asks for metrics: register it where others are served already."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.states: Sequence[State] = ()
        """The processes of a supervisor, as they are now."""

    def collect(self) -> Iterator[Family]:
        """Return all that there is something of."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {}
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}

        def family(name: str) -> Any:
            metric = table.METRICS[name]
            if name not in families:
                families[name] = kinds[metric.kind](name, metric.help, labels=metric.labels)
            return families[name]

        for name, labels, number in self._tally.counts():
            family(name).add_metric(labels, number)
        for name, labels, numbers, total in self._tally.lags():
            family(name).add_metric(labels, buckets=_cumulative(numbers), sum_value=total)
        for name, labels, value in self._gauges():
            family(name).add_metric(labels, value)
        return iter([families[metric.name] for metric in table.TABLE if metric.name in families])

    def _gauges(self) -> Iterable[Gauge]:
        yield from self._tally.gauges(younger_than=GAUGES_SECONDS)
        if self.states:
            counted = Counter("listening" if one.alive and one.ready else "not listening" for one in self.states)
            for state in ("listening", "not listening"):
                yield table.PROCESSES, (state,), float(counted[state])


def _cumulative(numbers: Sequence[float]) -> list[tuple[str, float]]:
    total, cumulative = 0.0, []
    for bound, number in zip([*map(str, table.LAGS), "+Inf"], numbers, strict=True):
        total += number
        cumulative.append((bound, total))
    return cumulative


def page(collector: Collector) -> Page:
    """Return the page `/metrics`."""
    if not available():
        return Page("prometheus-client is not installed: pip install 'pgpubsub-celery[metrics]'\n", 501)
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    # Of this text format all versions are one; newer ones only escape more.
    return Page(generate_latest(registry).decode(), content_type="text/plain; version=0.0.4; charset=utf-8")
