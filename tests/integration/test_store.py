"""Each statement of the store: which rows it touches, which it leaves alone, and that it waits for nobody."""

from __future__ import annotations

import datetime
import functools
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import make_url

from pgpubsub_celery import upkeep
from pgpubsub_celery.store import ERROR_LIMIT, TRACEBACK_LIMIT, Store, shorten
from tests.fixtures.notifications import (
    LEASE,
    TABLE,
    Notifications,
    paused_claim,
    seconds,
    together,
    until,
    waits_for_lock,
)

ME, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)


@pytest.fixture
def store() -> Store:
    """The statements."""
    return Store("public")


# Give back, or let go: the bridge


def test_release_unpublished_makes_rows_as_they_were_before_the_claim(notifications: Notifications) -> None:
    """A message that was not published does not count: the row is bundled again."""
    first, again = notifications.add_one(), notifications.add_one(dispatches=3)
    claimed = [(row.id, row.dispatches) for row in notifications.claim().rows]
    with notifications.autocommit() as connection:
        assert notifications.store.release_unpublished(connection, claimed, delay=30) == 2
    assert [(row["state"], row["dispatches"]) for row in notifications.rows()] == [("waiting", 0), ("waiting", 3)]
    assert [notifications.row(id)["seconds"] for id in (first, again)] == [seconds(30), seconds(30)]


@pytest.mark.parametrize("method", ["release_unpublished", "delete_published"])
def test_settling_touches_only_rows_that_are_still_the_messages(notifications: Notifications, method: str) -> None:
    """Rows taken, retried, failed or published again since belong to others."""
    matrix = _matrix(notifications, dispatches=2)
    with notifications.autocommit() as connection:
        touched = getattr(notifications.store, method)(connection, [(id, 2) for id in matrix.values()])
    assert touched == 1
    assert _changed(notifications, matrix) == {"dispatched"}


@pytest.mark.parametrize("method", ["release_unpublished", "delete_published"])
def test_settling_does_not_wait_for_a_row_that_a_worker_has_after_all(
    notifications: Notifications, method: str
) -> None:
    """The message whose outcome was unknown did arrive, and runs: the bridge leaves its row and goes on."""
    ids = notifications.dispatch(2)
    with notifications.transaction() as worker, notifications.autocommit() as bridge:
        notifications.store.take_locked(worker, ids[:1], 1)
        assert getattr(notifications.store, method)(bridge, [(id, 1) for id in ids]) == 1
    assert notifications.row(ids[0])["state"] == "dispatched"


# Take: listeners with `session`


def test_take_locked_returns_the_messages_rows_in_order(notifications: Notifications) -> None:
    """A taken row tells all that its listener can know of it."""
    ids = notifications.dispatch(3, payload='{"a": [1, null]}', context='{"b": 2}', retries=4, starts=1)
    with notifications.transaction() as connection:
        rows, transaction = notifications.store.take_locked(connection, ids[::-1], 1)
        assert transaction == int(connection.execute(text("SELECT pg_current_xact_id()::text")).scalar_one())
    assert [row.id for row in rows] == ids
    stored = notifications.row(ids[0])
    assert rows[0]._asdict() == {name: stored[name] for name in rows[0]._fields}
    assert (rows[0].payload, rows[0].context, rows[0].retries) == ({"a": [1, None]}, {"b": 2}, 4)


@pytest.mark.parametrize("take", ["take_locked", "take_owned", "count_start"])
def test_a_stale_message_takes_nothing(notifications: Notifications, take: str) -> None:
    """Rows gone, given back, failed, running, or published again since are another's."""
    matrix = _matrix(notifications, dispatches=2)
    ids = [*matrix.values(), 10**9]
    with notifications.autocommit() as connection:
        assert _take(notifications.store, take, connection, ids, 2) == [matrix["dispatched"]]


@pytest.mark.parametrize("take", ["take_locked", "take_owned", "count_start"])
def test_a_duplicate_does_not_wait_for_the_first(notifications: Notifications, take: str) -> None:
    """While one worker has the row, the broker's second delivery is dropped at once."""
    ids = notifications.dispatch(2)
    with notifications.transaction() as first, notifications.autocommit() as second:
        notifications.store.take_locked(first, ids[:1], 1)
        assert _take(notifications.store, take, second, ids, 1) == ids[1:]


@pytest.mark.parametrize(
    "method", ["take_locked", "take_owned", "count_start", "release_unpublished", "delete_published"]
)
def test_a_claim_that_comes_too_late_takes_nobodys_rows_for_a_moment(notifications: Notifications, method: str) -> None:
    """A claim with an old snapshot locks rows that another has claimed, until it ends: that is no run of theirs."""
    ids = notifications.add(3)
    with paused_claim(notifications) as late, notifications.transaction() as connection:
        assert notifications.claimed_ids() == ids
        late.lock()
        free = text(f"SELECT id FROM {TABLE} FOR UPDATE SKIP LOCKED")
        assert connection.execute(free).all() == [], "the test no longer shows what it is about"
        threading.Timer(0.05, late.finish).start()
        store = notifications.store
        if method in ("release_unpublished", "delete_published"):
            assert getattr(store, method)(connection, [(id, 1) for id in ids]) == len(ids)
        else:
            assert _take(store, method, connection, ids, 1) == ids


@pytest.mark.parametrize("take", ["take_locked", "take_owned"])
def test_of_many_duplicates_one_takes_the_row(
    notifications: Notifications, take: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries of one message that arrive together are one run for each row."""
    monkeypatch.setattr("pgpubsub_celery.store.PATIENCE", (0.001,))
    ids = notifications.dispatch(40)
    taken: list[list[int]] = [[] for _ in range(4)]
    begin = threading.Barrier(len(taken))

    def deliver(mine: list[int]) -> None:
        for id in ids:
            begin.wait(30)
            with notifications.transaction() as connection:
                got = _take(notifications.store, take, connection, [id], 1)
                mine += got
                begin.wait(30)
                if take == "take_locked" and got:
                    connection.execute(text(f"DELETE FROM {TABLE} WHERE id = :id"), {"id": id})
                connection.commit()

    together(*(functools.partial(deliver, mine) for mine in taken))
    assert sorted(id for mine in taken for id in mine) == ids


def test_acknowledge_locked_deletes_in_the_transaction_that_took(notifications: Notifications) -> None:
    """The finished rows go with the transaction's commit, and come back with its rollback."""
    ids = notifications.dispatch(3)
    for end in ("rollback", "commit"):
        with notifications.transaction() as connection:
            _, transaction = notifications.store.take_locked(connection, ids, 1)
            assert notifications.store.acknowledge_locked(connection, ids[:2], transaction) == 2
            getattr(connection, end)()
        assert notifications.ids() == (ids if end == "rollback" else ids[2:])


def test_acknowledge_locked_deletes_nothing_in_another_transaction(notifications: Notifications) -> None:
    """A listener that ended the transaction took the locks away: nothing may be acknowledged on their word."""
    ids = notifications.dispatch()
    with notifications.transaction() as connection:
        _, transaction = notifications.store.take_locked(connection, ids, 1)
        connection.commit()
        assert notifications.store.acknowledge_locked(connection, ids, transaction) == 0
        connection.commit()
    assert notifications.ids() == ids


def test_acknowledge_locked_deletes_inside_a_savepoint(notifications: Notifications) -> None:
    """A savepoint is not another transaction."""
    ids = notifications.dispatch()
    with notifications.transaction() as connection:
        _, transaction = notifications.store.take_locked(connection, ids, 1)
        with connection.begin_nested():
            assert notifications.store.acknowledge_locked(connection, ids, transaction) == 1
        connection.commit()
    assert notifications.ids() == []


def test_a_run_that_loses_its_connection_gives_up_its_row(notifications: Notifications) -> None:
    """A killed worker's row is claimable as soon as its lease has run out, and not before."""
    ids = notifications.dispatch(ago=1)
    with notifications.transaction() as connection:
        notifications.store.take_locked(connection, ids, 1)
        assert notifications.claimed_ids() == []
        connection.invalidate()
    until(lambda: notifications.claimed_ids() == ids)


def test_count_start_counts_only_the_messages_rows(notifications: Notifications) -> None:
    """A run begun is committed before the run."""
    ids = notifications.dispatch(2, dispatches=2) + notifications.dispatch(dispatches=3)
    with notifications.autocommit() as connection:
        assert sorted(notifications.store.count_start(connection, ids, 2)) == ids[:2]
    assert [row["starts"] for row in notifications.rows()] == [1, 1, 0]


def test_was_committed_tells_what_became_of_a_transaction(notifications: Notifications) -> None:
    """In progress, rolled back and committed are told apart."""
    ids = notifications.dispatch()
    ended = {}
    with notifications.autocommit() as observer:
        for end in ("rollback", "commit"):
            with notifications.transaction() as connection:
                _, transaction = notifications.store.take_locked(connection, ids, 1)
                assert notifications.store.was_committed(observer, transaction) is False
                getattr(connection, end)()
            ended[end] = notifications.store.was_committed(observer, transaction)
    assert ended == {"rollback": False, "commit": True}


def test_acknowledge_committed_deletes_only_rows_that_are_still_the_messages(notifications: Notifications) -> None:
    """Effects that are committed already are acknowledged once, and nobody else's with them."""
    matrix = _matrix(notifications, dispatches=2)
    with notifications.autocommit() as connection:
        assert notifications.store.acknowledge_committed(connection, list(matrix.values()), 2) == 1
    assert _changed(notifications, matrix) == {"dispatched"}


def test_has_deferrable_sees_a_deferrable_constraint(notifications: Notifications, store: Store) -> None:
    """Any constraint that can be checked at COMMIT counts, whatever it is now."""
    with notifications.autocommit() as connection:
        assert store.has_deferrable(connection) is False
        connection.execute(text("CREATE TABLE plain (a int UNIQUE)"))
        assert store.has_deferrable(connection) is False
        connection.execute(text("CREATE TABLE late (a int UNIQUE DEFERRABLE INITIALLY IMMEDIATE)"))
        assert store.has_deferrable(connection) is True


# Take: listeners without `session`


def test_take_owned_marks_rows_as_running(notifications: Notifications) -> None:
    """Owner, a start and a lease of its own are committed before the run."""
    ids = notifications.dispatch(2, starts=1)
    with notifications.autocommit() as connection:
        rows = notifications.store.take_owned(connection, ids[::-1], 1, ME, 50.0)
    assert [(row.id, row.starts) for row in rows] == [(id, 2) for id in ids]
    stored = notifications.row(ids[0])
    assert (stored["state"], stored["owner"], stored["starts"]) == ("running", ME, 2)
    assert stored["seconds"] == seconds(50)


def test_acknowledge_owned_is_the_owners(notifications: Notifications) -> None:
    """A lease that was lost cannot be acknowledged; one's own, once."""
    (mine,) = notifications.run(owner=ME)
    (theirs,) = notifications.run(owner=OTHER)
    (published,) = notifications.dispatch()
    with notifications.autocommit() as connection:
        assert [notifications.store.acknowledge_owned(connection, id, ME) for id in (mine, theirs, published)] == [
            True,
            False,
            False,
        ]
        assert notifications.store.acknowledge_owned(connection, mine, ME) is False
    assert notifications.ids() == [theirs, published]


def test_a_run_whose_lease_was_lost_changes_nothing(notifications: Notifications) -> None:
    """Once another dispatch has the row, its old owner can neither acknowledge, retry, fail, release nor renew it."""
    (id,) = notifications.run(owner=ME, ago=1)
    notifications.claim()
    before = notifications.row(id)
    store = notifications.store
    with notifications.autocommit() as connection:
        assert store.is_owned(connection, id, ME) is False
        assert store.acknowledge_owned(connection, id, ME) is False
        assert store.retry(connection, id, retries=1, owner=ME, dispatches=1, countdown=0) is False
        assert store.fail(connection, [id], owner=ME, dispatches=1, error="e", traceback=None) == []
        assert store.release_owned(connection, [id], ME) == []
        assert store.release_lost(connection, [id], 1) == []
        assert store.fail_lost(connection, [id], 1, error="e", task_id=None) == []
        assert store.renew(connection, {id: (ME, 500.0)}) == []
    after = notifications.row(id)
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def test_is_owned_sees_what_is_committed(notifications: Notifications) -> None:
    """An acknowledgement in an open transaction has not happened yet."""
    (id,) = notifications.run(owner=ME)
    with notifications.autocommit() as observer, notifications.transaction() as listener:
        assert notifications.store.acknowledge_owned(listener, id, ME)
        assert notifications.store.is_owned(observer, id, ME) is True
        assert notifications.store.is_owned(observer, id, OTHER) is False
        listener.commit()
        assert notifications.store.is_owned(observer, id, ME) is False


def test_renew_extends_ones_own_leases_only(notifications: Notifications) -> None:
    """Each row gets its own lease; another owner's, and rows that wait, keep theirs."""
    short, long = notifications.run(2, owner=ME)
    (theirs,) = notifications.run(owner=OTHER)
    (published,) = notifications.dispatch()
    leases = {short: (ME, 200.0), long: (ME, 300.0), theirs: (ME, 900.0), published: (ME, 900.0), 10**9: (ME, 900.0)}
    with notifications.autocommit() as connection:
        assert sorted(notifications.store.renew(connection, leases)) == [short, long]
        assert notifications.store.renew(connection, {}) == []
    assert [row["seconds"] for row in notifications.rows()] == [
        seconds(200),
        seconds(300),
        seconds(LEASE),
        seconds(LEASE),
    ]


def test_renew_does_not_wait_for_an_open_acknowledgement(notifications: Notifications) -> None:
    """One listener's open `acknowledge(session)` must not starve the leases of the others."""
    ids = notifications.run(2, owner=ME)
    with notifications.transaction() as listener, notifications.autocommit() as heartbeat:
        notifications.store.acknowledge_owned(listener, ids[0], ME)
        assert notifications.store.renew(heartbeat, dict.fromkeys(ids, (ME, 300.0))) == ids[1:]


def test_renew_locks_no_row_that_is_not_its_owners(notifications: Notifications) -> None:
    """A heartbeat that still names a lost row must not make the new owner's take skip it."""
    (lost,) = notifications.dispatch(dispatches=2)
    with notifications.transaction() as heartbeat, notifications.autocommit() as worker:
        notifications.store.renew(heartbeat, {lost: (ME, 300.0)})
        assert [row.id for row in notifications.store.take_owned(worker, [lost], 2, OTHER, LEASE)] == [lost]


# Retry, fail, release


@pytest.mark.parametrize("kind", ["locked", "owned"])
def test_a_retry_waits_for_its_time_as_if_never_published(notifications: Notifications, kind: str) -> None:
    """Its dispatches and starts begin anew, and it cannot be claimed early."""
    id, owner = _taken(notifications, kind, dispatches=3, starts=2)
    with notifications.autocommit() as connection:
        assert notifications.store.retry(connection, id, retries=5, owner=owner, dispatches=3, countdown=60) is True
    row = notifications.row(id)
    assert (row["state"], row["retries"], row["dispatches"], row["starts"], row["owner"]) == ("waiting", 5, 0, 0, None)
    assert row["seconds"] == seconds(60)
    assert notifications.claim().rows == []
    notifications.move([id], ago=0)
    assert [(row.id, row.dispatches, row.retries) for row in notifications.claim().rows] == [(id, 1, 5)]


def test_a_retry_can_name_its_time(notifications: Notifications) -> None:
    """An eta goes before a countdown."""
    (id,) = notifications.dispatch()
    eta = datetime.datetime(2100, 1, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    with notifications.autocommit() as connection:
        notifications.store.retry(connection, id, retries=1, owner=None, dispatches=1, countdown=5, eta=eta)
    assert notifications.row(id)["available_at"] == eta


def test_delays_count_from_now_in_a_transaction_that_began_before(notifications: Notifications) -> None:
    """A bundle's transaction may have taken its time: a retry's countdown begins when it is asked for."""
    retried, released = notifications.dispatch(2)
    with notifications.transaction() as connection:
        rows, _ = notifications.store.take_locked(connection, [retried, released], 1)
        assert len(rows) == 2
        connection.execute(text("SELECT pg_sleep(0.5)"))
        notifications.store.retry(connection, retried, retries=1, owner=None, dispatches=1, countdown=30)
        notifications.store.release(connection, [released], 1, delay=30)
        late = connection.execute(
            text(
                "SELECT bool_and(available_at >= transaction_timestamp() + interval '30.5 seconds') "
                f"FROM {TABLE} WHERE id = ANY (:ids)"
            ),
            {"ids": [retried, released]},
        ).scalar_one()
    assert late is True


@pytest.mark.parametrize("kind", ["locked", "owned"])
def test_fail_keeps_error_and_traceback(notifications: Notifications, kind: str) -> None:
    """A failed row says what happened, when, in which task, and is never due."""
    id, owner = _taken(notifications, kind)
    with notifications.autocommit() as connection:
        assert notifications.store.fail(
            connection, [id], owner=owner, dispatches=1, error="E: bad", traceback="Traceback …", task_id="t-1"
        ) == [id]
    row = notifications.row(id)
    assert (row["state"], row["available_at"], row["owner"]) == ("failed", None, None)
    assert (row["error"], row["traceback"], row["task_id"]) == ("E: bad", "Traceback …", "t-1")
    assert row["failed_at"] is not None
    assert notifications.claim().rows == []


def test_fail_stores_what_postgres_could_not(notifications: Notifications) -> None:
    """NUL, half characters and endless texts in an error do not keep it from being stored."""
    (id,) = notifications.dispatch()
    error = "nul \x00, file name b\udce9, " + "x" * ERROR_LIMIT * 2 + " the end"
    with notifications.autocommit() as connection:
        notifications.store.fail(connection, [id], owner=None, dispatches=1, error=error, traceback=error * 10)
    row = notifications.row(id)
    assert row["error"].startswith("nul \\x00, file name b\\udce9, xxx")
    assert row["error"].endswith("xxx the end")
    assert "characters left out" in row["error"]
    assert len(row["error"]) < ERROR_LIMIT + 100
    assert len(row["traceback"]) < TRACEBACK_LIMIT + 100


def test_shorten_keeps_the_end_which_says_most() -> None:
    """A short text stays; of a long one a third of the limit is its beginning, the rest its end."""
    assert shorten("short", 10) == "short"
    assert shorten("a" * 10 + "b" * 10 + "c" * 10, 15) == "aaaaa\n... 15 characters left out ...\ncccccccccc"


@pytest.mark.parametrize("method", ["retry", "fail", "release"])
def test_settling_a_locked_run_touches_only_rows_that_are_still_the_messages(
    notifications: Notifications, method: str
) -> None:
    """A row that was given back, failed, taken or published again since belongs to others."""
    matrix = _matrix(notifications, dispatches=2)
    store = notifications.store
    with notifications.autocommit() as connection:
        if method == "retry":
            for id in matrix.values():
                store.retry(connection, id, retries=9, owner=None, dispatches=2, countdown=5)
        elif method == "fail":
            store.fail(connection, list(matrix.values()), owner=None, dispatches=2, error="e", traceback=None)
        else:
            assert store.release(connection, list(matrix.values()), 2) == [matrix["dispatched"]]
    assert _changed(notifications, matrix) == {"dispatched"}


@pytest.mark.parametrize("method", ["retry", "fail", "release_owned"])
def test_settling_an_owned_run_touches_only_its_owners_rows(notifications: Notifications, method: str) -> None:
    """Only what runs under the owner's token can be settled by it."""
    matrix = _matrix(notifications, dispatches=2)
    store = notifications.store
    with notifications.autocommit() as connection:
        if method == "retry":
            for id in matrix.values():
                store.retry(connection, id, retries=9, owner=ME, dispatches=2, countdown=5)
        elif method == "fail":
            store.fail(connection, list(matrix.values()), owner=ME, dispatches=2, error="e", traceback=None)
        else:
            assert store.release_owned(connection, list(matrix.values()), ME) == [matrix["running"]]
    assert _changed(notifications, matrix) == {"running"}


@pytest.mark.parametrize("method", ["release_lost", "fail_lost"])
def test_settling_for_a_lost_process_touches_what_its_message_had(notifications: Notifications, method: str) -> None:
    """Published or running under the message's dispatch, whoever the owner is; nothing else."""
    matrix = _matrix(notifications, dispatches=2)
    arguments: dict[str, Any] = {"error": "killed", "task_id": "t"} if method == "fail_lost" else {"delay": 30}
    with notifications.autocommit() as connection:
        touched = getattr(notifications.store, method)(connection, list(matrix.values()), 2, **arguments)
    mine = {"dispatched", "running", "running for another"}
    assert sorted(touched) == sorted(matrix[name] for name in mine)
    assert _changed(notifications, matrix) == mine
    row = notifications.row(matrix["running"])
    if method == "release_lost":
        # What began and never ended stays counted, and the next message carries it alone.
        assert (row["state"], row["dispatches"], row["starts"], row["owner"]) == ("waiting", 2, 1, None)
        assert row["seconds"] == seconds(30)
    else:
        assert (row["state"], row["error"], row["available_at"], row["task_id"]) == ("failed", "killed", None, "t")


@pytest.mark.parametrize("method", ["release_lost", "fail_lost"])
def test_settling_for_a_lost_process_waits_for_its_locks_to_go(notifications: Notifications, method: str) -> None:
    """The lost process's backend may not have noticed yet; what it committed meanwhile is the truth."""
    ids = notifications.dispatch(2)
    arguments: dict[str, Any] = {"error": "killed", "task_id": None} if method == "fail_lost" else {}
    touched: list[int] = []

    def settle() -> None:
        with notifications.autocommit() as connection:
            touched.extend(getattr(notifications.store, method)(connection, ids, 1, **arguments))

    with notifications.transaction() as lost:
        _, transaction = notifications.store.take_locked(lost, ids, 1)
        notifications.store.acknowledge_locked(lost, ids[:1], transaction)
        thread = threading.Thread(target=settle)
        thread.start()
        until(lambda: waits_for_lock(notifications.engine))
        lost.commit()
        thread.join(30)
    assert touched == ids[1:]


def test_a_released_row_travels_alone_and_its_start_is_taken_back(notifications: Notifications) -> None:
    """Its dispatches stay, so that its next message carries it alone."""
    ended, never = notifications.dispatch(2, dispatches=2)
    notifications.execute(f"UPDATE {TABLE} SET starts = 2 WHERE id = :id", id=ended)
    with notifications.autocommit() as connection:
        assert sorted(notifications.store.release(connection, [ended, never], 2, started=1)) == [ended, never]
    assert [(row["state"], row["starts"]) for row in notifications.rows()] == [("waiting", 1), ("waiting", 0)]
    assert [row.dispatches for row in notifications.claim().rows] == [3, 3]


def test_a_released_running_row_loses_its_owner(notifications: Notifications) -> None:
    """It waits again, for as long as was asked."""
    (id,) = notifications.run(owner=ME)
    with notifications.autocommit() as connection:
        assert notifications.store.release_owned(connection, [id], ME, started=1, delay=40) == [id]
    row = notifications.row(id)
    assert (row["state"], row["owner"], row["starts"], row["dispatches"]) == ("waiting", None, 0, 1)
    assert row["seconds"] == seconds(40)


@pytest.mark.parametrize("method", ["release_lost", "fail_lost"])
def test_settling_late_touches_no_row_that_was_retried_since(notifications: Notifications, method: str) -> None:
    """A retry begins to count dispatches anew: its row, published again, is another message's."""
    retried, same, untold = notifications.dispatch(3)
    arguments: dict[str, Any] = {"error": "killed", "task_id": None} if method == "fail_lost" else {}
    with notifications.autocommit() as connection:
        notifications.store.retry(connection, retried, retries=1, owner=None, dispatches=1, countdown=0)
        notifications.claim()
        assert notifications.row(retried)["dispatches"] == 1
        settle = getattr(notifications.store, method)
        assert settle(connection, [retried, same], 1, retries=[0, 0], **arguments) == [same]
        assert sorted(settle(connection, [retried, untold], 1, retries=[1, 0], **arguments)) == [retried, untold]


# Hold, recover, adopt, prune


def test_hold_takes_what_was_stored_and_never_published(notifications: Notifications) -> None:
    """In flight, retried, given back, later, and other subscriptions' rows are left alone."""
    before = notifications.add(3)
    notifications.add(subscription=2)
    notifications.add(ago=-60)
    notifications.add(retries=1)
    notifications.add(dispatches=1)
    notifications.dispatch()
    notifications.run(owner=ME)
    notifications.add(state="failed")
    with notifications.autocommit() as connection:
        assert notifications.store.hold(connection, [1]) == 3
        assert notifications.store.hold(connection, [1]) == 0
    assert notifications.ids("held") == before


def test_what_somebody_has_asked_to_have_run_is_not_held_again(notifications: Notifications) -> None:
    """Recovered while no bridge was there to come to it: the next one's start leaves it waiting."""
    held, failed = notifications.add_one(state="held"), notifications.add_one(state="failed")
    with notifications.autocommit() as connection:
        assert notifications.store.recover(connection, [1], failed=True) == 2
        notifications.add_one()
        assert notifications.store.hold(connection, [1]) == 1
        assert notifications.ids("waiting") == [held, failed]
        assert notifications.store.hold(connection, [1]) == 0
        upkeep.retry_batch(connection, "public", upkeep.Selection(states=("held",)), after=0, last=10**9)
        assert notifications.store.hold(connection, [1]) == 0
    assert notifications.ids("held") == []


def test_what_commits_after_the_hold_is_not_before_it(notifications: Notifications) -> None:
    """A transaction that was open during the hold is not held, however early it began."""
    before = notifications.add_one()
    with notifications.transaction() as writer, notifications.autocommit() as bridge:
        writer.execute(
            text(f"INSERT INTO {TABLE} (channel, subscription, operation, payload) VALUES ('c', 1, 'm', '{{}}')")
        )
        assert notifications.store.hold(bridge, [1]) == 1
        writer.commit()
    assert notifications.ids("held") == [before]
    assert len(notifications.claim().rows) == 1


def test_recover_makes_held_and_failed_rows_wait_again(notifications: Notifications) -> None:
    """Held rows come as if new; failed ones begin anew, but alone."""
    held = notifications.add_one(state="held")
    failed = notifications.add_one(state="failed", dispatches=4, starts=3, retries=2, traceback="t", task_id="i")
    notifications.add(state="held", subscription=2)
    with notifications.autocommit() as connection:
        assert notifications.store.recover(connection, [1], failed=True) == 2
    for id, dispatches in ((held, 0), (failed, 1)):
        row = notifications.row(id)
        assert (row["state"], row["dispatches"], row["starts"], row["retries"]) == ("waiting", dispatches, 0, 0)
        assert [row[name] for name in ("failed_at", "error", "traceback", "task_id", "owner")] == [None] * 5
    assert [row.dispatches for row in notifications.claim().rows] == [1, 2]
    assert len(notifications.ids("held")) == 1


def test_recover_of_waiting_rows_leaves_the_failed(notifications: Notifications) -> None:
    """`--recover=waiting` takes up what was held only."""
    notifications.add(2, state="held")
    failed = notifications.add(2, state="failed")
    with notifications.autocommit() as connection:
        assert notifications.store.recover(connection, [1], failed=False) == 2
    assert notifications.ids("failed") == failed


def test_recover_in_batches_takes_everything_once(notifications: Notifications) -> None:
    """Batches over several subscriptions and states end when nothing is left."""
    for subscription in (1, 2):
        notifications.add(5, state="held", subscription=subscription)
        notifications.add(5, state="failed", subscription=subscription)
    with notifications.autocommit() as connection:
        batches = [notifications.store.recover(connection, [1, 2], failed=True, batch_size=7) for _ in range(4)]
    assert batches == [7, 7, 6, 0]


def test_recover_skips_rows_that_another_recovers(notifications: Notifications) -> None:
    """Several bridges share the work."""
    ids = notifications.add(3, state="held")
    with notifications.transaction() as other, notifications.autocommit() as connection:
        assert notifications.store.recover(other, [1], failed=True, batch_size=1) == 1
        assert notifications.store.recover(connection, [1], failed=True) == 2
    assert notifications.ids("held") == ids[:1]


def test_recover_leaves_what_failed_since_it_began(notifications: Notifications) -> None:
    """Rows that fail as fast as they are recovered do not keep a bridge from listening."""
    notifications.add(state="failed", ago=1)
    with notifications.autocommit() as connection:
        before = notifications.store.now(connection)
        assert notifications.store.recover(connection, [1], failed=True, before=before) == 1
        notifications.add(state="failed", ago=0)
        assert notifications.store.recover(connection, [1], failed=True, before=before) == 0
        assert notifications.store.recover(connection, [1], failed=True) == 1


def test_adopt_gives_orphans_to_the_first_subscription_that_wants_them(notifications: Notifications) -> None:
    """Rows stored before their channel had a listener go to one, by channel, earlier names and operation."""
    inserts = notifications.subscribe("a", operations=["insert"])
    deletes = notifications.subscribe("b", operations=["insert", "delete"], channel_aliases=["old.Name"])
    other = notifications.subscribe("c", operations=["insert"])
    orphans = [
        notifications.add_one(subscription=None, channel=channel, operation=operation)
        for channel, operation in (
            ("a.Channel", "insert"),
            ("a.Channel", "delete"),
            ("old.Name", "delete"),
            ("a.Channel", "truncate"),
            ("b.Channel", "insert"),
        )
    ]
    with notifications.autocommit() as connection:
        assert notifications.store.adopt(connection, [other, deletes, inserts]) == 3
        assert notifications.store.adopt(connection, [other, deletes, inserts]) == 0
    assert [notifications.row(id)["subscription"] for id in orphans] == [inserts, deletes, deletes, None, None]


def test_adopt_knows_only_the_callers_subscriptions(notifications: Notifications) -> None:
    """A listener that this process does not have adopts nothing."""
    notifications.subscribe("a")
    mine = notifications.subscribe("b")
    id = notifications.add_one(subscription=None)
    with notifications.autocommit() as connection:
        notifications.store.adopt(connection, [mine])
    assert notifications.row(id)["subscription"] == mine


def test_adopt_does_not_wait_for_another_that_adopts(notifications: Notifications) -> None:
    """Two bridges that start together do not wait for each other's rows."""
    mine = notifications.subscribe("a")
    notifications.add(3, subscription=None)
    with notifications.transaction() as other, notifications.autocommit() as connection:
        assert notifications.store.adopt(other, [mine]) == 3
        assert notifications.store.adopt(connection, [mine]) == 0


def test_prune_failed_deletes_what_failed_long_ago(notifications: Notifications) -> None:
    """Only failed rows, only those of the subscriptions, only past the retention; at most a thousand at once."""
    notifications.add(1001, state="failed", ago=100)
    recent = notifications.add_one(state="failed", ago=10)
    others = notifications.add_one(state="failed", ago=100, subscription=2)
    waiting = notifications.add_one(ago=100)
    with notifications.autocommit() as connection:
        pruned = [notifications.store.prune_failed(connection, [1], 50) for _ in range(3)]
    assert pruned == [1000, 1, 0]
    assert notifications.ids() == [recent, others, waiting]


# When to look again


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([], None, id="nothing"),
        pytest.param([{"ago": -50}], 50, id="waiting"),
        pytest.param([{"ago": -50}, {"state": "dispatched", "dispatches": 1, "ago": -20}], 20, id="lease"),
        pytest.param([{"state": "running", "dispatches": 1, "starts": 1, "owner": ME, "ago": -30}], 30, id="running"),
        pytest.param([{"ago": 500}], 0, id="overdue"),
        pytest.param([{"state": "held", "ago": 5}, {"state": "failed"}], None, id="held and failed"),
        pytest.param([{"subscription": 2}], None, id="another subscription"),
    ],
)
def test_next_due_is_the_earliest_wait_or_lease(
    notifications: Notifications, rows: list[dict[str, Any]], expected: float | None
) -> None:
    """Seconds until something can be claimed; never negative; None when nothing will be."""
    for row in rows:
        notifications.add(**row)
    with notifications.autocommit() as connection:
        due = notifications.store.next_due(connection, [1, 3])
    assert due == (expected if not expected else seconds(expected))


# Drivers


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_the_workers_statements_run_on_other_drivers(notifications: Notifications, driver: str) -> None:
    """A worker uses the engine of the application's session factory, which may be psycopg 3's."""
    store = notifications.store
    engine = create_engine(make_url(str(notifications.engine.url)).set(drivername=f"postgresql+{driver}"))
    locked = notifications.dispatch(8, dispatches=2, payload='{"a": 1}')
    eta = datetime.datetime(2100, 1, 1, tzinfo=datetime.timezone.utc)
    with engine.connect() as connection, connection.begin():
        assert sorted(store.count_start(connection, locked, 2)) == locked
        rows, transaction = store.take_locked(connection, locked, 2)
        assert [row.payload for row in rows] == [{"a": 1}] * 8
        assert store.has_deferrable(connection) is False
        assert store.idle_timeout(connection) == 0
        assert store.retry(connection, locked[1], retries=1, owner=None, dispatches=2, countdown=5.5)
        assert store.retry(connection, locked[2], retries=1, owner=None, dispatches=2, countdown=1, eta=eta)
        assert store.fail(connection, [locked[3]], owner=None, dispatches=2, error="e", traceback=None) == [locked[3]]
        assert store.release(connection, [locked[4]], 2, started=1, delay=2) == [locked[4]]
        assert store.release_lost(connection, [locked[5]], 2) == [locked[5]]
        assert store.fail_lost(connection, [locked[6]], 2, error="e", task_id="t") == [locked[6]]
        assert store.was_committed(connection, transaction) is False
        assert store.acknowledge_committed(connection, [locked[7]], 2) == 1
        assert store.acknowledge_locked(connection, [locked[0]], transaction) == 1
    owned = notifications.dispatch(4)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert [row.id for row in store.take_owned(connection, owned, 1, ME, 10)] == owned
        assert sorted(store.renew(connection, dict.fromkeys(owned, (ME, 20.0)))) == owned
        assert store.is_owned(connection, owned[0], ME)
        assert store.acknowledge_owned(connection, owned[0], ME)
        assert store.release_owned(connection, [owned[1]], ME, delay=1) == [owned[1]]
        assert store.retry(connection, owned[2], retries=1, owner=ME, dispatches=1, countdown=0)
        assert isinstance(store.installation(connection), uuid.UUID)
        store.ring(connection, "a.Channel")
    engine.dispose()


# Helpers


def _matrix(notifications: Notifications, dispatches: int) -> dict[str, int]:
    """Rows of every kind that a message of this dispatch may meet; only some are still its own."""
    return {
        "dispatched": notifications.dispatch(dispatches=dispatches)[0],
        "dispatched again": notifications.dispatch(dispatches=dispatches + 1)[0],
        "dispatched before": notifications.dispatch(dispatches=dispatches - 1)[0],
        "running": notifications.run(owner=ME, dispatches=dispatches)[0],
        "running for another": notifications.run(owner=OTHER, dispatches=dispatches)[0],
        "running again": notifications.run(owner=OTHER, dispatches=dispatches + 1)[0],
        "waiting": notifications.add_one(dispatches=dispatches),
        "failed": notifications.add_one(state="failed", dispatches=dispatches),
        "held": notifications.add_one(state="held"),
    }


def _changed(notifications: Notifications, matrix: dict[str, int]) -> set[str]:
    """Return which rows of a matrix are gone or are not as they were made."""
    now = {row["id"]: row for row in notifications.rows()}
    return {
        name
        for name, id in matrix.items()
        if id not in now or now[id]["state"] != name.split()[0] or now[id]["retries"] != 0
    }


def _taken(notifications: Notifications, kind: str, **columns: Any) -> tuple[int, uuid.UUID | None]:
    if kind == "locked":
        return notifications.dispatch(**columns)[0], None
    return notifications.run(owner=ME, **columns)[0], ME


def _take(store: Store, take: str, connection: Connection, ids: Sequence[int], dispatches: int) -> list[int]:
    if take == "take_locked":
        return [row.id for row in store.take_locked(connection, ids, dispatches)[0]]
    if take == "take_owned":
        return [row.id for row in store.take_owned(connection, ids, dispatches, OTHER, LEASE)]
    return store.count_start(connection, ids, dispatches)
