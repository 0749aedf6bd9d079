"""What workers and writers measure: in a worker the children count, and its main process adds up and serves.

Owns the pipe between them. A child writes what it has counted at each step, in one piece that no other's can be mixed
with, and never waits for its main process; what does not fit now goes along with the next. So nothing is lost when a
child is killed, and no file is left behind.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from celery import Celery
from celery import signals as celery_signals

from pgpubsub_celery import signals
from pgpubsub_celery.errors import PgPubSubError, SettingsError
from pgpubsub_celery.metrics import exposition, table
from pgpubsub_celery.metrics.receivers import Meter
from pgpubsub_celery.metrics.tallies import Tally, pieces
from pgpubsub_celery.supervisor import Server, wait

logger = logging.getLogger(__name__)

PIECE = 4096
"""Bytes that a pipe takes in one piece: PIPE_BUF of Linux."""


class WorkerMetrics:
    """The numbers of one worker. Made in its main process, before there are children."""

    def __init__(self) -> None:
        self.tally = Tally(table.LAGS)
        """The sum. Written and read in the main process only."""
        self.pending = Tally(table.LAGS)
        """What this process has counted and not handed on yet."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._rest = b""
        self._thread: threading.Thread | None = None
        self._stopping = False  # written by whoever stops it
        self._meter = Meter(self.pending, self.hand_on, always=True)
        self.server: Server | None = None

    def start(self, host: str, port: int | None) -> None:
        """Count from now on, in this process and its children; serve `/metrics` where a port is given."""
        collector = exposition.Collector(self.tally)
        if port is not None:
            self.server = Server(host, port, {"/metrics": lambda: exposition.page(collector)})
            logger.info("metrics on port %d: /metrics", self.server.port)
        self._meter.connect()
        os.register_at_fork(after_in_child=self._forked)
        self._thread = threading.Thread(target=self._run, name="pgpubsub-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Count no more, and serve nothing."""
        self._meter.disconnect()
        self._stopping = True
        os.write(self._writer, b"\n")
        if self._thread is not None:
            self._thread.join()
        os.close(self._writer)
        os.close(self._reader)
        if self.server is not None:
            self.server.close()

    def hand_on(self) -> None:
        """Let the main process have what this one has counted.

        That may be the same: of pools without children, and for what it settles of those that were lost.
        """
        taken = self.pending.take()
        if taken is None:
            return
        for piece in pieces(taken, PIECE):
            try:
                os.write(self._writer, piece + b"\n")
            except OSError:
                # Full, or nobody is left to read: with the next.
                self.pending.merge(piece)

    def _forked(self) -> None:
        """In a child: what is its parent's to read, to serve and to hand on is left to it."""
        if self._stopping:
            return
        self.pending.clear()
        os.close(self._reader)
        for open_socket in self.server.sockets if self.server else ():
            open_socket.close()

    def _run(self) -> None:
        server = self.server
        while not self._stopping:
            try:
                readers = [self._reader, *(server.readers() if server else ())]
                ready = wait(readers, server.writers() if server else (), 5.0)
                if self._reader in ready:
                    self._read()
                if server is not None:
                    server.serve(ready)
            except Exception:
                logger.exception("Serving metrics failed, going on")

    def _read(self) -> None:
        *lines, self._rest = (self._rest + os.read(self._reader, 1 << 16)).split(b"\n")
        for line in filter(None, lines):
            self.tally.merge(line)


_running: WorkerMetrics | None = None  # written by the worker's main process, at its start


def start(host: str, port: int | None, registry: Any = None) -> WorkerMetrics | None:
    """Begin to measure in this process, a worker's main one, before it has children; once."""
    global _running
    if _running is not None:
        return _running
    if not exposition.available():
        logger.error("no metrics: prometheus-client is not installed: pip install 'pgpubsub-celery[metrics]'")
        return None
    metrics = WorkerMetrics()
    try:
        metrics.start(host, port)
    except PgPubSubError as exc:
        logger.error("no metrics: %s", exc)
        return None
    if registry is not None:
        registry.register(exposition.Collector(metrics.tally))
    _running = metrics
    return metrics


def install_worker_metrics(app: Celery, *, port: int | None = None, host: str = "", registry: Any = None) -> None:
    """Have every worker of `app` count what becomes of notifications; call it where the application is made.

    The setting `worker_metrics_port` does the same. One worker, one port: others on the same host need others.

    Args:
        app: the Celery application.
        port: where the worker's main process serves `/metrics`; 0 is any that is free, None none.
        host: the address; empty for all.
        registry: a `prometheus_client` registry of your own, served by yourself in the worker's main process.

    Raises:
        SettingsError: neither `port` nor `registry`: nobody could see what is counted.
    """
    if port is None and registry is None:
        raise SettingsError("install_worker_metrics(): pass port, or registry, or nobody can see what is counted.")

    def begin(instance: Any = None, **_: Any) -> None:
        # After logging is configured, and before there are children.
        if getattr(instance, "app", app) is app:
            start(host, port, registry)

    celery_signals.celeryd_after_setup.connect(begin, weak=False)


def install_writer_metrics(registry: Any = None) -> None:
    """Count what this process emits, by channel, in a `prometheus_client` registry (the default one, where None).

    Served by you, as your application's other metrics. A transaction that is rolled back later has been counted;
    changes of tables, which Postgres emits, are not.
    """
    from prometheus_client import REGISTRY, Counter

    metric = table.METRICS[table.EMITTED]
    emitted = Counter(metric.name, metric.help, metric.labels, registry=REGISTRY if registry is None else registry)

    def count(channel: str, count: int, **_: Any) -> None:
        emitted.labels(channel).inc(count)

    signals.notification_emitted.connect(count, weak=False)
