"""A writer, as a process of its own: `python -m tests.stress.writers COMMITS SEED patiently`, or `"in bursts"`.

Each transaction is one message to the server, so that a million of them take minutes. They differ in what they do
before and after they emit: nothing, savepoints that are rolled back or not, pauses of about as long as a bridge takes
to fall asleep, a rollback, PREPARE TRANSACTION. The database is in the environment. Prints how many notifications were
committed.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Mapping, Sequence

import psycopg2

PAUSES = (0.0, 0.002, 0.02, 0.05)
"""Seconds, at most, within and between transactions."""
BURSTS: Mapping[str, Sequence[int]] = {"patiently": (1, 1, 3), "in bursts": (1, 1, 1, 10, 300)}
"""How many transactions follow each other without a pause."""
PREPARED_AT_ONCE = 5


class Writer:
    """One connection, and its random choices."""

    def __init__(self, url: str, seed: int) -> None:
        connection = psycopg2.connect(url)
        connection.autocommit = True
        self._cursor = connection.cursor()
        self._random = random.Random(seed)
        self._seed = seed
        self._prepared: list[str] = []
        self._number = 0
        self.committed = 0

    def write(self, commits: int, bursts: Sequence[int]) -> None:
        """Commit so many transactions, a random one of `bursts` at a time."""
        done = 0
        while done < commits:
            burst = self._random.choice(bursts)
            longest = self._random.choice(PAUSES)
            for _ in range(min(burst, commits - done)):
                done += self._transact(longest if burst < 300 else 0.0)
            time.sleep(self._random.uniform(0.0, longest))
        while self._prepared:
            self._commit_prepared()

    def _transact(self, longest: float) -> int:
        """Do one transaction; return how many were committed."""
        if self._random.random() < 0.01:
            return self._prepare()
        statements, emitted = ["BEGIN"], 0
        if self._random.random() < 0.2:
            statements += ["SAVEPOINT one", _emit()]
            if self._random.random() < 0.5:
                statements.append("ROLLBACK TO one")
            else:
                emitted += 1
        statements.append(self._sleep(longest))
        if not emitted or self._random.random() < 0.5:
            statements.append(_emit())
            emitted += 1
        statements.append(self._sleep(longest))
        if self._random.random() < 0.05:
            self._cursor.execute(";".join([*statements, "ROLLBACK"]))
            return 0
        self._cursor.execute(";".join([*statements, "COMMIT"]))
        self.committed += emitted
        return 1

    def _sleep(self, longest: float) -> str:
        if not longest or self._random.random() < 0.7:
            return "SELECT 1"
        return f"SELECT pg_sleep({self._random.uniform(0.0, longest):f})"

    def _prepare(self) -> int:
        self._number += 1
        name = f"stress {self._seed} {self._number}"
        quiet = "SELECT set_config('pgpubsub.notify', 'off', true)"
        self._cursor.execute(f"BEGIN; {quiet}; {_emit(prepared=True)}; PREPARE TRANSACTION '{name}'")
        self._prepared.append(name)
        if len(self._prepared) >= PREPARED_AT_ONCE:
            self._commit_prepared()
        return 1

    def _commit_prepared(self) -> None:
        name = self._prepared.pop(self._random.randrange(len(self._prepared)))
        self._cursor.execute(f"COMMIT PREPARED '{name}'")
        self.committed += 1


def _emit(*, prepared: bool = False) -> str:
    payload = '{"prepared": true}' if prepared else '{"prepared": false}'
    return f"SELECT pgpubsub_notify('doorbell.Tick', '{payload}')"


if __name__ == "__main__":
    writer = Writer(os.environ["PGPUBSUB_DATABASE_URL"], int(sys.argv[2]))
    writer.write(int(sys.argv[1]), BURSTS[sys.argv[3]])
    sys.stdout.write(f"committed {writer.committed}\n")
