"""Writers: transactions that emit, and that commit, roll back, or never learn which of the two it was.

Owns what is emitted. What a transaction has emitted, it also writes to the table `emitted`: that table, and nothing
that a writer remembers, tells afterwards what was committed.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, enqueue, notify, notify_many
from pgpubsub_celery.settings import sync_url
from tests.chaos import app

# How often each is chosen.
KINDS: dict[str, int] = {
    "single": 20,
    "bundled": 25,
    "owned": 12,
    "owned5": 10,
    "retrying": 5,
    "leading": 10,
    "author": 10,
    "plain": 8,
}
MESSAGES: dict[str, Callable[[int], Channel]] = {
    "single": app.Single,
    "bundled": app.Bundled,
    "owned": app.Owned,
    "owned5": app.OwnedBundled,
    "retrying": app.Retrying,
    "leading": app.Leading,
}

_numbers = itertools.count(1)


class Writer(threading.Thread):
    """Emits until told to stop, at most as fast as `may_emit` allows."""

    def __init__(self, url: str, seed: int, may_emit: Callable[[], bool]) -> None:
        super().__init__(name="writer", daemon=True)
        self._random = random.Random(seed)
        self._may_emit = may_emit
        self._stopping = threading.Event()
        self._engine = create_engine(
            sync_url(url), pool_pre_ping=True, connect_args={"application_name": "chaos-writer", "connect_timeout": 10}
        )
        self.committed = 0
        """Notifications, as far as this writer knows."""
        self.rolled_back = 0
        self.unknown = 0

    def run(self) -> None:
        while not self._stopping.is_set():
            if not self._may_emit():
                self._stopping.wait(0.05)
                continue
            count = 0
            committing = False
            try:
                with Session(self._engine) as session:
                    count = self._emit(session)
                    if self._random.random() < 0.15:
                        session.rollback()
                        self.rolled_back += count
                        continue
                    if self._random.random() < 0.1:
                        self._stopping.wait(self._random.uniform(0.01, 0.5))
                    committing = True
                    session.commit()
                    self.committed += count
            except DBAPIError:
                if committing:
                    self.unknown += count
                self._stopping.wait(0.2)
            self._stopping.wait(self._random.uniform(0, 0.05))

    def stop(self) -> None:
        """Finish the transaction."""
        self._stopping.set()
        self.join()
        self._engine.dispose()

    def _emit(self, session: Session) -> int:
        count = 0
        for _ in range(self._random.choice((1, 1, 2))):
            count += self._emit_one(session)
        if self._random.random() < 0.08:
            savepoint = session.begin_nested()
            self.rolled_back += self._emit_one(session)
            savepoint.rollback()
        return count

    def _emit_one(self, session: Session) -> int:
        kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        luck = self._random.random()
        size = self._random.randint(1, 2)
        if luck < 0.03 and kind in ("single", "bundled", "author"):
            size = self._random.randint(60, 200)
        elif luck < 0.2:
            size = self._random.randint(5, 15)
        numbers = list(itertools.islice(_numbers, size))
        record(session.connection(), kind, numbers)
        if kind == "author":
            session.execute(
                text("INSERT INTO author (id, name) SELECT n, 'author ' || n FROM unnest(CAST(:n AS bigint[])) n"),
                {"n": numbers},
            )
        elif kind == "plain":
            for number in numbers:
                enqueue(session, app.plain.s(number))
        elif size == 1:
            notify(session, MESSAGES[kind](numbers[0]))
        else:
            notify_many(session, [MESSAGES[kind](number) for number in numbers])
        return size


def record(connection: Connection, kind: str, numbers: list[int]) -> None:
    """Write down what this transaction emits."""
    connection.execute(
        text("INSERT INTO emitted (kind, number, at) SELECT :kind, n, :at FROM unnest(CAST(:n AS bigint[])) n"),
        {"kind": kind, "n": numbers, "at": time.time()},
    )
