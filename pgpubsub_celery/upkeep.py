"""Mending what is stored: making failed and held notifications run again, or discarding them.

Owns which notifications an operator means (`Selection`) and the statements that change them, in batches, past what is
locked. Unless forced, never touches what is in flight: a listener may be at work on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, TextClause, text

from pgpubsub_celery import announcements
from pgpubsub_celery.binds import connection_of
from pgpubsub_celery.channels import Channel, registered_channels, select_channels
from pgpubsub_celery.errors import SettingsError, did_you_mean
from pgpubsub_celery.models import DISPATCHED, FAILED, HELD, RUNNING, STATES, WAITING
from pgpubsub_celery.schema import Names
from pgpubsub_celery.schemas import schema_for

BATCH = 1_000
"""Rows changed by one statement."""

IDLE_STATES = (WAITING, HELD, FAILED)
"""What nobody is at work on."""
BUSY_STATES = (DISPATCHED, RUNNING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Which notifications are meant: those that fit all that is given."""

    ids: tuple[int, ...] = ()
    channels: tuple[str, ...] = ()
    """Names, any that a channel has had."""
    listeners: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    older_than: float | None = None
    """Seconds since they were stored."""
    error: str | None = None
    """A part of the error's text, in any case."""
    keys: tuple[str, ...] = ()
    """Ordering or unique keys."""

    def __post_init__(self) -> None:
        for state in self.states:
            if state not in STATES:
                raise SettingsError(
                    f"state is {state!r}: expected some of {', '.join(STATES)}.{did_you_mean(state, STATES)}"
                )

    @property
    def everything(self) -> bool:
        """Whether nothing was given that narrows it down."""
        return (
            not (self.ids or self.channels or self.listeners or self.error or self.keys)
            and self.older_than is None
            and not self.states
        )

    def condition(self, schema: str, *, states: Sequence[str] | None = None) -> tuple[str, dict[str, Any]]:
        """Return a condition over the table `n` and its parameters; `states` narrows the states further."""
        s = Names(schema).subscription
        conditions: list[str] = []
        parameters: dict[str, Any] = {}
        wanted = [state for state in (self.states or STATES) if states is None or state in states]
        conditions.append("n.state = ANY (CAST(:states AS text[]))")
        parameters["states"] = wanted
        if self.ids:
            conditions.append("n.id = ANY (CAST(:ids AS bigint[]))")
            parameters["ids"] = list(self.ids)
        if self.channels:
            conditions.append(
                f"(n.channel = ANY (CAST(:channels AS text[])) OR n.subscription IN (SELECT id FROM {s} "
                "WHERE channel = ANY (CAST(:channels AS text[])) OR channel_aliases && CAST(:channels AS text[])))"
            )
            parameters["channels"] = list(self.channels)
        if self.listeners:
            conditions.append(
                f"n.subscription IN (SELECT id FROM {s} WHERE listener = ANY (CAST(:listeners AS text[])) "
                "OR aliases && CAST(:listeners AS text[]))"
            )
            parameters["listeners"] = list(self.listeners)
        if self.older_than is not None:
            conditions.append("n.created_at < now() - make_interval(secs => :older_than)")
            parameters["older_than"] = self.older_than
        if self.error is not None:
            conditions.append("strpos(lower(n.error), lower(:error)) > 0")
            parameters["error"] = self.error
        if self.keys:
            conditions.append(
                "(n.ordering_key = ANY (CAST(:keys AS text[])) OR n.unique_key = ANY (CAST(:keys AS text[])))"
            )
            parameters["keys"] = list(self.keys)
        return " AND ".join(conditions), parameters


@dataclasses.dataclass(frozen=True)
class Extent:
    """How many notifications are meant, and up to which id: what is stored later is not."""

    count: int
    last: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """How many were changed, and where the next batch begins; `after` is None when there is none."""

    changed: int
    after: int | None


def measure(connection: Connection, schema: str, selection: Selection, states: Sequence[str] | None = None) -> Extent:
    """Return how many are meant now."""
    condition, parameters = selection.condition(schema, states=states)
    statement = text(f"SELECT count(*), coalesce(max(n.id), 0) FROM {Names(schema).notification} n WHERE {condition}")
    number, last = connection.execute(statement, parameters).one()
    return Extent(number, last)


def retry_batch(
    connection: Connection, schema: str, selection: Selection, *, after: int, last: int, force: bool = False
) -> Batch:
    """Make up to `BATCH` of those meant, with ids above `after` and up to `last`, due now, as if they had never run.

    Rings their channels. Failed ones travel alone from now on. Those that are due already are not counted, and not
    changed; nor are those in flight, unless `force`: then a run that is under way may happen beside the new one.
    """
    statement, parameters = _batch(_RETRY, schema, selection, after, last, force)
    rows = connection.execute(statement, parameters).all()
    by_channel: dict[str, list[int]] = {}
    for row in rows:
        by_channel.setdefault(row.channel, []).append(row.id)
    _ring(connection, schema, by_channel)
    for channel in sorted(by_channel):
        announcements.recovered(channel, by_channel[channel], len(by_channel[channel]))
    return _next([row.id for row in rows])


def discard_batch(
    connection: Connection, schema: str, selection: Selection, *, after: int, last: int, force: bool = False
) -> Batch:
    """Delete up to `BATCH` of those meant, with ids above `after` and up to `last`; what is in flight with `force`."""
    statement, parameters = _batch(_DISCARD, schema, selection, after, last, force)
    rows = connection.execute(statement, parameters).all()
    # What held its key may be gone.
    _ring(connection, schema, {row.channel for row in rows if row.ordering_key is not None})
    by_channel: dict[str, list[int]] = {}
    for row in rows:
        by_channel.setdefault(row.channel, []).append(row.id)
    for channel, ids in by_channel.items():
        announcements.discarded(channel, ids, len(ids))
    return _next([id for ids in by_channel.values() for id in ids])


def process_stored_notifications(
    bind: Any, channels: Sequence[type[Channel] | str] | None = None, *, failed: bool = True
) -> int:
    """Have what is stored processed: held and failed notifications become due, for the bridge that listens.

    Args:
        bind: a Session, scoped_session or Connection; uses the caller's transaction, never commits.
        channels: classes or names, of base classes their subclasses too; default: all.
        failed: also the failed ones; otherwise only those held.

    Returns:
        How many notifications became due. Those locked by somebody else are left out.
    """
    connection = connection_of(bind, "process_stored_notifications")
    classes = _classes(channels)
    schema = schema_for(classes, connection, "process_stored_notifications")
    names = tuple(dict.fromkeys(name for cls in classes for name in (cls.name(), *cls.aliases)))
    selection = Selection(channels=names, states=(HELD, FAILED) if failed else (HELD,))
    last = measure(connection, schema, selection).last
    total = 0
    after: int | None = 0
    while after is not None:
        batch = retry_batch(connection, schema, selection, after=after, last=last)
        total += batch.changed
        after = batch.after
    return total


def _classes(channels: Sequence[type[Channel] | str] | None) -> list[type[Channel]]:
    """Return channels with their subclasses; no channels given, none."""
    if channels is None:
        return []
    if not channels:
        raise SettingsError("process_stored_notifications: channels is empty: name some, or pass None for all.")
    classes: list[type[Channel]] = []
    for one in channels:
        if isinstance(one, str):
            classes += select_channels([one])
        else:
            classes += [one, *(cls for cls in registered_channels() if issubclass(cls, one))]
    return classes


def _batch(
    template: str, schema: str, selection: Selection, after: int, last: int, force: bool
) -> tuple[TextClause, dict[str, Any]]:
    condition, parameters = selection.condition(schema, states=None if force else IDLE_STATES)
    statement = text(template.format(n=Names(schema).notification, condition=condition))
    return statement, {**parameters, "after": after, "last": last, "batch": BATCH}


def _ring(connection: Connection, schema: str, channels: Iterable[str]) -> None:
    ring = text(f"SELECT {Names(schema).prefix}pgpubsub_ring(:channel)")
    for channel in sorted(channels):
        connection.execute(ring, {"channel": channel})


def _next(ids: list[int]) -> Batch:
    return Batch(len(ids), max(ids) if len(ids) == BATCH else None)


# Past what is locked: a listener may be at work on it, or somebody else mending it. In the order of ids, each batch
# where the last one ended: what fails again meanwhile is not met twice, and dead rows are not waded through.
_RETRY = """
UPDATE {n} n SET state = 'waiting', available_at = now(), starts = 0, retries = 0, owner = NULL, failed_at = NULL,
    error = NULL, traceback = NULL, task_id = NULL, recovered_at = now(),
    dispatches = CASE WHEN n.state = 'failed' THEN 1 ELSE n.dispatches END
WHERE n.id = ANY (ARRAY(
    SELECT n.id FROM {n} n
    WHERE n.id > :after AND n.id <= :last AND NOT (n.state = 'waiting' AND n.available_at <= now()) AND {condition}
    ORDER BY n.id LIMIT :batch FOR UPDATE SKIP LOCKED
))
RETURNING n.id, n.channel, n.ordering_key
"""

_DISCARD = """
DELETE FROM {n} n WHERE n.id = ANY (ARRAY(
    SELECT n.id FROM {n} n WHERE n.id > :after AND n.id <= :last AND {condition}
    ORDER BY n.id LIMIT :batch FOR UPDATE SKIP LOCKED
))
RETURNING n.id, n.channel, n.ordering_key
"""
