"""Claiming where notifications have keys: ordered ones one at a time, of unique ones only the newest.

Owns the claim of subscriptions whose channel declares `ordering_key` or `unique_key`, and where it goes on the next
time. Everything else of their life is `store`'s, and as any notification's. Never opens a connection.

Two claims of one subscription at the same time could each see a key as free and put two of its notifications in
flight. So a claim first takes a lock for each subscription, and looks in a second statement, whose snapshot has all
that the claim before it did. A subscription whose lock another bridge has is left to that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import key_statements as sql
from pgpubsub_celery.binds import is_autocommit
from pgpubsub_celery.drivers import sqlstate
from pgpubsub_celery.prepared import Prepared
from pgpubsub_celery.schema import Names
from pgpubsub_celery.statements import filter_condition
from pgpubsub_celery.store import BOUND_SECONDS, Claim, Quota, told_by_claim

WINDOW = 100
"""Due rows and keys that a claim looks at in each subscription, at least; else a batch's worth."""

MOST_OLDER = 5_000
"""Superseded notifications that one claim deletes, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a claim left off in one subscription, because there was more than it looks at."""

    waiting: tuple[datetime.datetime, int] | None = None
    """`available_at` and id of the last due row that it has come to; None to begin with the first."""
    key: str | None = None
    """The last key that it has come to; None to begin with the first."""
    began: datetime.datetime
    """When the first claim was, which looked from the beginning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedQuota(Quota):
    """How much of a subscription with keys a claim may take, and which keys it has. Its `bound` is not used."""

    ordered: bool
    passes: bool = False
    """Whether a failed notification lets the later ones of its key pass."""
    unique: bool = False
    run: int = 1
    """Notifications of one key that may be claimed, and travel, together."""
    cursor: Cursor | None = None
    """What the last claim returned in `cursors`, if it did."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedClaim(Claim):
    """The outcome of one claim where there are keys."""

    superseded: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    """The ids deleted because a newer notification of their unique key waits, by subscription."""
    cursors: Mapping[int, Cursor] = dataclasses.field(default_factory=dict)
    """For the next claim's quotas: the subscriptions that this one has not come to the end of."""
    unfinished: bool = False
    """There may be something to claim that this look did not come to, or that it has made free: look again at once.

    So the keys are all come to, a look after the other. What becomes free behind a look is for those who free it to
    ring for: then begin with the first key again."""
    busy: bool = False
    """Another bridge is claiming of one of the subscriptions: look again soon."""
    seen_at: Mapping[int, datetime.datetime] = dataclasses.field(default_factory=dict)
    """By subscription, when it looked, in database time: whatever could be claimed and was due by then, was."""

    @property
    def superseded_count(self) -> int:
        """How many were deleted."""
        return sum(map(len, self.superseded.values()))

    @classmethod
    def of(cls, claims: Sequence[Claim]) -> KeyedClaim:
        """Return several claims of one look, of different subscriptions, as one."""
        keyed = [claim for claim in claims if isinstance(claim, KeyedClaim)]
        return cls(
            rows=sorted((row for claim in claims for row in claim.rows), key=lambda row: row.id),
            failed=sum(claim.failed for claim in claims),
            given_up=[row for claim in claims for row in claim.given_up],
            lost=sum(claim.lost for claim in claims),
            in_flight={id: count for claim in claims for id, count in claim.in_flight.items()},
            bounds={id: bound for claim in claims for id, bound in claim.bounds.items()},
            superseded={id: ids for claim in keyed for id, ids in claim.superseded.items()},
            cursors={id: cursor for claim in keyed for id, cursor in claim.cursors.items()},
            unfinished=any(claim.unfinished for claim in keyed),
            busy=any(claim.busy for claim in keyed),
            seen_at={id: at for claim in keyed for id, at in claim.seen_at.items()},
        )


class KeyedStore:
    """The statements for one schema. Stateless."""

    def __init__(self, schema: str, filters: Mapping[int, str] | None = None) -> None:
        """`filters` as for `Store`."""
        names = Names(schema)
        mine = filter_condition(filters or {})
        self._lock = text(sql.LOCK.format(p=names.prefix))
        self._claim = Prepared("pgpubsub_keyed", text(sql.CLAIM.format(n=names.notification, filter=mine)))
        self._next_due = Prepared("pgpubsub_keyed_due", text(sql.NEXT_DUE.format(n=names.notification, filter=mine)))

    @property
    def prepared(self) -> Prepared:
        """The claiming statement, for whoever explains it."""
        return self._claim

    def claim(
        self, connection: Connection, quotas: Sequence[KeyedQuota], *, batch_size: int, max_starts: int
    ) -> KeyedClaim:
        """Put due rows under lease and return them, as `Store.claim` does, but in the order of their keys.

        On a connection in autocommit: a transaction of its own, ended before it returns, so that the lease is committed
        before anything is published. On another the caller's, in READ COMMITTED. Uses pgpubsub_notification_claim_idx
        for what is due, _ordering_idx for the order, _unique_idx for the newest; locks the claimed and the deleted
        rows, skips what others have locked, and never waits for a lock.
        """
        wanted = [quota.subscription for quota in quotas]
        parameters = self.parameters(quotas, batch_size=batch_size, max_starts=max_starts)
        try:
            granted, result = self._locked_claim(connection, wanted, parameters)
        except DBAPIError as exc:
            # A prepared statement of another session than is used now (behind a pooler, against all advice): it is
            # not prepared any more, but the transaction has failed.
            if sqlstate(exc) != "25P02":
                raise
            granted, result = self._locked_claim(connection, wanted, parameters)
        mine = [quota for quota in quotas if quota.subscription in granted]
        rows, given_up, stands = told_by_claim(result)
        goes_on = {quota.subscription: _cursor(quota, stands[quota.subscription], parameters) for quota in mine}
        superseded = {id: stand.superseded for id, stand in stands.items() if stand.superseded}
        return KeyedClaim(
            rows=rows,
            failed=len(given_up),
            given_up=given_up,
            lost=sum(row.was_lost for row in rows),
            in_flight={subscription: stand.in_flight for subscription, stand in stands.items()},
            bounds={},
            superseded=superseded,
            cursors={id: cursor for id, (cursor, _) in goes_on.items() if cursor is not None},
            # What was given up or put back may have freed a key that this look has passed by.
            unfinished=bool(
                given_up
                or superseded
                or any(stand.put_back for stand in stands.values())
                or any(is_left for _, is_left in goes_on.values())
            ),
            busy=len(mine) < len(quotas),
            seen_at={subscription: stand.now for subscription, stand in stands.items()},
        )

    def _locked_claim(
        self, connection: Connection, wanted: Sequence[int], parameters: Mapping[str, Any]
    ) -> tuple[set[int], Sequence[Any]]:
        """Return the subscriptions whose lock was to be had, and what the claiming statement returns for them."""
        with _transaction(connection):
            # Locks end with the transaction, after its commit is visible: whoever has one sees all that was claimed.
            granted = set(connection.execute(self._lock, {"subscriptions": list(wanted)}).scalars())
            if not granted:
                return granted, []
            if len(granted) < len(wanted):
                kept = [position for position, id in enumerate(wanted) if id in granted]
                parameters = {
                    name: [value[position] for position in kept] if isinstance(value, list) else value
                    for name, value in parameters.items()
                }
            return granted, self._claim.execute(connection, parameters).all()

    def parameters(self, quotas: Sequence[KeyedQuota], *, batch_size: int, max_starts: int) -> dict[str, Any]:
        """Return what the claiming statement is given."""
        cursors = [q.cursor for q in quotas]
        return {
            "subscriptions": [q.subscription for q in quotas],
            "limits": [q.limit for q in quotas],
            "leases": [q.lease for q in quotas],
            "lease_maxima": [q.lease_max for q in quotas],
            "payloads": [q.with_payload for q in quotas],
            "ordered": [q.ordered for q in quotas],
            "passes": [q.passes for q in quotas],
            "uniques": [q.unique for q in quotas],
            "runs": [q.run for q in quotas],
            "from_at": [c.waiting[0] if c and c.waiting else None for c in cursors],
            "from_id": [c.waiting[1] if c and c.waiting else None for c in cursors],
            "after_keys": [c.key if c else None for c in cursors],
            "batch_size": batch_size,
            "window": max(batch_size, WINDOW),
            "most_older": MOST_OLDER,
            "max_starts": max_starts,
        }

    def next_due(self, connection: Connection, looked_at: Mapping[int, datetime.datetime]) -> float | None:
        """Return the seconds until something may become due in these ordered subscriptions, or None.

        `looked_at`: for each a claim's `seen_at`. What was due by then, and was not claimed, waits for others of its
        key: whoever finishes those rings. One index probe for each subscription and state.
        """
        parameters = {"subscriptions": list(looked_at), "looked_at": list(looked_at.values())}
        seconds = self._next_due.execute(connection, parameters).scalar()
        return None if seconds is None else max(0.0, float(seconds))


@contextlib.contextmanager
def _transaction(connection: Connection) -> Iterator[None]:
    """A transaction of several statements on a connection in autocommit; on another the caller's, which stays open."""
    if not is_autocommit(connection):
        yield
        return
    connection.execute(text("BEGIN ISOLATION LEVEL READ COMMITTED"))
    try:
        yield
    except BaseException:
        # Of a connection that is lost, the server does it.
        with contextlib.suppress(Exception):
            connection.execute(text("ROLLBACK"))
        raise
    connection.execute(text("COMMIT"))


def _cursor(quota: KeyedQuota, stand: Any, parameters: Mapping[str, Any]) -> tuple[Cursor | None, bool]:
    """Return where to go on, and whether there are keys that were not come to though there was room."""
    window, before = parameters["window"], quota.cursor
    if stand.in_flight >= quota.limit:
        return before, False  # it has not looked
    began = stand.now if before is None else before.began
    fresh = datetime.timedelta(0) <= stand.now - began < datetime.timedelta(seconds=BOUND_SECONDS)
    from_first_row = before is None or before.waiting is None
    looked_at = window if quota.ordered else min(quota.limit - stand.in_flight, parameters["batch_size"])
    more_rows = not stand.is_all or stand.seen >= looked_at
    # What was passed by, because its key was not free, may be free by now: not for ever in the same direction.
    waiting = (stand.seen_at, stand.seen_id) if more_rows and fresh and stand.seen_id is not None else None
    if not quota.ordered:
        return (Cursor(waiting=waiting, began=began) if waiting else None), False
    # Where it has seen all that is due, it has seen all keys that matter; where it has walked, it came to the last key.
    came_to_end = stand.is_all and (stand.walked < window if stand.seen >= window else from_first_row)
    key = None
    if not came_to_end:
        key = stand.last_key if stand.last_key is not None else None if before is None else before.key
    cursor = Cursor(waiting=waiting, key=key, began=began) if waiting or key is not None else None
    return cursor, stand.is_all and not came_to_end
