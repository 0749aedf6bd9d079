"""Any order of what bridges, workers and their deaths do to rows: nothing is lost, done twice, or held by two.

Hypothesis puts together runs of two bridges, two workers of each kind, a broker that repeats and reorders messages, and
operators, on a real Postgres. After each step the table must agree with what was told to whoever asked.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, text

from pgpubsub_celery.store import Bound, Claim, Quota, Store
from tests.fixtures.notifications import TABLE, Notifications, inconsistencies, until

LOCKED, OWNED = 1, 2
"""The subscriptions: one of a listener with `session`, one of a listener without."""

MAX_STARTS = 2
LONG, SHORT = 100.0, 0.0
"""Leases: one that lasts, one that has run out whenever somebody looks. Nothing may depend on how fast this runs."""

outcomes = st.sampled_from(["acknowledge", "acknowledge", "retry", "fail", "release"])
each_outcome = st.lists(outcomes, min_size=3, max_size=3)
leases = st.sampled_from([LONG, SHORT])
bridges = st.sampled_from([0, 1])
workers = st.sampled_from([0, 1])
which_worker = st.integers(0, 3)
actions = st.sampled_from(
    ["emit"] * 2 + ["time"] * 3 + ["emit in vain", "discard", "hold", "recover failed", "recover waiting", "restart"]
)


@dataclasses.dataclass(frozen=True)
class Message:
    """What the broker has: it may come at any time, any number of times."""

    subscription: int
    ids: tuple[int, ...]
    dispatches: int


@dataclasses.dataclass
class Run:
    """What a worker has taken and not settled."""

    message: Message
    ids: list[int]
    connection: Connection | None = None
    """Of a listener with `session`: its transaction."""
    transaction: int = 0
    owner: uuid.UUID | None = None
    """Of a listener without."""


class StoreMachine(RuleBasedStateMachine):
    """The world around the table, and what it must look like."""

    messages: Bundle[Message] = Bundle("messages")

    def __init__(self, notifications: Notifications) -> None:
        super().__init__()
        self.store: Store = notifications.store
        engine = notifications.engine
        self.engine = engine
        self.autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.connections = [self.connect() for _ in range(2)]
        self.operator = self.connect()
        self.operator.execute(text(f"DELETE FROM {TABLE}"))
        self.bounds: list[Mapping[int, Bound]] = [{}, {}]
        self.locked: dict[int, Run] = {}
        self.owned: dict[int, Run] = {}
        self.dead: list[Message] = []
        """Messages whose process was lost, and whose parent has not told yet."""
        self.stored: set[int] = set()
        """Committed, and neither acknowledged nor discarded."""
        self.acknowledged: set[int] = set()

    def connect(self) -> Connection:
        connection = self.autocommit.connect()
        # Nothing here may wait for a lock that another of the world's connections holds.
        connection.execute(text("SET lock_timeout = '5s'"))
        return connection

    @initialize()
    def emit_some(self) -> None:
        for subscription in (LOCKED, OWNED):
            self.emit(subscription, 3, commits=True)

    def emit(self, subscription: int, count: int, *, commits: bool) -> None:
        with self.engine.connect() as connection:
            ids = connection.execute(
                text(
                    f"INSERT INTO {TABLE} (channel, subscription, operation, payload) "
                    "SELECT 'c', :subscription, 'message', '{}' FROM generate_series(1, :count) RETURNING id"
                ),
                {"subscription": subscription, "count": count},
            ).scalars()
            stored = set(ids)
            if commits:
                connection.commit()
                self.stored |= stored

    # Bridges

    @rule(
        target=messages,
        bridge=bridges,
        limit=st.integers(1, 10),
        batch_size=st.integers(1, 10),
        lease=leases,
        bundle=st.integers(1, 3),
        publish=st.sampled_from(["confirmed"] * 4 + ["refused", "unknown"]),
    )
    def claim(
        self, bridge: int, limit: int, batch_size: int, lease: float, bundle: int, publish: str
    ) -> MultipleResults[Message]:
        before = self.rows()
        claim = self._claim(bridge, limit, batch_size, lease)
        assert len(claim.rows) + claim.failed <= batch_size
        for row in claim.rows:
            was = before[row.id]
            assert was["seconds"] <= 0, "claimed before it was due"
            assert was["state"] in ("waiting", "dispatched", "running")
            assert row.was_lost == (was["state"] != "waiting")
            assert row.id not in self._locked_ids(), "claimed while a transaction has it"
            assert row.dispatches == was["dispatches"] + 1
        for subscription in (LOCKED, OWNED):
            fresh = [row for row in claim.rows if row.subscription == subscription and not row.was_lost]
            flying = [
                row
                for row in before.values()
                if row["subscription"] == subscription and row["state"] in ("dispatched", "running")
            ]
            # A bound is of a time that `time_passes` has turned back.
            if fresh and not self._bounded:
                assert len(flying) + len(fresh) <= limit, "more in flight than the limit"
        claimed = [(row.id, row.dispatches) for row in claim.rows]
        if publish != "confirmed":
            assert self.store.release_unpublished(self.connections[bridge], claimed) == len(claimed)
        return multiple(*(_bundled(claim, bundle) if publish != "refused" else ()))

    def _claim(self, bridge: int, limit: int, batch_size: int, lease: float) -> Claim:
        bounds = self.bounds[bridge]
        self._bounded = bool(bounds)
        quotas = [
            Quota(subscription=id, limit=limit, lease=lease, lease_max=LONG * 10, bound=bounds.get(id))
            for id in (LOCKED, OWNED)
        ]
        claim = self.store.claim(self.connections[bridge], quotas, batch_size=batch_size, max_starts=MAX_STARTS)
        self.bounds[bridge] = claim.bounds
        return claim

    def restart_bridge(self, bridge: int) -> None:
        self.connections[bridge].invalidate()
        self.connections[bridge].close()
        self.connections[bridge] = self.connect()
        self.bounds[bridge] = {}

    def hold(self) -> None:
        before = self.rows()
        held = self.store.hold(self.operator, [LOCKED, OWNED])
        new = [row for row in self.rows().values() if row["state"] == "held" and before[row["id"]]["state"] != "held"]
        assert len(new) == held
        assert all(before[row["id"]]["dispatches"] == 0 and before[row["id"]]["retries"] == 0 for row in new)

    def recover(self, failed: bool) -> None:
        self.store.recover(self.operator, [LOCKED, OWNED], failed=failed)
        assert not [row for row in self.rows().values() if row["state"] in ("held", "failed" if failed else "")]

    # Workers

    @rule(worker=workers, message=messages, lease=leases)
    def deliver(self, worker: int, message: Message, lease: float) -> None:
        if message.subscription == LOCKED:
            self.take_locked(worker, message)
        else:
            self.take_owned(worker, message, lease)

    @precondition(lambda self: self.busy)
    @rule(which=which_worker, each=each_outcome, commits=st.booleans())
    def finish(self, which: int, each: list[str], commits: bool) -> None:
        self.finish_run(which, each, commits=commits)

    @precondition(lambda self: self.busy)
    @rule(which=which_worker, each=each_outcome)
    def finish_well(self, which: int, each: list[str]) -> None:
        """Runs end more often than workers die."""
        self.finish_run(which, each, commits=True)

    def finish_run(self, which: int, each: list[str], *, commits: bool) -> None:
        kind, worker = self.busy[which % len(self.busy)]
        if kind == LOCKED:
            self.finish_locked(worker, each, commits=commits)
        else:
            # One that is not finished goes on, and may find that its lease is lost.
            self.settle_owned(worker, each if commits else each[:1])

    @precondition(lambda self: self.busy)
    @rule(which=which_worker)
    def kill(self, which: int) -> None:
        kind, worker = self.busy[which % len(self.busy)]
        run = (self.locked if kind == LOCKED else self.owned).pop(worker)
        if run.connection is not None:
            self._kill(run.connection)
        self.dead.append(run.message)

    @property
    def busy(self) -> list[tuple[int, int]]:
        return [(LOCKED, worker) for worker in sorted(self.locked)] + [(OWNED, worker) for worker in sorted(self.owned)]

    # Listeners with `session`

    def take_locked(self, worker: int, message: Message) -> None:
        if worker in self.locked or message.subscription != LOCKED:
            return
        before = self.rows()
        ids: Iterable[int] = message.ids
        if message.dispatches > 1:
            ids = self.store.count_start(self.operator, message.ids, message.dispatches)
        connection = self.engine.connect()
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        rows, transaction = self.store.take_locked(connection, list(ids), message.dispatches)
        self._check_taken(message, [row.id for row in rows], before)
        if rows:
            self.locked[worker] = Run(message, [row.id for row in rows], connection, transaction)
        else:
            connection.close()

    def finish_locked(self, worker: int, each: list[str], *, commits: bool) -> None:
        run = self.locked.pop(worker)
        assert run.connection is not None
        done = []
        for id, outcome in zip(run.ids, each, strict=False):
            assert self._settle(run.connection, run, id, outcome), "a locked row was taken away"
            if outcome == "acknowledge":
                done.append(id)
        assert self.store.acknowledge_locked(run.connection, done, run.transaction) == len(done)
        if commits:
            run.connection.commit()
            self._acknowledged(done)
        run.connection.close()

    # Listeners without

    def take_owned(self, worker: int, message: Message, lease: float) -> None:
        if worker in self.owned or message.subscription != OWNED:
            return
        before = self.rows()
        owner = uuid.uuid4()
        rows = self.store.take_owned(self.operator, message.ids, message.dispatches, owner, lease)
        self._check_taken(message, [row.id for row in rows], before)
        if rows:
            self.owned[worker] = Run(message, [row.id for row in rows], owner=owner)

    def settle_owned(self, worker: int, each: list[str]) -> None:
        run = self.owned[worker]
        assert run.owner is not None
        for outcome in each[: len(run.ids)]:
            id = run.ids.pop(0)
            row = self.rows().get(id)
            mine = row is not None and row["owner"] == run.owner
            if outcome == "acknowledge":
                assert self.store.acknowledge_owned(self.operator, id, run.owner) == mine
                if mine:
                    self._acknowledged([id])
            else:
                assert self._settle(self.operator, run, id, outcome) == mine
        if not run.ids:
            del self.owned[worker]

    @precondition(lambda self: len(self.owned) == 1)
    @rule(bridge=bridges)
    def overtake(self, bridge: int) -> None:
        """A run that has lost its lease goes on while another worker has its rows."""
        self.time_passes()
        other = 1 - min(self.owned)
        for message in _bundled(self._claim(bridge, 100, 100, LONG), 1):
            if message.subscription == OWNED and other not in self.owned:
                self.take_owned(other, message, LONG)

    @precondition(lambda self: self.owned)
    @rule(lease=leases)
    def renew(self, lease: float) -> None:
        for run in self.owned.values():
            assert run.owner is not None
            mine = {id for id, row in self.rows().items() if row["owner"] == run.owner}
            renewed = self.store.renew(self.operator, dict.fromkeys(run.ids, (run.owner, lease)))
            assert set(renewed) == mine & set(run.ids)

    @precondition(lambda self: self.dead)
    @rule(fails=st.booleans())
    def tell_of_lost_process(self, fails: bool) -> None:
        message = self.dead.pop(0)
        if set(message.ids) & self._locked_ids():
            return  # redelivered meanwhile: the parent waits for that run, which this world cannot
        before = self.rows()
        if fails:
            self.store.fail_lost(self.operator, message.ids, message.dispatches, error="killed", task_id=None)
        else:
            self.store.release_lost(self.operator, message.ids, message.dispatches)
        for id, row in self.rows().items():
            mine = before[id]["state"] in ("dispatched", "running") and before[id]["dispatches"] == message.dispatches
            if id not in message.ids or not mine:
                assert row["state"] == before[id]["state"], "another message's row was settled"

    # Writers, time, and operators

    def time_passes(self) -> None:
        """Whatever waits is due and every lease has run out, of what is not locked."""
        self.operator.execute(
            text(
                f"UPDATE {TABLE} SET available_at = now() WHERE id IN (SELECT id FROM {TABLE} "
                "WHERE available_at > now() AND state <> 'held' FOR UPDATE SKIP LOCKED)"
            )
        )

    @rule(action=actions, which=st.integers(0, 3))
    def operate(self, action: str, which: int) -> None:
        if action == "time":
            self.time_passes()
        elif action in ("emit", "emit in vain"):
            self.emit([LOCKED, OWNED][which % 2], which + 1, commits=action == "emit")
        elif action == "discard":
            self.discard(which)
        elif action == "hold":
            self.hold()
        elif action == "restart":
            self.restart_bridge(which % 2)
        else:
            self.recover(failed=action == "recover failed")

    def discard(self, which: int) -> None:
        gone = self.operator.execute(
            text(
                f"DELETE FROM {TABLE} WHERE id IN (SELECT id FROM {TABLE} WHERE state IN ('failed', 'held') "
                "ORDER BY id OFFSET :which LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id"
            ),
            {"which": which},
        ).scalars()
        self.stored -= set(gone)

    # What must hold

    @invariant()
    def the_table_tells_the_truth(self) -> None:
        rows = self.rows()
        assert set(rows) == self.stored, "lost, or came back"
        assert [wrong for row in rows.values() for wrong in inconsistencies(row)] == []
        locked = [id for run in self.locked.values() for id in run.ids]
        assert len(locked) == len(set(locked)), "two transactions have the same row"
        assert {rows[id]["state"] for id in locked} <= {"dispatched"}, "changed while a transaction has it"

    def teardown(self) -> None:
        """Whatever happened, all that is left can be finished."""
        try:
            for run in self.locked.values():
                assert run.connection is not None
                self._kill(run.connection)
            self.locked.clear()
            self.owned.clear()
            deadline = time.monotonic() + 10
            while self.stored:
                assert time.monotonic() < deadline, f"left for ever: {list(self.rows().values())}"
                self.time_passes()
                self.recover(failed=True)
                for message in _bundled(self._claim(0, 1000, 1000, LONG), 100):
                    if message.subscription == LOCKED:
                        self.take_locked(0, message)
                        self.finish_locked(0, ["acknowledge"] * len(message.ids), commits=True)
                    else:
                        self.take_owned(0, message, LONG)
                        self.settle_owned(0, ["acknowledge"] * len(message.ids))
            assert self.rows() == {}
        finally:
            for connection in (*self.connections, self.operator):
                connection.close()

    # Helpers

    def rows(self) -> dict[int, dict[str, Any]]:
        """Return the table, as committed; `seconds` is the time until a row is due, by the clock that claims have."""
        rows = self.operator.execute(
            text(f"SELECT *, coalesce(extract(epoch FROM available_at - now()), 1e9)::float8 AS seconds FROM {TABLE}")
        )
        return {row["id"]: dict(row) for row in rows.mappings()}

    def _kill(self, connection: Connection) -> None:
        """Lose the connection, and wait until its backend has noticed: until then it has its locks."""
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None
        pid = driver_connection.info.backend_pid
        connection.invalidate()
        connection.close()
        alive = text("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = :pid)")
        until(lambda: not self.operator.execute(alive, {"pid": pid}).scalar_one())

    def _locked_ids(self) -> set[int]:
        return {id for run in self.locked.values() for id in run.ids}

    def _acknowledged(self, ids: Iterable[int]) -> None:
        for id in ids:
            assert id not in self.acknowledged, "acknowledged twice"
            self.acknowledged.add(id)
            self.stored.discard(id)

    def _check_taken(self, message: Message, taken: list[int], before: Mapping[int, Mapping[str, Any]]) -> None:
        assert set(taken) <= set(message.ids)
        assert not set(taken) & self._locked_ids(), "taken while another's transaction has it"
        for id in taken:
            assert before[id]["state"] == "dispatched", "taken while it runs, waits or has failed"
            assert before[id]["dispatches"] == message.dispatches, "taken by a stale message"

    def _settle(self, connection: Connection, run: Run, id: int, outcome: str) -> bool:
        dispatches = run.message.dispatches
        if outcome == "retry":
            return self.store.retry(connection, id, retries=1, owner=run.owner, dispatches=dispatches, countdown=60)
        if outcome == "fail":
            return [id] == self.store.fail(
                connection, [id], owner=run.owner, dispatches=dispatches, error="error", traceback=None
            )
        if outcome == "release":
            if run.owner is not None:
                return [id] == self.store.release_owned(connection, [id], run.owner)
            return [id] == self.store.release(connection, [id], dispatches, started=1)
        return True


def _bundled(claim: Claim, bundle: int) -> list[Message]:
    """Return messages as a bridge builds them: first dispatches share one, others travel alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row in claim.rows:
        groups.setdefault((row.subscription, row.dispatches), []).append(row.id)
    return [
        Message(subscription, tuple(ids[start : start + size]), dispatches)
        for (subscription, dispatches), ids in groups.items()
        for size in [bundle if dispatches == 1 else 1]
        for start in range(0, len(ids), size)
    ]


def test_no_order_of_events_loses_or_repeats_a_notification(
    notifications: Notifications, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever bridges, workers, the broker and operators do, and whenever they die, the table tells the truth."""
    # Nothing happens at the same time here: who is locked now will be so in a moment.
    monkeypatch.setattr("pgpubsub_celery.store.PATIENCE", ())

    class World(StoreMachine):
        def __init__(self) -> None:
            super().__init__(notifications)

    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
