"""Publishing task messages through kombu: a batch goes in, an outcome for each message comes out.

Owns the bridge's connection to the broker and what counts as published: the broker's own confirmation, in time. An
outcome that is unknown counts as not published, because the row then comes again and a duplicate is recognised, while a
lost message is not. Never touches the database.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import kombu.exceptions
from amqp.exceptions import Blocked, ChannelError, MessageNacked
from celery import Celery
from celery.result import denied_join_result
from kombu import Connection, Producer
from kombu.exceptions import KombuError
from kombu.exceptions import OperationalError as KombuOperationalError

from pgpubsub_celery.confirms import UNKNOWN, Confirms, Errors
from pgpubsub_celery.errors import BrokerError

logger = logging.getLogger(__name__)

_BATCH_ERRORS: tuple[type[BaseException], ...] = ()
if hasattr(kombu.exceptions, "BatchPublishError"):  # kombu 5.7
    _BATCH_ERRORS = (kombu.exceptions.BatchPublishError,)
_OUTAGES = (OSError, KombuOperationalError, MessageNacked, *_BATCH_ERRORS)

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
        self._confirms: Confirms | None = None
        # Remembered beyond the connection, which is dropped before anybody asks what its error meant.
        self._outage_errors: tuple[type[BaseException], ...] = _OUTAGES
        self._refusals: tuple[type[BaseException], ...] = (MessageNacked,)

    @staticmethod
    def check(app: Celery) -> None:
        """Raise BrokerError when the configured URL can never work: unknown kind, missing driver, or unreadable."""
        url = app.conf.broker_write_url or app.conf.broker_url
        expected = "expected for example 'redis://host:6379/0' or 'amqp://user:password@host:5672//'."
        try:
            with app.connection_for_write() as connection:
                connection.get_transport_cls()
        except ValueError:
            # What could not be read may be a part of the password.
            raise BrokerError(
                f"The broker URL cannot be read: {expected} Special characters in user and password are to be "
                "percent-encoded."
            ) from None
        except Exception as exc:  # whatever the transport's module raises
            scheme = str(url).partition("://")[0]
            raise BrokerError(f"The broker URL's kind {scheme!r} cannot be used ({_told(exc)}): {expected}") from exc

    def publish(self, publications: Sequence[Publication]) -> list[BaseException | None]:
        """Publish in order; return None for each confirmed message, else why it does not count as published.

        Redis: one pipeline, confirmed by its reply. RabbitMQ: publisher confirms, awaited together (`confirms`).
        After a connection error the rest is not tried. One message that cannot be built or encoded, or that RabbitMQ
        refuses (its queue is full, gone, or has other arguments than declared), does not hold up others.
        """
        try:
            self._acquire(fresh=True)
        except Exception as exc:  # noqa: BLE001 - whatever it is, no message is to blame
            self._drop_after(exc)
            return [self._outage(exc)] * len(publications)
        if self._confirms is None:
            return self._publish_unconfirmed(publications)
        return self._publish_confirmed(self._confirms, publications)

    def _publish_confirmed(self, confirms: Confirms, publications: Sequence[Publication]) -> list[BaseException | None]:
        with denied_join_result():
            outcomes, error = confirms.publish(
                [functools.partial(publication, self._app) for publication in publications],
                Errors(refusals=self._refusals, outages=self._outage_errors),
            )
        if error is None:
            if confirms.is_outdated:
                self.close()
            return outcomes
        self._drop_after(error)
        outage = self._outage(error)
        return [outage if outcome is UNKNOWN else outcome for outcome in outcomes]

    def _publish_unconfirmed(self, publications: Sequence[Publication]) -> list[BaseException | None]:
        """Publish where the transport tells of what it has published at once, or of a pipeline as one."""
        outcomes: list[BaseException | None] = [None] * len(publications)
        position = 0
        pipelined = False
        try:
            producer = self._acquire()
            pipelined = _pipelines(producer)
            # Sent at its end only: an error of the pipeline must not come out of one message's publication.
            batch = producer.batch(max_size=sys.maxsize) if pipelined else contextlib.nullcontext()
            # Denied, or each message would subscribe to its result: the result backend's outages are not the broker's.
            with denied_join_result(), batch:
                for position, publication in enumerate(publications):
                    try:
                        publication(self._app, producer)
                    except self._outage_errors as exc:
                        if pipelined or not isinstance(exc, self._refusals):
                            raise
                        outcomes[position] = exc
                        self.close()  # with the refusal the broker has closed the channel
                        producer = self._acquire()
                    except Exception as exc:  # noqa: BLE001 - one message's error is its outcome
                        outcomes[position] = exc
        except Exception as exc:  # noqa: BLE001 - whatever it is, no message is to blame
            self.close()
            outage = self._outage(exc)
            # A pipeline's failure leaves all its messages unknown; without one, those before were confirmed singly.
            first = 0 if pipelined else position
            outcomes[first:] = [outcome or outage for outcome in outcomes[first:]]
        return outcomes

    def _outage(self, error: Exception) -> Exception:
        """Return the error as what it is, the broker's, with the reason that kombu's own may hide."""
        if self.is_outage(error) and not isinstance(error, _BATCH_ERRORS) and str(error):
            return error
        if not self.is_outage(error):
            logger.error("Publishing failed in an unexpected way", exc_info=error)
        reason = error.__cause__ or error
        # redis-py quotes the command before the reason: it is the message.
        outage: Exception = KombuOperationalError(
            f"{type(reason).__name__}: {str(reason).rpartition('caused error: ')[2]}"
        )
        outage.__cause__ = error
        return outage

    def reachable(self) -> BaseException | None:
        """Try to connect; None when the broker answers and takes messages, else the error."""
        try:
            self._acquire(fresh=True)
        except Exception as exc:  # noqa: BLE001 - whatever the transport raises is the answer
            self._drop_after(exc)
            return exc
        return None

    def _drop_after(self, error: Exception) -> None:
        """Drop the connection, unless the broker has only said that it is full: it will say when it is not any more."""
        if isinstance(error, Blocked):
            return
        if self._confirms is not None and self._connection is not None:
            # Without a farewell, which a broker that hangs does not answer.
            self._connection.collect()
        self.close()

    def is_outage(self, error: BaseException) -> bool:
        """Whether `error` is the broker's, not the message's: connection lost, refused, full, too slow."""
        return isinstance(error, self._outage_errors)

    @staticmethod
    def is_refusal(error: BaseException) -> bool:
        """Whether RabbitMQ works and has refused this very message: its queue is full, or not as declared."""
        return isinstance(error, (MessageNacked, ChannelError))

    def close(self) -> None:
        """Drop the connection; the next publish makes a new one."""
        connection, self._connection, self._producer, self._confirms = self._connection, None, None, None
        if connection is not None:
            try:
                connection.release()
            except (OSError, KombuError, ValueError, AttributeError) as exc:
                logger.debug("Closing the broker connection failed: %s", exc)

    def _acquire(self, *, fresh: bool = False) -> Producer:
        """Return the producer; `fresh`: where the broker can say so, not one whose connection was lost meanwhile."""
        if fresh and self._confirms is not None:
            try:
                self._confirms.refresh()
            except Blocked:
                raise
            except Exception as exc:  # noqa: BLE001 - it cost no message
                logger.debug("The broker connection was lost while there was nothing to publish: %s", exc)
                self.close()
        if self._producer is None:
            # Without a heartbeat, which nobody would send while there is nothing to publish.
            connection = self._app.connection_for_write(connect_timeout=self._timeout, heartbeat=0)
            self._connection = connection
            connection.transport_options = {**connection.transport_options, **self._transport_options(connection)}
            errors = (*connection.connection_errors, *connection.channel_errors)
            # Kombu's Redis transport counts KeyError too, which here would be a message that cannot be built.
            self._outage_errors = (*_OUTAGES, *(error for error in errors if error is not KeyError))
            self._refusals = (MessageNacked, *connection.channel_errors)
            connection.ensure_connection(**self._attempts(connection), timeout=self._timeout)
            self._producer = self._app.amqp.Producer(connection, auto_declare=False)
            if connection.transport.driver_name == "py-amqp":
                self._confirms = Confirms(connection, self._producer, timeout=self._timeout)
        return self._producer

    def _transport_options(self, connection: Connection) -> dict[str, Any]:
        """Return what keeps a broker that hangs from hanging the bridge, whatever the application sets for itself."""
        # For the channel, which connects once more where the connection was lost in between.
        options = self._attempts(connection)
        if connection.transport.driver_type == "redis":
            options |= {
                "socket_timeout": self._timeout,
                "socket_connect_timeout": self._timeout,
                "socket_keepalive": True,
                # Also what makes kombu publish in a pipeline: repeated, its commands might be executed twice.
                "retry_on_timeout": False,
            }
        elif connection.transport.driver_type == "amqp":
            # Each by itself, for other drivers than ours.
            confirm = connection.transport.driver_name != "py-amqp"
            options |= {"confirm_publish": confirm, "read_timeout": self._timeout, "write_timeout": self._timeout}
        return options

    @staticmethod
    def _attempts(connection: Connection) -> dict[str, Any]:
        """Connect twice, or to each of several brokers once, without a pause."""
        brokers = len(connection.alt or ())
        return {"max_retries": max(1, brokers), "interval_start": 0, "interval_step": 0, "interval_max": 0}


def _told(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _pipelines(producer: Producer) -> bool:
    """Whether what is published within `producer.batch()` goes out as one (kombu 5.7 on Redis)."""
    return bool(getattr(producer, "supports_batch_publish", False))
