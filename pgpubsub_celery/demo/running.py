"""The demo's servers and processes: an embedded Postgres and Valkey, `pgpubsub-bridge listen` and `celery worker`.

Owns their life: all of it is gone when the block ends, and when this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine, create_engine

from pgpubsub_celery.demo import account
from pgpubsub_celery.demo.leftovers import Leftovers
from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey, start_process
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.settings import sync_url

APP = "pgpubsub_celery.demo.celery_app"
READY_SECONDS = 60.0
STOP_SECONDS = 10.0


class Blog:
    """The running application."""

    def __init__(self, folder: Path, database_url: str, broker_url: str) -> None:
        """Describe it; the folder holds its logs and the account."""
        self.folder = folder
        self.database_url = database_url
        self.account = folder / "account.jsonl"
        self.engine: Engine = create_engine(sync_url(database_url))
        self._environment = {
            **os.environ,
            "PGPUBSUB_DATABASE_URL": database_url,
            "CELERY_BROKER_URL": broker_url,
            account.FILE: str(self.account),
            "PYTHONUNBUFFERED": "1",
            # What they leave when they are killed goes with the folder.
            "TMPDIR": str(folder),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str]) -> None:
        """Start a process of the application; its log is `folder/name.log`."""
        with self.log_path(name).open("wb") as log:
            self._processes[name] = start_process(
                [sys.executable, "-m", *command],
                # The demo is gone then, and all that they could still do is of no use to anybody.
                death_signal=signal.SIGKILL,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, name: str, words: str) -> None:
        """Wait until the process has said `words`."""
        deadline = time.monotonic() + READY_SECONDS
        while words not in self.log_path(name).read_text(errors="replace"):
            if self._processes[name].poll() is not None or time.monotonic() > deadline:
                raise PgPubSubError(f"The {name} did not start. Its log ends:\n{self.log_tail(name)}")
            time.sleep(0.02)

    def pid(self, name: str) -> int:
        """Return a process's id."""
        return self._processes[name].pid

    def ended(self) -> list[str]:
        """Return which processes have ended, though nobody stopped them, and how."""
        return [
            f"the {name} has ended with {process.returncode}"
            for name, process in self._processes.items()
            if process.poll() is not None
        ]

    def log_path(self, name: str) -> Path:
        """Return where a process's log is."""
        return self.folder / f"{name}.log"

    def log_tail(self, name: str, lines: int = 15) -> str:
        """Return the end of a process's log."""
        return "\n".join(self.log_path(name).read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Stop all processes, the last one first; those that do not end are killed."""
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in reversed(self._processes.values()):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.engine.dispose()


@contextlib.contextmanager
def running() -> Iterator[Blog]:
    """Start everything in temporary folders; the database is installed, bridge and worker are ready."""
    from pgpubsub_celery.apps import load_app
    from pgpubsub_celery.demo.channels import CHANNELS
    from pgpubsub_celery.demo.models import Base
    from pgpubsub_celery.migrations import install

    postgres, valkey = EmbeddedPostgres(), EmbeddedValkey()
    with contextlib.ExitStack() as stack:
        leftovers = stack.enter_context(Leftovers())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgpubsub-demo-")))
        for each in (folder, postgres.directory, valkey.directory):
            leftovers.note(each)
        stack.enter_context(postgres)
        stack.enter_context(valkey)
        blog = Blog(folder, postgres.url, valkey.url)
        stack.callback(blog.stop)
        worker = ["celery", "-A", APP, "worker", "--concurrency=2", "--loglevel=info"]
        blog.start("worker", [*worker, "--without-gossip", "--without-mingle"])
        load_app(APP)
        Base.metadata.create_all(blog.engine)
        install(blog.engine, channels=CHANNELS)
        blog.start("bridge", ["pgpubsub_celery.cli", "-A", APP, "listen"])
        blog.wait_for("bridge", "listening to")
        blog.wait_for("worker", "ready.")
        yield blog
