"""A sample project goes through six Alembic revisions, with notifications stored in between: none is lost."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.triggers import TEMPLATE
from tests.fixtures.commands import CELERY, Folder, done, started
from tests.fixtures.processes import Running, eventually

PROJECT = Path(__file__).parent / "project"
APP = ("-A", "library.celery_app")
VERSIONS = "migrations/versions"
ALEMBIC = "import sys; from alembic.config import main; [main(step.split()) for step in sys.argv[1:]]"


class Library:
    """The project in a folder of its own, with the processes of its releases."""

    def __init__(self, folder: Folder, engine: Engine) -> None:
        self.folder = folder
        self.engine = engine
        self.running: list[Running] = []

    def alembic(self, release: int, *steps: str) -> str:
        """Run Alembic's commands one after the other, in one process."""
        told = self.folder.run("-c", ALEMBIC, *steps, program=sys.executable, RELEASE=str(release))
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    def migrate(self, release: int) -> None:
        """As its deployment does: to its revision, after which the database is what its models and listeners need."""
        (revision,) = (PROJECT / VERSIONS).glob(f"r{release}_*.py")
        # As if it had been made with the present version of our tables, which is not what this is about.
        written = revision.read_text().replace("pgpubsub(version=1)", f"pgpubsub(version={VERSION})")
        (self.folder.path / VERSIONS / revision.name).write_text(written.replace("template=1", f"template={TEMPLATE}"))
        assert "No new upgrade operations detected" in self.alembic(release, "upgrade head", "check")

    def bridge(self, release: int) -> Running:
        bridge = started(self.folder, *APP, "listen", "--recover", RELEASE=str(release))
        self.running.append(bridge)
        bridge.wait_for("listening to")
        return bridge

    def worker(self, release: int) -> Running:
        options = ("worker", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=info")
        worker = started(self.folder, *APP, *options, program=CELERY, RELEASE=str(release))
        self.running.append(worker)
        return worker

    def execute(self, *statements: str) -> None:
        """What a writer of the release that is installed does."""
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def done(self) -> list[tuple[str, str, int]]:
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT what, db_version, release FROM done"))
            return sorted((row.what, row.db_version, row.release) for row in rows)

    def stored(self) -> list[tuple[str, str, str]]:
        """Listener, state and version of what is stored."""
        with self.engine.connect() as connection:
            rows = connection.execute(
                text(
                    "SELECT s.listener, n.state, n.db_version FROM pgpubsub_notification n "
                    "JOIN pgpubsub_subscription s ON s.id = n.subscription ORDER BY n.id"
                )
            )
            return [tuple(row) for row in rows]


@pytest.fixture
def library(tmp_path: Path, database_url: str, broker_url: str, engine: Engine) -> Iterator[Library]:
    """A copy of the project, on an empty database."""
    path = tmp_path / "project"
    shutil.copytree(PROJECT, path, ignore=shutil.ignore_patterns("r?_*.py"))
    library = Library(Folder(path, PGPUBSUB_DATABASE_URL=database_url, LIBRARY_BROKER_URL=broker_url), engine)
    yield library
    for running in library.running:
        with contextlib.suppress(ProcessLookupError):
            running.destroy()


def test_what_is_stored_between_six_revisions_is_not_lost(library: Library) -> None:
    """Columns and channels are added, renamed, removed, a type changes; the last release finishes all that it can.

    What a removed listener has waiting stays; what cannot be read any more fails, and says why.
    """
    library.migrate(1)
    first = library.bridge(1), library.worker(1)
    library.execute("INSERT INTO book (id, title) VALUES (1, 'Emma')")
    eventually(lambda: len(library.done()) == 1, "the first release shelves a book")

    # The first release's processes go on while the database is the second's.
    library.migrate(2)
    library.execute(
        "INSERT INTO book (id, title, author) VALUES (2, 'Ulysses', 'Joyce')",
        "UPDATE book SET title = 'Emma, again' WHERE id = 1",
        "SELECT pgpubsub_notify('library.Borrowed', '{\"book\": 1}')",
    )
    eventually(lambda: len(library.done()) == 3, "the first release goes on with the second's database")
    for running in first:
        assert running.stop() == 0

    library.execute(
        "INSERT INTO book (id, title) VALUES (3, 'Dubliners')",
        "SELECT pgpubsub_notify('library.Borrowed', '{\"book\": 2}')",
    )
    library.migrate(3)
    library.execute(
        "INSERT INTO book (id, name, author) VALUES (4, 'Middlemarch', 'Eliot')",
        "UPDATE book SET name = 'Dubliners, again' WHERE id = 3",
        "UPDATE book SET author = 'somebody' WHERE id = 3",  # which no listener wants to know
    )
    library.migrate(4)
    library.execute(
        "INSERT INTO book (id, name, pages) VALUES (5, 'Hamlet', '120')",
        "INSERT INTO book (id, name, pages) VALUES (6, 'The Bible', 'many')",
    )
    library.migrate(5)
    library.execute("INSERT INTO book (id, name) VALUES (7, 'Faust')", "DELETE FROM book WHERE id = 2")
    assert library.stored() == [
        ("library.index", "waiting", "r2"),
        ("library.arrange", "waiting", "r2"),
        ("library.lend", "waiting", "r2"),
        ("library.arrange", "waiting", "r3"),
        ("library.index", "waiting", "r3"),
        ("library.arrange", "waiting", "r4"),
        ("library.arrange", "waiting", "r4"),
        ("library.arrange", "waiting", "r5"),
        ("library.remember", "waiting", "r5"),
    ]
    status = json.loads(done(library.folder.run("status", "--json")))
    versions = {one["listener"]: one["versions"] for one in status["listeners"]}
    assert versions["library.arrange"] == ["r2", "r3", "r4", "r5"]

    # The last release's bridge is there before its migration: it says what is missing, and listens all the same.
    last = library.bridge(6)
    last.wait_for(r'WARNING.*the table "reader" of a trigger channel does not exist: run')
    library.migrate(6)
    library.execute(
        "INSERT INTO book (id, name, pages) VALUES (8, 'Moby-Dick', 600)",
        "INSERT INTO reader VALUES (1)",
        "SELECT pgpubsub_notify('library.Borrowed', '{\"book\": 3, \"days\": 7}')",
    )
    library.worker(6)
    eventually(
        lambda: not [one for one in library.stored() if one[0] != "library.index" and one[1] != "failed"], "done"
    )
    assert library.done() == sorted(
        [
            ("shelve 1 Emma", "r1", 1),
            ("shelve 2 Ulysses", "r2", 1),
            ("lend 1", "r2", 1),
            ("arrange 3 Dubliners None", "r2", 6),  # a title then, without pages
            ("lend 2 14", "r2", 6),
            ("arrange 4 Middlemarch None", "r3", 6),
            ("arrange 5 Hamlet 120", "r4", 6),
            ("arrange 7 Faust None", "r5", 6),
            ("remember 2 Ulysses", "r5", 6),
            ("arrange 8 Moby-Dick 600", "r6", 6),
            ("greet", "r6", 6),
            ("lend 3 7", "r6", 6),
        ]
    )
    left = [("library.index", "waiting", "r2"), ("library.index", "waiting", "r3"), ("library.arrange", "failed", "r4")]
    assert library.stored() == left
    with library.engine.connect() as connection:
        error = str(connection.execute(text("SELECT error FROM pgpubsub_notification WHERE state = 'failed'")).scalar())
    assert re.search(r"the column 'pages'.* stored at version r4 of the database, which is now at r6", error)

    # There and back with rows stored; all the way back would lose them.
    assert "No new upgrade" in library.alembic(6, "downgrade r1", "upgrade head", "check")
    assert library.stored() == left
    assert "everything is in place" in done(library.folder.run(*APP, "install", "--check", RELEASE="6"))
