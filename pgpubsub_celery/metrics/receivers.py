"""What is counted, from the signals that tell of it.

Owns the translation of `signals` into numbers of `table`. Nothing is counted, and no signal is built, until a meter is
connected. Its receivers run in the middle of the work: they add, and now and then hand on what they have added.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from celery.utils.dispatch import Signal

from pgpubsub_celery import signals
from pgpubsub_celery.metrics import table
from pgpubsub_celery.metrics.tallies import Tally


class Meter:
    """Counts into a tally while it is connected."""

    def __init__(self, tally: Tally, flush: Callable[[], object] = lambda: None, *, always: bool = False) -> None:
        """`flush` hands the tally on: after each look of a bridge, or `always`, after each signal."""
        self._tally = tally
        self._flush = flush
        self._always = always
        self._connected: list[tuple[Signal, Callable[..., None]]] = []

    def connect(self) -> Meter:
        """Count from now on."""
        counted: dict[Signal, Callable[..., None]] = {
            signals.notification_claimed: self._claimed,
            signals.notification_published: self._timed(table.PUBLISHED, table.PUBLISH_LAG),
            signals.notification_acknowledged: self._timed(table.ACKNOWLEDGED, table.FINISH_LAG),
            signals.notification_released: self._released,
            signals.notification_retried: self._counting(table.RETRIED),
            signals.notification_failed: self._counting(table.FAILED),
            signals.notification_dropped: self._counting(table.DROPPED),
            signals.notification_superseded: self._counting(table.SUPERSEDED),
            signals.notification_discarded: self._mended(table.DISCARDED),
            signals.notification_recovered: self._mended(table.RECOVERED),
            signals.bridge_woken: self._woken,
            signals.bridge_interrupted: self._interrupted,
            signals.bridge_connected: self._bridge_connected,
            signals.bridge_looked: self._looked,
            signals.bridge_stopped: self._looked,
        }
        for signal, receiver in counted.items():
            signal.connect(receiver, weak=False)
            self._connected.append((signal, receiver))
        return self

    def disconnect(self) -> None:
        """Count no more."""
        for signal, receiver in self._connected:
            signal.disconnect(receiver)
        self._connected.clear()

    def __enter__(self) -> Meter:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.disconnect()
        self._flush()

    def _counted(self) -> None:
        if self._always:
            self._flush()

    def _claimed(self, sender: str, channel: str, count: int, lost: int, **_: Any) -> None:
        self._tally.add(table.CLAIMED, (channel, sender), count)
        self._tally.add(table.EXPIRED, (channel, sender), lost)
        self._counted()

    def _timed(self, counter: str, lag: str) -> Callable[..., None]:
        def receive(sender: str, channel: str, count: int, created_at: Sequence[datetime.datetime], **_: Any) -> None:
            self._tally.add(counter, (channel, sender), count)
            now = datetime.datetime.now(datetime.timezone.utc)
            self._tally.observe(lag, (channel, sender), [(now - moment).total_seconds() for moment in created_at])
            self._counted()

        return receive

    def _counting(self, counter: str) -> Callable[..., None]:
        def receive(sender: str, channel: str, count: int, **_: Any) -> None:
            self._tally.add(counter, (channel, sender), count)
            self._counted()

        return receive

    def _mended(self, counter: str) -> Callable[..., None]:
        def receive(channel: str | None, count: int, **_: Any) -> None:
            self._tally.add(counter, (channel or "",), count)
            self._counted()

        return receive

    def _released(self, sender: str, channel: str, count: int, reason: str, **_: Any) -> None:
        self._tally.add(table.RELEASED, (channel, sender, reason), count)
        self._counted()

    def _woken(self, reason: str, count: int, **_: Any) -> None:
        self._tally.add(table.WAKEUPS, (reason,), count)

    def _interrupted(self, what: str, **_: Any) -> None:
        self._tally.add(table.INTERRUPTIONS, (what,))
        self._flush()

    def _bridge_connected(self, again: bool, **_: Any) -> None:
        self._tally.add(table.RECONNECTS, (), 1 if again else 0)
        self._flush()

    def _looked(self, **_: Any) -> None:
        self._flush()
