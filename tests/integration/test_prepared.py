"""A claim is planned once for each session, and sent as it is where a session may be another one each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import URL

from pgpubsub_celery import prepared
from pgpubsub_celery.prepared import Prepared
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.wakeups import Link, bridge_engine
from tests.fixtures.notifications import Notifications

PREPARED = text("SELECT name FROM pg_prepared_statements ORDER BY name")
DOUBLE = Prepared(
    "double", text("SELECT CAST(:number AS int) * 2 AS twice, '100 % of' || CAST(:number AS int) AS told")
)


@pytest.fixture(params=["psycopg2", "psycopg"])
def url(request: pytest.FixtureRequest, installed_url: str) -> URL:
    """A database with our tables, to be reached with each driver."""
    return sync_url(installed_url).set(drivername=f"postgresql+{request.param}")


@pytest.fixture
def session(url: URL) -> Iterator[Connection]:
    """One that statements may be prepared on, as a bridge's."""
    engine = bridge_engine(url)
    with engine.connect() as connection:
        prepared.allow(connection)
        yield connection


def names(connection: Connection) -> list[str]:
    return list(connection.execute(PREPARED).scalars())


def is_prepared(connection: Connection) -> bool:
    """Whether the statement is, alone; psycopg 3 has its own names."""
    return names(connection) in ([DOUBLE.name], ["_pg3_0"])


def twice(connection: Connection, number: int) -> int:
    row = DOUBLE.execute(connection, {"number": number}).one()
    assert row.told == f"100 % of{number}"
    result: int = row.twice
    return result


def test_a_statement_is_prepared_once(session: Connection) -> None:
    """The second time is an EXECUTE alone, with other parameters."""
    assert [twice(session, 1), twice(session, 21)] == [2, 42]
    assert is_prepared(session)
    calls = session.execute(text("SELECT generic_plans, custom_plans FROM pg_prepared_statements")).one()
    assert tuple(calls) == (2, 0)


def test_a_session_that_is_another_one_is_sent_the_statement_as_it_is(session: Connection) -> None:
    """A pooler between transactions forgets what was prepared, or has it from somebody else: nothing fails."""
    assert twice(session, 1) == 2
    session.execute(text("DEALLOCATE ALL"))
    assert twice(session, 2) == 4
    assert twice(session, 3) == 6
    assert names(session) == []


def test_a_statement_of_that_name_from_somebody_else_is_not_executed(session: Connection) -> None:
    """Two clients share a session's prepared statements behind such a pooler."""
    for name in (DOUBLE.name, "_pg3_0"):
        session.exec_driver_sql(f"PREPARE {name} AS SELECT $1::int * 3 AS twice, 'wrong'")
    assert twice(session, 2) == 4


def test_an_error_of_the_statement_itself_is_raised(session: Connection) -> None:
    """Only a session's own forgetting is cured."""
    with pytest.raises(Exception, match="out of range"):
        twice(session, 2**31 - 1)
    assert is_prepared(session)


@pytest.mark.parametrize(("pooled", "expected"), [(False, ["pgpubsub_claim", "pgpubsub_next_due"]), (True, [])])
def test_a_bridge_prepares_unless_its_connection_is_pooled(
    notifications: Notifications, url: URL, pooled: bool, expected: list[str]
) -> None:
    """With `listen_url`, the other URL is one of a pooler."""
    engine = bridge_engine(url)
    notifications.add(3)
    with Link(engine, engine, "public", pooled=pooled) as link:
        assert [len(notifications.claim(connection=link.claims).rows) for _ in range(2)] == [3, 0]
        notifications.store.next_due(link.claims, [1])
        found = [name.rpartition("_")[0] for name in names(link.claims)]
        assert found == expected if url.drivername.endswith("psycopg2") else len(found) == len(expected)


def test_only_a_claim_is_committed_before_it_is_on_disk(installed_engine: Engine, session: Connection) -> None:
    """Lost with a crash, its rows are waiting again; what comes after it on the same connection is durable."""
    Notifications(installed_engine).claim(connection=session)
    assert session.execute(text("SHOW synchronous_commit")).scalar() == "on"


def test_a_claim_planned_on_an_empty_table_finds_rows_by_their_ids_when_it_is_full(
    notifications: Notifications, session: Connection
) -> None:
    """Nobody analyses a table in time: reading all of it, which cost nothing then, would be the plan for ever."""
    assert notifications.claim(connection=session).rows == []
    notifications.add(3000)
    (name,) = names(session)
    assert len(notifications.claim(connection=session).rows) == 500
    call = notifications.store._claim.texts(session)[1].text
    given = ["'{1}'", "'{1000}'", "'{60}'", "'{60}'", "'{false}'", *["'{NULL}'"] * 4, "500", "3"]
    order = [one.strip() for one in call[call.index("(") + 1 : -1].split(",")]
    known = dict(zip(PARAMETERS, given, strict=True))
    plan = session.execute(text(f"EXPLAIN EXECUTE {name} ({', '.join(known[one] for one in order)})")).scalars().all()
    assert [line for line in plan if "pgpubsub_notification_pkey" in line]
    assert not [line for line in plan if "Seq Scan" in line]


PARAMETERS = [
    *(":subscriptions", ":limits", ":leases", ":lease_maxima", ":payloads"),
    *(":waiting_at", ":waiting_id", ":flying", ":expired", ":batch_size", ":max_starts"),
]
