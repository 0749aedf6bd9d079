"""One link's life, awake and asleep: when to look, when to wait, when writers have to ring.

Owns the decision to close the doors or to open them, and how long a bridge waits for what: for a ring, for what becomes
due, for a quota that is used up, for the sweep. What a look does is `bridge`'s; the locks and the waiting itself are
`wakeups`'. Holds no state that matters.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pgpubsub_celery import signals
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.wakeups import Assembler, Link

if TYPE_CHECKING:
    from pgpubsub_celery.bridge import Bridge

EMPTY_CLAIMS_BEFORE_SLEEP = 3
"""Looks that find nothing, a moment apart, before an awake bridge falls asleep."""

MOMENT = 0.005
"""Seconds between two looks of an awake bridge that has little to do: a fuller batch costs less."""

BUSY_MOMENT = 0.05
"""Seconds between two looks, at most, while a writer's open transaction keeps the door from closing."""

QUOTA_MOMENT = 0.02
"""Seconds between two looks while a quota is used up: one look then takes what several workers have finished."""

FULL_MOMENT = 1.0
"""Seconds between two looks, at most, while all that is due is in flight, or locked by a run that outlives its
lease."""

RINGS_UNDER_LOAD = 50
"""Rings in a second of sleep above which the bridge stays awake, so that writers need not ring."""

AWAKE_SECONDS = 2.0
"""How long a bridge stays awake after that while quotas are used up, though it claims nothing."""

RING_OTHERS_SECONDS = 0.2
"""How often, at most, a bridge that has more than it can take tells the others: each time is a commit."""

KEEPER_SECONDS = 2.0
"""How often a bridge that is not the keeper of a channel looks whether it should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looked:
    """What a claim found."""

    claimed: int
    full: bool
    unfinished: bool
    """There are keys that it has not come to."""
    limited: bool
    """A quota was used up: there may be more."""
    soon: float
    """Seconds in which a good part of a quota that was used up should be free again."""
    outage: BaseException | None
    in_flight: Mapping[int, int]
    """Before it, by subscription."""


class Watch:
    """One link's life, awake and asleep."""

    def __init__(self, bridge: Bridge, link: Link, dispatcher: Dispatcher, listeners: Mapping[int, Listener]) -> None:
        self._bridge = bridge
        self._link = link
        self._dispatcher = dispatcher
        self._listeners = listeners
        self._assembler = Assembler()
        self._empty = 0
        self._rings: list[float] = []
        self._ring_others_at = float("-inf")
        self._awake_until = float("-inf")
        self._sweep_at = time.monotonic() + bridge.settings.poll_interval

    def run(self) -> None:
        """Look, and wait for what makes another look worth while, until asked to stop; then finish the last batch."""
        try:
            self._run()
        finally:
            self._bridge.finish(self._link, self._dispatcher)

    def _run(self) -> None:
        bridge, stopping = self._bridge, self._bridge.control.stopping
        while not stopping.is_set():
            self._hear()
            if not bridge.broker_works():
                continue
            self._sweep_if_due()
            looked = bridge.claim_and_dispatch(self._link, self._dispatcher, self._listeners)
            if signals.bridge_looked.receivers:
                signals.bridge_looked.send(bridge.control.index, claimed=looked.claimed, in_flight=looked.in_flight)
            if looked.outage is not None:
                # Another bridge's broker connection may work: it is to keep the doors, and to look at once.
                self._link.resign()
                bridge.ring_others(self._link)
                bridge.broker_failed(looked.outage)
                continue
            if looked.full:
                self._link.open_doors()
                self._ring_others()
                continue
            if stopping.is_set():
                return
            self._wait(self._patience(looked))

    def _patience(self, looked: Looked) -> float:
        """Return how long to wait for a ring; above all decide whether writers have to ring."""
        if looked.unfinished:
            if looked.claimed:
                self._empty = 0
                self._link.open_doors()
            return 0.0
        if looked.limited and self._link.asleep and self._under_load():
            # Writers would go on to ring for what cannot be had yet, each for one look in vain.
            self._awake_until = time.monotonic() + AWAKE_SECONDS
            self._link.open_doors()
        if looked.claimed:
            self._empty = 0
            return self._patience_with_some(looked)
        self._empty += 1
        return self._patience_with_none(looked)

    def _patience_with_some(self, looked: Looked) -> float:
        if looked.limited:
            return max(MOMENT, min(QUOTA_MOMENT, looked.soon))
        if self._link.asleep and not self._under_load():
            return 0.0  # one more look: what is claimed alone says nothing of what else is due
        self._link.open_doors()
        return MOMENT

    def _patience_with_none(self, looked: Looked) -> float:
        kept = self._link.keep(self._bridge.stored)
        if not self._link.asleep:
            if self._empty < EMPTY_CLAIMS_BEFORE_SLEEP:
                return MOMENT
            if looked.limited and time.monotonic() < self._awake_until:
                return BUSY_MOMENT
            # Whoever was registered has committed once the doors are closed: one more look, and sleep. While some
            # writer is still registered, silently, look again soon.
            closed = self._link.close_doors()
            self._bridge.something_happened()
            return 0.0 if closed else self._doubling(BUSY_MOMENT)
        waits = [self._sweep_at - time.monotonic()]
        due = None if looked.limited else self._bridge.next_due(self._link, self._listeners)
        if looked.limited or (due is not None and due <= 0):
            # More is due than can be had: in flight up to the quota, or locked by a run that outlives its lease.
            waits.append(max(MOMENT, min(self._doubling(FULL_MOMENT), looked.soon)))
        elif due is not None:
            waits.append(due)
        if len(kept) < len(self._bridge.stored):
            waits.append(KEEPER_SECONDS)
        return max(0.0, min(waits))

    def _ring_others(self) -> None:
        now = time.monotonic()
        if now >= self._ring_others_at:
            self._ring_others_at = now + RING_OTHERS_SECONDS
            self._bridge.ring_others(self._link)

    def _doubling(self, most: float) -> float:
        return float(min(most, MOMENT * 2.0 ** min(self._empty, 16)))

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._link.wait(seconds, self._bridge.control.stopping)

    def _hear(self) -> None:
        """Take what was rung: a doorbell, or a message of a channel that is not stored."""
        for notify in self._link.rung():
            if notify.payload:
                message = self._assembler.add(notify.payload)
                if message is not None:
                    # One at a time: the broker connection is not for two threads.
                    self._bridge.finish(self._link, self._dispatcher)
                    self._bridge.publish_unstored(self._dispatcher, message)
            else:
                self._rings.append(time.monotonic())
                self._bridge.something_happened()
                signals.bridge_woken.send(self._bridge.control.index, reason="doorbell", count=1)
        del self._rings[: -2 * RINGS_UNDER_LOAD]

    def _under_load(self) -> bool:
        since = time.monotonic() - 1.0
        return sum(1 for at in self._rings if at >= since) > RINGS_UNDER_LOAD

    def _sweep_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + self._bridge.settings.poll_interval
            signals.bridge_woken.send(self._bridge.control.index, reason="sweep", count=1)
            self._bridge.sweep(self._link, self._listeners)
