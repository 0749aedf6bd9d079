"""What bridges and workers say of notifications: one signal for each listener and step, of a whole bundle.

Owns the grouping of rows and runs into the arguments of `signals`, and that nothing is built where nobody listens: each
function costs a call then. Never decides anything, and is called when what it tells of is committed.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.utils.dispatch import Signal
from sqlalchemy import Connection

from pgpubsub_celery import signals
from pgpubsub_celery.channels import Channel
from pgpubsub_celery.listeners import Listener

if TYPE_CHECKING:
    from pgpubsub_celery.messages import Envelope
    from pgpubsub_celery.runs import Run
    from pgpubsub_celery.store import Claimed

UNPUBLISHED, REFUSED, CIRCUMSTANCES, LOST = "unpublished", "refused", "circumstances", "lost"
"""Reasons of `notification_released`."""


def claimed(listeners: Mapping[int, Listener], rows: Sequence[Claimed], connection: Connection) -> None:
    """Rows are under lease."""
    if not signals.notification_claimed.receivers:
        return
    for listener, mine in _by_listener(listeners, rows):
        _send(
            signals.notification_claimed,
            listener,
            [row.id for row in mine],
            created_at=[row.created_at for row in mine],
            lost=sum(row.was_lost for row in mine),
            connection=connection,
        )


def given_up(listeners: Mapping[int, Listener], rows: Sequence[Claimed]) -> None:
    """A claim has failed them instead."""
    if not rows or not signals.notification_failed.receivers:
        return
    for listener, mine in _by_listener(listeners, rows):
        error = "started and never finished, each time"
        _send(signals.notification_failed, listener, [row.id for row in mine], error=error)


def superseded(listeners: Mapping[int, Listener], ids: Mapping[int, Sequence[int]]) -> None:
    """A claim has deleted them, by subscription: newer ones of their unique key wait."""
    if signals.notification_superseded.receivers:
        for subscription, mine in ids.items():
            _send(signals.notification_superseded, listeners[subscription], mine)


def settled(
    listeners: Mapping[int, Listener],
    rows: Sequence[Claimed],
    published: Iterable[Sequence[tuple[int, int]]],
    *,
    acknowledged: Sequence[tuple[int, int]] = (),
    unpublished: Sequence[tuple[int, int]] = (),
    refused: Sequence[tuple[int, int]] = (),
) -> None:
    """Of the rows of a batch, as (id, dispatches): what was published, what has gone with that, what was given back."""
    if not (
        signals.notification_published.receivers
        or signals.notification_acknowledged.receivers
        or signals.notification_released.receivers
    ):
        return
    by_id = {row.id: row for row in rows}
    timed = (
        (signals.notification_published, [pair for pairs in published for pair in pairs]),
        (signals.notification_acknowledged, acknowledged),
    )
    for signal, pairs in timed:
        for listener, mine in _by_listener(listeners, [by_id[id] for id, _ in pairs]):
            _send(signal, listener, [row.id for row in mine], created_at=[row.created_at for row in mine])
    for reason, pairs in ((UNPUBLISHED, unpublished), (REFUSED, refused)):
        for listener, mine in _by_listener(listeners, [by_id[id] for id, _ in pairs]):
            _send(signals.notification_released, listener, [row.id for row in mine], reason=reason)


def unpublishable(listeners: Mapping[int, Listener], rows: Sequence[Claimed], ids: Iterable[int], error: str) -> None:
    """Rows whose message can never be published are failed."""
    if not signals.notification_failed.receivers:
        return
    wanted = set(ids)
    for listener, mine in _by_listener(listeners, [row for row in rows if row.id in wanted]):
        _send(signals.notification_failed, listener, [row.id for row in mine], error=error)


def ended(listener: Listener, runs: Sequence[Run], left: Sequence[int] = ()) -> None:
    """Runs are settled, as their outcomes say; the rows `left` were given back without having been run."""
    if not (
        signals.notification_acknowledged.receivers
        or signals.notification_retried.receivers
        or signals.notification_failed.receivers
        or signals.notification_released.receivers
    ):
        return
    done = [row for run in runs if run.outcome == "done" for row in run.rows]
    if done:
        acknowledged(listener, [row.id for row in done], [row.created_at for row in done])
    given_back = list(left)
    for run in runs:
        # Each by itself: they are few, and their errors differ.
        if run.outcome == "retry":
            _send(signals.notification_retried, listener, run.ids, error=run.told)
        elif run.outcome == "failed":
            _send(signals.notification_failed, listener, run.ids, error=run.told)
        elif run.outcome == "released":
            given_back += run.ids
    if given_back:
        _send(signals.notification_released, listener, given_back, reason=CIRCUMSTANCES)


def acknowledged(listener: Listener, ids: Sequence[int], created_at: Sequence[datetime.datetime]) -> None:
    """Finished and gone."""
    if signals.notification_acknowledged.receivers:
        _send(signals.notification_acknowledged, listener, ids, created_at=created_at)


def dropped(listener: Listener, told: Sequence[int], taken: Iterable[int]) -> None:
    """Of the ids that a message tells of, those that could not be taken are another's, or gone."""
    if len(told) == 0 or not signals.notification_dropped.receivers:
        return
    found = set(taken)
    left = [id for id in told if id not in found]
    if left:
        _send(signals.notification_dropped, listener, left)


def lost(envelope: Envelope, ids: Sequence[int], *, error: str | None = None) -> None:
    """Of a message whose run ended without a word of its own: given back, or failed with an `error`."""
    if not ids:
        return
    told: dict[str, Any] = {"channel": envelope.channel, "ids": list(ids), "count": len(ids)}
    if error is None:
        signals.notification_released.send(sender=envelope.listener, reason=LOST, **told)
    else:
        signals.notification_failed.send(sender=envelope.listener, error=error, **told)


def emitted(channels: Iterable[type[Channel]]) -> None:
    """A writer has emitted messages of these, in its open transaction."""
    if signals.notification_emitted.receivers:
        for channel, count in Counter(channel.name() for channel in channels).items():
            signals.notification_emitted.send(sender=channel, channel=channel, ids=[], count=count)


def discarded(channel: str | None, ids: Sequence[int], count: int) -> None:
    """Deleted without having been finished."""
    if count:
        signals.notification_discarded.send(sender=None, channel=channel, ids=list(ids), count=count)


def recovered(channel: str | None, ids: Sequence[int], count: int) -> None:
    """Made due, by somebody's wish."""
    if count:
        signals.notification_recovered.send(sender=None, channel=channel, ids=list(ids), count=count)


def unstored(listener: Listener, created_at: Any) -> None:
    """A message without a row was published; `created_at` as the NOTIFY has it, which any role can send."""
    if not signals.notification_published.receivers:
        return
    try:
        moments = [datetime.datetime.fromisoformat(str(created_at))]
    except ValueError:
        moments = []
    _send(signals.notification_published, listener, [0], created_at=moments)


def _by_listener(
    listeners: Mapping[int, Listener], rows: Iterable[Claimed]
) -> Iterable[tuple[Listener, list[Claimed]]]:
    groups: dict[int, list[Claimed]] = {}
    for row in rows:
        groups.setdefault(row.subscription, []).append(row)
    return [(listeners[subscription], group) for subscription, group in groups.items()]


def _send(signal: Signal, listener: Listener, ids: Sequence[int], **more: Any) -> None:
    # Of rows that do not exist, which have the id 0, only the number is told.
    stored = [id for id in ids if id]
    signal.send(sender=listener.name, channel=listener.channel.name(), ids=stored, count=len(ids), **more)
