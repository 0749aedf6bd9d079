"""What makes a pooler possible: with `listen_url`, nothing that outlasts a transaction is on the other connection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.orm import Session

from pgpubsub_celery import notify
from pgpubsub_celery.migrations import grant_run
from tests.e2e.conftest import database, shop
from tests.fixtures.processes import Shop, eventually
from tests.fixtures.shop import Order

__all__ = ["database", "shop"]

ROLES = ("through_the_pooler", "directly")


@pytest.fixture
def urls(database: Engine, shop: Shop) -> Iterator[list[str]]:
    """The database by two roles, so that the server can tell the connections of one address from the other's."""
    with database.begin() as connection:
        for role in ROLES:
            connection.execute(text(f"CREATE ROLE {role} LOGIN"))
            grant_run(connection, role)
    url = make_url(shop.database_url)
    yield [url.set(username=role).render_as_string() for role in ROLES]
    shop.close()
    with database.begin() as connection:
        for role in ROLES:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


def test_what_outlasts_a_transaction_is_on_the_direct_connection(shop: Shop, database: Engine, urls: list[str]) -> None:
    """Its locks, by which it is rung; claims are statements on the other, each a transaction of its own."""
    pooled, direct = urls
    shop.bridge("--poll-interval=600", PGPUBSUB_DATABASE_URL=pooled, PGPUBSUB_LISTEN_URL=direct)
    with Session(database) as session, session.begin():
        notify(session, Order(number=1))

    def scalars(statement: str) -> list[str]:
        with database.connect() as connection:
            return list(connection.execute(text(statement)).scalars())

    eventually(lambda: scalars("SELECT state FROM pgpubsub_notification") == ["dispatched"], "it is published")
    of_bridge = (
        "FROM pg_stat_activity a WHERE application_name LIKE 'pgpubsub-bridge%' AND datname = current_database()"
    )
    assert set(scalars(f"SELECT usename {of_bridge}")) == set(ROLES)
    holding = scalars(
        f"SELECT DISTINCT usename {of_bridge} AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
    )
    assert holding == ["directly"]
    # Between its statements the pooled one is in no transaction, so that a pooler may give it to others.
    eventually(
        lambda: scalars(f"SELECT state {of_bridge} AND usename = 'through_the_pooler'") == ["idle"],
        "the pooled connection is in no transaction",
    )
