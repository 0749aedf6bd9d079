"""Metrics for Prometheus: counted from our own signals, added up over processes, served by the one above them.

Owns what is measured of bridges and workers, its names and its pages. Measures nothing unless asked to, and touches no
notification. prometheus_client (the extra `[metrics]`) is only what writes the page: it adds nothing up.

Reading order: `table` (the metrics), `receivers` (from signals to numbers), `tallies` (numbers that processes add up),
`exposition` (the page), `worker` (a Celery worker's, and a writer's).

A bridge's process counts for itself and hands on differences (through the line that joins it with its supervisor); the
supervisor adds them up and serves the sum, so that a process started anew makes no counter go down.
"""

from __future__ import annotations

from pgpubsub_celery.metrics.exposition import Collector, available, page
from pgpubsub_celery.metrics.receivers import Meter
from pgpubsub_celery.metrics.table import LAGS, METRICS, Metric
from pgpubsub_celery.metrics.tallies import Tally
from pgpubsub_celery.metrics.worker import install_worker_metrics, install_writer_metrics, start

__all__ = [
    "LAGS",
    "METRICS",
    "Collector",
    "Meter",
    "Metric",
    "Tally",
    "available",
    "install_worker_metrics",
    "install_writer_metrics",
    "page",
    "start",
]
