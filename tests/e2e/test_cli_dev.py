"""`dev`: a user's application with the servers it lacks, the bridge and a worker; and all of it gone at the end."""

from __future__ import annotations

import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Engine, create_engine, text

from pgpubsub_celery.settings import sync_url
from tests.fixtures.commands import Folder, started
from tests.fixtures.processes import Running, eventually

APP = ("-A", "news.celery_app")
TABLES = "CREATE TABLE reader (id int PRIMARY KEY); CREATE TABLE welcomed (id int PRIMARY KEY)"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """The application, which names neither a database nor a broker."""
    folder = Folder(tmp_path)
    folder.write_news()
    return folder


@pytest.fixture
def data() -> Iterator[Path]:
    """Where servers may keep their data: as root, Postgres runs as somebody else."""
    path = Path(tempfile.mkdtemp(prefix="test-dev-"))
    path.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def configured(folder: Folder, database_url: str, broker_url: str) -> Folder:
    """The same application, with a database and a broker that answer."""
    folder.environment.update(PGPUBSUB_DATABASE_URL=database_url, NEWS_BROKER_URL=broker_url)
    return folder


@pytest.fixture
def running(folder: Folder, data: Path) -> Iterator[list[Running]]:
    """What the test has started, to be ended whatever becomes of it."""
    running: list[Running] = []
    yield running
    for one in running:
        one.destroy()


def welcomes(engine: Engine, reader: int) -> None:
    """Insert a reader, and wait for what the listener makes of it."""
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO reader VALUES (:id)"), {"id": reader})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        found = text("SELECT count(*) FROM welcomed WHERE id = :id")
        eventually(lambda: connection.execute(found, {"id": reader}).scalar() == 1, "the reader was welcomed")


def ends_with_everything(dev: Running, signum: int, code: int) -> None:
    """Send a signal; whatever it had started is gone when it is."""
    below = dev.children()
    assert below
    dev.signal(signum)
    assert dev.code() == code
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []


def test_dev_starts_what_is_lacking_and_ctrl_c_ends_all_of_it(
    folder: Folder, data: Path, running: list[Running]
) -> None:
    """From nothing to a committed row that a listener has seen; the data are there the next time."""
    words = [*APP, "dev", "--directory", str(data), "--create-tables", "--concurrency", "1"]
    for reader in (1, 2):
        dev = started(folder, *words)
        running.append(dev)
        dev.wait_for(r"database  (\S+)\nbroker    redis://127.0.0.1")
        dev.wait_for("listening to")
        found = re.search(r"database  (\S+)", dev.log())
        assert found is not None
        engine = create_engine(sync_url(found[1]))
        welcomes(engine, reader)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM reader")).scalar() == reader
        engine.dispose()
        ends_with_everything(dev, signal.SIGINT, 0)
        assert "Traceback" not in dev.log()


def test_dev_uses_servers_that_answer_and_waits_for_tables_that_are_missing(
    configured: Folder, data: Path, engine: Engine, running: list[Running]
) -> None:
    """The user's migrations make them, with the database at the address that it has said."""
    dev = started(configured, *APP, "dev", "--directory", str(data))
    running.append(dev)
    dev.wait_for("missing   .*reader.*: create them there")
    assert dev.children() == []
    with engine.begin() as connection:
        connection.execute(text(TABLES))
    dev.wait_for("listening to")
    welcomes(engine, 1)
    assert dev.log().count("missing   ") == 1
    assert list(data.iterdir()) == []
    ends_with_everything(dev, signal.SIGTERM, 0)


def test_dev_starts_servers_in_the_place_of_those_that_do_not_answer(
    folder: Folder, data: Path, running: list[Running]
) -> None:
    """It says so, without the password."""
    folder.environment.update(
        PGPUBSUB_DATABASE_URL="postgresql://somebody:s3cret@127.0.0.1:1/x",
        NEWS_BROKER_URL="redis://:s3cret@127.0.0.1:1/0",
    )
    dev = started(folder, *APP, "dev", "--directory", str(data), "--create-tables")
    running.append(dev)
    dev.wait_for("the configured database does not answer")
    dev.wait_for("the configured broker does not answer")
    dev.wait_for("listening to")
    assert "s3cret" not in dev.log()


def test_dev_ends_when_one_of_its_processes_has_ended(
    configured: Folder, engine: Engine, running: list[Running]
) -> None:
    """A worker that is gone unnoticed would be looked for for a long time."""
    with engine.begin() as connection:
        connection.execute(text(TABLES))
    dev = started(configured, *APP, "dev")
    running.append(dev)
    dev.wait_for(r"ready\.")
    below = dev.children()
    (worker,) = [one for one in below if one.ppid() == dev.pid and "worker" in one.cmdline()]
    worker.kill()
    assert dev.code() == 1
    assert "the worker has ended with -9" in dev.log()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []
