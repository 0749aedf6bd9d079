"""A tour as an operator: each trouble is found with `status`, and mended with the one command that it names."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import notify_many
from tests.fixtures import shop as app
from tests.fixtures.commands import done
from tests.fixtures.processes import APP, DEADLINE, Shop, eventually

QUICK: dict[str, Any] = {"PGPUBSUB_LEASE": "3", "PGPUBSUB_HEARTBEAT_INTERVAL": "1"}
"""So that a run which hangs shows within seconds."""


class Operator:
    """Looks, and does what is said."""

    def __init__(self, shop: Shop, database: Engine) -> None:
        self.shop = shop
        self.database = database

    def execute(self, statement: str) -> None:
        with self.database.begin() as connection:
            connection.execute(text(statement))

    def status(self) -> str:
        """Return what `status` shows."""
        return done(self.shop.run("-A", APP, "status", **QUICK))

    def waits_for(self, *told: str) -> str:
        """Return the command below the first line of `status` that has all of `told`, as soon as there is one."""
        deadline = time.monotonic() + DEADLINE
        while True:
            shown = self.status()
            lines = shown.splitlines()
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                if all(word in line for word in told):
                    return following.strip()
            assert time.monotonic() < deadline, f"{told} is not in\n{shown}"
            time.sleep(0.2)

    def run(self, command: str) -> str:
        """Run one of our commands, as it was shown."""
        program, *words = shlex.split(command)
        assert program == "pgpubsub-bridge"
        return done(self.shop.run(*words, **QUICK))

    def stored(self) -> int:
        with self.database.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM pgpubsub_notification")).scalar_one())

    def is_quiet(self) -> bool:
        """Whether nothing needs anybody."""
        told: dict[str, Any] = json.loads(done(self.shop.run("-A", APP, "status", "--json", **QUICK)))
        return not told["attention"]


def emit(database: Engine, *messages: Any) -> None:
    with Session(database) as session, session.begin():
        notify_many(session, messages)


def test_whatever_is_wrong_is_found_with_status_and_mended_with_one_command(shop: Shop, database: Engine) -> None:
    """A stopped bridge, a backlog, a failing listener, one that hangs, and a stale trigger; then nothing is wrong."""
    operator = Operator(shop, database)
    emit(database, *(app.Order(number=n) for n in range(3)))

    # Nobody listens.
    listen = operator.waits_for("No bridge is connected for a stored channel: nothing is published.")
    assert listen == f"pgpubsub-bridge -A {APP} listen"
    shop.bridge("--recover", "--max-in-flight", "1", "--health-port", "0", **QUICK)

    # Nobody works: what is due gets old.
    operator.execute(
        "UPDATE pgpubsub_notification SET available_at = now() - interval '2 minutes' WHERE state = 'waiting'"
    )
    work = operator.waits_for(f"{APP}.take_order: due for 1", "in flight: workers do not keep up, or there are none")
    assert work == f"celery -A {APP} worker"
    shop.worker("--pool=prefork", "--concurrency=2", **QUICK)
    eventually(lambda: operator.stored() == 0, "the backlog is done")

    # A listener fails, until somebody has mended what it stumbles over.
    emit(database, app.Entry(number=app.POISON))
    retry = operator.waits_for(f"{APP}.index: 1 failed; the last one: ValueError: poison")
    operator.execute("""UPDATE pgpubsub_notification SET payload = '{"number": 7}'""")
    assert operator.run(retry) == "1 notification(s) made due.\n"
    eventually(lambda: operator.stored() == 0, "what had failed is done")

    # One hangs. What it waits for is there again, but it will never notice.
    emit(database, app.Call(number=1, seconds=3600))
    again = operator.waits_for(f"{APP}.make_call: 1 running, the oldest stored", "takes long, or hangs")
    operator.execute("""UPDATE pgpubsub_notification SET payload = '{"number": 1, "seconds": 0}'""")
    assert operator.run(again) == "1 notification(s) made due.\n"
    eventually(lambda: operator.stored() == 0, "it has run beside the one that hangs")

    # A trigger was switched off, and what it misses is stored nowhere.
    operator.execute("ALTER TABLE author DISABLE TRIGGER ALL")
    install = operator.waits_for("author", "disabled")
    assert install == f"pgpubsub-bridge -A {APP} install"
    operator.run(install)
    operator.execute("INSERT INTO author (id, name) VALUES (1, 'Ann')")
    eventually(lambda: operator.stored() == 0, "the trigger's notification is done")
    with database.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM effect WHERE kind = 'welcome'")).scalar() == 1
    eventually(operator.is_quiet, f"nothing needs anybody: {operator.status()}")
