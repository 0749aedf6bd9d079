"""What stands in the table, for `/metrics`: read every few seconds, beside the bridge.

Owns a thread with a connection of its own in one of the processes that listen, so that counting holds up no claim. What
it reads is bounded, whatever the table holds. Never changes anything; where it cannot read, there are no gauges.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from pgpubsub_celery import insights
from pgpubsub_celery.drivers import connect_arguments
from pgpubsub_celery.metrics import Tally, table
from pgpubsub_celery.metrics.tallies import Gauge
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.supervisor import StopEvent

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""Between two readings."""


class Reader(threading.Thread):
    """Reads the gauges into a tally until the process is asked to stop."""

    def __init__(self, settings: Settings, tally: Tally, flush: Callable[[], object], stopping: StopEvent) -> None:
        """`flush` hands the tally on."""
        super().__init__(name="pgpubsub-gauges", daemon=True)
        self._settings = settings
        self._tally = tally
        self._flush = flush
        self._stopping = stopping

    def run(self) -> None:
        """Connect, read now and then; connect anew when that fails."""
        url = self._settings.require_database_url()
        engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=connect_arguments(url, "pgpubsub-gauges"),
        )
        while not self._stopping.is_set():
            try:
                with engine.connect() as connection:
                    while not self._stopping.is_set():
                        self._tally.gauge(read(connection, self._settings.schema))
                        self._flush()
                        self._stopping.wait(SECONDS)
            except SQLAlchemyError as exc:
                # The bridge says that the database is away; nobody needs to hear it twice.
                logger.debug("gauges are not read: %s", type(exc).__name__)
                self._stopping.wait(SECONDS)


def read(connection: Connection, schema: str) -> Iterator[Gauge]:
    """Return the gauges of each listener, and of channels that have none yet."""
    for one in insights.read_counts(connection, schema):
        labels = (one.channel, one.listener or "")
        for state, number in (
            ("waiting", one.waiting),
            ("delayed", one.delayed),
            ("in_flight", one.in_flight),
            ("held", one.held),
            ("failed", one.failed),
        ):
            yield table.STORED, (*labels, state), float(number)
        yield table.OLDEST, labels, one.oldest_seconds or 0.0
        if one.run_seconds is not None:
            yield table.RUN_TIME, labels, one.run_seconds
