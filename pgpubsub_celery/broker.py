"""Publishing task messages through kombu: a batch goes in, an outcome for each message comes out.

Owns the bridge's connection to the broker and what counts as published: the broker's own confirmation, in time. An
outcome that is unknown counts as not published, because the row then comes again and a duplicate is recognised, while a
lost message is not. Never touches the database.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import kombu.exceptions
from celery import Celery
from kombu import Connection, Producer
from kombu.exceptions import KombuError
from kombu.exceptions import OperationalError as KombuOperationalError

from pgpubsub_celery.errors import BrokerError

logger = logging.getLogger(__name__)

_OUTAGES: tuple[type[BaseException], ...] = (OSError, KombuOperationalError)
if hasattr(kombu.exceptions, "BatchPublishError"):  # kombu 5.7
    _OUTAGES += (kombu.exceptions.BatchPublishError,)

Publication = Callable[[Celery, Producer], None]
"""Publishes one message with the given producer."""


class Broker:
    """One connection for publishing, made again after each failure."""

    def __init__(self, app: Celery, *, timeout: float) -> None:
        """`timeout`: seconds for the broker to accept a connection and to confirm a message."""
        self._app = app
        self._timeout = timeout
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        # Remembered beyond the connection, which is dropped before anybody asks what its error meant.
        self._outage_errors: tuple[type[BaseException], ...] = _OUTAGES

    @staticmethod
    def check(app: Celery) -> None:
        """Raise BrokerError when the configured URL can never work: unknown transport or unreadable."""
        url = app.conf.broker_write_url or app.conf.broker_url
        try:
            with app.connection_for_write() as connection:
                _ = connection.transport_cls
                connection.get_transport_cls()
        except (KeyError, ImportError, ValueError, AttributeError) as exc:
            scheme = str(url).partition("://")[0]
            raise BrokerError(
                f"The broker URL's kind {scheme!r} cannot be used ({exc}): expected for example "
                "'redis://host:6379/0' or 'amqp://user:password@host:5672//'."
            ) from exc

    def publish(self, publications: Sequence[Publication]) -> list[BaseException | None]:
        """Publish in order; return None for each confirmed message, else why it does not count as published.

        Redis: one pipeline, confirmed by its reply. RabbitMQ: publisher confirms, awaited for each message. After a
        connection error the rest is not tried. One message that cannot be built or encoded does not hold up others.
        """
        outcomes: list[BaseException | None] = [None] * len(publications)
        position = 0
        pipelined = False
        try:
            producer = self._acquire()
            pipelined = _pipelines(producer)
            with producer.batch(max_size=max(1, len(publications))) if pipelined else contextlib.nullcontext():
                for position, publication in enumerate(publications):
                    try:
                        publication(self._app, producer)
                    except self._outage_errors:
                        raise
                    except Exception as exc:  # noqa: BLE001 - one message's error is its outcome
                        outcomes[position] = exc
        except Exception as exc:
            self.close()
            if not self.is_outage(exc):
                logger.exception("Publishing failed in an unexpected way")
            # A pipeline's failure leaves all its messages unknown; without one, those before were confirmed singly.
            first = 0 if pipelined else position
            outcomes[first:] = [outcome or exc for outcome in outcomes[first:]]
        return outcomes

    def reachable(self) -> BaseException | None:
        """Try to connect; None when the broker answers, else the error."""
        try:
            self._acquire()
        except Exception as exc:  # noqa: BLE001 - whatever the transport raises is the answer
            self.close()
            return exc
        return None

    def is_outage(self, error: BaseException) -> bool:
        """Whether `error` is the broker's, not the message's: connection lost, refused, full, too slow."""
        return isinstance(error, self._outage_errors)

    def close(self) -> None:
        """Drop the connection; the next publish makes a new one."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except (OSError, KombuError, ValueError, AttributeError) as exc:
                logger.debug("Closing the broker connection failed: %s", exc)

    def _transport_options(self) -> dict[str, Any]:
        options = dict(self._app.conf.broker_transport_options or {})
        url = str(self._app.conf.broker_write_url or self._app.conf.broker_url or "")
        if url.startswith(("redis", "sentinel", "valkey")):
            # Without these a hanging server would hang the bridge.
            options.setdefault("socket_timeout", self._timeout)
            options.setdefault("socket_connect_timeout", self._timeout)
            options.setdefault("socket_keepalive", True)
        elif url.startswith(("amqp", "pyamqp")):
            options["confirm_publish"] = True
            options.setdefault("read_timeout", self._timeout)
            options.setdefault("write_timeout", self._timeout)
        return options

    def _acquire(self) -> Producer:
        if self._producer is None:
            connection = self._app.connection_for_write(
                connect_timeout=self._timeout, transport_options=self._transport_options()
            )
            self._connection = connection
            errors = (*connection.connection_errors, *connection.channel_errors)
            # Kombu's Redis transport counts KeyError too, which here would be a message that cannot be built.
            self._outage_errors = (*_OUTAGES, *(error for error in errors if error is not KeyError))
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=self._timeout)
            self._producer = self._app.amqp.Producer(connection, auto_declare=False)
        return self._producer


def _pipelines(producer: Producer) -> bool:
    """Whether what is published within `producer.batch()` goes out as one (kombu 5.7 on Redis)."""
    return bool(getattr(producer, "supports_batch_publish", False))
