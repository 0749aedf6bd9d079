"""Claiming where notifications have keys: the head of each key, what follows it, and of unique keys the newest."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pytest
from sqlalchemy import text

from pgpubsub_celery import prepared
from pgpubsub_celery.keyed import KeyedStore
from tests.fixtures.notifications import TABLE, Notifications, until

ME = uuid.UUID(int=1)


def add(notifications: Notifications, keys: str, **columns: object) -> list[int]:
    """Insert a row for each letter, with it as the ordering key; a blank is none."""
    return [notifications.add_one(ordering_key=None if key == " " else key, **columns) for key in keys]


def finish(notifications: Notifications, ids: Sequence[int]) -> None:
    """Acknowledge rows."""
    notifications.execute(f"DELETE FROM {TABLE} WHERE id = ANY (:ids)", ids=list(ids))


# Order


def test_of_each_key_only_the_first_is_claimed(notifications: Notifications) -> None:
    """The next of a key follows when the one before is gone; other keys do not wait for it."""
    a1, b1, a2, _, b2 = add(notifications, "abaab")
    assert notifications.keyed_ids() == [a1, b1]
    assert notifications.keyed_ids() == []
    finish(notifications, [a1])
    assert notifications.keyed_ids() == [a2]
    finish(notifications, [b1])
    assert notifications.keyed_ids() == [b2]


def test_a_notification_without_key_waits_for_nobody(notifications: Notifications) -> None:
    """NULL is not a key: all of them are claimed at once."""
    ids = add(notifications, "  a a ")
    assert notifications.keyed_ids() == [ids[0], ids[1], ids[2], ids[3], ids[5]]


def test_consecutive_ones_of_a_key_are_claimed_together_up_to_the_run(notifications: Notifications) -> None:
    """They travel in one message; the rest follows when they are done."""
    a1, b1, a2, a3, a4 = add(notifications, "abaaa")
    assert notifications.keyed_ids(run=3) == [a1, b1, a2, a3]
    finish(notifications, [a1, a2])
    assert notifications.keyed_ids(run=3) == []
    finish(notifications, [a3])
    assert notifications.keyed_ids(run=3) == [a4]


@pytest.mark.parametrize(
    "before",
    [
        {"ago": -60},
        {"state": "held"},
        {"state": "failed"},
        {"state": "dispatched", "dispatches": 1, "ago": -60},
        {"state": "running", "dispatches": 1, "starts": 1, "owner": ME, "ago": -60},
    ],
    ids=["not yet due", "held", "failed", "dispatched", "running"],
)
def test_whatever_the_earlier_one_waits_for_holds_its_key(
    notifications: Notifications, before: dict[str, object]
) -> None:
    """Not what is due decides, but what is there; other keys go on."""
    add(notifications, "a", **before)
    a2, b1 = add(notifications, "ab")
    assert notifications.keyed_ids(run=5) == [b1]
    assert notifications.row(a2)["state"] == "waiting"


def test_a_run_ends_before_what_cannot_be_claimed_with_it(notifications: Notifications) -> None:
    """Not yet due, held or published before: those behind it do not overtake it."""
    for obstacle in ({"ago": -60}, {"state": "held"}, {"dispatches": 1}):
        a1, a2 = add(notifications, "aa")
        (a3,) = add(notifications, "a", **obstacle)
        add(notifications, "a")
        assert notifications.keyed_ids(run=10) == [a1, a2], obstacle
        finish(notifications, notifications.ids())
        assert a3 not in notifications.ids()


def test_what_was_published_before_is_claimed_alone(notifications: Notifications) -> None:
    """A suspect at the head takes nobody along."""
    (a1,) = add(notifications, "a", dispatches=1)
    (a2,) = add(notifications, "a")
    assert notifications.keyed_ids(run=10) == [a1]
    finish(notifications, [a1])
    assert notifications.keyed_ids(run=10) == [a2]


def test_a_failed_one_lets_its_key_pass_where_that_is_declared(notifications: Notifications) -> None:
    """Retried later it is the first of its key again, and waits for what is in flight."""
    (failed,) = add(notifications, "a", state="failed")
    a2, a3 = add(notifications, "aa")
    assert notifications.keyed_ids(passes=True) == [a2]
    notifications.execute(
        f"UPDATE {TABLE} SET state = 'waiting', failed_at = NULL, error = NULL, available_at = now(), dispatches = 1 "
        "WHERE id = :id",
        id=failed,
    )
    assert notifications.keyed_ids(passes=True) == []
    finish(notifications, [a2])
    assert notifications.keyed_ids(passes=True) == [failed]
    finish(notifications, [failed])
    assert notifications.keyed_ids(passes=True) == [a3]


def test_a_head_that_another_has_locked_is_not_overtaken(notifications: Notifications) -> None:
    """Somebody mends it: neither it nor those behind it are claimed meanwhile."""
    a1, a2, b1 = add(notifications, "aab")
    with notifications.transaction() as connection:
        connection.execute(text(f"SELECT FROM {TABLE} WHERE id = :id FOR UPDATE"), {"id": a1})
        assert notifications.keyed_ids(run=5) == [b1]
    assert notifications.keyed_ids(run=5) == [a1, a2]


def test_one_that_is_locked_ends_the_run(notifications: Notifications) -> None:
    """What comes before it is claimed, what comes behind it is not."""
    a1, a2, _ = add(notifications, "aaa")
    with notifications.transaction() as connection:
        connection.execute(text(f"SELECT FROM {TABLE} WHERE id = :id FOR UPDATE"), {"id": a2})
        assert notifications.keyed_ids(run=5) == [a1]


def test_of_two_bridges_one_claims_and_the_other_looks_again(notifications: Notifications) -> None:
    """While a claim is under way nobody else claims of the subscription, and its snapshot has all before it."""
    (a1,) = add(notifications, "a")
    with notifications.autocommit() as other:
        other.execute(text("BEGIN"))
        other.execute(
            text("SELECT pg_advisory_xact_lock(pgpubsub_lock_key('claim', '1'))"),
        )
        claim = notifications.claim_keyed()
        assert (claim.rows, claim.busy) == ([], True)
        other.execute(text("COMMIT"))
    claim = notifications.claim_keyed()
    assert ([row.id for row in claim.rows], claim.busy) == ([a1], False)


def test_a_claim_that_is_prepared_in_another_session_is_sent_as_it_is(notifications: Notifications) -> None:
    """Behind a pooler that the bridge was not told of; the transaction that it fails in is begun anew."""
    a1, a2 = add(notifications, "aa")
    with notifications.autocommit() as connection:
        prepared.allow(connection)
        assert notifications.keyed_ids(connection=connection) == [a1]
        finish(notifications, [a1])
        connection.execute(text("DEALLOCATE ALL"))
        assert notifications.keyed_ids(connection=connection) == [a2]
        connection.invalidate()


# Expired leases


def test_of_a_lost_bundle_the_first_is_published_again_and_the_others_follow_it(notifications: Notifications) -> None:
    """They come after it, each alone, and their starts, which were none, are taken back."""
    lost = notifications.run(3, owner=ME, ago=1, ordering_key="a")
    claim = notifications.claim_keyed(run=10)
    assert [(row.id, row.was_lost, row.dispatches) for row in claim.rows] == [(lost[0], True, 2)]
    assert claim.unfinished
    states = [(row["state"], row["starts"], row["dispatches"]) for row in notifications.rows()]
    assert states == [("dispatched", 1, 2), ("waiting", 0, 1), ("waiting", 0, 1)]
    for id in lost[1:]:
        finish(notifications, [notifications.ids("dispatched")[0]])
        assert notifications.keyed_ids(run=10) == [id]


def test_a_lost_one_waits_for_what_of_its_key_is_still_in_flight(notifications: Notifications) -> None:
    """One that runs on, behind or before it, is not joined by a second one of its key."""
    (earlier,) = notifications.dispatch(ordering_key="a", ago=1)
    (later,) = notifications.dispatch(ordering_key="a")
    assert notifications.keyed_ids() == []
    assert notifications.row(earlier)["state"] == "waiting"
    finish(notifications, [later])
    assert notifications.keyed_ids() == [earlier]


def test_a_lost_one_that_is_locked_is_running_on(notifications: Notifications) -> None:
    """Its worker outlives the lease inside its transaction: neither it nor the next of its key is published."""
    (running,) = notifications.dispatch(ordering_key="a", ago=1)
    add(notifications, "a")
    with notifications.transaction() as connection:
        connection.execute(text(f"SELECT FROM {TABLE} WHERE id = :id FOR UPDATE"), {"id": running})
        assert notifications.keyed_ids() == []
    assert notifications.keyed_ids() == [running]


@pytest.mark.parametrize("passes", [False, True])
def test_one_that_kills_its_workers_is_failed_and_holds_its_key_or_not(
    notifications: Notifications, passes: bool
) -> None:
    """As any failed one; the claim says that there may be more to do."""
    (killer,) = notifications.run(owner=ME, ago=1, ordering_key="a", dispatches=3)
    notifications.execute(f"UPDATE {TABLE} SET starts = 3")
    (a2,) = add(notifications, "a")
    claim = notifications.claim_keyed(passes=passes)
    assert ([row.id for row in claim.given_up], claim.rows, claim.unfinished) == ([killer], [], True)
    assert notifications.keyed_ids(passes=passes) == ([a2] if passes else [])


# Limits, and where a claim goes on


def test_keyed_claims_keep_limits_and_batches(notifications: Notifications) -> None:
    """What is in flight counts; a batch is a batch."""
    ids = add(notifications, "abcdef")
    assert notifications.keyed_ids(limit=4, batch_size=3) == ids[:3]
    claim = notifications.claim_keyed(limit=4)
    assert [row.id for row in claim.rows] == ids[3:4]
    assert claim.in_flight == {1: 3}
    assert notifications.keyed_ids(limit=4) == []


def test_what_has_been_due_longest_is_claimed_first(notifications: Notifications) -> None:
    """The order of keys among themselves is that of time, as without keys."""
    late = add(notifications, "a", ago=5)
    early = add(notifications, "b", ago=50)
    assert notifications.keyed_ids(batch_size=1) == early
    assert notifications.keyed_ids(batch_size=1) == late


def test_behind_a_long_backlog_of_one_key_the_others_are_found(notifications: Notifications) -> None:
    """More due rows of one key than a claim looks at; keys of all kinds, the empty one among them."""
    hot = notifications.add(350, ordering_key="hot", ago=100)
    others = [*add(notifications, "az", ago=1), notifications.add_one(ordering_key="", ago=1)]
    claimed: list[int] = []
    cursor = None
    for _ in range(3):
        claim = notifications.claim_keyed(cursor=cursor, batch_size=100)
        cursor = claim.cursors.get(1)
        claimed += [row.id for row in claim.rows]
    assert sorted(claimed) == sorted([hot[0], *others])


def test_behind_many_keys_that_wait_the_claim_goes_on_where_it_left_off(notifications: Notifications) -> None:
    """Blocked keys are walked past, a window's worth for each look, until what is free has been found."""
    for n in range(250):
        key = f"k{n:03}"
        notifications.dispatch(ordering_key=key)
        notifications.add_one(ordering_key=key, ago=100)
    free = notifications.add_one(ordering_key="k999", ago=1)
    unfinished, found, cursor = [], [], None
    for _ in range(4):
        claim = notifications.claim_keyed(cursor=cursor, batch_size=100)
        cursor = claim.cursors.get(1)
        unfinished.append(claim.unfinished)
        found += [row.id for row in claim.rows]
    assert found == [free]
    assert unfinished == [True, True, True, False]
    assert cursor is not None
    assert cursor.key is None


def test_keys_get_their_turn_when_there_is_room_for_few(notifications: Notifications) -> None:
    """A limit of one, and more keys than a claim looks at: each key comes, whichever of them stay unfinished."""
    ids = {notifications.add(2, ordering_key=f"k{n:03}", ago=100)[0] for n in range(130)}
    found: set[int] = set()
    cursor = None
    for _ in range(140):
        claim = notifications.claim_keyed(cursor=cursor, batch_size=1, limit=100_000)
        cursor = claim.cursors.get(1)
        found |= {row.id for row in claim.rows}
    assert found == ids


def test_a_bridge_with_a_filter_leaves_the_other_tenants_keys(notifications: Notifications) -> None:
    """Its condition is looked at in the head and in what follows it."""
    store = KeyedStore("public", {1: "context->>'tenant' = 'a'"})
    mine = notifications.add_one(ordering_key="a", context='{"tenant": "a"}')
    notifications.add_one(ordering_key="b", context='{"tenant": "b"}')
    notifications.add_one(ordering_key="a", context='{"tenant": "b"}')
    notifications.add_one(ordering_key="b", context='{"tenant": "a"}')
    assert notifications.keyed_ids(store=store, run=5) == [mine]


# Unique


def unique(notifications: Notifications, keys: str, **columns: object) -> list[int]:
    """Insert a row for each letter, with it as the unique key."""
    return [notifications.add_one(unique_key=None if key == " " else key, **columns) for key in keys]


def test_of_a_unique_key_only_the_newest_is_claimed(notifications: Notifications) -> None:
    """The older ones are deleted; rows without key, and other keys, are as without."""
    a1, a2, b1, none, a3 = unique(notifications, "aab a")
    claim = notifications.claim_keyed(ordered=False, unique=True)
    assert [row.id for row in claim.rows] == [b1, none, a3]
    assert {id: set(ids) for id, ids in claim.superseded.items()} == {1: {a1, a2}}
    assert notifications.ids() == [b1, none, a3]


def test_what_is_in_flight_or_held_or_failed_is_never_superseded(notifications: Notifications) -> None:
    """Nothing dispatched or running is touched: the newest waiting one runs besides."""
    untouched = [
        *notifications.dispatch(unique_key="a"),
        *notifications.run(owner=ME, unique_key="a"),
        notifications.add_one(unique_key="a", state="held"),
        notifications.add_one(unique_key="a", state="failed"),
    ]
    newest = notifications.add_one(unique_key="a")
    assert notifications.keyed_ids(ordered=False, unique=True) == [newest]
    assert notifications.ids() == [*untouched, newest]


def test_a_newer_one_for_later_supersedes_what_is_due(notifications: Notifications) -> None:
    """Debounce: with a countdown each new one puts the run off."""
    notifications.add_one(unique_key="a", ago=10)
    later = notifications.add_one(unique_key="a", ago=-60)
    claim = notifications.claim_keyed(ordered=False, unique=True)
    assert (claim.rows, claim.unfinished) == ([], True)
    assert notifications.ids() == [later]
    notifications.move([later], ago=1)
    assert notifications.keyed_ids(ordered=False, unique=True) == [later]


def test_an_older_one_that_waits_for_its_retry_is_superseded(notifications: Notifications) -> None:
    """It would otherwise run after the newer one, with what it knew before."""
    notifications.add_one(unique_key="a", ago=-60, retries=2)
    newer = notifications.add_one(unique_key="a")
    assert notifications.keyed_ids(ordered=False, unique=True) == [newer]
    assert notifications.ids() == [newer]


def test_the_newest_waits_for_an_older_one_that_is_locked(notifications: Notifications) -> None:
    """Claimed without having deleted that one, it would be followed by it."""
    older, newest = unique(notifications, "aa")
    with notifications.transaction() as connection:
        connection.execute(text(f"SELECT FROM {TABLE} WHERE id = :id FOR UPDATE"), {"id": older})
        assert notifications.keyed_ids(ordered=False, unique=True) == []
    assert notifications.keyed_ids(ordered=False, unique=True) == [newest]


def test_many_superseded_ones_are_deleted_a_part_at_a_time(
    notifications: Notifications, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the newest is claimed when they are gone, however many there are."""
    monkeypatch.setattr("pgpubsub_celery.keyed.MOST_OLDER", 50)
    ids = notifications.add(180, unique_key="a")
    looks = 0

    def claimed() -> bool:
        nonlocal looks
        looks += 1
        return notifications.keyed_ids(ordered=False, unique=True) == ids[-1:]

    until(claimed)
    assert looks == 4
    assert notifications.ids() == ids[-1:]


def test_with_both_keys_what_is_superseded_takes_no_part_in_the_order(notifications: Notifications) -> None:
    """First the newest of each unique key is left, then they are claimed in the order of the other."""
    first = notifications.add_one(ordering_key="order", unique_key="x")
    other = notifications.add_one(ordering_key="order", unique_key="y")
    newest = notifications.add_one(ordering_key="order", unique_key="x")
    claim = notifications.claim_keyed(unique=True, run=10)
    assert [row.id for row in claim.rows] == [other, newest]
    assert list(claim.superseded[1]) == [first]
