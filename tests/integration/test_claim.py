"""Claiming: which rows a bridge takes, in which order, how many, and how a drain goes on where it left off."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import text

from pgpubsub_celery.store import BOUND_SECONDS, Bound
from tests.fixtures.notifications import (
    LEASE,
    LEASE_MAX,
    TABLE,
    Notifications,
    paused_claim,
    seconds,
    together,
    until,
)

ME = uuid.UUID(int=1)


def test_claim_publishes_a_waiting_row_under_a_lease(notifications: Notifications) -> None:
    """A claimed row is dispatched once, and its lease begins now."""
    id = notifications.add_one(operation="insert", retries=2)
    (claimed,) = notifications.claim().rows
    row = notifications.row(id)
    assert (row["state"], row["dispatches"], row["owner"]) == ("dispatched", 1, None)
    assert row["seconds"] == seconds(LEASE)
    assert (claimed.id, claimed.subscription, claimed.dispatches, claimed.retries) == (id, 1, 1, 2)
    assert (claimed.operation, claimed.created_at, claimed.was_lost) == ("insert", row["created_at"], False)


def test_claim_leaves_what_is_not_due_and_what_is_not_its_own(notifications: Notifications) -> None:
    """Later rows, leases that run, failed and held rows, and other subscriptions' are left alone."""
    notifications.add(ago=-60)
    notifications.dispatch()
    notifications.run(owner=ME)
    notifications.add(state="failed")
    notifications.add(state="held")
    notifications.add(subscription=2)
    notifications.add(subscription=None)
    before = notifications.rows()
    assert notifications.claim().rows == []
    assert [row["state"] for row in notifications.rows()] == [row["state"] for row in before]


def test_claim_without_subscriptions_takes_nothing(notifications: Notifications) -> None:
    """A bridge of unstored channels only claims nothing."""
    notifications.add()
    claim = notifications.claim([])
    assert (claim.rows, claim.failed, claim.in_flight, claim.bounds) == ([], 0, {}, {})


def test_claim_takes_expired_leases_before_waiting_rows(notifications: Notifications) -> None:
    """A lost run comes before rows that have waited longer."""
    notifications.add(3, ago=1000)
    lost = notifications.dispatch(ago=1) + notifications.run(owner=ME, ago=1)
    claim = notifications.claim(batch_size=2)
    assert [row.id for row in claim.rows] == lost
    assert claim.lost == 2
    assert [(row.was_lost, row.dispatches) for row in claim.rows] == [(True, 2), (True, 2)]
    assert [notifications.row(id)["owner"] for id in lost] == [None, None]


def test_claim_takes_waiting_rows_in_order_of_time_then_id(notifications: Notifications) -> None:
    """What has been due longest comes first; what is due together, in the order it was stored."""
    late = notifications.add_one(ago=5)
    early = notifications.add_one(ago=20)
    together = notifications.add(3, ago=10)
    order = [notifications.claimed_ids(batch_size=1)[0] for _ in range(5)]
    assert order == [early, *together, late]


def test_claim_returns_rows_in_the_order_they_were_stored(notifications: Notifications) -> None:
    """Within a batch messages follow the order of ids, also across subscriptions."""
    ids = [notifications.add_one(subscription=1 + i % 3, ago=10 + i) for i in range(9)]
    assert notifications.claimed_ids([3, 1, 2]) == ids


def test_claim_counts_lost_rows_against_the_batch(notifications: Notifications) -> None:
    """Expired leases and waiting rows together are at most a batch."""
    lost = notifications.dispatch(3, ago=1)
    waiting = notifications.add(5)
    assert notifications.claimed_ids(batch_size=5) == lost + waiting[:2]


def test_claim_shares_a_batch_between_subscriptions_in_the_order_given(notifications: Notifications) -> None:
    """The first subscription may fill the batch; the next gets what is left."""
    first = notifications.add(2, subscription=1)
    second = notifications.add(5, subscription=2)
    assert notifications.claimed_ids([2, 1], batch_size=6) == [first[0], *second]


def test_claim_takes_no_more_than_the_limit_minus_what_is_in_flight(notifications: Notifications) -> None:
    """Published and running rows count; the backlog stays in Postgres."""
    notifications.dispatch(2)
    notifications.run(3, owner=ME)
    notifications.dispatch(7, subscription=2)
    waiting = notifications.add(10)
    claim = notifications.claim(limit=9)
    assert [row.id for row in claim.rows] == waiting[:4]
    assert claim.in_flight == {1: 5}
    assert notifications.claim(limit=9).rows == []
    assert notifications.claim(limit=3).rows == []


def test_claim_publishes_lost_rows_even_when_the_limit_is_reached(notifications: Notifications) -> None:
    """Expired leases are in flight already: publishing them again adds nothing."""
    lost = notifications.dispatch(4, ago=1)
    notifications.add(2)
    assert notifications.claimed_ids(limit=4) == lost


def test_claim_skips_rows_locked_by_another_connection(notifications: Notifications) -> None:
    """Rows that another bridge is claiming, or a worker's transaction holds, are not waited for."""
    ids = notifications.add(3) + notifications.dispatch(ago=1)
    with notifications.transaction() as other:
        other.execute(text(f"SELECT FROM {TABLE} WHERE id = ANY (:ids) FOR UPDATE"), {"ids": [ids[0], ids[3]]})
        assert notifications.claimed_ids() == ids[1:3]
        other.rollback()
    assert notifications.claimed_ids() == [ids[0], ids[3]]


def test_claim_leaves_rows_that_were_claimed_after_its_snapshot(notifications: Notifications) -> None:
    """A claim that sees a row as it was, and locks it after another's claim of it is committed, leaves it."""
    fresh, lost = notifications.add(2), notifications.dispatch(2, ago=1)
    with paused_claim(notifications) as late:
        assert notifications.claimed_ids() == fresh + lost
        claim = late.finish()
    assert claim.rows == []
    assert [row["dispatches"] for row in notifications.rows()] == [1, 1, 2, 2]


def test_claim_takes_a_row_as_it_is_when_it_was_retried_after_its_snapshot(notifications: Notifications) -> None:
    """A row that became due again meanwhile is published with its present counts, not those of the snapshot."""
    (id,) = notifications.dispatch(ago=1, dispatches=4, starts=2)
    with paused_claim(notifications) as late:
        # Still dispatched and expired by the latest version, so the claim may have it; with other counts.
        notifications.execute(f"UPDATE {TABLE} SET dispatches = 7, starts = 0 WHERE id = :id", id=id)
        claim = late.finish()
    assert [(row.id, row.dispatches) for row in claim.rows] == [(id, 8)]
    assert notifications.row(id)["starts"] == 0


def test_claims_at_once_share_the_rows(notifications: Notifications) -> None:
    """Four bridges empty the table together; no row is claimed twice."""
    ids = notifications.add(400)
    claimed: list[list[int]] = [[], [], [], []]

    def work(mine: list[int]) -> None:
        with notifications.autocommit() as connection:
            while batch := notifications.claimed_ids(batch_size=7, connection=connection):
                mine += batch

    together(*(functools.partial(work, mine) for mine in claimed))
    assert sorted(id for mine in claimed for id in mine) == ids


def test_the_lease_doubles_with_each_dispatch_up_to_its_cap(notifications: Notifications) -> None:
    """A row that nobody takes is published ever less often."""
    id = notifications.add_one()
    leases = []
    for _ in range(4):
        notifications.claim()
        leases.append(notifications.row(id)["seconds"])
        notifications.move([id], ago=1)
    assert leases == [seconds(LEASE), seconds(2 * LEASE), seconds(LEASE_MAX), seconds(LEASE_MAX)]


def test_the_lease_of_a_row_published_thousands_of_times_is_its_cap(notifications: Notifications) -> None:
    """The doubling does not overflow."""
    (id,) = notifications.dispatch(dispatches=100_000, ago=1)
    notifications.claim()
    assert notifications.row(id)["seconds"] == seconds(LEASE_MAX)


@pytest.mark.parametrize("state", ["waiting", "dispatched", "running"])
def test_claim_fails_a_row_whose_starts_are_used_up(notifications: Notifications, state: str) -> None:
    """A row whose runs begin and never end is failed with the reason, not published."""
    owner = ME if state == "running" else None
    id = notifications.add_one(state=state, dispatches=4, starts=3, owner=owner, ago=1)
    claim = notifications.claim(max_starts=3)
    assert (claim.rows, claim.failed) == ([], 1)
    row = notifications.row(id)
    assert (row["state"], row["available_at"], row["owner"]) == ("failed", None, None)
    assert row["failed_at"] is not None
    assert row["error"].startswith("started 3 times and never finished")


def test_many_dispatches_without_a_start_fail_nothing(notifications: Notifications) -> None:
    """A night without workers must not fail healthy rows."""
    (id,) = notifications.dispatch(dispatches=500, starts=2, ago=1)
    assert notifications.claimed_ids(max_starts=3) == [id]


def test_claim_returns_payloads_only_where_asked(notifications: Notifications) -> None:
    """Payloads do not leave Postgres unless the message must carry them."""
    notifications.add(payload='{"secret": 1}', context='{"user": 2}', db_version="abc")
    (row,) = notifications.claim().rows
    assert (row.payload, row.context, row.db_version) == (None, None, None)
    notifications.move([row.id], ago=1)
    (row,) = notifications.claim(with_payload=True).rows
    assert (row.payload, row.context, row.db_version) == ({"secret": 1}, {"user": 2}, "abc")


# Bounds: a drain begins where it left off


def test_a_drain_takes_every_row_once(notifications: Notifications) -> None:
    """Claims that begin where the last one ended miss nothing and repeat nothing."""
    for start in range(0, 60, 20):
        notifications.add(20, subscription=1, ago=100 - start)
        notifications.add(10, subscription=2, ago=100 - start)
    drained, bounds = _drain(notifications, [1, 2], batch_size=7)
    assert sorted(drained) == notifications.ids()
    assert bounds == {}


def test_a_drain_keeps_to_the_limit(notifications: Notifications) -> None:
    """Rows in flight are counted right where the count begins at the earliest lease in flight."""
    notifications.add(50)
    bounds: Any = {}
    flying: set[int] = set()
    counts = []
    while True:
        claim = notifications.claim(limit=8, bounds=bounds)
        counts.append(claim.in_flight[1])
        flying |= {row.id for row in claim.rows}
        bounds = claim.bounds
        assert len(flying) <= 8
        if not claim.rows:
            break
        done = sorted(flying)[:5]
        flying -= set(done)
        notifications.execute(f"DELETE FROM {TABLE} WHERE id = ANY (:ids)", ids=done)
    assert counts[:3] == [0, 3, 3]
    assert notifications.ids() == []


def test_a_drain_publishes_leases_that_run_out_meanwhile(notifications: Notifications) -> None:
    """What expires during a drain comes before the backlog, whoever published it."""
    notifications.add(30)
    first = notifications.claim(batch_size=5)
    assert first.bounds
    notifications.execute(
        f"UPDATE {TABLE} SET available_at = clock_timestamp() + interval '1 millisecond' WHERE id = :id",
        id=first.rows[0].id,
    )
    until(lambda: bool(notifications.row(first.rows[0].id)["seconds"] < 0))
    second = notifications.claim(batch_size=5, bounds=first.bounds)
    assert [row.id for row in second.rows if row.was_lost] == [first.rows[0].id]


def test_a_locked_row_whose_lease_ran_out_is_not_forgotten_by_a_drain(notifications: Notifications) -> None:
    """A run that outlives its lease keeps its row; if it fails, the drain's next claim has it."""
    (locked,) = notifications.dispatch(ago=500)
    notifications.add(30)
    with notifications.transaction() as run:
        notifications.store.take_locked(run, [locked], 1)
        claim = notifications.claim(batch_size=5)
        claim = notifications.claim(batch_size=5, bounds=claim.bounds)
        assert locked not in [row.id for row in claim.rows]
        run.rollback()
    assert locked in notifications.claimed_ids(batch_size=5, bounds=claim.bounds)


def test_what_commits_late_is_taken_at_the_end_of_the_drain(notifications: Notifications) -> None:
    """A long transaction's row has an earlier time than the drain's bound; it is not lost."""
    notifications.add(10, ago=100)
    claim = notifications.claim(batch_size=5)
    late = notifications.add_one(ago=200)
    drained, _ = _drain(notifications, [1], batch_size=5, bounds=claim.bounds)
    assert late in drained


def test_a_bound_is_given_only_where_something_may_be_left(notifications: Notifications) -> None:
    """A claim that took all it was allowed to take says where; one that took less looks at everything next time."""
    notifications.add(3, subscription=1)
    notifications.add(1, subscription=2)
    assert set(notifications.claim([1, 2], limit=3).bounds) == {1}
    assert set(notifications.claim([1, 2], limit=100).bounds) == set()


def test_a_bound_ahead_of_the_clock_cures_itself(notifications: Notifications) -> None:
    """After the clock was set back a drain finds nothing once, and then everything."""
    notifications.add(10)
    bound = notifications.claim(batch_size=5).bounds[1]
    hour = datetime.timedelta(hours=1)
    assert bound.waiting is not None
    ahead = Bound(
        waiting=(bound.waiting[0] + hour, 1),
        flying=bound.flying + hour,
        seen=bound.seen + hour,
        began=bound.began + hour,
    )
    claim = notifications.claim(batch_size=5, bounds={1: ahead})
    assert (claim.rows, claim.bounds) == ([], {})
    assert len(notifications.claimed_ids(batch_size=5, bounds=claim.bounds)) == 5


def test_a_long_drain_looks_at_everything_once_in_a_while(notifications: Notifications) -> None:
    """The bound ends after a while, also in a drain that does not."""
    notifications.add(30)
    bound = notifications.claim(batch_size=5).bounds[1]
    old = dataclasses.replace(bound, began=bound.began - datetime.timedelta(seconds=BOUND_SECONDS))
    assert notifications.claim(batch_size=5, bounds={1: bound}).bounds != {}
    assert notifications.claim(batch_size=5, bounds={1: old}).bounds == {}


# Helpers


def _drain(
    notifications: Notifications, subscriptions: Sequence[int], *, batch_size: int, bounds: Any = None
) -> tuple[list[int], Any]:
    drained: list[int] = []
    while True:
        claim = notifications.claim(subscriptions, batch_size=batch_size, bounds=bounds)
        drained += [row.id for row in claim.rows]
        if not claim.rows and not bounds:
            return drained, claim.bounds
        bounds = claim.bounds


def test_claims_in_the_same_moment_exceed_the_limit_by_their_own_share_at_most(notifications: Notifications) -> None:
    """Two bridges do not see what the other is claiming; the next look of either does."""
    notifications.add(30)
    with notifications.transaction() as first, notifications.transaction() as second:
        mine = notifications.claim(limit=5, connection=first).rows
        yours = notifications.claim(limit=5, connection=second).rows
        first.commit()
        second.commit()
    assert (len(mine), len(yours)) == (5, 5)
    assert not {row.id for row in mine} & {row.id for row in yours}
    assert notifications.claim(limit=5).rows == []
