"""What a bridge claims at each look: how much of which subscription, in whose turn, and where the last look left off.

Owns the quotas and the progress through a backlog, which serve speed alone and may be lost at any time. Whether a
subscription is claimed in the order of keys is decided here; how is `keyed`'s, and for all others `store`'s. Never
publishes and never waits.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Connection

from pgpubsub_celery.channels import Keys, keys_of
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.keyed import Cursor, KeyedClaim, KeyedQuota, KeyedStore
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.pacing import Pace
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.store import Bound, Claim, Quota, Store

MOMENTARY_BATCHES = 20
"""Batches in flight, at most, of notifications whose rows go when they are published: that many bridges are busy."""


class Claims:
    """The claims of one bridge."""

    def __init__(self, settings: Settings) -> None:
        """Describe them."""
        self._settings = settings
        self.store = Store(settings.schema)
        """The statements, with the conditions of this bridge's listeners."""
        self._keyed = KeyedStore(settings.schema)
        self._keys: dict[int, Keys] = {}
        self.paces: dict[int, Pace] = {}
        """How quickly each subscription's notifications are finished."""
        self._bounds: Mapping[int, Bound] = {}
        self._cursors: Mapping[int, Cursor] = {}
        self._looked_at: dict[int, datetime.datetime] = {}
        self._walk_again = False
        """Something happened since the present walk through the keys began with the first: it may be behind it."""
        self._turn = 0

    def serve(self, conditions: Mapping[int, str]) -> None:
        """Begin to claim on a new link, only what meets the `conditions`, by subscription."""
        self.store = Store(self._settings.schema, conditions)
        self._keyed = KeyedStore(self._settings.schema, conditions)
        self._keys, self._looked_at = {}, {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget where the last look left off: something behind it may have been given back."""
        self._bounds, self._cursors = {}, {}

    def something_happened(self) -> None:
        """Note that a key may have become free which the present walk through the keys has passed."""
        self._walk_again = True

    def quotas(self, listeners: Mapping[int, Listener], dispatcher: Dispatcher) -> list[Quota]:
        """Return how much of each subscription may be claimed now."""
        found = [self._quota(id, listener, dispatcher) for id, listener in listeners.items()]
        # In turns, so that one listener's backlog does not fill every batch.
        self._turn = (self._turn + 1) % max(1, len(found))
        return found[self._turn :] + found[: self._turn]

    def _quota(self, id: int, listener: Listener, dispatcher: Dispatcher) -> Quota:
        lease = listener.channel.lease or self._settings.lease
        carries = listener.channel.acknowledge == "published"
        pace = self.paces.get(id)
        if pace is None:
            pace = self.paces[id] = Pace(self._settings.max_in_flight, lease)
        # Rows that go at publication are in flight for moments, those of all bridges: only the broker limits them.
        limit = MOMENTARY_BATCHES * self._settings.batch_size if carries else pace.quota
        lease_max = max(lease, self._settings.lease_max)
        keys = self._keys.get(id)
        if keys is None:
            keys = self._keys[id] = keys_of(listener.channel)
        if not keys.ordering and not keys.unique:
            return Quota(
                subscription=id,
                limit=limit,
                lease=lease,
                lease_max=lease_max,
                with_payload=carries,
                bound=self._bounds.get(id),
            )
        return KeyedQuota(
            subscription=id,
            limit=limit,
            lease=lease,
            lease_max=lease_max,
            with_payload=carries,
            ordered=bool(keys.ordering),
            passes=keys.passes,
            unique=bool(keys.unique),
            run=dispatcher.run_of_a_key(id),
            cursor=self._cursors.get(id),
        )

    def claim(self, connection: Connection, quotas: Sequence[Quota], batch_size: int) -> Claim:
        """Claim up to a batch in all; with and without keys, each goes first in turn."""
        plain = [quota for quota in quotas if not isinstance(quota, KeyedQuota)]
        keyed = [quota for quota in quotas if isinstance(quota, KeyedQuota)]
        if not keyed:
            return self._claim_plain(connection, plain, batch_size)
        claims: list[Claim] = []
        # The quotas are turned round at each look, so this is a fair share.
        for with_keys in (True, False) if isinstance(quotas[0], KeyedQuota) else (False, True):
            left = batch_size - sum(len(claim.rows) for claim in claims)
            if left > 0 and with_keys:
                claims.append(self._claim_keyed(connection, keyed, left))
            elif left > 0 and plain:
                claims.append(self._claim_plain(connection, plain, left))
        return KeyedClaim.of(claims)

    def _claim_plain(self, connection: Connection, quotas: Sequence[Quota], batch_size: int) -> Claim:
        most = self._settings.max_starts
        claim = self.store.claim(connection, quotas, batch_size=batch_size, max_starts=most)
        self._bounds = claim.bounds
        return claim

    def _claim_keyed(self, connection: Connection, quotas: Sequence[KeyedQuota], batch_size: int) -> KeyedClaim:
        if all(quota.cursor is None or quota.cursor.key is None for quota in quotas):
            self._walk_again = False
        most = self._settings.max_starts
        claim = self._keyed.claim(connection, quotas, batch_size=batch_size, max_starts=most)
        # What another bridge was claiming of stays as it was.
        kept = {id: cursor for id, cursor in self._cursors.items() if id not in claim.seen_at}
        self._cursors = {**kept, **claim.cursors}
        self._looked_at.update(claim.seen_at)
        if self._walk_again and not claim.unfinished:
            self._walk_again = False
            return dataclasses.replace(claim, unfinished=True)
        return claim

    def next_due(self, connection: Connection, subscriptions: Iterable[int]) -> float | None:
        """Return the seconds until something is due, or None."""
        ordered = {id for id, keys in self._keys.items() if keys.ordering and id in self._looked_at}
        dues = [self.store.next_due(connection, [id for id in subscriptions if id not in ordered])]
        if ordered:
            dues.append(self._keyed.next_due(connection, {id: self._looked_at[id] for id in sorted(ordered)}))
        return min((due for due in dues if due is not None), default=None)
