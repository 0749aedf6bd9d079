"""Versions of the schema: each older one becomes the present one with its rows, and works meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

import pgpubsub_celery
from pgpubsub_celery import drift, install, notify, script, upgrades
from pgpubsub_celery.channels import Channel
from pgpubsub_celery.errors import NotInstalledError, PgPubSubError
from pgpubsub_celery.migrations import check, install_sql
from pgpubsub_celery.schema import VERSION, Names
from pgpubsub_celery.store import Quota, Store
from pgpubsub_celery.upgrades import Upgrade, released
from pgpubsub_celery.wakeups import require_installed
from tests.fixtures.schemas.example import Base, declare
from tests.fixtures.schemas.recording import present_statements, present_version

RECORDED = Path(__file__).parents[1] / "fixtures" / "schemas"
PAST = range(1, VERSION)
DIGESTS: dict[int, str] = {1: "600f3a1338c16ce404d21a82b26510aac77eddab8689dea8171f3cef586c1286"}
"""Of the recorded versions before the present one: what a release has installed is never edited."""

NEXT = VERSION + 1


@pytest.fixture(autouse=True)
def channels(registry: None) -> Sequence[type[Channel]]:
    """The channels of the recorded databases, and no others."""
    from pgpubsub_celery import channels, listeners

    channels._registry.clear()
    listeners._registry.clear()
    return declare()


@pytest.fixture
def old(engine: Engine) -> Engine:
    """A database of version 1, with rows that its triggers and functions have stored."""
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        execute(connection, (RECORDED / "v1.sql").read_text())
        store(connection, 1)
    return engine


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    """A release with one version more: a column that is filled, and an index on it."""
    upgrade = Upgrade(
        to=NEXT,
        what="a colour for each notification",
        up=lambda names: (
            f"ALTER TABLE {names.notification} ADD COLUMN IF NOT EXISTS colour text NOT NULL DEFAULT 'blue'",
            f"CREATE INDEX IF NOT EXISTS colour_idx ON {names.notification} (colour)",
        ),
        down=lambda names: (f"ALTER TABLE {names.notification} DROP COLUMN IF EXISTS colour",),
    )
    monkeypatch.setattr(upgrades, "UPGRADES", (*upgrades.UPGRADES, upgrade))
    for module in (drift, script):
        monkeypatch.setattr(module, "VERSION", NEXT)
    return upgrade


def execute(connection: Connection, script: str) -> None:
    """Run a script of several statements as psql would."""
    connection.connection.cursor().execute(script)


def store(connection: Connection, id: int) -> None:
    """Store four notifications: one of the message, three of the changes."""
    connection.execute(text("SELECT pgpubsub_notify('example.Posted', '{\"number\": 1}')"))
    connection.execute(text("INSERT INTO author VALUES (:id, 'Ada')"), {"id": id})
    connection.execute(text("UPDATE author SET name = 'Grace' WHERE id = :id"), {"id": id})


def stored(engine: Engine) -> list[Any]:
    """What there is of notifications, with the columns of version 1."""
    columns = "id, channel, subscription, operation, payload, state, available_at, dispatches, starts, retries"
    with engine.connect() as connection:
        return list(connection.execute(text(f"SELECT {columns} FROM pgpubsub_notification ORDER BY id")))


def shape(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """Columns, indexes and constraints of our tables, and our functions with their digests."""
    ours = "c.relname LIKE 'pgpubsub\\_%' AND n.nspname = 'public'"
    of_tables = "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
    queries = {
        "columns": (
            "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, "
            f"pg_get_expr(d.adbin, d.adrelid) {of_tables} JOIN pg_attribute a ON a.attrelid = c.oid "
            "LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum "
            f"WHERE {ours} AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1, 2"
        ),
        "indexes": f"SELECT c.relname, pg_get_indexdef(c.oid) {of_tables} WHERE {ours} AND c.relkind = 'i' ORDER BY 1",
        "constraints": (
            f"SELECT o.conname, pg_get_constraintdef(o.oid) {of_tables} JOIN pg_constraint o ON o.conrelid = c.oid "
            f"WHERE {ours} ORDER BY 1"
        ),
        "settings": (
            f"SELECT c.relname, array(SELECT unnest(c.reloptions) ORDER BY 1) {of_tables} "
            f"WHERE {ours} AND c.relkind = 'r' ORDER BY 1"
        ),
        "functions": (
            "SELECT p.oid::regprocedure::text, obj_description(p.oid, 'pg_proc'), p.proacl::text FROM pg_proc p "
            "WHERE p.pronamespace = 'public'::regnamespace AND p.proname LIKE 'pgpubsub\\_%' "
            "AND p.prorettype <> 'trigger'::regtype ORDER BY 1"
        ),
    }
    with engine.connect() as connection:
        return {
            what: [tuple(row) for row in connection.execute(text(query.replace("\\", "\\\\")))]
            for what, query in queries.items()
        }


# An older database


@pytest.mark.parametrize("by", ["install", "script"])
def test_a_database_of_version_1_becomes_the_present_one_with_its_rows(
    old: Engine, installed_engine: Engine, channels: Sequence[type[Channel]], by: str
) -> None:
    """Nothing is lost, nothing differs afterwards, and it is what an installation from nothing is."""
    before = stored(old)
    assert len(before) == 4
    if by == "install":
        install(old)
    else:
        with old.begin() as connection:
            execute(connection, install_sql(schema="public"))
    assert stored(old) == before
    with old.begin() as connection:
        assert check(connection) == []
        assert notify(connection, channels[0](number=2)) == 1  # type: ignore[call-arg]
        connection.execute(text("DELETE FROM author"))
    assert len(stored(old)) == 6
    assert shape(old) == shape(installed_engine)


def test_the_next_version_is_reached_by_its_step_with_rows_stored(old: Engine, next_version: Upgrade) -> None:
    """Told, done once, and what was stored has what the version adds."""
    before = stored(old)
    with old.connect() as connection:
        told = check(connection)
    assert f"version {NEXT} of the schema: a colour for each notification" in told
    assert install(old) == told
    assert stored(old) == before
    with old.connect() as connection:
        assert set(connection.execute(text("SELECT colour FROM pgpubsub_notification")).scalars()) == {"blue"}
        assert require_installed(connection, "public", NEXT)
    assert install(old) == []


def test_the_script_reaches_the_next_version_too(old: Engine, next_version: Upgrade) -> None:
    """It is for any older version, so its steps are conditions; on an empty database they are none."""
    text_of_it = install_sql(schema="public")
    for _ in range(2):
        with old.begin() as connection:
            execute(connection, text_of_it)
    with old.connect() as connection:
        assert check(connection) == []
        assert set(connection.execute(text("SELECT colour FROM pgpubsub_notification")).scalars()) == {"blue"}


def test_the_version_before_works_on_the_next_schema(old: Engine, next_version: Upgrade) -> None:
    """While pods are replaced: its writers, triggers, bridges and workers, but not its install."""
    with old.begin() as connection:
        for upgrade in upgrades.UPGRADES:
            for statement in upgrade.up(Names("public")):
                connection.execute(text(statement))
        connection.execute(text(f"UPDATE pgpubsub_installation SET version = {NEXT}"))
        store(connection, 2)
        assert require_installed(connection, "public", VERSION)
    assert len(stored(old)) == 8
    with old.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        ids = connection.execute(text("SELECT id FROM pgpubsub_subscription")).scalars()
        quotas = [Quota(subscription=id, limit=100, lease=60.0, lease_max=60.0) for id in ids]
        rows = Store("public").claim(connection, quotas, batch_size=100, max_starts=3).rows
        taken, _ = Store("public").take_locked(connection, [row.id for row in rows], 1)
    assert len(rows) == len(taken) == 8


def test_an_upgrade_waits_for_a_writer_no_longer_than_asked(old: Engine, next_version: Upgrade) -> None:
    """And does nothing then: the version is still the one before."""
    with old.begin() as writer:
        writer.execute(text("LOCK TABLE pgpubsub_notification IN ROW EXCLUSIVE MODE"))
        with pytest.raises(PgPubSubError, match=r"waited 0.3 s in vain for this package's own tables"):
            install(old, lock_timeout=0.3)
    with old.connect() as connection, pytest.raises(NotInstalledError, match=f"needs {NEXT}"):
        require_installed(connection, "public", NEXT)
    install(old)


# What is recorded


def test_the_present_version_is_recorded() -> None:
    """Whoever changes tables or functions records them: a released version gets a number and a step."""
    file = Path(pgpubsub_celery.__file__).parent / "released" / f"v{VERSION}.sql"
    assert file.is_file(), "upgrades.py says how: python -m tests.fixtures.schemas"
    assert file.read_text() == present_version(), (
        f"tables or functions are not those of version {VERSION}: if it has been released, raise VERSION and add an "
        "Upgrade; then run python -m tests.fixtures.schemas"
    )


@pytest.mark.parametrize("schema", ["public", "Od\"d 'schema' 100% \\"])
def test_a_recorded_version_is_what_install_makes_in_any_schema(schema: str) -> None:
    """Its functions to the letter, digests too."""
    tables, functions = present_statements(schema)
    recorded = released(VERSION, Names(schema))
    assert list(recorded.functions) == functions
    assert [one.replace('"', "") for one in recorded.tables] == [one.replace('"', "") for one in tables]
    assert len(recorded.signatures) == len([one for one in functions if one.startswith("CREATE")])


def test_released_versions_are_as_they_were() -> None:
    """Migrations that were made with them must do the same for ever."""
    folder = Path(pgpubsub_celery.__file__).parent / "released"
    found = {version: hashlib.sha256((folder / f"v{version}.sql").read_bytes()).hexdigest() for version in PAST}
    assert found == DIGESTS, "a version that is past is pinned here: add its digest, never change one"


def test_there_is_one_step_to_each_version_in_order() -> None:
    """From the first on."""
    assert [upgrade.to for upgrade in upgrades.UPGRADES] == list(range(2, VERSION + 1))


def test_an_unknown_version_is_told_with_those_that_are_known() -> None:
    """A migration of a newer release is not guessed at."""
    with pytest.raises(PgPubSubError, match=rf"the versions 1 to {VERSION} of the schema, not 99"):
        released(99, Names("public"))
    with pytest.raises(PgPubSubError, match="not 99"):
        upgrades.upgrade_to(99)
