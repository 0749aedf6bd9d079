"""`demo`: it shows what happened, tells when something is missing, and leaves nothing behind, whatever ends it."""

from __future__ import annotations

import os
import re
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from pgpubsub_celery.demo import scenario
from pgpubsub_celery.demo.running import Blog, running
from pgpubsub_celery.demo.scenario import Journey, play
from tests.fixtures.commands import Folder, started
from tests.fixtures.processes import Running, eventually


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for all temporary files, which everybody may enter: as root, Postgres runs as somebody else."""
    path = Path(tempfile.mkdtemp(prefix="test-demo-"))
    path.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX)
    yield path
    path.rmdir()  # there is nothing in it any more


@pytest.fixture
def demo(tmp_path: Path, place: Path) -> Iterator[Demo]:
    """`pgpubsub-bridge demo`; the test ends with everything gone that it had started."""
    demo = Demo(Folder(tmp_path, TMPDIR=str(place)), place)
    yield demo
    demo.destroy()


class Demo:
    """A demo, and all that it has started."""

    def __init__(self, folder: Folder, place: Path) -> None:
        self.folder = folder
        self.place = place
        self.running: Running | None = None
        self.seen: list[psutil.Process] = []

    def start(self, *words: str) -> Running:
        """Start it, and wait until it is ready."""
        self.running = started(self.folder, "demo", *words)
        self.running.wait_for("Ready after")
        self.seen = self.running.children()
        return self.running

    def process(self, word: str) -> psutil.Process:
        """Return the one of its processes whose command line has `word`."""
        assert self.running is not None
        mine = [one for one in self.seen if one.ppid() == self.running.pid]
        (found,) = [one for one in mine if word in one.cmdline()]
        return found

    def left(self) -> list[str]:
        """Return which processes and folders are left of it."""
        processes = [str(one) for one in self.seen if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        return processes + [str(one) for one in self.place.iterdir()]

    def leaves_nothing(self) -> None:
        """Wait until nothing is left."""
        assert len(self.seen) >= 5
        eventually(lambda: self.left() == [], f"nothing is left; there are {self.left()}")

    def destroy(self) -> None:
        """End what a failed test has left."""
        if self.running is not None:
            self.running.destroy()
        eventually(lambda: self.left() == [], "nothing is left")


def test_demo_once_shows_each_step_and_ends_with_0(demo: Demo) -> None:
    """Inserts, updates, deletes, a message, an ordinary task, retries, a failure, a rollback and a bulk."""
    running = demo.start("--once")
    assert running.code() == 0
    told = running.log()
    for task in ("create_first_post", "follow_renaming", "say_goodbye", "count_read", "send_mail"):
        shown = re.search(rf"✓ #\d+ \w+ \w+ → [a-z ]+ {task}\n +claimed ([\d.]+) ms, .*finished ([\d.]+) ms", told)
        assert shown is not None, (task, told)
        assert 0 < float(shown[1]) < float(shown[2])
    assert re.search(r"send_newsletter \(3 runs\)", told)
    assert re.search(r"✗ #\d+ Misprint message → listener correct_misprint\n.*failure [\d.]+ ms.*\n.*traceback", told)
    assert re.search(r"all of it, rolled back\n  ✓ no notification", told)
    assert re.search(r"✓ 1,000 of 1,000 notifications finished", told)
    assert re.search(r"create_first_post +1,001 +1,001 +1,001 +0\n", told)
    assert told.endswith("✓ Every effect is in the database exactly once; what was rolled back left nothing.\n")
    demo.leaves_nothing()


def test_demo_goes_on_until_ctrl_c(demo: Demo) -> None:
    """Every few seconds another author."""
    running = demo.start()
    running.wait_for(r"✓ #\d+ AuthorChanges insert → listener create_first_post", count=2)
    running.signal(signal.SIGINT)
    assert running.code() == 0
    assert "Traceback" not in running.log()
    demo.leaves_nothing()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_when_the_demo_is_killed(demo: Demo, signum: int) -> None:
    """Neither servers, nor bridge, nor worker, nor a file; even when it cannot do anything about it."""
    running = demo.start("--once")
    running.signal(signum)
    assert running.code() == (1 if signum == signal.SIGTERM else -signum)
    demo.leaves_nothing()


@pytest.mark.parametrize("victim", ["celery", "pgpubsub_celery.cli"])
def test_demo_once_fails_when_a_process_of_it_dies(demo: Demo, victim: str) -> None:
    """It says which, shows its log, and does not wait for the deadline."""
    running = demo.start("--once")
    demo.process(victim).kill()
    assert running.code() == 6
    name = "worker" if victim == "celery" else "bridge"
    assert f"✗ the {name} has ended with -9" in running.log()
    assert f"The {name}'s log ends:" in running.log()
    demo.leaves_nothing()


class Meddler:
    """Hears of each step, and meddles with the effects once."""

    def __init__(self, blog: Blog, *statements: str) -> None:
        self._blog = blog
        self._statements = statements

    def step(self, title: str) -> None:
        pass

    def journey(self, journey: Journey) -> None:
        statements, self._statements = self._statements, ()
        with self._blog.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def bulk(self, journeys: list[Journey]) -> None:
        pass

    def nothing(self) -> None:
        pass


def test_what_is_missing_or_there_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be a defect."""
    monkeypatch.setattr(scenario, "BULK", 10)
    with running() as blog:
        meddler = Meddler(
            blog,
            "DELETE FROM effect WHERE kind = 'first post'",
            "INSERT INTO effect (kind, value) VALUES ('goodbye', 1), ('mail', 2)",
        )
        differences = play(blog, meddler)
        logs = blog.log_tail("worker", 100) + blog.log_tail("bridge", 100)
    assert sorted(differences) == [
        "missing: first post of 1",
        "there 1 times instead of 0: mail of 2",
        "there 2 times instead of 1: goodbye of 1",
    ], logs


def test_what_never_arrives_is_found_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for ever."""
    monkeypatch.setattr(scenario, "DEADLINE_SECONDS", 2.0)
    with running() as blog:
        os.kill(blog.pid("worker"), signal.SIGSTOP)
        differences = play(blog, Meddler(blog))
        os.kill(blog.pid("worker"), signal.SIGCONT)
    assert "missing: first post of 1" in differences
