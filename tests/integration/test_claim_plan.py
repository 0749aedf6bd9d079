"""What a claim costs: only what it takes, whatever else the table is full of and whatever the planner believes.

Plans and page counts, never times. The table is large, full of dead rows that an old transaction keeps, and belongs to
several subscriptions, because a plan that is right for a small table tells nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import Connection, TextClause, create_engine, text

from pgpubsub_celery import prepared
from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.store import Bound, Quota
from tests.fixtures.notifications import LEASE, LEASE_MAX, TABLE, Notifications

DATABASE = "claim_plan"
BATCH = 500
SCALE = int(os.environ.get("STRESS_CLAIM_SCALE", "1"))
"""Times 300,000 rows: `make stress` looks at five million."""
NOISE = 100
"""Pages beyond one for each row claimed: the index, and what explaining has left behind."""
LITTLE, LARGE, BUSY, DELAYED, SPENT, MORE_LITTLE = range(1, 7)
"""Subscriptions: a little backlog, a large one, many rows in flight, many for later, many finished under an old
snapshot, and again a little backlog, beside many failed and held."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the scans of one claim read, and how."""

    nodes: list[Mapping[str, Any]]
    """The plan's nodes that read the table."""
    claimed: int
    bound: Bound | None
    """Where the next claim of a drain begins."""

    @property
    def pages(self) -> int:
        """Pages read to find the rows, hit or not; without the update's own."""
        pages: int = sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in self._finding)
        return pages

    @property
    def rows(self) -> int:
        """Rows read to find those that were claimed."""
        read: float = sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            for node in self._finding
        )
        return round(read)

    @property
    def _finding(self) -> list[Mapping[str, Any]]:
        return [node for node in self.nodes if node["Alias"] != "n"]


@pytest.fixture(scope="module")
def table(postgres: EmbeddedPostgres, template: str) -> Iterator[Notifications]:
    """A table without autovacuum, of 300,000 rows or more at the end; tests leave it as they found it."""
    engine = create_engine(sync_url(postgres.create_database(DATABASE, template=template)))
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = false)"))
    yield Notifications(engine)
    engine.dispose()
    postgres.drop_database(DATABASE)


@pytest.fixture(scope="module")
def early(table: Notifications) -> Iterator[Connection]:
    """A bridge's session that has claimed, and so planned, when there was nothing."""
    with table.engine.connect() as connection:
        prepared.allow(connection)
        assert table.claim([LITTLE], connection=connection).rows == []
        connection.commit()
        yield connection
        connection.invalidate()


@pytest.fixture(scope="module")
def alone(table: Notifications, early: Connection) -> Cost:
    """What it costs to claim from a little backlog in a table that holds nothing else."""
    table.add(BATCH + 100, subscription=LITTLE)
    table.execute(f"ANALYZE {TABLE}")
    cost, _ = claim(table, LITTLE)
    assert cost.claimed == BATCH
    return cost


@pytest.fixture(scope="module")
def full(table: Notifications, alone: Cost) -> Iterator[Notifications]:
    """The same table, with the rest in it; what the planner knows is from before."""
    with table.engine.connect() as old:
        old.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        old.execute(text("SELECT 1"))
        table.add(SCALE * 150_000, subscription=LARGE)
        table.dispatch(SCALE * 50_000, subscription=BUSY)
        table.add(BATCH + 100, subscription=BUSY)
        table.add(SCALE * 50_000, subscription=DELAYED, ago=-3600)
        table.add(BATCH + 100, subscription=DELAYED)
        table.add(SCALE * 10_000, subscription=MORE_LITTLE, state="failed")
        table.add(SCALE * 10_000, subscription=MORE_LITTLE, state="held")
        table.add(SCALE * 20_000, subscription=SPENT, ago=60)
        table.add(2 * BATCH, subscription=SPENT, ago=30)
        table.execute(
            f"UPDATE {TABLE} SET state = 'dispatched', dispatches = 1, available_at = now() + interval '1 minute' "
            "WHERE subscription = :spent AND available_at < now() - interval '45 seconds'",
            spent=SPENT,
        )
        table.execute(f"DELETE FROM {TABLE} WHERE subscription = :spent AND state = 'dispatched'", spent=SPENT)
        table.add(BATCH + 100, subscription=MORE_LITTLE)
        yield table
        old.rollback()


@pytest.fixture(params=["from before the burst", "none", "present"])
def planner(request: pytest.FixtureRequest, full: Notifications) -> None:
    """What the planner knows of the table."""
    if request.param == "none":
        full.execute(f"DELETE FROM pg_statistic WHERE starelid = '{TABLE}'::regclass")
    elif request.param == "present":
        full.execute(f"ANALYZE {TABLE}")


@pytest.mark.parametrize("pooled", [False, True])
def test_a_claim_reads_by_its_index_in_order(planner: None, full: Notifications, pooled: bool) -> None:
    """No scan of the table, no sort, no bitmap to find rows; the update finds them by their ids. Prepared or not."""
    for subscription in (LITTLE, LARGE, BUSY, DELAYED, SPENT):
        cost, plan = claim(full, subscription, pooled=pooled)
        finding = {(node["Node Type"], node.get("Index Name")) for node in cost.nodes if node["Alias"] != "n"}
        assert finding == {
            ("Index Only Scan", "pgpubsub_notification_claim_idx"),
            ("Index Scan", "pgpubsub_notification_claim_idx"),
        }
        assert "Seq Scan" not in {node["Node Type"] for node in cost.nodes}
        updating = {node.get("Index Name") for node in walk(plan) if "pkey" in node.get("Index Name", "")}
        assert updating == {"pgpubsub_notification_pkey"}
        sorted_here = [node["Plans"][0] for node in walk(plan) if "Sort" in node["Node Type"]]
        assert {node.get("CTE Name") for node in sorted_here} <= {"fresh", "quota"}, (
            "only what has been found may be sorted"
        )


def test_others_backlogs_cost_a_claim_nothing(alone: Cost, full: Notifications) -> None:
    """A subscription with a little to do pays for that, beside others' 300,000 rows and its own failed and held."""
    cost, _ = claim(full, MORE_LITTLE)
    assert cost.claimed == BATCH
    assert cost.rows == alone.rows
    assert cost.pages < BATCH + NOISE


def test_a_large_backlog_costs_no_more_than_a_little_one(alone: Cost, full: Notifications) -> None:
    """What is claimed is what is paid for."""
    cost, _ = claim(full, LARGE)
    assert cost.claimed == BATCH
    assert cost.rows == alone.rows
    assert cost.pages < BATCH + NOISE


def test_rows_for_later_cost_a_claim_nothing(alone: Cost, full: Notifications) -> None:
    """50,000 retries that wait for their time are not read."""
    cost, _ = claim(full, DELAYED)
    assert cost.claimed == BATCH
    assert cost.rows == alone.rows
    assert cost.pages < BATCH + NOISE


def test_rows_in_flight_are_counted_no_further_than_the_limit(full: Notifications) -> None:
    """50,000 rows in flight, over a limit of 100: a hundred are read, and nothing is claimed."""
    cost, _ = claim(full, BUSY, limit=100)
    assert (cost.claimed, cost.rows) == (0, 100)
    assert cost.pages < 150


def test_a_drain_does_not_wade_through_what_it_has_finished(full: Notifications) -> None:
    """Under an old snapshot 20,000 finished rows stay in the index; the next claim begins behind them."""
    waded, _ = claim(full, SPENT)
    begun, _ = claim(full, SPENT, bound=waded.bound)
    assert (waded.claimed, begun.claimed) == (BATCH, BATCH)
    assert waded.pages > BATCH + 5 * NOISE
    assert begun.pages < BATCH + NOISE


def test_a_claim_that_was_planned_when_the_table_was_empty_reads_by_its_index(
    early: Connection, full: Notifications
) -> None:
    """What was cheap then would read 300,000 rows now."""
    for subscription in (LARGE, MORE_LITTLE):
        cost, plan = claim(full, subscription, within=early)
        assert cost.claimed == BATCH
        assert "Seq Scan" not in {node["Node Type"] for node in walk(plan)}


def claim(
    table: Notifications,
    subscription: int,
    *,
    limit: int = 100_000,
    bound: Bound | None = None,
    pooled: bool = False,
    within: Connection | None = None,
) -> tuple[Cost, Mapping[str, Any]]:
    """Explain a claim of one subscription, prepared as a bridge's are unless they go through a pooler; take it back."""
    quota = Quota(subscription=subscription, limit=limit, lease=LEASE, lease_max=LEASE_MAX, bound=bound)
    if within is not None:
        return _explained(table, within, quota)
    with table.engine.connect() as connection:
        if not pooled:
            prepared.allow(connection)
        found = _explained(table, connection, quota)
        connection.invalidate()  # nobody else is to have what is prepared
    return found


def _explained(table: Notifications, connection: Connection, quota: Quota) -> tuple[Cost, Mapping[str, Any]]:
    explaining = _Explaining(connection)
    claimed = table.store.claim(explaining, [quota], batch_size=BATCH, max_starts=3)  # type: ignore[arg-type]
    connection.rollback()
    nodes = [node for node in walk(explaining.plan) if _reads_table(node)]
    return Cost(nodes, len(claimed.rows), claimed.bounds.get(quota.subscription)), explaining.plan


class _Explaining:
    """A connection that explains what it executes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.plan: Mapping[str, Any] = {}
        self.statement = ""
        self.info, self.dialect = connection.info, connection.dialect
        self.exec_driver_sql = connection.exec_driver_sql

    def execute(self, statement: TextClause, parameters: Mapping[str, Any]) -> Any:
        self.statement = statement.text
        with self._connection.begin_nested() as savepoint:
            explain = text("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement.text)
            self.plan = self._connection.execute(explain, parameters).scalar_one()[0]["Plan"]
            savepoint.rollback()
        return self._connection.execute(statement, parameters)


def walk(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a plan's nodes."""
    yield plan
    for child in plan.get("Plans", ()):
        yield from walk(child)


def _reads_table(node: Mapping[str, Any]) -> bool:
    return node.get("Relation Name") == "pgpubsub_notification" and node["Node Type"] != "ModifyTable"
