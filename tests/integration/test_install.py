"""install, check, uninstall: what a database has afterwards, beside writers, other installs and other releases."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import Channel, TriggerChannel, install, install_on_create_all, metadata, notify, uninstall
from pgpubsub_celery.errors import BindError, NotInstalledError, PgPubSubError
from pgpubsub_celery.listeners import Listener, register_listener
from pgpubsub_celery.measuring import Report
from pgpubsub_celery.migrations import check, grant_emit, grant_run, install_sql, register_subscriptions
from pgpubsub_celery.schema import quote_identifier
from pgpubsub_celery.settings import sync_url
from pgpubsub_celery.upgrades import pending

pytestmark = pytest.mark.usefixtures("registry")


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture(autouse=True)
def _nothing_is_registered(registry: None) -> None:
    """Only what a test declares is installed by it."""
    from pgpubsub_celery import channels, listeners

    channels._registry.clear()
    listeners._registry.clear()


def listen(
    channel: type[Channel],
    name: str = "listener",
    operations: tuple[str, ...] = ("message",),
    aliases: tuple[str, ...] = (),
) -> Listener:
    """Register a listener, without a task."""
    listener = Listener(
        name=name, channel=channel, operations=operations, fields=(), injected=frozenset(), aliases=aliases
    )
    register_listener(listener)
    return listener


def reads(name: str = "blog.Reads", *, earlier: tuple[str, ...] = (), stored: bool = True) -> type[Channel]:
    """Declare a message channel."""

    @dataclasses.dataclass
    class Reads(Channel):
        __qualname__ = name.replace(".", "_")
        channel_name = name
        aliases = earlier
        lock_notifications = stored
        value: int = 0

    return Reads


def changes(of: type[Any] = Author, name: str = "blog.Changes", earlier: tuple[str, ...] = ()) -> type[Channel]:
    """Declare a trigger channel."""

    class Changes(TriggerChannel):
        __qualname__ = name.replace(".", "_")
        channel_name = name
        aliases = earlier
        lock_notifications = True
        model = of

    return Changes


def subscriptions(engine: Engine) -> dict[str, set[str]]:
    """Listener names and their operations, without the one of enqueue()."""
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT listener, operations FROM pgpubsub_subscription WHERE listener <> 'pgpubsub.enqueue'")
        )
        return {row.listener: set(row.operations) for row in rows}


def triggers(engine: Engine) -> list[tuple[str, str]]:
    """Tables and triggers of ours on them."""
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT tgrelid::regclass::text, tgname FROM pg_trigger "
                "WHERE NOT tgisinternal AND tgname LIKE 'pgpubsub%' ORDER BY 1, 2"
            )
        )
        return [(row[0], row[1]) for row in rows]


def differences(engine: Engine, **options: Any) -> list[str]:
    with engine.connect() as connection:
        return check(connection, **options)


def count(engine: Engine, what: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {what}")).scalar_one())


@pytest.fixture
def role(installed_engine: Engine) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"role_{installed_engine.url.database}"
    with installed_engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
    yield name
    with installed_engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))


@pytest.fixture
def as_role(installed_engine: Engine, role: str) -> Iterator[Engine]:
    """An engine of that role."""
    engine = create_engine(installed_engine.url.set(username=role))
    yield engine
    engine.dispose()


# Installing


def test_install_makes_everything_and_a_second_one_nothing(engine: Engine) -> None:
    """What it says it did is what check said was missing."""
    Base.metadata.create_all(engine)
    listen(reads())
    listen(changes(), "on_author", ("insert", "update"))
    missing = differences(engine)
    assert any("pgpubsub_notification" in line for line in missing)
    assert install(engine) == missing
    assert differences(engine) == []
    assert install(engine) == []
    assert subscriptions(engine) == {"listener": {"message"}, "on_author": {"insert", "update"}}
    assert triggers(engine)


def test_a_second_install_locks_no_table_of_the_users(engine: Engine) -> None:
    """A deployment must not wait for, or hold up, the writers of a busy table."""
    Base.metadata.create_all(engine)
    listen(changes(), "on_author", ("insert",))
    install(engine)
    with engine.begin() as writer:
        writer.execute(text("LOCK TABLE author IN ACCESS EXCLUSIVE MODE"))
        assert install(engine, lock_timeout=0.1) == []


def test_installs_at_the_same_time_do_not_disturb_each_other(engine: Engine) -> None:
    """Every pod of a deployment may run it."""
    Base.metadata.create_all(engine)
    listen(reads())
    listen(changes(), "on_author", ("insert", "update"))
    start = threading.Barrier(4)

    def run(_: int) -> list[str]:
        start.wait()
        return install(engine)

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(run, range(4)))
    assert len([lines for lines in done if any("pgpubsub_notification" in line for line in lines)]) == 1
    assert differences(engine) == []
    assert count(engine, "pgpubsub_installation") == 1


def test_a_connections_transaction_is_the_callers(engine: Engine) -> None:
    """Rolled back, nothing was installed; its lock_timeout is as it was."""
    with engine.connect() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '7s'"))
        assert install(connection)
        assert connection.execute(text("SHOW lock_timeout")).scalar() == "7s"
        assert check(connection) == []
        connection.rollback()
    assert differences(engine)


@pytest.mark.parametrize("schema", ["queue", "Od\"d 'schema' 100% \\"])
def test_everything_can_be_in_a_schema_of_its_own(engine: Engine, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called; notify() finds it by the same setting."""
    from pgpubsub_celery import emit

    Base.metadata.create_all(engine)
    channel = reads()
    listen(channel)
    listen(changes(), "on_author", ("insert", "update", "delete"))
    install(engine, schema=schema)
    assert differences(engine, schema=schema) == []
    assert install(engine, schema=schema) == []
    monkeypatch.setattr(emit, "schema_for", lambda *_: schema)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {quote_identifier(schema)}.alembic_version (version_num text)"))
        connection.execute(text(f"INSERT INTO {quote_identifier(schema)}.alembic_version VALUES ('abc')"))
        connection.execute(text("CREATE TABLE alembic_version AS SELECT 'of another application' AS version_num"))
        assert notify(connection, channel(value=1)) == 1  # type: ignore[call-arg]
        connection.execute(text("INSERT INTO author VALUES (1, 'Ada')"))
    assert count(engine, f"{quote_identifier(schema)}.pgpubsub_notification WHERE db_version = 'abc'") == 2
    assert differences(engine) != []
    uninstall(engine, discard_stored=True, schema=schema)
    assert triggers(engine) == []


def test_what_is_not_an_engine_or_connection_is_refused(engine: Engine) -> None:
    """A session's transaction would be half ours; autocommit has none."""
    with Session(engine) as session, pytest.raises(BindError, match="given a Session: expected an Engine"):
        install(session)  # type: ignore[arg-type]
    with (
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(BindError, match="AUTOCOMMIT"),
    ):
        install(connection)


def test_an_engine_in_autocommit_is_given_transactions(engine: Engine) -> None:
    """Its isolation level is the application's business, not that of an installation."""
    autocommit = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    assert install(autocommit)
    assert differences(engine) == []
    autocommit.dispose()


def test_a_table_that_others_hold_is_named_with_what_to_do(engine: Engine) -> None:
    """After lock_timeout, with everything else installed."""
    Base.metadata.create_all(engine)
    listen(changes(), "on_author", ("insert",))
    listen(changes(Book, "blog.Books"), "on_book", ("insert",))
    with engine.begin() as writer:
        writer.execute(text("INSERT INTO book VALUES (1)"))
        with pytest.raises(PgPubSubError, match=r"waited 0\.3 s in vain for the table .*book.*pg_stat_activity"):
            install(engine, lock_timeout=0.3)
    assert {table for table, _ in triggers(engine)} == {"author"}
    install(engine)
    assert {table for table, _ in triggers(engine)} == {"author", "book"}


def test_install_waits_for_a_table_without_holding_up_its_writers(engine: Engine) -> None:
    """Who queues behind a waiting lock waits, too: so it never waits for long at a time."""
    Base.metadata.create_all(engine)
    listen(changes(), "on_author", ("insert",))
    with ThreadPoolExecutor(1) as pool:
        with engine.connect() as slow:
            slow.execute(text("INSERT INTO author VALUES (1, 'Ada')"))
            installing = pool.submit(install, engine, lock_timeout=30)
            with engine.connect() as watcher:
                while not watcher.execute(
                    text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'author'::regclass")
                ).scalar():
                    assert not installing.done()
            with engine.begin() as writer:
                writer.execute(text("SET LOCAL lock_timeout = '5s'"))
                writer.execute(text("INSERT INTO author VALUES (2, 'Grace')"))
            assert not installing.done()
            slow.commit()
        installing.result(timeout=30)
    assert {table for table, _ in triggers(engine)} == {"author"}


def test_a_trigger_channel_without_its_table_is_named(engine: Engine) -> None:
    """The order of migrations is the user's: ours come after theirs."""
    listen(changes(), "on_author", ("insert",))
    with pytest.raises(PgPubSubError, match=r"the table .*author.* does not exist: create it first"):
        install(engine)


def test_a_role_without_rights_is_told_which(as_role: Engine, installed_engine: Engine) -> None:
    """And what to run it as."""
    with installed_engine.begin() as connection:
        Base.metadata.create_all(connection)
    with pytest.raises(PgPubSubError, match="belongs to the role"):
        install(as_role)
    with pytest.raises(PgPubSubError, match="lacks a right"):
        install(as_role, schema="other")


def test_a_table_of_another_role_is_not_built_upon(installed_engine: Engine, as_role: Engine) -> None:
    """Our functions would write to it, with the rights of the role that installs."""
    uninstall(installed_engine)
    with installed_engine.begin() as connection:
        connection.execute(text(f"GRANT CREATE ON SCHEMA public TO {as_role.url.username}"))
    with as_role.begin() as connection:
        connection.execute(text("CREATE TABLE pgpubsub_subscription (channel text)"))
    with pytest.raises(PgPubSubError, match=f"pgpubsub_subscription .* belongs to the role '{as_role.url.username}'"):
        install(installed_engine)


def test_a_newer_database_is_not_downgraded(installed_engine: Engine) -> None:
    """An old pod that starts late must not undo what the new ones need."""
    with installed_engine.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_installation SET version = 1000"))
    with pytest.raises(PgPubSubError, match="version 1000 of the schema, this release has"):
        install(installed_engine)


def test_an_older_database_is_upgraded(installed_engine: Engine) -> None:
    """Its version and what is out of date, by the digest in its comment."""
    with installed_engine.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_installation SET version = 0"))
        connection.execute(text("COMMENT ON FUNCTION pgpubsub_ring(text) IS 'pgpubsub:of an older release'"))
        connection.execute(text("DROP FUNCTION pgpubsub_send(text, jsonb)"))
    done = install(installed_engine)
    assert len(done) == 3 + len(pending(0))
    assert any("version 0" in line for line in done)
    assert any("pgpubsub_ring(text) is out of date" in line for line in done)
    assert any("pgpubsub_send(text, jsonb) is missing" in line for line in done)
    assert differences(installed_engine) == []


def test_an_upgrade_keeps_the_grants(installed_engine: Engine, role: str) -> None:
    """A replaced function is the same function to those who may call it."""
    with installed_engine.begin() as connection:
        grant_emit(connection, role)
        for function in ("pgpubsub_notify(text, jsonb, timestamptz, jsonb)",):
            connection.execute(text(f"COMMENT ON FUNCTION {function} IS 'pgpubsub:of an older release'"))
    assert install(installed_engine)
    with installed_engine.connect() as connection:
        assert connection.execute(
            text("SELECT has_function_privilege(:role, 'pgpubsub_notify(text, jsonb, timestamptz, jsonb)', 'EXECUTE')"),
            {"role": role},
        ).scalar()


def test_a_new_id_of_the_installation_reaches_the_functions(installed_engine: Engine) -> None:
    """Whoever gives a copy of a database an id of its own, so that workers tell them apart, runs install."""
    with installed_engine.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_installation SET id = gen_random_uuid()"))
    assert any("pgpubsub_installation() is out of date" in line for line in differences(installed_engine))
    install(installed_engine)
    with installed_engine.connect() as connection:
        assert connection.execute(text("SELECT id = pgpubsub_installation() FROM pgpubsub_installation")).scalar()


def test_tables_made_by_other_means_get_the_settings_of_a_queue(engine: Engine) -> None:
    """By Alembic from the metadata, say; what somebody has set otherwise stays."""
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE pgpubsub_notification SET (fillfactor = 50)"))
    assert any("lacks settings of a queue (autovacuum" in line for line in install(engine))
    with engine.connect() as connection:
        options = connection.execute(text("SELECT reloptions FROM pg_class WHERE relname = 'pgpubsub_notification'"))
        assert {"fillfactor=50", "autovacuum_vacuum_scale_factor=0"} <= set(options.scalar_one())
    assert differences(engine) == []


# Subscriptions


def test_install_sets_operations_to_what_is_declared(engine: Engine) -> None:
    """Also to less, which a bridge's start never does."""
    Base.metadata.create_all(engine)
    channel = changes()
    listen(channel, "on_author", ("insert", "update"))
    install(engine)
    listen(channel, "on_author", ("insert", "delete"))
    install(engine)
    assert subscriptions(engine) == {"on_author": {"insert", "delete"}}


def test_a_bridge_adds_what_is_missing_and_takes_nothing_away(installed_engine: Engine) -> None:
    """Releases run beside each other: what another one wants must go on being stored."""
    channel = changes()
    first = listen(channel, "on_author", ("insert", "update"))
    with installed_engine.begin() as connection:
        ids = register_subscriptions(connection, "public", [first])
    assert list(ids.values()) == [first]
    second = listen(channel, "on_author", ("insert", "delete"))
    with installed_engine.begin() as connection:
        assert register_subscriptions(connection, "public", [second]) == dict.fromkeys(ids, second)
    assert subscriptions(installed_engine) == {"on_author": {"insert", "update", "delete"}}


def test_a_bridge_makes_its_channels_known_so_that_they_can_be_rung(installed_engine: Engine) -> None:
    """Also one that no install has seen yet."""
    channel = reads()
    with installed_engine.begin() as connection:
        register_subscriptions(connection, "public", [listen(channel)])
        name = connection.execute(
            text("SELECT listen_name FROM pgpubsub_channel WHERE name = :name"), {"name": channel.name()}
        ).scalar()
    assert name == channel.listen_safe_name()


def test_bridges_that_start_at_the_same_time_make_one_subscription(installed_engine: Engine) -> None:
    """In autocommit, as bridges work."""
    listeners = [listen(reads(), f"listener_{n}") for n in range(5)]
    autocommit = installed_engine.execution_options(isolation_level="AUTOCOMMIT")
    start = threading.Barrier(6)

    def run(_: int) -> dict[int, Listener]:
        with autocommit.connect() as connection:
            start.wait()
            return register_subscriptions(connection, "public", listeners)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(run, range(6)))
    assert all(ids == found[0] for ids in found)
    assert sorted(listener.name for listener in found[0].values()) == [f"listener_{n}" for n in range(5)]


def test_a_renamed_listener_keeps_its_subscription_and_what_is_stored_for_it(installed_engine: Engine) -> None:
    """And the older release, which knows only the old name, finds it, too, and does not rename it back."""
    channel = reads()
    old = listen(channel, "old_name")
    with installed_engine.begin() as connection:
        ids = register_subscriptions(connection, "public", [old])
        assert notify(connection, channel(value=1)) == 1  # type: ignore[call-arg]
    new = listen(channel, "new_name", aliases=("old_name",))
    with installed_engine.begin() as connection:
        assert register_subscriptions(connection, "public", [new]) == dict.fromkeys(ids, new)
        assert subscriptions_in(connection) == {"new_name"}
        assert register_subscriptions(connection, "public", [old]) == dict.fromkeys(ids, old)
        assert subscriptions_in(connection) == {"new_name"}
        assert notify(connection, channel(value=2)) == 1  # type: ignore[call-arg]
        assert connection.execute(
            text("SELECT DISTINCT subscription FROM pgpubsub_notification")
        ).scalars().all() == list(ids)


def subscriptions_in(connection: Connection) -> set[str]:
    rows = connection.execute(text("SELECT listener FROM pgpubsub_subscription WHERE listener <> 'pgpubsub.enqueue'"))
    return set(rows.scalars())


def test_a_renamed_channel_keeps_its_subscriptions(installed_engine: Engine) -> None:
    """Whichever name a writer's release emits under."""
    old_channel = reads("blog.Old")
    old = listen(old_channel)
    install(installed_engine)
    from pgpubsub_celery import channels

    channels._registry.clear()  # it is another release that declares this
    new_channel = reads("blog.New", earlier=("blog.Old",))
    new = listen(new_channel)
    with installed_engine.begin() as connection:
        ids = register_subscriptions(connection, "public", [new])
        assert register_subscriptions(connection, "public", [old]) == dict.fromkeys(ids, old)
        assert notify(connection, old_channel(value=1)) == 1  # type: ignore[call-arg]
        assert notify(connection, new_channel(value=2)) == 1  # type: ignore[call-arg]
        rows = connection.execute(text("SELECT channel, subscription FROM pgpubsub_notification")).all()
    assert {(row.channel, row.subscription) for row in rows} == {("blog.New", *ids)}


def test_install_renames_too(engine: Engine) -> None:
    """The release's install runs before its bridges start."""
    channel = reads()
    listen(channel, "old_name")
    install(engine)
    from pgpubsub_celery import listeners

    listeners._registry.clear()
    listen(channel, "new_name", aliases=("old_name",))
    assert install(engine) == [
        f"the subscription of old_name to {channel.name()} has an earlier name: new_name to {channel.name()}"
    ]
    assert subscriptions(engine) == {"new_name": {"message"}}
    assert install(engine) == []


def test_an_alias_that_comes_late_ends_the_doubled_delivery(engine: Engine) -> None:
    """Renamed without one there are two subscriptions: then one gets nothing new, and both are worked off."""
    channel = reads()
    listen(channel, "old_name")
    listen(channel, "new_name")
    install(engine)
    with engine.begin() as connection:
        assert notify(connection, channel(value=1)) == 2  # type: ignore[call-arg]
    from pgpubsub_celery import listeners

    listeners._registry.clear()
    listener = listen(channel, "new_name", aliases=("old_name",))
    install(engine)
    assert subscriptions(engine) == {"new_name": {"message"}, "old_name": set()}
    with engine.begin() as connection:
        assert notify(connection, channel(value=2)) == 1  # type: ignore[call-arg]
        ids = register_subscriptions(connection, "public", [listener])
    assert len(ids) == 2
    assert subscriptions(engine) == {"new_name": {"message"}, "old_name": set()}
    assert install(engine) == []


def test_a_new_listener_may_take_a_name_that_another_once_had(engine: Engine) -> None:
    """Two listeners never share a subscription."""
    channel = reads()
    listen(channel, "handle")
    install(engine)
    from pgpubsub_celery import listeners

    listeners._registry.clear()
    renamed = listen(channel, "handle_slowly", aliases=("handle",))
    install(engine)
    new = listen(channel, "handle")
    with engine.begin() as connection:
        ids = register_subscriptions(connection, "public", [new, renamed])
    assert sorted(listener.name for listener in ids.values()) == ["handle", "handle_slowly"]
    assert set(subscriptions(engine)) == {"handle", "handle_slowly"}


def test_a_bridge_that_may_only_read_says_what_is_missing(
    installed_engine: Engine, as_role: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """And works with what is there."""
    channel = reads()
    known = listen(channel, "known")
    install(installed_engine)
    unknown = listen(channel, "unknown")
    with installed_engine.begin() as connection:
        connection.execute(text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {as_role.url.username}"))
    with as_role.begin() as connection, caplog.at_level(logging.WARNING):
        ids = register_subscriptions(connection, "public", [known, unknown])
    assert list(ids.values()) == [known]
    assert "the subscription of unknown to blog.Reads is missing" in caplog.text
    assert set(subscriptions(installed_engine)) == {"known"}


def test_the_channel_of_enqueue_is_always_there(engine: Engine) -> None:
    """With one subscription, the bridge's."""
    install(engine, channels=[reads()])
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT channel, operations FROM pgpubsub_subscription WHERE listener = 'pgpubsub.enqueue'")
        )
        assert [tuple(row) for row in rows] == [("pgpubsub.enqueue", ["message"])]


def test_only_the_channels_given_are_installed(engine: Engine) -> None:
    """As classes or by their path."""
    first, second = reads("blog.First"), reads("blog.Second")
    listen(first, "one")
    listen(second, "two")
    install(engine, channels=[first])
    assert set(subscriptions(engine)) == {"one"}
    install(engine, channels=["blog.Second"])
    assert set(subscriptions(engine)) == {"one", "two"}


# Triggers, and pruning


def test_changed_definitions_replace_their_triggers(engine: Engine) -> None:
    """By the digest in the trigger's comment; check tells it first."""
    Base.metadata.create_all(engine)
    channel = changes()
    listen(channel, "on_author", ("insert",))
    install(engine)
    before = triggers(engine)
    with engine.begin() as connection:
        for table, name in before:
            connection.execute(text(f"COMMENT ON TRIGGER {name} ON {table} IS 'of an older release'"))
    assert len(differences(engine)) == len(before)
    assert all("is out of date" in line for line in differences(engine))
    assert len(install(engine)) == len(before)
    assert triggers(engine) == before
    assert differences(engine) == []


def test_a_trigger_that_was_dropped_is_made_again(engine: Engine) -> None:
    """Whoever dropped it."""
    Base.metadata.create_all(engine)
    listen(changes(), "on_author", ("insert",))
    install(engine)
    before = triggers(engine)
    with engine.begin() as connection:
        connection.execute(text(f"DROP TRIGGER {before[0][1]} ON author"))
    assert len(differences(engine)) == 1
    install(engine)
    assert triggers(engine) == before


def test_an_older_release_that_installs_late_doubles_no_triggers(engine: Engine) -> None:
    """It knows the table's channel by an earlier name: its triggers would emit each change once more."""
    from pgpubsub_celery import channels

    Base.metadata.create_all(engine)
    old = changes(name="blog.Old")
    listen(old, "on_author", ("insert",))
    install(engine)
    channels._registry.clear()
    new = changes(name="blog.New", earlier=("blog.Old",))
    listen(new, "on_author", ("insert",))
    install(engine, channels=[new])
    before = triggers(engine)
    channels._registry.clear()
    install(engine, channels=[old])
    assert triggers(engine) == before
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO author VALUES (1, 'Ada')"))
    assert count(engine, "pgpubsub_notification") == 1
    # Renamed back, by a release that says so.
    back = changes(name="blog.Old", earlier=("blog.New",))
    listen(back, "on_author", ("insert",))
    install(engine, channels=[back])
    assert triggers(engine) != before
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO author VALUES (2, 'Grace')"))
    assert count(engine, "pgpubsub_notification") == 2


def test_a_plain_role_can_install_for_its_own_tables(installed_engine: Engine, as_role: Engine) -> None:
    """No superuser is needed; and who writes the table afterwards needs no right to anything of ours."""
    owner = as_role.url.username
    with installed_engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA app AUTHORIZATION {owner}"))
    with as_role.begin() as connection:
        connection.execute(text("SET search_path = app"))
        Base.metadata.create_all(connection)
    listen(changes(), "on_author", ("insert", "update", "delete"))
    engine = create_engine(as_role.url, connect_args={"options": "-c search_path=app"})
    install(engine, schema="app")
    assert differences(engine, schema="app") == []
    engine.dispose()
    writer = f"writer_{installed_engine.url.database}"
    with installed_engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {writer}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA app TO {writer}"))
        connection.execute(text(f"GRANT INSERT ON app.author TO {writer}"))
        connection.execute(text(f"SET ROLE {writer}"))
        connection.execute(text("INSERT INTO app.author VALUES (1, 'Ada')"))
        connection.execute(text("RESET ROLE"))
        connection.execute(text(f"DROP OWNED BY {writer}"))
        connection.execute(text(f"DROP ROLE {writer}"))
    assert count(installed_engine, "app.pgpubsub_notification") == 1


def test_what_is_not_wanted_any_more_goes_only_when_pruned(engine: Engine) -> None:
    """An older release that still runs may want it."""
    Base.metadata.create_all(engine)
    kept, gone = changes(), changes(Book, "blog.Books")
    listen(kept, "on_author", ("insert", "delete"))
    listen(gone, "on_book", ("insert",))
    install(engine)
    from pgpubsub_celery import channels, listeners

    channels._registry.clear()
    listeners._registry.clear()
    kept = changes()
    listen(kept, "on_author", ("insert",))
    install(engine)
    before = triggers(engine)
    assert {table for table, _ in before} == {"author", "book"}
    assert set(subscriptions(engine)) == {"on_author", "on_book"}
    assert all("not wanted any more" in line for line in differences(engine))
    done = install(engine, prune=True)
    assert "removed the subscription of on_book to blog.Books" in done
    assert "removed the channel blog.Books" in done
    assert {table for table, _ in triggers(engine)} == {"author"}
    assert len(triggers(engine)) < len(before)
    assert subscriptions(engine) == {"on_author": {"insert"}}
    assert differences(engine) == []
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO author VALUES (1, 'Ada')"))
        connection.execute(text("INSERT INTO book VALUES (1)"))
    assert count(engine, "pgpubsub_notification") == 1


def test_a_subscription_with_stored_notifications_is_never_pruned(engine: Engine) -> None:
    """It is said how many wait; once they are gone, it goes."""
    channel = reads()
    listen(channel, "gone")
    install(engine)
    with engine.begin() as connection:
        notify(connection, channel(value=1))  # type: ignore[call-arg]
        notify(connection, channel(value=2))  # type: ignore[call-arg]
    from pgpubsub_celery import listeners

    listeners._registry.clear()
    assert install(engine, prune=True) == [
        "kept the subscription of gone to blog.Reads: 2 notification(s) are stored for it"
    ]
    assert set(subscriptions(engine)) == {"gone"}
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM pgpubsub_notification"))
    assert install(engine, prune=True) == ["removed the subscription of gone to blog.Reads"]


def test_pruning_waits_for_a_writer_that_is_about_to_store(engine: Engine) -> None:
    """What it stores for the subscription would otherwise be nobody's for ever."""
    channel = reads()
    listen(channel, "gone")
    install(engine)
    from pgpubsub_celery import listeners

    listeners._registry.clear()
    with ThreadPoolExecutor(1) as pool:
        with engine.connect() as writer:
            notify(writer, channel(value=1))  # type: ignore[call-arg]
            pruning = pool.submit(install, engine, prune=True, lock_timeout=30)
            with engine.connect() as watcher:
                while not watcher.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar():
                    assert not pruning.done()
            writer.commit()
        assert pruning.result(timeout=30) == [
            "kept the subscription of gone to blog.Reads: 1 notification(s) are stored for it"
        ]


# As a script


def split(script: str) -> str:
    """Without its transaction, which the test's connection has."""
    return script.replace("BEGIN;\n\n", "", 1).replace("\nCOMMIT;\n", "\n")


def run_script(engine: Engine, script: str) -> None:
    driver = engine.raw_connection()
    try:
        driver.cursor().execute(script)
    finally:
        driver.close()


@pytest.mark.parametrize("schema", ["public", "Od\"d 'schema' 100%"])
def test_the_script_does_what_install_does(engine: Engine, schema: str) -> None:
    """On an empty database, and nothing on a second run."""
    Base.metadata.create_all(engine)
    listen(reads("blog.Re'ads"))
    listen(changes(), "on_author", ("insert", "update"))
    script = install_sql(schema=schema)
    run_script(engine, script)
    assert differences(engine, schema=schema) == []
    before = triggers(engine)
    with engine.begin() as writer:
        writer.execute(text("LOCK TABLE author IN ROW EXCLUSIVE MODE"))
        run_script(engine, "SET lock_timeout = '1s';" + script)
    assert triggers(engine) == before
    assert differences(engine, schema=schema) == []


def test_the_script_brings_an_older_database_up_to_date(engine: Engine) -> None:
    """And keeps the installation's id."""
    Base.metadata.create_all(engine)
    channel = changes()
    listen(channel, "on_author", ("insert",))
    install(engine)
    with engine.connect() as connection:
        installation = connection.execute(text("SELECT id FROM pgpubsub_installation")).scalar()
    with engine.begin() as connection:
        connection.execute(text("COMMENT ON FUNCTION pgpubsub_ring(text) IS 'pgpubsub:older'"))
    listen(channel, "on_author", ("insert", "delete"))
    assert len(differences(engine)) > 1
    run_script(engine, install_sql())
    assert differences(engine) == []
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM pgpubsub_installation")).scalar() == installation


def test_the_script_leaves_a_renamed_listener_to_the_bridge(engine: Engine) -> None:
    """It must not make a second subscription, which would double what is stored."""
    channel = reads()
    listen(channel, "old_name")
    install(engine)
    from pgpubsub_celery import listeners

    listeners._registry.clear()
    listener = listen(channel, "new_name", aliases=("old_name",))
    run_script(engine, install_sql())
    assert set(subscriptions(engine)) == {"old_name"}
    with engine.begin() as connection:
        assert list(register_subscriptions(connection, "public", [listener]).values()) == [listener]
    assert set(subscriptions(engine)) == {"new_name"}


# Grants


def test_a_role_with_the_grants_can_run_a_bridge_and_a_worker(installed_engine: Engine, as_role: Engine) -> None:
    """Subscribe, claim, ring, acknowledge and emit, without owning anything."""
    from pgpubsub_celery.store import Quota, Store

    channel = reads()
    listener = listen(channel)
    role = as_role.url.username
    assert role is not None
    with installed_engine.begin() as connection:
        grant_run(connection, role)
    store = Store("public")
    autocommit = as_role.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection:
        (id,) = register_subscriptions(connection, "public", [listener])
    with as_role.begin() as connection:
        notify(connection, channel(value=1))  # type: ignore[call-arg]
        connection.execute(text("SELECT pgpubsub_ring(:channel)"), {"channel": channel.name()})
    with autocommit.connect() as connection:
        quota = Quota(subscription=id, limit=10, lease=60, lease_max=60)
        claim = store.claim(connection, [quota], batch_size=10, max_starts=3)
        assert len(claim.rows) == 1
        assert connection.execute(text("SELECT id FROM pgpubsub_installation")).scalar()
    with as_role.begin() as connection:
        taken, transaction = store.take_locked(connection, [claim.rows[0].id], 1)
        assert store.acknowledge_locked(connection, [taken[0].id], transaction) == 1
        store.report_run_time(connection, id, uuid.uuid4(), Report(0.1, 1, 2.5))
        assert id in store.run_times(connection, [id])
        assert store.forget_run_times(connection) == 0


def test_grants_name_what_is_missing(engine: Engine, installed_engine: Engine, role: str) -> None:
    """A role or an installation."""
    with installed_engine.begin() as connection, pytest.raises(PgPubSubError, match="has no role 'nobody_at_all'"):
        grant_emit(connection, "nobody_at_all")
    with engine.connect() as connection, pytest.raises(NotInstalledError, match="run install first"):
        grant_emit(connection, role)


# Removing


def test_uninstall_leaves_no_trace_and_what_is_not_ours(engine: Engine) -> None:
    """The user's tables and functions stay; writers go on."""
    Base.metadata.create_all(engine)

    def everything() -> set[str]:
        with engine.connect() as connection:
            return set(
                connection.execute(
                    text(
                        "SELECT 'relation ' || relname FROM pg_class WHERE relnamespace = 'public'::regnamespace UNION "
                        "SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace UNION "
                        "SELECT 'trigger ' || tgname FROM pg_trigger UNION "
                        "SELECT 'type ' || typname FROM pg_type WHERE typnamespace = 'public'::regnamespace"
                    )
                ).scalars()
            )

    with engine.begin() as connection:
        connection.execute(text("CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'"))
    before = everything()
    listen(changes(), "on_author", ("insert", "update", "delete", "truncate"))
    install(engine)
    assert everything() > before
    assert uninstall(engine)
    assert everything() == before
    assert uninstall(engine) == []
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO author VALUES (1, 'Ada')"))


def test_uninstall_refuses_while_notifications_are_stored(engine: Engine) -> None:
    """Says how many, and the option; nothing has been removed."""
    Base.metadata.create_all(engine)
    listen(changes(), "on_author", ("insert",))
    install(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO author VALUES (1, 'Ada'), (2, 'Grace')"))
    with pytest.raises(PgPubSubError, match=r"2 notification\(s\) are stored.*discard_stored=True"):
        uninstall(engine)
    assert differences(engine) == []
    uninstall(engine, discard_stored=True)
    assert triggers(engine) == []


# create_all


def test_create_all_installs_and_drop_all_removes_the_triggers(engine: Engine) -> None:
    """For applications and tests that have no migrations."""

    class OwnBase(DeclarativeBase):
        pass

    class Thing(OwnBase):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)

    listen(changes(Thing, "blog.Things"), "on_thing", ("insert",))
    install_on_create_all(OwnBase.metadata)
    install_on_create_all(OwnBase.metadata)
    OwnBase.metadata.create_all(engine)
    assert differences(engine) == []
    OwnBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Thing(id=1))
        session.commit()
    assert count(engine, "pgpubsub_notification") == 1
    OwnBase.metadata.drop_all(engine)
    assert count(engine, "pg_proc WHERE prorettype = 'trigger'::regtype AND proname LIKE 'pgpubsub%'") == 0
    OwnBase.metadata.create_all(engine)
    assert differences(engine) == []


def test_create_all_of_some_tables_leaves_the_others_for_later(engine: Engine) -> None:
    """A trigger channel whose table is not there yet is no error."""

    class OwnBase(DeclarativeBase):
        pass

    class First(OwnBase):
        __tablename__ = "first"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Second(OwnBase):
        __tablename__ = "second"
        id: Mapped[int] = mapped_column(primary_key=True)

    listen(changes(First, "blog.First"), "on_first", ("insert",))
    listen(changes(Second, "blog.Second"), "on_second", ("insert",))
    install_on_create_all(OwnBase.metadata)
    OwnBase.metadata.create_all(engine, tables=[First.__table__])  # type: ignore[list-item]
    assert {table for table, _ in triggers(engine)} == {"first"}
    OwnBase.metadata.create_all(engine)
    assert {table for table, _ in triggers(engine)} == {"first", "second"}
    OwnBase.metadata.drop_all(engine, tables=[First.__table__])  # type: ignore[list-item]
    assert {table for table, _ in triggers(engine)} == {"second"}


def test_create_all_in_autocommit_installs_too(engine: Engine) -> None:
    """Its tables are committed one by one; ours come in a transaction of their own."""

    class OwnBase(DeclarativeBase):
        pass

    install_on_create_all(OwnBase.metadata)
    autocommit = create_engine(sync_url(str(engine.url)), isolation_level="AUTOCOMMIT")
    OwnBase.metadata.create_all(autocommit)
    autocommit.dispose()
    assert differences(engine) == []


def test_the_tables_fit_what_alembic_would_make_of_the_metadata(engine: Engine) -> None:
    """`pgpubsub_celery.metadata` beside one's own finds nothing to do after install."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from pgpubsub_celery.alembic import NAME

    install(engine)
    # Without our plugin, which takes our tables out of the comparison.
    plugins = ["alembic.autogenerate.*", f"~{NAME}"]
    options = {"compare_type": True, "compare_server_default": True, "autogenerate_plugins": plugins}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []


def test_a_foreign_error_is_not_hidden(engine: Engine) -> None:
    """Only what we can explain is explained."""
    install(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE VIEW mine AS SELECT * FROM pgpubsub_notification"))
    with pytest.raises(DBAPIError, match="depend"):
        uninstall(engine)
    with engine.begin() as connection, contextlib.suppress(DBAPIError):
        connection.execute(text("DROP VIEW mine"))
