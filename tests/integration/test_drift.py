"""Drift: whatever a database lacks is named by `check`, with what differs, and made good by `install`."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgpubsub_celery import channels, install, listeners
from pgpubsub_celery.bridge import Bridge
from pgpubsub_celery.migrations import check
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.triggers import trigger_name
from pgpubsub_celery.wakeups import Link, bridge_engine
from tests.fixtures.changes import channel_of, listener_of

pytestmark = pytest.mark.usefixtures("registry")

INSERT = trigger_name("changes", "insert")
UPDATE = trigger_name("changes", "update")


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def authors(installed_engine: Engine) -> Engine:
    """A table with the triggers of one channel, and nothing else that is registered."""
    channels._registry.clear()
    listeners._registry.clear()
    Base.metadata.create_all(installed_engine)
    declare()
    install(installed_engine)
    assert found(installed_engine) == []
    return installed_engine


def declare(operations: tuple[str, ...] = ("insert", "update"), **attributes: Any) -> None:
    """Declare the channel, in the place of the one before, with one listener."""
    channels._registry.clear()
    listeners._registry.clear()
    options = {name: attributes.pop(name) for name in ("changed", "condition") if name in attributes}
    listeners.register_listener(listener_of(channel_of(Author, "changes", **attributes), *operations, **options))


def found(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return check(connection)


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.connection.cursor().execute(statement)


EDITED = "CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (f"DROP TRIGGER {INSERT} ON author", f'{INSERT} on "author" is missing'),
        (f"DROP FUNCTION {INSERT}() CASCADE", f'{INSERT} on "author" is missing'),
        (f"COMMENT ON TRIGGER {INSERT} ON author IS NULL", "is out of date"),
        (f"ALTER TABLE author DISABLE TRIGGER {INSERT}", f'{INSERT} on "author" is disabled'),
        (f"ALTER TABLE author ENABLE REPLICA TRIGGER {INSERT}", "is disabled"),
        (EDITED.format(name=INSERT), rf"somebody has edited ({INSERT})"),
        (f"ALTER FUNCTION {INSERT}() SECURITY INVOKER", "settings somebody has altered"),
        (f"ALTER FUNCTION {INSERT}() RESET search_path", "settings somebody has altered"),
        ("DROP INDEX pgpubsub_notification_claim_idx", "the index pgpubsub_notification_claim_idx on"),
        ("ALTER TABLE pgpubsub_notification RESET (fillfactor)", "lacks settings of a queue (fillfactor)"),
        ("DELETE FROM pgpubsub_channel WHERE name = 'changes'", "the channel changes is missing"),
        ("UPDATE pgpubsub_channel SET stored = false WHERE name = 'changes'", "the channel changes is out of date"),
        ("DELETE FROM pgpubsub_subscription WHERE channel = 'changes'", "the subscription of"),
        ("DROP FUNCTION pgpubsub_ring(text)", "pgpubsub_ring(text) is missing"),
        (
            "CREATE OR REPLACE FUNCTION pgpubsub_ring(emitted text) RETURNS void LANGUAGE sql AS ''",
            "pgpubsub_ring(text) has been edited",
        ),
        ("DROP TABLE pgpubsub_run_time", 'pgpubsub_run_time" is missing'),
    ],
)
def test_each_kind_of_drift_is_named_and_made_good(authors: Engine, changed: str, told: str) -> None:
    """By one line that says what; install says the same and leaves nothing to say."""
    execute(authors, changed)
    (line,) = found(authors)
    assert told in line
    assert install(authors) == [line]
    assert found(authors) == []


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"include": "key"}, "(columns: -name)"),
        ({"lock_notifications": False}, "stored: None -> False"),
        ({"changed": ("name",)}, "(predicates)"),
        ({"condition": "new.id > 1"}, "(predicates)"),
    ],
)
def test_what_is_out_of_date_says_in_what(authors: Engine, attributes: dict[str, Any], told: str) -> None:
    """From what the comment in the database tells of the definition that it has."""
    declare(("update",), **attributes)
    (line,) = [line for line in found(authors) if f"the trigger {UPDATE} " in line]
    assert told in line


def test_what_nobody_wants_any_more_is_named_and_goes_when_pruned(authors: Engine) -> None:
    """Triggers, and functions whose table was dropped."""
    declare(("insert",))
    assert f"the trigger {UPDATE} on public.author is not wanted any more" in found(authors)
    channels._registry.clear()
    listeners._registry.clear()
    execute(authors, "DROP TABLE author")
    told = found(authors)
    assert [line for line in told if INSERT in line and "is not used any more" in line]
    assert not [line for line in told if "the trigger " in line and "function" not in line]


def test_a_partitioned_table_that_lacks_one_of_its_triggers_is_named(installed_engine: Engine) -> None:
    """Also one that was attached to a parent since: its statements' trigger misses what the parent writes."""
    channels._registry.clear()
    listeners._registry.clear()
    execute(
        installed_engine,
        "CREATE TABLE author (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE author_1 PARTITION OF author FOR VALUES FROM (0) TO (100)",
    )
    declare(("insert",))
    install(installed_engine)
    assert found(installed_engine) == []
    lacking = trigger_name("changes", "insert_begin")
    execute(installed_engine, f"DROP TRIGGER {lacking} ON author")
    (line,) = found(installed_engine)
    assert f"lacks {lacking}" in line
    install(installed_engine)
    execute(
        installed_engine,
        "CREATE OR REPLACE FUNCTION "
        + EDITED.partition("FUNCTION ")[2].format(name=trigger_name("changes", "insert_by_row")),
    )
    (line,) = found(installed_engine)
    assert "somebody has edited" in line
    install(installed_engine)
    execute(
        installed_engine,
        "CREATE TABLE everybody (id int NOT NULL, name text) PARTITION BY RANGE (id)",
        "ALTER TABLE everybody ATTACH PARTITION author FOR VALUES FROM (0) TO (1000)",
    )
    (line,) = found(installed_engine)
    assert "has become, or is no longer, a partition" in line
    install(installed_engine)
    assert found(installed_engine) == []


def test_a_table_with_virtual_columns_is_not_taken_for_edited(installed_engine: Engine) -> None:
    """Their functions are adapted when they are made."""
    with installed_engine.connect() as connection:
        version = int(connection.execute(text("SHOW server_version_num")).scalar_one())
    kind = "VIRTUAL" if version >= 180000 else "STORED"
    channels._registry.clear()
    listeners._registry.clear()
    execute(
        installed_engine,
        f'CREATE TABLE author (id int PRIMARY KEY, name text, "Full Name" text GENERATED ALWAYS AS (name) {kind})',
    )
    declare(("update",), condition="new.id > 0")
    install(installed_engine)
    assert found(installed_engine) == []


def test_a_bridge_says_at_its_start_which_triggers_its_listeners_need(
    authors: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing and out of date; nothing when all is well, and nothing of other channels."""
    engine = bridge_engine(sync_url(authors.url.render_as_string(hide_password=False)))
    app = Celery("drift", broker="memory://", set_as_current=False)

    def told(*watched: Any) -> list[str]:
        caplog.clear()
        with Link(engine, engine, "public") as link:
            Bridge(app, Settings(), watched, Control())._look_at_triggers(link)
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    watched = channels.registered_channels()
    assert told(*watched) == []
    execute(
        authors,
        f"DROP TRIGGER {INSERT} ON author",
        f"COMMENT ON TRIGGER {UPDATE} ON author IS 'pgpubsub_celery:v1:older'",
    )
    missing, stale = told(*watched)
    assert f'{INSERT} on "author" is missing: run `pgpubsub-bridge install`, or migrate' in missing
    assert f'{UPDATE} on "author" is out of date' in stale
    assert told() == []
    engine.dispose()
    app.close()
