"""The plugin for Alembic: what autogenerate writes, and that it does and undoes what `install` does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, Text, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import Channel, channels, install, install_on_create_all, listeners, metadata, triggers, upgrades
from pgpubsub_celery.alembic import NAME, comparison, include_object
from pgpubsub_celery.listeners import Listener, register_listener
from pgpubsub_celery.migrations import check
from pgpubsub_celery.schema import VERSION, quote_identifier
from pgpubsub_celery.triggers import TEMPLATE, trigger_name
from pgpubsub_celery.upgrades import Upgrade
from tests.fixtures.alembic_environment import Environment
from tests.fixtures.changes import channel_of, listener_of

pytestmark = pytest.mark.usefixtures("registry")

EMPTY = ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
WATCHED = ("insert", "update")


@pytest.fixture(autouse=True)
def _nothing_is_registered(registry: None) -> None:
    forget()


def forget() -> None:
    """As in a process that has imported nothing of the application."""
    channels._registry.clear()
    listeners._registry.clear()


def table(*names: str, of: MetaData | None = None, name: str = "author") -> Table:
    """A table with an id and columns of text."""
    return Table(
        name,
        of if of is not None else MetaData(),
        Column("id", Integer, primary_key=True),
        *(Column(one, Text) for one in names),
    )


def watch(
    model: Table, *operations: str, name: str = "changes", listener: str = "listener", **attributes: Any
) -> MetaData:
    """Declare a channel of a table's changes with one listener; return the table's metadata."""
    options: dict[str, Any] = {key: attributes.pop(key) for key in ("changed", "condition") if key in attributes}
    options["aliases"] = attributes.pop("listener_aliases", ())
    channel = channel_of(model, name, **attributes)
    register_listener(listener_of(channel, *(operations or WATCHED), name=listener, **options))
    return model.metadata


def message(name: str = "posted", **attributes: Any) -> None:
    """Declare a channel of messages with one listener."""
    namespace = {"__annotations__": {"number": int}, "__module__": __name__, "number": 0, **attributes}
    Posted: Any = dataclasses.dataclass(  # noqa: N806 - a class
        type(name, (Channel,), {"channel_name": name, "lock_notifications": True, **namespace})
    )

    register_listener(
        Listener(name=f"{name}.listener", channel=Posted, operations=("message",), fields=(), injected=frozenset())
    )


def two_listeners() -> MetaData:
    target = watch(table(), "insert")
    register_listener(listener_of(here(), "delete", name="another"))
    return target


def with_message(model: Table, **attributes: Any) -> MetaData:
    message(**attributes)
    return model.metadata


def another_channel(model: Table) -> MetaData:
    message()
    return model.metadata


def here() -> Any:
    """The channel that was declared last."""
    return next(reversed(channels._registry.values()))


@pytest.fixture
def environment(tmp_path: Path, engine: Engine) -> Callable[..., Environment]:
    """An environment for metadata, as the application is now."""

    def make(target: Any, **options: Any) -> Environment:
        return Environment(tmp_path, engine, target, **options)

    return make


def found(engine: Engine, **options: Any) -> list[str]:
    with engine.connect() as connection:
        return check(connection, **options)


def state(engine: Engine, schema: str = "public") -> dict[str, list[Any]]:
    """All that is ours: triggers with the text of their functions, functions, channels, subscriptions."""
    s = quote_identifier(schema)
    queries = {
        "triggers": (
            "SELECT pg_get_triggerdef(t.oid), obj_description(t.oid, 'pg_trigger'), pg_get_functiondef(t.tgfoid), "
            "obj_description(t.tgfoid, 'pg_proc') FROM pg_trigger t "
            "WHERE NOT t.tgisinternal AND t.tgname LIKE 'pgpubsub%' ORDER BY 1"
        ),
        "functions": (
            "SELECT p.oid::regprocedure::text, obj_description(p.oid, 'pg_proc'), p.proacl::text FROM pg_proc p "
            "WHERE p.proname LIKE 'pgpubsub%' ORDER BY 1"
        ),
        "tables": (
            "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, c.reloptions "
            "FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
            "WHERE c.relname LIKE 'pgpubsub%' AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1, 2"
        ),
    }
    rows = {
        # Keys are there from version 2 on.
        "channels": f"SELECT name, jsonb_strip_nulls(to_jsonb(c))::text FROM {s}.pgpubsub_channel c ORDER BY 1",
        "subscriptions": (
            "SELECT channel, listener, array(SELECT unnest(operations) ORDER BY 1) "
            f"FROM {s}.pgpubsub_subscription WHERE operations <> '{{}}' ORDER BY 1, 2"
        ),
    }
    with engine.connect() as connection:
        if connection.execute(text(f"SELECT to_regclass('{s}.pgpubsub_installation')")).scalar() is not None:
            queries |= rows
        return {what: [tuple(row) for row in connection.execute(text(query))] for what, query in queries.items()}


def execute(engine: Engine, *statements: str) -> None:
    """As psql would: any number of statements, as they are."""
    with engine.begin() as connection:
        for statement in statements:
            connection.connection.cursor().execute(statement)


# What is written


def test_the_first_migration_is_readable_and_makes_what_install_makes(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """Arguments of a trigger, no text of it; the second one is empty; the way back leaves nothing."""
    nothing = state(engine)
    message()
    env = environment(watch(table("name"), "insert", "update", "delete"))
    written = env.autogenerate()
    assert f"    op.create_pgpubsub(version={VERSION})\n" in written
    assert "    op.create_pgpubsub_channel('changes', table='author')\n" in written
    assert "    op.create_pgpubsub_subscription('posted', 'posted.listener', ['message'])\n" in written
    assert (
        "    op.create_pgpubsub_trigger(\n"
        "        'changes',\n        'author',\n        ['insert', 'update', 'delete'],\n"
        f"        columns=['id', 'name'],\n        template={TEMPLATE},\n    )\n"
    ) in written
    assert "    op.drop_pgpubsub_trigger('changes', 'author', ['insert', 'update', 'delete'])\n" in written
    assert "FUNCTION" not in written
    assert max(map(len, written.splitlines())) <= 88
    env.upgrade()
    assert found(engine) == []
    assert env.autogenerate() == ""
    env.downgrade()
    assert state(engine) == nothing


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "a column is added": (lambda: watch(table()), lambda: watch(table("name")), "replace_pgpubsub_trigger("),
    "a column is removed, and a condition on it": (
        lambda: watch(table("name"), condition="new.name <> ''"),
        lambda: watch(table(), condition="new.id > 1"),
        "replace_pgpubsub_trigger(",
    ),
    "a column is excluded": (
        lambda: watch(table("name")),
        lambda: watch(table("name"), exclude=("name",)),
        "replace_pgpubsub_trigger(",
    ),
    "a listener wants less": (
        lambda: watch(table("name")),
        lambda: watch(table("name"), changed=("name",)),
        "'changed': ['name']",
    ),
    "a listener wants more": (
        lambda: watch(table(), "insert"),
        lambda: watch(table(), "insert", "delete", "truncate"),
        "['insert', 'delete', 'truncate']",
    ),
    "a listener is added": (
        lambda: watch(table(), "insert"),
        two_listeners,
        "create_pgpubsub_subscription('changes', 'another', ['delete'])",
    ),
    "a listener is removed": (
        two_listeners,
        lambda: watch(table(), "insert"),
        "drop_pgpubsub_subscription('changes', 'another')",
    ),
    "a listener is renamed": (
        lambda: watch(table()),
        lambda: watch(table(), listener="renamed", listener_aliases=("listener",)),
        "was=['changes', 'listener']",
    ),
    "a channel is added": (
        lambda: table().metadata,
        lambda: watch(table()),
        "create_pgpubsub_channel('changes', table='author')",
    ),
    "a channel is removed": (
        lambda: watch(table()),
        lambda: another_channel(table()),
        "drop_pgpubsub_channel('changes')",
    ),
    "a channel is removed with its table": (
        lambda: watch(table()),
        lambda: another_channel(table(name="other")),
        "drop_pgpubsub_trigger('changes', 'author', ['insert', 'update'])",
    ),
    "a channel is renamed": (
        lambda: watch(table()),
        lambda: watch(table(), name="renamed", aliases=("changes",)),
        "was=['changes', 'listener']",
    ),
    "a channel is stored no more": (
        lambda: watch(table()),
        lambda: watch(table(), lock_notifications=False),
        "alter_pgpubsub_channel('changes', table='author', stored=False)",
    ),
    "a channel's changes are ordered": (
        lambda: watch(table("name")),
        lambda: watch(table("name"), ordering_key="row", unique_key="name"),
        "ordering_key=['id'],\n        unique_key=['name'],",
    ),
    "a channel's messages are ordered": (
        lambda: with_message(table()),
        lambda: with_message(table(), ordering_key="number"),
        "alter_pgpubsub_channel('posted', ordering_key=['number'])",
    ),
    "a channel's messages are ordered no more": (
        lambda: with_message(table(), ordering_key="number", unique_key="number"),
        lambda: with_message(table(), unique_key="number"),
        "alter_pgpubsub_channel('posted', ordering_key=[], unique_key=['number'])",
    ),
    "a channel is of another table": (
        lambda: watch(table()),
        lambda: watch(table(name="writer")),
        "create_pgpubsub_trigger(",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_written_done_and_undone(
    environment: Callable[..., Environment], engine: Engine, change: str
) -> None:
    """A second autogenerate finds nothing, `check` neither, and the way back restores what was before."""
    before, after, written = CHANGES[change]
    message("before")
    env = environment(before())
    env.autogenerate()
    env.upgrade()
    assert found(engine) == []
    was = state(engine)
    forget()
    message("before")
    env.options["target_metadata"] = after()
    assert written in env.autogenerate()
    env.upgrade()
    assert found(engine) == []
    assert env.autogenerate() == ""
    assert state(engine) != was
    env.downgrade()
    now = state(engine)
    # A channel under its later name is left where an older release may listen to it.
    assert {row[:1] for row in was["channels"]} <= {row[:1] for row in now["channels"]}
    assert {what: rows for what, rows in now.items() if what != "channels"} == {
        what: rows for what, rows in was.items() if what != "channels"
    }
    forget()
    message("before")
    env.options["target_metadata"] = before()
    assert found(engine) == []


def test_a_renamed_table_keeps_its_notifications_and_has_its_triggers(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """Where the developer makes one renaming of Alembic's drop and create."""
    env = environment(watch(table("name")))
    env.autogenerate()
    env.upgrade()
    execute(engine, "INSERT INTO author VALUES (1, 'Ada')")
    was = state(engine)
    forget()
    env.options["target_metadata"] = watch(table("name", name="writer"))
    written = env.autogenerate()
    create = written[written.index("    op.create_table('writer'") : written.index("    op.drop_table('author')")]
    undo = written[written.rindex("    op.create_table('author'") : written.index("    op.drop_table('writer')")]
    env.edit(
        2,
        (create, ""),
        ("    op.drop_table('author')", "    op.rename_table('author', 'writer')"),
        (undo, ""),
        ("    op.drop_table('writer')", "    op.rename_table('writer', 'author')"),
    )
    env.upgrade()
    assert found(engine) == []
    assert env.autogenerate() == ""
    execute(engine, "INSERT INTO writer VALUES (2, 'Grace')")
    with engine.connect() as connection:
        versions = connection.execute(text("SELECT db_version FROM pgpubsub_notification ORDER BY id")).scalars()
        assert list(versions) == ["r1", "r2"]
    env.downgrade()
    assert state(engine) == was


def test_a_migration_does_the_same_when_the_application_is_another(
    environment: Callable[..., Environment], engine: Engine, database_url: str
) -> None:
    """All that it needs is in it: nothing of models, channels and listeners, and not the setting of the schema."""
    env = environment(watch(table("name"), condition="new.id > 1"))
    env.autogenerate()
    env.upgrade()
    made = state(engine)
    env.downgrade("base")
    forget()
    env.options["target_metadata"] = MetaData()
    env.upgrade()
    assert state(engine) == made


def test_the_script_of_offline_mode_does_the_same(environment: Callable[..., Environment], engine: Engine) -> None:
    """Both ways, whatever is in the texts: percent signs, colons, backslashes, quotes."""
    nothing = state(engine)
    condition = r"new.name LIKE '50%:x\' OR new.name = 'it''s'"
    env = environment(watch(table("name", "per%cent:age"), condition=condition))
    env.autogenerate()
    env.upgrade()
    made = state(engine)
    up, down = env.script("r1"), env.undo_script("r1:base")
    env.downgrade()
    assert state(engine) == nothing
    execute(engine, "DROP TABLE alembic_version", up)
    assert state(engine) == made
    assert found(engine) == []
    execute(engine, down)
    assert state(engine) == nothing


# Beside the other ways


def test_install_and_create_all_and_migrations_agree(environment: Callable[..., Environment], engine: Engine) -> None:
    """Each makes the same, and finds nothing to do where another was."""
    message()
    target = watch(table("name"), "insert", "update", "delete", "truncate", condition="true")
    env = environment(target)
    env.autogenerate()
    env.upgrade()
    by_migration = state(engine)
    assert install(engine) == []

    execute(engine, *EMPTY)
    target.create_all(engine)
    install(engine)
    assert state(engine) == by_migration
    env.stamp()
    assert env.autogenerate() == ""

    execute(engine, *EMPTY)
    install_on_create_all(target)
    target.create_all(engine)
    assert state(engine) == by_migration
    env.edit(1, ("op.create_table('author'", "op.create_table('elsewhere'"))
    env.upgrade()  # over what is there
    assert state(engine) == by_migration


@pytest.mark.parametrize("with_ours", [False, True], ids=["without our metadata", "with it"])
def test_our_tables_are_not_alembic_s_to_drop_or_make(
    environment: Callable[..., Environment], engine: Engine, with_ours: bool
) -> None:
    """Nor their indexes; whether or not the environment names our metadata."""
    target: Any = watch(table())
    env = environment([target, metadata] if with_ours else target)
    written = env.autogenerate()
    assert "create_table('pgpubsub" not in written
    env.upgrade()
    assert env.autogenerate() == ""


def test_the_filter_for_environments_without_the_plugin_keeps_our_tables(engine: Engine) -> None:
    """`include_object` in env.py; without both, Alembic would drop them."""
    install(engine)
    plugins = ["alembic.autogenerate.*", f"~{NAME}"]

    def proposed(**options: Any) -> list[Any]:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"autogenerate_plugins": plugins, **options})
            return list(compare_metadata(context, MetaData()))

    assert any(one[0] == "remove_table" for one in proposed())
    assert proposed(include_object=include_object) == []


def test_several_metadata_and_schemas_have_their_own_channels(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two environments of one application: each makes the triggers of its tables, none the other's."""
    execute(engine, "CREATE SCHEMA news", "CREATE SCHEMA shop")
    news, shop = MetaData(schema="news"), MetaData(schema="shop")
    watch(table("name", of=news), name="news")
    watch(table("name", of=shop, name="order"), name="shop")
    options = {"pgpubsub_schema": "queue", "include_schemas": True}
    first = Environment(tmp_path / "a", engine, [news], version_table="a_version", **options)
    second = Environment(tmp_path / "b", engine, shop, version_table="b_version", **options)
    filters: list[tuple[str, Any]] = [("news", first), ("shop", second)]
    for mine, env in filters:
        env.options["include_name"] = lambda name, type_, _, mine=mine: type_ != "schema" or name == mine
    written = first.autogenerate()
    assert "'order'" not in written
    assert "table_schema='news'" in written
    assert "schema='queue'" in written
    first.upgrade()
    assert found(engine, schema="queue") != []
    assert first.autogenerate() == ""
    written = second.autogenerate()
    assert "op.create_pgpubsub(" not in written
    assert "'author'" not in written
    second.upgrade()
    assert found(engine, schema="queue") == []
    assert (first.autogenerate(), second.autogenerate()) == ("", "")
    execute(engine, "INSERT INTO news.author VALUES (1, 'Ada')", "INSERT INTO shop.order VALUES (1, 'Ada')")
    with engine.connect() as connection:
        names = connection.execute(text("SELECT channel FROM queue.pgpubsub_notification ORDER BY id")).scalars()
        assert list(names) == ["news", "shop"]


def test_another_application_s_channels_are_left_alone_by_include_name(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """Two services in one database: without the filter, each would propose to remove what is the other's."""
    target = table("name").metadata
    target.create_all(engine)
    watch(target.tables["author"], name="theirs.Changes")
    message("theirs.Posted")
    install(engine)
    forget()
    watch(target.tables["author"], name="mine.Changes")
    env = environment(target)
    assert "drop_pgpubsub_trigger('theirs.Changes'" in env.autogenerate()
    (file,) = (env.path / "versions").glob("*.py")
    file.unlink()
    env.options["include_name"] = lambda name, type_, _: type_ != "pgpubsub_channel" or not name.startswith("theirs.")
    assert "theirs." not in env.autogenerate()


def test_an_environment_that_imports_no_channel_removes_none(
    environment: Callable[..., Environment], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told what to import; where nothing of ours is installed, nothing is said."""
    target = table("name").metadata
    env = environment(target)
    assert "pgpubsub" not in env.autogenerate()
    env.upgrade()
    watch(target.tables["author"])
    install(engine)
    forget()
    with caplog.at_level(logging.WARNING, logger=comparison.logger.name):
        assert env.autogenerate() == ""
    assert [record.message for record in caplog.records if "pass pgpubsub_app=" in record.message]


# What is stored


def test_a_notification_stored_before_its_listener_is_known_is_its_own(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """The migration subscribes: a release that emits before any bridge of it runs loses nothing, for any listener."""
    target = watch(table("name"), "insert")
    register_listener(listener_of(here(), "insert", name="another"))
    env = environment(target)
    env.autogenerate()
    env.upgrade()
    execute(engine, "INSERT INTO author VALUES (1, 'Ada')")
    joined = "pgpubsub_notification n JOIN pgpubsub_subscription s ON s.id = n.subscription"
    stored = text(f"SELECT s.listener FROM {joined} ORDER BY 1")
    with engine.connect() as connection:
        assert list(connection.execute(stored).scalars()) == ["another", "listener"]


def test_the_way_back_refuses_while_notifications_are_stored(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """They would be lost: the migration fails, and everything is as it was."""
    env = environment(watch(table("name"), "insert"))
    env.autogenerate()
    env.upgrade()
    execute(engine, "INSERT INTO author VALUES (1, 'Ada')")
    was = state(engine)
    with pytest.raises(DBAPIError, match=r"1 notification\(s\) are stored, and would be lost"):
        env.downgrade()
    assert state(engine) == was


def test_what_notifications_wait_for_is_not_removed(environment: Callable[..., Environment], engine: Engine) -> None:
    """A removed listener's notifications stay, with its subscription; so does a channel that waits for a listener."""
    target = watch(table("name"), "insert")
    message("kept")
    env = environment(target)
    env.autogenerate()
    env.upgrade()
    execute(
        engine,
        "INSERT INTO author VALUES (1, 'Ada')",
        "DELETE FROM pgpubsub_subscription WHERE channel = 'kept'",
        "SELECT pgpubsub_notify('kept', '{}')",
    )
    forget()
    message("other")
    assert "'kept'" not in env.autogenerate().replace("drop_pgpubsub_subscription('kept'", "")
    env.upgrade()
    assert env.autogenerate() == ""
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT n.channel, s.operations FROM pgpubsub_notification n "
                "LEFT JOIN pgpubsub_subscription s ON s.id = n.subscription ORDER BY 1"
            )
        )
        assert [tuple(row) for row in rows] == [("changes", []), ("kept", None)]


# Drift


INSERT = trigger_name("changes", "insert")


@pytest.mark.parametrize(
    ("damage", "written"),
    [
        (f"DROP TRIGGER {INSERT} ON author", "create_pgpubsub_trigger("),
        (f"ALTER TABLE author DISABLE TRIGGER {INSERT}", "replace_pgpubsub_trigger("),
        (
            f"CREATE OR REPLACE FUNCTION {INSERT}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "replace_pgpubsub_trigger(",
        ),
        (f"COMMENT ON TRIGGER {INSERT} ON author IS NULL", "replace_pgpubsub_trigger("),
        ("DROP FUNCTION pgpubsub_ring(text)", f"restore_pgpubsub(version={VERSION})"),
        ("DROP TABLE pgpubsub_run_time", f"restore_pgpubsub(version={VERSION})"),
        ("DROP INDEX pgpubsub_notification_claim_idx", f"restore_pgpubsub(version={VERSION})"),
        ("DELETE FROM pgpubsub_subscription", "create_pgpubsub_subscription("),
        ("DROP TABLE pgpubsub_channel, pgpubsub_subscription", "create_pgpubsub_channel("),
    ],
)
def test_drift_is_made_good_by_a_migration(
    environment: Callable[..., Environment], engine: Engine, damage: str, written: str
) -> None:
    """By the operation for it, and nothing else."""
    env = environment(watch(table("name")))
    env.autogenerate()
    env.upgrade()
    was = state(engine)
    execute(engine, damage)
    text_of_it = env.autogenerate()
    assert f"    op.{written}" in text_of_it
    env.upgrade()
    assert found(engine) == []
    assert env.autogenerate() == ""
    assert {what: rows for what, rows in state(engine).items() if what != "tables"} == {
        what: rows for what, rows in was.items() if what != "tables"
    }


def test_triggers_that_nobody_knows_are_removed_and_restored_as_they_are(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """By their text, because nothing says what they are made of; functions without triggers by their comments."""
    env = environment(watch(table("name")))
    env.autogenerate()
    env.upgrade()
    execute(
        engine,
        "CREATE FUNCTION pgpubsub_mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END -- 100%:x'",
        "CREATE TRIGGER pgpubsub_mine AFTER INSERT ON author FOR EACH ROW EXECUTE FUNCTION pgpubsub_mine()",
    )
    was = state(engine)
    assert "op.execute('DROP TRIGGER" in env.autogenerate()
    env.upgrade()
    assert env.autogenerate() == ""
    assert found(engine) == []
    env.downgrade()
    assert state(engine) == was


def test_a_better_text_of_triggers_is_a_migration_that_can_be_undone(
    environment: Callable[..., Environment], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released ones stay: the migrations made with them do the same as before, also in a later release."""
    env = environment(watch(table("name"), "insert"))
    env.autogenerate()
    env.upgrade()
    was = state(engine)
    first = triggers._TEMPLATES[1]

    def second(capture: Any, target: str) -> list[str]:
        return [statement.replace("BEGIN", "BEGIN -- better", 1) for statement in first(capture, target)]

    monkeypatch.setattr(triggers, "_TEMPLATES", {1: first, 2: second})
    monkeypatch.setattr(triggers, "TEMPLATE", 2)
    (line,) = found(engine)
    assert "is out of date (its text is version 1, this release has 2)" in line
    written = env.autogenerate()
    upgrade, downgrade = written.split("def downgrade")
    assert "op.replace_pgpubsub_trigger(" in upgrade
    assert "template=2" in upgrade
    assert "template=1" in downgrade
    env.upgrade()
    now = state(engine)
    # The release before does not undo it.
    monkeypatch.setattr(triggers, "TEMPLATE", 1)
    assert (found(engine), install(engine), state(engine)) == ([], [], now)
    env.downgrade()
    assert state(engine) == was


# Versions of our own tables


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> int:
    """A release with one version of the schema more, which has a column and a function more."""
    recorded = upgrades._recorded.__wrapped__
    version = VERSION + 1

    def with_next(wanted: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if wanted != version:
            return recorded(wanted)
        tables, functions = recorded(VERSION)
        colour = ("\tpayload JSONB NOT NULL, ", "\tpayload JSONB NOT NULL, \n\tcolour TEXT, ")
        extra = (
            "CREATE OR REPLACE FUNCTION \"@schema@\".pgpubsub_colour() RETURNS text LANGUAGE sql RETURN 'blue'",
            "COMMENT ON FUNCTION \"@schema@\".pgpubsub_colour() IS 'pgpubsub:0'",
        )
        return tuple(one.replace(*colour) for one in tables), (*functions, *extra)

    upgrade = Upgrade(
        to=version,
        what="a colour",
        up=lambda names: (f"ALTER TABLE {names.notification} ADD COLUMN IF NOT EXISTS colour text",),
        down=lambda names: (f"ALTER TABLE {names.notification} DROP COLUMN IF EXISTS colour",),
    )
    from pgpubsub_celery import drift

    monkeypatch.setattr(upgrades, "_recorded", with_next)
    monkeypatch.setattr(upgrades, "UPGRADES", (*upgrades.UPGRADES, upgrade))
    monkeypatch.setattr(comparison, "VERSION", version)
    monkeypatch.setattr(drift, "VERSION", version)
    return version


def test_the_next_version_of_our_tables_is_a_migration_that_keeps_rows(
    environment: Callable[..., Environment], engine: Engine, request: pytest.FixtureRequest
) -> None:
    """There and back, online and as a script; a database that is of it already stays as it is."""
    env = environment(watch(table("name")))
    env.autogenerate()
    env.upgrade()
    execute(engine, "INSERT INTO author VALUES (1, 'Ada')")
    was = state(engine)
    version = request.getfixturevalue("next_version")
    written = env.autogenerate()
    assert f"    op.upgrade_pgpubsub(from_version={version - 1}, to_version={version})\n" in written
    assert f"    op.downgrade_pgpubsub(from_version={version}, to_version={version - 1})\n" in written
    env.upgrade()
    now = state(engine)
    assert "colour" in {row[1] for row in now["tables"]}
    assert "pgpubsub_colour()" in {row[0] for row in now["functions"]}
    env.downgrade()
    assert state(engine) == was
    execute(engine, env.script("r1:r2"))
    assert state(engine) == now
    execute(engine, "UPDATE alembic_version SET version_num = 'r1'")
    env.upgrade()
    assert state(engine) == now
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM pgpubsub_notification")).scalar() == 1
        assert connection.execute(text("SELECT version FROM pgpubsub_installation")).scalar() == version


def test_version_1_becomes_the_present_one_by_a_migration_with_keys(
    environment: Callable[..., Environment], engine: Engine
) -> None:
    """What a release of version 1 has made and stored; the way back leaves it as it was, in no order."""
    message()
    env = environment(watch(table("name")))
    env.autogenerate()
    env.edit(1, (f"op.create_pgpubsub(version={VERSION})", "op.create_pgpubsub(version=1)"))
    env.upgrade()
    store = (
        "INSERT INTO author VALUES (nextval('author_id_seq'), 'Ada')",
        "SELECT pgpubsub_notify('posted', '{\"number\": 5}')",
    )
    execute(engine, *store)
    was = state(engine)
    forget()
    message(ordering_key="number")
    env.options["target_metadata"] = watch(table("name"), ordering_key="row")
    written = env.autogenerate()
    assert f"    op.upgrade_pgpubsub(from_version=1, to_version={VERSION})\n" in written
    assert "op.alter_pgpubsub_channel('posted', ordering_key=['number'])" in written
    env.upgrade()
    assert found(engine) == []
    execute(engine, *store)
    with engine.connect() as connection:
        stored = "SELECT ordering_key FROM pgpubsub_notification ORDER BY id"
        assert list(connection.execute(text(stored)).scalars()) == [None, None, "2", "5"]
    env.downgrade()
    assert state(engine) == was
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM pgpubsub_notification")).scalar() == 4


def test_a_migration_that_creates_a_later_version_upgrades_an_older_installation(
    environment: Callable[..., Environment], engine: Engine, request: pytest.FixtureRequest
) -> None:
    """One that `install` of an older release has made."""
    target = watch(table("name"))
    target.create_all(engine)
    install(engine)
    version = request.getfixturevalue("next_version")
    env = environment(target)
    env.autogenerate()
    env.edit(
        1,
        (
            f"op.upgrade_pgpubsub(from_version={version - 1}, to_version={version})",
            f"op.create_pgpubsub(version={version})",
        ),
    )
    env.upgrade()
    assert "colour" in {row[1] for row in state(engine)["tables"]}
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version FROM pgpubsub_installation")).scalar() == version
