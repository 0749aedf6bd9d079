"""`install`, `uninstall` and `triggers`, as real processes on a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from pgpubsub_celery import metadata
from tests.fixtures.commands import Folder, done, refused

APP = ("-A", "news.celery_app")
OPERATIONS = ("insert", "update", "delete", "truncate")
TABLES = {table.name for table in metadata.sorted_tables}


@pytest.fixture
def folder(tmp_path: Path, database_url: str, engine: Engine) -> Folder:
    """The application, on a database that has its tables and nothing of ours."""
    folder = Folder(tmp_path, PGPUBSUB_DATABASE_URL=database_url)
    folder.write_news()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE reader (id int PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE welcomed (id int PRIMARY KEY)"))
    return folder


@pytest.fixture
def installed(folder: Folder) -> Folder:
    """The same, installed."""
    done(folder.run(*APP, "install"))
    return folder


@pytest.fixture
def role(engine: Engine, tmp_path: Path) -> Iterator[str]:
    """A role that may do nothing yet."""
    name = f"web_{abs(hash(tmp_path))}"
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {name}"))
    yield name
    with engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))


def tables(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(
            connection.execute(text("SELECT tablename FROM pg_tables WHERE tablename LIKE 'pgpubsub\\_%'")).scalars()
        )


def triggers(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.execute(text("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")).scalars())


def execute(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


# install


def test_install_makes_everything_and_again_changes_nothing(folder: Folder, engine: Engine) -> None:
    """What it has made is said, line by line; the second time there is nothing to say."""
    told = done(folder.run(*APP, "install"))
    assert told.endswith("installed.\n")
    assert "the trigger pgpubsub_news_channels_readerchanges_insert" in told
    assert tables(engine) == TABLES
    assert len(triggers(engine)) == 1
    assert done(folder.run(*APP, "install")) == "everything is in place.\n"


def test_check_says_what_differs_with_exit_code_1_and_changes_nothing(folder: Folder, engine: Engine) -> None:
    """For a pipeline."""
    result = folder.run(*APP, "install", "--check")
    assert result.returncode == 1
    assert "pgpubsub_notification" in result.stdout
    assert tables(engine) == set()
    done(folder.run(*APP, "install"))
    assert done(folder.run(*APP, "install", "--check")) == "everything is in place.\n"


def test_the_printed_script_does_what_install_does(folder: Folder, engine: Engine) -> None:
    """For those whose databases only others may change. It needs no database to be printed."""
    script = done(folder.run(*APP, "install", "--sql", PGPUBSUB_DATABASE_URL=""))
    with engine.connect() as connection:
        connection.connection.cursor().execute(script)
    assert tables(engine) == TABLES
    assert done(folder.run(*APP, "install", "--check")) == "everything is in place.\n"


def test_prune_removes_what_no_listener_wants(installed: Folder, engine: Engine) -> None:
    """Only when asked: another release may still have it."""
    listeners = installed.path / "news" / "listeners.py"
    listeners.write_text(listeners.read_text().replace('@channel_task(ReaderChanges, on="insert")', ""))
    done(installed.run(*APP, "install"))
    assert len(triggers(engine)) == 1
    told = done(installed.run(*APP, "install", "--prune"))
    assert "news.listeners.welcome" in told
    assert triggers(engine) == set()


def test_a_missing_table_is_told_with_what_to_do(folder: Folder, engine: Engine) -> None:
    """The triggers are on the user's table, which we do not make."""
    execute(engine, "DROP TABLE reader")
    refused(folder.run(*APP, "install"), "reader", "create it first")


def test_a_locked_table_is_waited_for_no_longer_than_asked(folder: Folder, engine: Engine) -> None:
    """Somebody's long transaction does not become everybody's."""
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO reader VALUES (1)"))
        refused(folder.run(*APP, "install", "--lock-timeout", "0.3"), "reader")
    done(folder.run(*APP, "install"))


def test_install_needs_an_application(folder: Folder) -> None:
    """Without one there are no listeners to install for."""
    refused(folder.run("install"), "-A")


def test_grant_emit_lets_a_role_emit(folder: Folder, engine: Engine, role: str) -> None:
    """And nothing else: it may not look."""
    emit = text("SELECT pgpubsub_notify('news.channels.Issue', '{\"number\": 1}')")
    done(folder.run(*APP, "install", "--grant-emit", role))
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL ROLE {role}"))
        assert connection.execute(emit).scalar() == 1
        may_look = text("SELECT has_table_privilege('pgpubsub_notification', 'SELECT')")
        assert connection.execute(may_look).scalar() is False


def test_a_role_that_may_not_look_is_told_which_grant_it_needs(
    installed: Folder, engine: Engine, role: str, database_url: str
) -> None:
    """One line, from the command that it cannot run."""
    execute(engine, f"ALTER ROLE {role} LOGIN")
    url = database_url.replace("postgres@", f"{role}@")
    refused(installed.run("list", "--database-url", url), "permission denied", "--grant-run", code=1)
    done(installed.run(*APP, "install", "--grant-run", role))
    assert installed.run("list", "--database-url", url).returncode == 0


def test_a_role_that_is_not_there_is_refused(installed: Folder) -> None:
    """By its name."""
    result = installed.run(*APP, "install", "--grant-emit", "nobody_at_all")
    assert result.returncode == 2
    assert "'nobody_at_all'" in result.stderr


# uninstall


def test_uninstall_asks_first(installed: Folder, engine: Engine) -> None:
    """Which database it is about; anything but yes leaves all in place."""
    result = installed.run("uninstall", said="n\n")
    assert result.returncode == 1
    assert "127.0.0.1" in result.stdout + result.stderr
    assert tables(engine) == TABLES
    assert "uninstalled." in done(installed.run("uninstall", said="y\n"))
    assert tables(engine) == set()
    assert triggers(engine) == set()


def test_uninstall_refuses_while_notifications_are_stored(installed: Folder, engine: Engine) -> None:
    """They would be lost, which somebody has to want."""
    execute(engine, "INSERT INTO reader VALUES (1), (2)")
    refused(installed.run("uninstall", "--yes"), "2 notification(s)", "--discard-stored")
    assert tables(engine) == TABLES
    done(installed.run("uninstall", "--yes", "--discard-stored"))
    assert tables(engine) == set()


# triggers


def test_triggers_list_shows_what_the_database_has(installed: Folder, engine: Engine) -> None:
    """The table, the name, and whether it is enabled; the application is not needed."""
    told = done(installed.run("triggers", "list"))
    assert "public.reader" in told
    assert triggers(engine).pop() in told
    done(installed.run("uninstall", "--yes"))
    assert "no triggers" in done(installed.run("triggers", "list"))


def test_triggers_check_names_each_difference_with_exit_code_1(folder: Folder, engine: Engine) -> None:
    """One line for each kind of drift, nothing else, and `install` makes them all go away."""
    listeners = folder.path / "news" / "listeners.py"
    wanted = '@channel_task(ReaderChanges, on=("insert", "update", "delete", "truncate"))'
    listeners.write_text(listeners.read_text().replace('@channel_task(ReaderChanges, on="insert")', wanted))
    done(folder.run(*APP, "install"))
    assert done(folder.run(*APP, "triggers", "check")) == "everything is in place.\n"
    of = {operation: next(name for name in triggers(engine) if f"_{operation}_" in name) for operation in OPERATIONS}
    execute(engine, f"DROP TRIGGER {of['insert']} ON reader")
    execute(engine, f"COMMENT ON TRIGGER {of['update']} ON reader IS 'pgpubsub_celery:v1:0000'")
    execute(engine, f"ALTER TABLE reader DISABLE TRIGGER {of['delete']}")
    edited = (
        f"CREATE OR REPLACE FUNCTION {of['truncate']}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    execute(engine, edited)
    execute(engine, "CREATE FUNCTION pgpubsub_mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    execute(engine, "CREATE TRIGGER mine AFTER INSERT ON reader EXECUTE FUNCTION pgpubsub_mine()")
    result = folder.run(*APP, "triggers", "check")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    for name, told in (
        (of["insert"], "is missing"),
        (of["update"], "is out of date"),
        (of["delete"], "is disabled"),
        (of["truncate"], "somebody has edited"),
        ("mine", "is not wanted any more"),
    ):
        assert len([line for line in lines if f"the trigger {name} on " in line and told in line]) == 1, (name, lines)
    assert len(lines) == 5
    done(folder.run(*APP, "install", "--prune"))
    assert done(folder.run(*APP, "triggers", "check")) == "everything is in place.\n"


def test_triggers_of_partitioned_tables_are_not_taken_for_somebody_s(folder: Folder, engine: Engine) -> None:
    """They have more than one trigger for an operation."""
    execute(engine, "DROP TABLE reader")
    execute(engine, "CREATE TABLE reader (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    execute(engine, "CREATE TABLE reader_1 PARTITION OF reader FOR VALUES FROM (0) TO (100)")
    done(folder.run(*APP, "install"))
    assert len(triggers(engine)) > 1
    assert done(folder.run(*APP, "triggers", "check")) == "everything is in place.\n"
    assert done(folder.run(*APP, "triggers", "diff")) == "everything is in place.\n"


def test_triggers_diff_shows_what_install_would_change(installed: Folder, engine: Engine) -> None:
    """The lines of the function that a new column brings."""
    channels = installed.path / "news" / "channels.py"
    channels.write_text(
        channels.read_text().replace(
            '__tablename__ = "reader"\n', '__tablename__ = "reader"\n    surname: Mapped[str] = mapped_column()\n'
        )
    )
    execute(engine, "ALTER TABLE reader ADD surname text")
    result = installed.run(*APP, "triggers", "diff")
    assert result.returncode == 1
    changed = [line for line in result.stdout.splitlines() if line.startswith(("+", "-"))]
    assert [line for line in changed if "surname" in line and line.startswith("+")]
    assert not [line for line in changed if "surname" in line and line.startswith("-")]
    done(installed.run(*APP, "install"))
    assert done(installed.run(*APP, "triggers", "diff")) == "everything is in place.\n"


def test_triggers_sql_prints_statements_that_make_them(installed: Folder, engine: Engine) -> None:
    """Where they were dropped, executing it puts them back."""
    (trigger,) = triggers(engine)
    script = done(installed.run(*APP, "triggers", "sql"))
    execute(engine, f"DROP TRIGGER {trigger} ON reader")
    with engine.connect() as connection:
        connection.connection.cursor().execute(script)
        connection.connection.commit()
    assert done(installed.run(*APP, "triggers", "check")) == "everything is in place.\n"
