"""What a claim in the order of keys costs: a probe for each key, whatever one of them has waiting, and for how many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from pgpubsub_celery import prepared
from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.keyed import KeyedQuota, KeyedStore
from pgpubsub_celery.settings import sync_url
from tests.fixtures.notifications import LEASE, LEASE_MAX, TABLE, Notifications

DATABASE = "keyed_plan"
BATCH = 100
LITTLE, HOT, DELAYED, UNIQUE = range(1, 5)
"""Subscriptions: of little, of one key with a large backlog before some others, of many keys that wait for later, and
of unique keys with some superseded ones beside many others."""


@pytest.fixture(scope="module")
def table(postgres: EmbeddedPostgres, template: str) -> Iterator[Notifications]:
    """A table without autovacuum, of 200,000 rows; what the planner knows is from before most of them."""
    engine = create_engine(sync_url(postgres.create_database(DATABASE, template=template)))
    table = Notifications(engine)
    table.execute(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = false)")
    add(table, LITTLE, "'k' || n", BATCH)
    table.execute(f"ANALYZE {TABLE}")
    add(table, HOT, "'hot'", 100_000, ago=100)
    add(table, HOT, "'other' || n", 20)
    add(table, DELAYED, "'later' || n", 50_000, ago=-3600)
    add(table, DELAYED, "'now' || n", 20)
    add(table, UNIQUE, "'u' || n", 40_000, ago=-3600, column="unique_key")
    add(table, UNIQUE, "'s' || n % 20", 60, column="unique_key")
    yield table
    engine.dispose()
    postgres.drop_database(DATABASE)


def add(
    table: Notifications, subscription: int, key: str, count: int, *, ago: int = 10, column: str = "ordering_key"
) -> None:
    """Insert rows with keys, as SQL over n."""
    table.execute(
        f"INSERT INTO {TABLE} (channel, operation, payload, subscription, {column}, available_at) "
        f"SELECT 'a', 'message', '{{}}', :subscription, {key}, now() - make_interval(secs => :ago) "
        "FROM generate_series(1, :count) n",
        subscription=subscription,
        ago=ago,
        count=count,
    )


@pytest.fixture(params=["from before the burst", "none", "present"])
def planner(request: pytest.FixtureRequest, table: Notifications) -> None:
    """What the planner knows of the table."""
    if request.param == "none":
        table.execute(f"DELETE FROM pg_statistic WHERE starelid = '{TABLE}'::regclass")
    elif request.param == "present":
        table.execute(f"ANALYZE {TABLE}")


def explain(
    table: Notifications, subscription: int, *, ordered: bool = True, pooled: bool = False
) -> tuple[int, int, list[dict[str, Any]]]:
    """Explain a claim, prepared as a bridge's are unless they go through a pooler, and take it back.

    Return what it claimed, the pages read to find that, and the nodes that read the table.
    """
    quota = KeyedQuota(
        subscription=subscription,
        limit=1000,
        lease=LEASE,
        lease_max=LEASE_MAX,
        ordered=ordered,
        unique=not ordered,
        run=10,
    )
    store = KeyedStore("public")
    parameters = store.parameters([quota], batch_size=BATCH, max_starts=3)
    claim = store.prepared
    with table.engine.connect() as connection:
        statement = claim.statement
        if not pooled:
            prepared.allow(connection)
            preparing, statement = claim.texts(connection)
            connection.exec_driver_sql(preparing)
        explaining = text("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement.text)
        with connection.begin_nested() as savepoint:
            (explained,) = connection.execute(explaining, parameters).scalar_one()
            savepoint.rollback()
        claimed = [row for row in connection.execute(statement, parameters) if row.id is not None]
        connection.rollback()
        connection.invalidate()  # nobody else is to have what is prepared
    nodes = [
        node
        for node in walk(explained["Plan"])
        if node.get("Relation Name") == "pgpubsub_notification" and node["Node Type"] != "ModifyTable"
    ]
    # Those of the statement's writing parts find rows by their ids.
    finding = [node for node in nodes if node["Alias"] not in ("n", "d", "b")]
    pages = sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in finding)
    return len(claimed), pages, nodes


def walk(plan: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a plan's nodes."""
    yield dict(plan)
    for child in plan.get("Plans", ()):
        yield from walk(child)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("subscription", "claimed", "pages"),
    [
        (LITTLE, BATCH, 25 * BATCH),
        # A hundred due rows of one key, twenty-one keys, ten rows of the run.
        (HOT, 30, 700),
        # Nothing of the fifty thousand.
        (DELAYED, 20, 600),
        (UNIQUE, 20, 1500),
    ],
    ids=["little", "hot key", "delayed keys", "unique"],
)
def test_a_keyed_claim_costs_what_it_claims(
    planner: None, table: Notifications, subscription: int, claimed: int, pages: int, pooled: bool
) -> None:
    """By the indexes alone, whatever the planner believes; beside a backlog of a key, or of many that are not due.

    Prepared or not.
    """
    found, read, nodes = explain(table, subscription, ordered=subscription != UNIQUE, pooled=pooled)
    assert found == claimed
    assert {node["Node Type"] for node in nodes} <= {"Index Scan", "Index Only Scan", "Bitmap Heap Scan"}
    bitmaps = [child for node in nodes if "Bitmap" in node["Node Type"] for child in node["Plans"]]
    assert {bitmap["Index Name"] for bitmap in bitmaps} <= {"pgpubsub_notification_pkey"}
    assert read < pages
