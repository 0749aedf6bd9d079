"""Every statement that a running bridge or worker sends, on a connection that the caller gives.

Owns the SQL of the protocol: claim, release, take, acknowledge, retry, fail, recover. Each method names its
purpose, the index it uses, the locks it takes and what the caller's transaction must be. Never opens a
connection, never commits, never sees a payload's meaning. Database time decides everything.
"""

from __future__ import annotations

import dataclasses
import datetime
import operator
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import key_statements
from pgpubsub_celery import statements as sql
from pgpubsub_celery.measuring import Report
from pgpubsub_celery.prepared import Prepared
from pgpubsub_celery.schema import Names, quote_literal

TRACEBACK_LIMIT = 20_000
"""Characters of a traceback that are kept; its end says most, so its middle goes."""
ERROR_LIMIT = 2_000


PATIENCE = (0.005, 0.02, 0.05, 0.1, 0.2)
"""Seconds between attempts at rows that are as they should be, but locked: by another bridge's claim, for moments, or
by a run, for long."""

RUN_TIME_SECONDS = 3600.0
"""How long what a worker process has measured counts."""

BOUND_SECONDS = 30.0
"""How long a drain may go without looking at everything once more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Where the last claim of a drain stood in one subscription, so that the next one begins there.

    Under an old snapshot (a dump, a report) the rows that a drain has finished stay in the index, dead. Without a bound
    each claim wades through all of them: 8 ms grew to 33 ms after 100,000 rows.
    """

    waiting: tuple[datetime.datetime, int] | None
    """`available_at` and id of the last waiting row claimed. What commits later with an earlier time waits for the
    drain's end, or for `BOUND_SECONDS`."""
    flying: datetime.datetime
    """No lease of the rows in flight ends before this."""
    seen: datetime.datetime
    """When, in database time. No lease given since ends before this."""
    began: datetime.datetime
    """When the drain's first claim was, which looked at everything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quota:
    """How much of one subscription a claim may take, and under which lease."""

    subscription: int
    limit: int
    """Rows published and not yet acknowledged, at most; the claim takes the difference."""
    lease: float
    lease_max: float
    with_payload: bool = False
    """Payloads are returned only where the message must carry them (`acknowledge="published"`)."""
    bound: Bound | None = None
    """What the last claim returned in `bounds`, if it did."""


class Claimed(NamedTuple):
    """A row that a claim has put under lease, as the bridge sees it: ids, not contents. The first of its columns."""

    id: int
    subscription: int
    dispatches: int
    retries: int
    operation: str
    created_at: datetime.datetime
    payload: Any = None
    context: Any = None
    db_version: str | None = None
    ordering_key: str | None = None
    """Of a subscription that is ordered by it."""
    was_lost: bool = False
    """It had been published before, and its lease ran out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """The outcome of one claim."""

    rows: list[Claimed]
    failed: int
    """Rows that were failed instead, because their starts are used up."""
    given_up: list[Claimed] = dataclasses.field(default_factory=list)
    """Those."""
    lost: int
    """How many of the rows had been published before and their lease ran out."""
    in_flight: Mapping[int, int]
    """Published and not yet acknowledged, before this claim, for each subscription."""
    bounds: Mapping[int, Bound]
    """For the next claim's quotas: the subscriptions of which this one may have left something."""


class Taken(NamedTuple):
    """A row as the worker that runs its listener sees it; the columns of `statements.TAKEN`, in its order."""

    id: int
    channel: str
    subscription: int
    operation: str
    payload: Any
    context: Any
    created_at: datetime.datetime
    db_version: str | None
    dispatches: int
    starts: int
    retries: int
    ordering_key: str | None = None


_OF_CLAIMED, _OF_TAKEN = len(Claimed._fields), len(Taken._fields)

_by_id = operator.attrgetter("id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """How a listener's runs went lately, in all worker processes that said so."""

    mean_seconds: float
    processes: int


class Store:
    """The statements for one schema. Stateless; may be shared by threads and processes."""

    def __init__(self, schema: str, filters: Mapping[int, str] | None = None) -> None:
        """`filters`: by subscription, conditions that its notifications must meet to be this bridge's (`filters`)."""
        self.names = Names(schema)
        n, s = self.names.notification, self.names.subscription
        mine = sql.filter_condition(filters or {})
        self._claim = Prepared("pgpubsub_claim", _sql(sql.CLAIM, n=n, filter=mine))
        self._adopt = _sql(sql.ADOPT, n=n, s=s)
        self._next_due = Prepared("pgpubsub_next_due", _sql(sql.NEXT_DUE, n=n, filter=mine))
        self._hold = _sql(sql.HOLD, n=n, filter=mine)
        self._recover = _sql(sql.RECOVER, n=n, filter=mine)
        self._prune_failed = _sql(sql.PRUNE_FAILED, n=n)
        self._dispatched = _sql(sql.DISPATCHED, n=n)
        self._unpublished = _sql(sql.UNPUBLISHED, n=n, given_back=sql.GIVEN_BACK)
        self._delete_published = _sql(sql.DELETE_PUBLISHED, n=n)
        self._count_start = _sql(sql.COUNT_START, n=n)
        self._take_locked = _sql(sql.TAKE_LOCKED, n=n, taken=sql.TAKEN)
        self._acknowledge_locked = _sql(sql.ACKNOWLEDGE_LOCKED, n=n)
        self._acknowledge_and_commit = _sql(sql.ACKNOWLEDGE_AND_COMMIT, n=n)
        self._take_owned = _sql(sql.TAKE_OWNED, n=n, taken=sql.TAKEN)
        self._acknowledge_owned = _sql(sql.ACKNOWLEDGE_OWNED, n=n)
        self._acknowledge_ringing = _sql(sql.ACKNOWLEDGE_RINGING, n=n, p=self.names.prefix)
        self._behind = _sql(key_statements.BEHIND, n=n)
        self._is_owned = _sql(sql.IS_OWNED, n=n)
        self._renew = _sql(sql.RENEW, n=n)
        self._retry = _sql(sql.RETRY, n=n)
        self._retry_all = _sql(sql.RETRY_ALL, n=n)
        self._fail = _sql(sql.FAIL, n=n)
        self._release = _sql(sql.RELEASE, n=n, given_back=sql.GIVEN_BACK)
        self._release_owned = _sql(sql.RELEASE_OWNED, n=n, given_back=sql.GIVEN_BACK)
        self._installation = _sql("SELECT id FROM {i}", i=self.names.installation)
        self._db_version = _sql("SELECT {p}pgpubsub_db_version()", p=self.names.prefix)
        self._may_ask_version = _sql(
            "SELECT has_function_privilege({f}, 'EXECUTE')",
            f=quote_literal(f"{self.names.prefix}pgpubsub_db_version()"),
        )
        self._ring = _sql("SELECT {p}pgpubsub_ring(:channel)", p=self.names.prefix)
        self._acknowledge_committed = _sql(sql.ACKNOWLEDGE_COMMITTED, n=n)
        self._release_lost = _sql(sql.RELEASE_LOST, n=n, given_back=sql.GIVEN_BACK)
        self._fail_lost = _sql(sql.FAIL_LOST, n=n)
        self._report_run_time = _sql(sql.REPORT_RUN_TIME, t=self.names.run_time)
        self._run_times = _sql(sql.RUN_TIMES, t=self.names.run_time)
        self._forget_run_times = _sql(sql.FORGET_RUN_TIMES, t=self.names.run_time)

    def installation(self, connection: Connection) -> uuid.UUID:
        """Return the installation's id."""
        id = connection.execute(self._installation).scalar_one()
        return id if isinstance(id, uuid.UUID) else uuid.UUID(str(id))

    def db_version(self, connection: Connection) -> str | None:
        """Return Alembic's revision(s) of the database, or None where there are none, or this role may not ask."""
        if not connection.execute(self._may_ask_version).scalar():
            return None  # asking would abort the caller's transaction
        version = connection.execute(self._db_version).scalar()
        return None if version is None else str(version)

    def ring(self, connection: Connection, channel: str) -> None:
        """Ring the doorbell of a stored channel, as a writer does, for rows made waiting in this transaction."""
        connection.execute(self._ring, {"channel": channel})

    # The bridge

    def claim(self, connection: Connection, quotas: Sequence[Quota], *, batch_size: int, max_starts: int) -> Claim:
        """Put due rows under lease and return them: expired leases first, then waiting ones in order.

        One statement; the caller's connection is in autocommit, so the lease is committed, though not yet on disk,
        before anything is published. Uses pgpubsub_notification_claim_idx; locks the claimed rows, skips what others
        have locked. Two claims at once count the same rows in flight: together they may exceed a limit, each by its own
        share.
        """
        bounds = [q.bound for q in quotas]
        result = self._claim.execute(
            connection,
            {
                "subscriptions": [q.subscription for q in quotas],
                "limits": [q.limit for q in quotas],
                "leases": [q.lease for q in quotas],
                "lease_maxima": [q.lease_max for q in quotas],
                "payloads": [q.with_payload for q in quotas],
                "waiting_at": [b.waiting[0] if b and b.waiting else None for b in bounds],
                "waiting_id": [b.waiting[1] if b and b.waiting else None for b in bounds],
                "flying": [b.flying if b else None for b in bounds],
                "expired": [min(b.flying, b.seen) if b else None for b in bounds],
                "batch_size": batch_size,
                "max_starts": max_starts,
            },
        ).all()
        rows, given_up, stands = told_by_claim(result)
        return Claim(
            rows=rows,
            failed=len(given_up),
            given_up=given_up,
            lost=sum(row.was_lost for row in rows),
            in_flight={subscription: stand.in_flight for subscription, stand in stands.items()},
            bounds=_bounds(quotas, [*rows, *given_up], stands, full=len(rows) + len(given_up) >= batch_size),
        )

    def next_due(self, connection: Connection, subscriptions: Sequence[int]) -> float | None:
        """Return the seconds until the earliest waiting row or lease end of these, or None. One index probe each."""
        seconds = self._next_due.execute(connection, {"subscriptions": list(subscriptions)}).scalar()
        return None if seconds is None else max(0.0, float(seconds))

    def adopt(self, connection: Connection, subscriptions: Sequence[int]) -> int:
        """Give rows stored before their channel had a listener to its first subscription; return how many."""
        return connection.execute(self._adopt, {"subscriptions": list(subscriptions)}).rowcount

    def hold(self, connection: Connection, subscriptions: Sequence[int]) -> int:
        """Mark what was stored before as held; return how many rows.

        The statement's snapshot is the boundary: a transaction that commits later is not before. Rows in flight,
        retries and rows not yet due are left alone.
        """
        return connection.execute(self._hold, {"subscriptions": list(subscriptions)}).rowcount

    def recover(
        self,
        connection: Connection,
        subscriptions: Sequence[int],
        *,
        failed: bool,
        batch_size: int = 1000,
        before: datetime.datetime | None = None,
    ) -> int:
        """Make up to `batch_size` held (and failed) rows waiting again; return how many. Skips locked rows.

        `before`: leave what failed later (by `now`), or who repeats this until nothing is left may never be done where
        other bridges are at work. Uses pgpubsub_notification_claim_idx.
        """
        states = ["held", "failed"] if failed else ["held"]
        return connection.execute(
            self._recover,
            {"subscriptions": list(subscriptions), "states": states, "batch_size": batch_size, "before": before},
        ).rowcount

    def now(self, connection: Connection) -> datetime.datetime:
        """Return the database's time."""
        now: datetime.datetime = connection.execute(sql.NOW).scalar_one()
        return now

    def prune_failed(self, connection: Connection, subscriptions: Sequence[int], seconds: float) -> int:
        """Delete rows that failed more than `seconds` ago, up to 1,000 at a time; return how many."""
        return connection.execute(
            self._prune_failed, {"subscriptions": list(subscriptions), "seconds": seconds}
        ).rowcount

    def release_unpublished(
        self, connection: Connection, claimed: Sequence[tuple[int, int]], *, delay: float = 0
    ) -> int:
        """Give back rows, as (id, dispatches), whose message was not published or whose outcome is unknown.

        Rows that stay locked are left: their message has reached a worker after all.
        """
        return len(self._settle(connection, self._unpublished, claimed, delay=delay))

    def delete_published(self, connection: Connection, claimed: Sequence[tuple[int, int]]) -> int:
        """Acknowledge rows, as (id, dispatches), of channels whose rows go when the broker has confirmed."""
        return len(self._settle(connection, self._delete_published, claimed))

    def _settle(
        self, connection: Connection, statement: TextClause, claimed: Sequence[tuple[int, int]], **parameters: Any
    ) -> list[int]:
        dispatches = dict(claimed)

        def attempt(ids: Sequence[int]) -> list[int]:
            pairs = {"ids": list(ids), "dispatches": [dispatches[id] for id in ids]}
            return list(connection.execute(statement, {**pairs, **parameters}).scalars())

        return self._patiently(connection, dispatches, attempt)

    def _patiently(
        self, connection: Connection, dispatches: Mapping[int, int], attempt: Callable[[Sequence[int]], list[int]]
    ) -> list[int]:
        """Repeat an attempt that skips locked rows while some, of id to dispatches, are as they should be but locked.

        A claim whose snapshot is older than another bridge's claim locks the rows that it then leaves to that one,
        until it ends. Who took such a lock for a run would drop a message, and its rows would wait for their lease.
        """
        left: list[int] = list(dispatches)
        done: list[int] = []
        for pause in (*PATIENCE, None):
            done += attempt(left)
            found = set(done)
            left = [id for id in left if id not in found]
            if not left or pause is None:
                break
            pairs = {"ids": left, "dispatches": [dispatches[id] for id in left]}
            left = list(connection.execute(self._dispatched, pairs).scalars())
            if not left:
                break
            time.sleep(pause)
        return done

    def run_times(self, connection: Connection, subscriptions: Sequence[int]) -> dict[int, Measured]:
        """Return what worker processes have measured of these within `RUN_TIME_SECONDS`, where they have."""
        rows = connection.execute(
            self._run_times, {"subscriptions": list(subscriptions), "seconds": RUN_TIME_SECONDS}
        ).all()
        return {row.subscription: Measured(mean_seconds=row.mean_seconds, processes=row.processes) for row in rows}

    def forget_run_times(self, connection: Connection) -> int:
        """Delete what processes measured that may be gone by now; return how many."""
        return connection.execute(self._forget_run_times, {"seconds": 2 * RUN_TIME_SECONDS}).rowcount

    # The worker

    def report_run_time(self, connection: Connection, subscription: int, process: uuid.UUID, report: Report) -> None:
        """Tell the bridges how long a listener's runs take in this process; one row, which nobody else writes."""
        told = {"subscription": subscription, "process": str(process), **report._asdict()}
        connection.execute(self._report_run_time, told)

    # The worker, for listeners with `session`

    def count_start(self, connection: Connection, ids: Sequence[int], dispatches: int) -> list[int]:
        """Count a run begun, for rows published before; return the ids that are still this message's.

        The caller commits it before the run, so that a run that kills its worker is counted.
        """

        def attempt(ids: Sequence[int]) -> list[int]:
            parameters = {"ids": list(ids), "dispatches": dispatches}
            return list(connection.execute(self._count_start, parameters).scalars())

        return self._patiently(connection, dict.fromkeys(ids, dispatches), attempt)

    def take_locked(self, connection: Connection, ids: Sequence[int], dispatches: int) -> tuple[list[Taken], int]:
        """Lock and return the rows that are still this message's, and the id of the caller's transaction.

        Rows gone, taken or locked for long are left out: a duplicate, or another's. READ COMMITTED.
        """
        rows: list[Any] = []

        def attempt(ids: Sequence[int]) -> list[int]:
            taken = connection.execute(self._take_locked, {"ids": list(ids), "dispatches": dispatches}).all()
            rows.extend(taken)
            return [row.id for row in taken]

        self._patiently(connection, dict.fromkeys(ids, dispatches), attempt)
        return _in_order(rows), (int(rows[0].transaction) if rows else 0)

    def acknowledge_locked(self, connection: Connection, ids: Sequence[int], transaction: int) -> int:
        """Delete finished rows in the transaction that locked them; return how many.

        Deletes nothing when the transaction is not the one that took them: a listener ended it.
        """
        return connection.execute(
            self._acknowledge_locked, {"ids": list(ids), "transaction": str(transaction)}
        ).rowcount

    def acknowledge_and_commit(self, connection: Connection, ids: Sequence[int], transaction: int) -> bool:
        """Do the same and commit, in one round trip, where the driver lets a transaction be ended by text.

        False, and nothing is committed, when not all of them could be deleted.
        """
        try:
            connection.execute(self._acknowledge_and_commit, {"ids": list(ids), "transaction": str(transaction)})
        except DBAPIError as exc:
            if getattr(exc.orig, "pgcode", None) != "22012":  # psycopg2's: no other driver can
                raise
            return False
        return True

    def has_deferrable(self, connection: Connection) -> bool:
        """Whether any constraint of the database can be checked as late as COMMIT."""
        return bool(connection.execute(sql.HAS_DEFERRABLE).scalar())

    def idle_timeout(self, connection: Connection) -> float:
        """Return the seconds that a session of this role may be idle inside a transaction; 0 for no limit."""
        return float(connection.execute(sql.IDLE_TIMEOUT).scalar_one()) / 1000

    def was_committed(self, connection: Connection, transaction: int) -> bool:
        """Whether the transaction that took the rows has committed, by somebody else's doing."""
        return connection.execute(sql.XACT_STATUS, {"transaction": str(transaction)}).scalar() == "committed"

    def acknowledge_committed(self, connection: Connection, ids: Sequence[int], dispatches: int) -> int:
        """Delete rows whose effects are committed already, where they are still this message's."""
        return connection.execute(self._acknowledge_committed, {"ids": list(ids), "dispatches": dispatches}).rowcount

    # The worker, for listeners without `session`

    def take_owned(
        self, connection: Connection, ids: Sequence[int], dispatches: int, owner: uuid.UUID, lease: float
    ) -> list[Taken]:
        """Mark the rows that are still this message's as running under `owner`, and return them."""
        rows: list[Any] = []

        def attempt(ids: Sequence[int]) -> list[int]:
            parameters = {"ids": list(ids), "dispatches": dispatches, "owner": str(owner), "lease": lease}
            taken = connection.execute(self._take_owned, parameters).all()
            rows.extend(taken)
            return [row.id for row in taken]

        self._patiently(connection, dict.fromkeys(ids, dispatches), attempt)
        return _in_order(rows)

    def acknowledge_owned(self, connection: Connection, id: int, owner: uuid.UUID, *, rings: str | None = None) -> bool:
        """Delete a finished row; False when it is no longer this owner's."""
        return self.acknowledge_all_owned(connection, [id], owner, rings=rings) == 1

    def acknowledge_all_owned(
        self, connection: Connection, ids: Sequence[int], owner: uuid.UUID, *, rings: str | None = None
    ) -> int:
        """Delete finished rows; return how many were still this owner's.

        `rings`: a channel with an ordering key, to tell its bridges in the same transaction that the next may follow.
        """
        parameters = {"ids": list(ids), "owner": str(owner)}
        if rings is None:
            return connection.execute(self._acknowledge_owned, parameters).rowcount
        return int(connection.execute(self._acknowledge_ringing, {**parameters, "channel": rings}).scalar_one())

    def behind(self, connection: Connection, ids: Sequence[int], *, passes: bool) -> set[int]:
        """Return which of these taken rows have an earlier one of their ordering key that is not among them.

        `passes`: failed ones do not count. Uses pgpubsub_notification_ordering_idx, one probe for each row.
        """
        return set(connection.execute(self._behind, {"ids": list(ids), "passes": passes}).scalars())

    def is_owned(self, connection: Connection, id: int, owner: uuid.UUID) -> bool:
        """Whether the row is still there and this owner's, as committed."""
        return connection.execute(self._is_owned, {"id": id, "owner": str(owner)}).scalar() is not None

    def renew(self, connection: Connection, leases: Mapping[int, tuple[uuid.UUID, float]]) -> list[int]:
        """Renew the leases of running rows, id to (owner, seconds); return the ids renewed. Skips locked rows."""
        return list(
            connection.execute(
                self._renew,
                {
                    "ids": list(leases),
                    "owners": [str(owner) for owner, _ in leases.values()],
                    "leases": [lease for _, lease in leases.values()],
                },
            ).scalars()
        )

    # Both

    def retry(
        self,
        connection: Connection,
        id: int,
        *,
        retries: int,
        owner: uuid.UUID | None,
        dispatches: int,
        countdown: float | None = None,
        eta: datetime.datetime | None = None,
    ) -> bool:
        """Make a taken row wait for its next run, after `countdown` seconds or at `eta`; False when it is lost."""
        return (
            connection.execute(
                self._retry,
                {
                    "id": id,
                    "retries": retries,
                    "owner": None if owner is None else str(owner),
                    "dispatches": dispatches,
                    "countdown": countdown or 0.0,
                    "eta": eta,
                },
            ).rowcount
            == 1
        )

    def retry_all(
        self,
        connection: Connection,
        ids: Sequence[int],
        *,
        owner: uuid.UUID | None,
        dispatches: int,
        countdown: float | None = None,
        eta: datetime.datetime | None = None,
    ) -> int:
        """Make taken rows wait for their next run, each with one retry more; return how many were not lost."""
        return connection.execute(
            self._retry_all,
            {
                "ids": list(ids),
                "owner": None if owner is None else str(owner),
                "dispatches": dispatches,
                "countdown": countdown or 0.0,
                "eta": eta,
            },
        ).rowcount

    def fail(
        self,
        connection: Connection,
        ids: Sequence[int],
        *,
        owner: uuid.UUID | None,
        dispatches: int,
        error: str,
        traceback: str | None,
        task_id: str | None = None,
    ) -> list[int]:
        """Mark taken rows as failed with their error; return the ids marked."""
        return list(
            connection.execute(
                self._fail,
                {
                    "ids": list(ids),
                    "owner": None if owner is None else str(owner),
                    "dispatches": dispatches,
                    "error": shorten(error, ERROR_LIMIT),
                    "traceback": None if traceback is None else shorten(traceback, TRACEBACK_LIMIT),
                    "task_id": task_id,
                },
            ).scalars()
        )

    def release(
        self, connection: Connection, ids: Sequence[int], dispatches: int, *, started: int = 0, delay: float = 0
    ) -> list[int]:
        """Give back published rows; their next message carries them alone. `started` takes starts back."""
        return list(
            connection.execute(
                self._release, {"ids": list(ids), "dispatches": dispatches, "started": started, "delay": delay}
            ).scalars()
        )

    def release_owned(
        self, connection: Connection, ids: Sequence[int], owner: uuid.UUID, *, started: int = 1, delay: float = 0
    ) -> list[int]:
        """Give back running rows of this owner; `started` takes starts back where the run did not begin."""
        return list(
            connection.execute(
                self._release_owned, {"ids": list(ids), "owner": str(owner), "started": started, "delay": delay}
            ).scalars()
        )

    # The worker's parent process, for a child that it has lost

    def release_lost(
        self,
        connection: Connection,
        ids: Sequence[int],
        dispatches: int,
        *,
        retries: Sequence[int] | None = None,
        delay: float = 0,
    ) -> list[int]:
        """Give back the rows of a message whose process is gone, taken or not. Waits for its locks to go.

        What the message has finished is gone already; a row dispatched again since, or retried (`retries`, of each id,
        tells), is another message's.
        """
        retried = None if retries is None else list(retries)
        return list(
            connection.execute(
                self._release_lost, {"ids": list(ids), "dispatches": dispatches, "retries": retried, "delay": delay}
            ).scalars()
        )

    def fail_lost(
        self,
        connection: Connection,
        ids: Sequence[int],
        dispatches: int,
        *,
        retries: Sequence[int] | None = None,
        error: str,
        task_id: str | None,
    ) -> list[int]:
        """Mark as failed the rows of a message that ended without a word of its own (hard time limit, revoked)."""
        return list(
            connection.execute(
                self._fail_lost,
                {
                    "ids": list(ids),
                    "dispatches": dispatches,
                    "retries": None if retries is None else list(retries),
                    "error": shorten(error, ERROR_LIMIT),
                    "task_id": task_id,
                },
            ).scalars()
        )


def shorten(value: str, limit: int) -> str:
    """Return `value` cut in its middle to about `limit` characters, as Postgres can store it.

    An error can quote what cannot be stored: NUL, and half characters, such as those of an undecodable file name.
    """
    value = value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
    if len(value) <= limit:
        return value
    head = limit // 3
    return f"{value[:head]}\n... {len(value) - limit} characters left out ...\n{value[-(limit - head) :]}"


def told_by_claim(result: Sequence[Any]) -> tuple[list[Claimed], list[Claimed], dict[int, Any]]:
    """Return what a claim's statement says: rows claimed, by id, rows given up, and how each subscription stands."""
    stands = {row.subscription: row for row in result if row[0] is None}
    # A class of attributes, filled by name, would cost more than all else that the bridge does for a row.
    told = [(Claimed._make(row[:_OF_CLAIMED]), row[_OF_CLAIMED]) for row in result if row[0] is not None]
    # UPDATE … RETURNING has no order; ids follow the order in which the rows were stored.
    rows = sorted((row for row, state in told if state != "failed"), key=_by_id)
    return rows, [row for row, state in told if state == "failed"], stands


def _bounds(
    quotas: Sequence[Quota], claimed: Sequence[Claimed], stands: Mapping[int, Any], *, full: bool
) -> dict[int, Bound]:
    """Return where the claim stood in the subscriptions that it may have left something of.

    A claim that took less than it was allowed ends the drain: the next one looks at everything. So a bound that is
    wrong, because the clock was set back say, cures itself.
    """
    fresh = Counter(row.subscription for row in claimed if not row.was_lost)
    bounds = {}
    for quota in quotas:
        stand, before = stands[quota.subscription], quota.bound
        lease_end = stand.now + datetime.timedelta(seconds=quota.lease)
        began = stand.now if before is None else before.began
        in_time = datetime.timedelta(0) <= stand.now - began < datetime.timedelta(seconds=BOUND_SECONDS)
        if in_time and (full or stand.in_flight + fresh[quota.subscription] >= quota.limit):
            last = None if before is None else before.waiting
            bounds[quota.subscription] = Bound(
                waiting=last if stand.last_id is None else (stand.last_at, stand.last_id),
                # What is in flight now, or will be from now on.
                flying=min(stand.earliest or lease_end, lease_end),
                seen=stand.now,
                began=began,
            )
    return bounds


def _in_order(rows: Sequence[Any]) -> list[Taken]:
    return sorted(map(_taken, rows), key=_by_id)


def _taken(row: Any) -> Taken:
    return Taken._make(row[:_OF_TAKEN])


def _sql(template: str, **names: str) -> TextClause:
    return text(template.format(**names))
