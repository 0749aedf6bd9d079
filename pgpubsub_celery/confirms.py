"""RabbitMQ's publisher confirms, pipelined: a whole batch is published, then its confirmations are awaited together.

Owns one channel in confirm mode: which delivery tag is which publication's, what the broker has said of each (ack,
nack, return, or a closed channel), and what it has not said in time. Waiting for each message by itself, as kombu does,
costs a round trip and a write to the broker's disk each.

Never decides what an error means for a notification: that is `broker`'s and `dispatch`'s. Queues are declared on a
channel of their own, so that one that was declared otherwise before (406) takes no other message with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from amqp import spec
from amqp.exceptions import Blocked, ChannelError, MessageNacked, RecoverableConnectionError
from kombu import Connection, Producer
from kombu.common import maybe_declare

logger = logging.getLogger(__name__)

_CORK: int | None = getattr(socket, "TCP_CORK", None)
"""Of Linux."""

UNKNOWN: Any = object()
"""The outcome of a publication that the broker has said nothing of."""

DELAY_HEADER = "x-delay"
"""Messages with it wait in an exchange (rabbitmq_delayed_message_exchange), which calls them unroutable meanwhile."""

Publication = Callable[[Producer], None]
"""Publishes one message, or several, with the given producer."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """What errors mean that come out of a publication."""

    refusals: tuple[type[BaseException], ...]
    """The broker works, and does not want this one."""
    outages: tuple[type[BaseException], ...]
    """The broker does not work."""


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What is being published, and what became of it so far."""

    publications: Sequence[Publication]
    errors: Errors
    outcomes: list[Any]


class Confirms:
    """A connection's channel in confirm mode; useless when the connection has gone.

    Not for several threads at once. All of its state is written while a method of its own is reading from the
    connection or publishing.
    """

    def __init__(self, connection: Connection, producer: Producer, *, timeout: float) -> None:
        """Prepare `producer`, which has been made for `connection`; `timeout`: seconds to wait for confirmations."""
        self._timeout = timeout
        self._producer = producer
        self._channel: Any = producer.channel
        self._declaring: Any = connection.channel()
        self._tag = 0
        self._pending: dict[int, int] = {}
        """Delivery tags that nothing was heard of, in order, and the positions of their publications."""
        self._failed: dict[int, Exception] = {}
        self._ids: dict[str, int] = {}
        self._position = 0
        self._closed: ChannelError | None = None
        self._blocked = False
        self.is_outdated = False
        """Somebody has deleted a queue: what this connection has declared is to be declared again, by another one."""
        # Kept: kombu would replace it, and amqp reconnect, as soon as somebody asks for one that is gone.
        self._amqp: Any = connection.connection
        self._amqp.on_blocked = self._on_blocked
        self._amqp.on_unblocked = self._on_unblocked
        self._send: Callable[..., Any] = self._channel.basic_publish
        # As amqp itself does for confirms that are awaited one by one.
        self._channel.basic_publish = self._publish
        producer.maybe_declare = self._declare
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)

    def refresh(self) -> None:
        """Read what the broker has sent meanwhile, without waiting.

        Raises:
            Blocked: the broker takes no messages for now (its memory or disk is full); the connection is good.
            OSError, AMQPError: the connection is gone.
        """
        with contextlib.suppress(TimeoutError):
            while True:
                self._drain(0)
        self._require_unblocked()

    def publish(self, publications: Sequence[Publication], errors: Errors) -> tuple[list[Any], Exception | None]:
        """Publish all; return for each None (confirmed), why not, or UNKNOWN; and the error that left some unknown.

        One deadline for all confirmations. Where the broker closes the channel because of one message, those that it
        has not confirmed are published once more, each by itself: that finds the one, and costs a duplicate for each
        that had arrived after all.
        """
        batch = _Batch(publications, errors, [UNKNOWN] * len(publications))
        try:
            self._publish_all(batch)
        except Exception as exc:  # noqa: BLE001 - told with the outcomes
            return batch.outcomes, exc
        return batch.outcomes, None

    def _publish_all(self, batch: _Batch) -> None:
        rest = list(range(len(batch.outcomes)))
        self._pending.clear()
        while rest:
            self._require_unblocked()
            self._reopen()
            sent = self._pipeline(batch, rest)
            rest = rest[len(sent) :]
            if self._closed is not None:
                self._find(batch, [position for position in sent if batch.outcomes[position] is UNKNOWN])

    def _find(self, batch: _Batch, suspects: Sequence[int]) -> None:
        """Publish each by itself: the channel is closed by the one."""
        deadline = time.monotonic() + self._timeout
        for position in suspects:
            self._reopen()
            self._pipeline(batch, [position], deadline)
            if self._closed is not None and batch.outcomes[position] is UNKNOWN:
                batch.outcomes[position] = self._closed

    def _pipeline(self, batch: _Batch, positions: Sequence[int], deadline: float | None = None) -> list[int]:
        """Publish until the broker closes the channel or is full; return what was published, with its outcomes."""
        self._failed.clear()
        self._ids.clear()
        sent: list[int] = []
        self._cork(True)
        try:
            for position in positions:
                self._position = position
                try:
                    batch.publications[position](self._producer)
                except Exception as exc:
                    if self._is_own(exc):
                        break
                    if not isinstance(exc, batch.errors.refusals) and self._is_outage(exc, batch.errors):
                        raise
                    self._failed[position] = exc
                if self._closed is not None:
                    break
                sent.append(position)
                if self._blocked:
                    break
            # Several messages of one publication, and the channel closed in between.
            if self._closed is not None and self._position not in sent and self._position in self._unheard():
                sent.append(self._position)
            self._wait(len(sent), deadline)
        finally:
            unheard = self._unheard()
            for position in sent:
                if position in self._failed:
                    batch.outcomes[position] = self._failed[position]
                elif position not in unheard:
                    batch.outcomes[position] = None
        return sent

    def _unheard(self) -> set[int]:
        return set(self._pending.values())

    def _wait(self, published: int, deadline: float | None) -> None:
        self._cork(False)
        deadline = time.monotonic() + self._timeout if deadline is None else deadline
        while self._pending and self._closed is None:
            try:
                self._drain(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self._require_unblocked()
                raise TimeoutError(
                    f"the broker has not confirmed {len(self._unheard())} of {published} message(s) within "
                    f"{self._timeout:g} s"
                ) from None

    def _drain(self, timeout: float) -> None:
        if not self._amqp.connected:
            raise RecoverableConnectionError("the connection to the broker is lost")
        try:
            self._amqp.drain_events(timeout=timeout)
        except ChannelError as exc:
            if not self._is_own(exc):
                raise

    def _is_own(self, exc: Exception) -> bool:
        """Whether the broker has closed the channel, because of some message that it was sent before."""
        if isinstance(exc, ChannelError) and exc.method_sig == spec.Basic.Publish:
            self._closed = exc
        return exc is self._closed

    def _is_outage(self, exc: Exception, errors: Errors) -> bool:
        """Whether the error is the connection's, in whatever words: amqp's may be an AttributeError."""
        return isinstance(exc, errors.outages) or not self._amqp.connected

    def _require_unblocked(self) -> None:
        if self._blocked:
            raise Blocked("the broker takes no messages for now: its memory or its disk is full (see its alarms)")

    def _cork(self, corked: bool) -> None:
        """Let the system gather what is written into full packets: half of a message's price was to wake the broker."""
        if _CORK is not None and self._amqp.connected:
            with contextlib.suppress(OSError):
                self._amqp.sock.setsockopt(socket.IPPROTO_TCP, _CORK, int(corked))

    def _reopen(self) -> None:
        """Go on after the broker has closed the channel: amqp has opened it again, in ordinary mode."""
        if self._closed is not None:
            self._closed = None
            self._pending.clear()
            self._tag = 0
            self._channel.confirm_select()

    # What stands in the way of kombu and amqp

    def _publish(self, message: Any, *args: Any, **options: Any) -> Any:
        if self._closed is not None:
            raise self._closed
        headers = message.properties.get("application_headers") or {}
        if DELAY_HEADER not in headers:
            # What no queue takes would be confirmed like everything else, and be nowhere.
            options["mandatory"] = True
        result = self._send(message, *args, **options)
        self._tag += 1
        self._pending[self._tag] = self._position
        id = message.properties.get("correlation_id")
        if id is not None:
            self._ids[id] = self._position
        return result

    def _declare(self, entity: Any, retry: bool = False, **_: Any) -> Any:
        if not entity:
            return None
        self._cork(False)
        declared = maybe_declare(entity, self._declaring)
        self._cork(True)
        return declared

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._heard(tag, multiple, None)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._heard(tag, multiple, MessageNacked("the broker has refused the message: its queue is full"))

    def _heard(self, tag: int, multiple: bool, error: Exception | None) -> None:
        tags = [tag]
        if multiple:
            tags = []
            for pending in self._pending:
                if pending > tag:
                    break
                tags.append(pending)
        for one in tags:
            position = self._pending.pop(one, None)
            if position is not None and error is not None:
                self._failed.setdefault(position, error)

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        """No queue took a message; the confirmation that follows says only that the broker has seen it."""
        position = self._ids.get(message.properties.get("correlation_id"))
        told = f"no queue takes messages of exchange {exchange!r} with routing key {routing_key!r}"
        if position is None:
            logger.warning("%s, and one that came back is not known here", told)
        else:
            self._failed.setdefault(position, ChannelError(told))
        self.is_outdated = True

    def _on_blocked(self, _: str) -> None:
        self._blocked = True

    def _on_unblocked(self) -> None:
        self._blocked = False
