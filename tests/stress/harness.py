"""What runs in a stress of the doorbell: servers, bridges and who disturbs them, writers, and a watch over the table.

Owns their lives and what was seen; what was allowed is the test's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import redis
from sqlalchemy import create_engine

from pgpubsub_celery import install
from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey
from pgpubsub_celery.settings import sync_url
from tests.fixtures.processes import BIN, Running
from tests.stress import app

APP = "tests.stress.app"
FEW = 10_000
"""Commits that would be over before anybody is disturbed."""
WATCHED = 5000
"""The oldest notifications in the table: those that wait for longest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wait:
    """How long a committed notification was seen in the table."""

    id: int
    prepared: bool
    since: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What was done to a bridge, from when to when it mattered."""

    kind: str
    since: float
    until: float


class Stress:
    """Everything, until it is closed."""

    def __init__(self, folder: Path, *, bridges: int, sweep: float, seed: int, bin_dir: str | None) -> None:
        self._folder = folder
        self._sweep = sweep
        self._random = random.Random(seed)
        self._stack = contextlib.ExitStack()
        options = {"max_prepared_transactions": "50", "max_connections": "100"}
        self.postgres = self._stack.enter_context(EmbeddedPostgres(bin_dir=bin_dir, fsync=False, options=options))
        self.valkey = self._stack.enter_context(EmbeddedValkey())
        self.url = self.postgres.create_database("stress")
        engine = create_engine(sync_url(self.url))
        install(engine, channels=[app.Tick])
        engine.dispose()
        self.environment = {"PGPUBSUB_DATABASE_URL": self.url, "STRESS_BROKER_URL": self.valkey.url}
        self._started = 0
        self.disturbances: list[Disturbance] = []
        self.waits: list[Wait] = []
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self.bridges = [self._bridge() for _ in range(bridges)]

    def __enter__(self) -> Stress:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for bridge in self.bridges:
            bridge.destroy()
        self._stack.close()

    def _start(self, command: list[str]) -> Running:
        self._started += 1
        return Running(command, self._folder / f"{self._started}.log", self.environment)

    def _bridge(self) -> Running:
        # What one finds that starts while no other is alive is not "before" anything here.
        options = ["--worker", "--recover", "--poll-interval", str(self._sweep), "--drain-timeout", "5"]
        bridge = self._start([str(BIN / "pgpubsub-bridge"), "-A", APP, "listen", *options])
        bridge.wait_for("listening to")
        return bridge

    # Writers

    def write(self, commits: int, *, writers: int, within: float, storm: bool = False) -> int:
        """Let writers commit, in calm or storm; return how many notifications there were once none is left."""
        watch = self._thread(self._watch)
        others = [self._thread(self._disturb)] if storm else []
        running = [self._writer(commits // writers, patient=storm and commits < FEW) for _ in range(writers)]
        deadline = time.monotonic() + within
        try:
            for writer in running:
                assert writer.process.wait(max(1.0, deadline - time.monotonic())) == 0, writer.log()[-4000:]
        finally:
            self._over.set()
            for thread in others:
                thread.join(60)
            for writer in running:
                writer.destroy()
        self._wait_for_the_end()
        watch.join(60)
        assert not self._errors, self._errors
        self._over.clear()
        return sum(int(re.findall(r"committed (\d+)", writer.log())[0]) for writer in running)

    def _writer(self, commits: int, *, patient: bool) -> Running:
        arguments = [str(commits), str(self._random.randrange(10**6)), "patiently" if patient else "in bursts"]
        return self._start([sys.executable, "-m", "tests.stress.writers", *arguments])

    def _wait_for_the_end(self) -> None:
        deadline = time.monotonic() + 2 * self._sweep + 60
        with _cursor(self.url) as cursor:
            while _scalar(cursor, "SELECT EXISTS (SELECT FROM pgpubsub_notification)"):
                assert time.monotonic() < deadline, f"never published: {self._left(cursor)}"
                time.sleep(0.1)

    @staticmethod
    def _left(cursor: Any) -> Any:
        cursor.execute(
            "SELECT id, state, available_at - now(), dispatches, starts, error FROM pgpubsub_notification LIMIT 5"
        )
        return cursor.fetchall()

    def _thread(self, work: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as exc:  # noqa: BLE001 - shown by `write`
                self._errors.append(exc)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    # The watch

    def _watch(self) -> None:
        """Note how long each notification is seen, until there are none and nobody writes any more."""
        seen: dict[int, tuple[float, bool]] = {}
        broker = redis.Redis.from_url(self.valkey.url)
        with _cursor(self.url) as cursor:
            while True:
                at = time.monotonic()
                cursor.execute(
                    "SELECT id, (payload ->> 'prepared')::bool FROM pgpubsub_notification ORDER BY id LIMIT %s",
                    (WATCHED,),
                )
                there = dict(cursor.fetchall())
                for id in [id for id in seen if id not in there]:
                    since, prepared = seen.pop(id)
                    self.waits.append(Wait(id=id, prepared=prepared, since=since, seconds=at - since))
                for id, prepared in there.items():
                    seen.setdefault(id, (at, prepared))
                broker.delete(app.QUEUE)  # what is published has been seen
                if not there and self._over.is_set():
                    return
                time.sleep(0.1)

    # Who disturbs

    def _disturb(self) -> None:
        """Kill a bridge, stop it for a while, or cut its connections, one after another."""
        kinds = [self._kill, self._stop, self._cut]
        with _cursor(self.url) as cursor:
            while not self._over.wait(self._random.uniform(0.5, 3.0)):
                kind = self._random.choice(kinds)
                since = time.monotonic()
                kind(cursor)
                self.disturbances.append(
                    Disturbance(kind=kind.__name__.strip("_"), since=since, until=time.monotonic())
                )

    def _kill(self, _: Any) -> None:
        bridge = self.bridges.pop(self._random.randrange(len(self.bridges)))
        bridge.destroy()
        self.bridges.append(self._bridge())

    def _stop(self, _: Any) -> None:
        bridge = self._random.choice(self.bridges)
        processes = [bridge.pid, *(child.pid for child in bridge.children())]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(0.2, 3.0))
        for pid in processes:
            os.kill(pid, signal.SIGCONT)

    def _cut(self, cursor: Any) -> None:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'pgpubsub-bridge%' "
            "ORDER BY random() LIMIT 1"
        )


def _scalar(cursor: Any, statement: str) -> Any:
    cursor.execute(statement)
    return cursor.fetchone()[0]


@contextlib.contextmanager
def _cursor(url: str) -> Iterator[Any]:
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()
