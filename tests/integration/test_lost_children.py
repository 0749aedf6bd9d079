"""What a worker's parent process does for the children that it loses, while it forks their successors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.fixtures.notifications import Notifications

SETTLING = textwrap.dedent(
    """
    import sys, threading, uuid

    imported = []

    def note(event, arguments):
        if event == "import" and threading.current_thread().name == "pgpubsub-settler":
            imported.append(arguments[0])

    sys.addaudithook(note)

    from pgpubsub_celery import requests
    from pgpubsub_celery.messages import Envelope
    from tests.fixtures.shop import app

    app.finalize()
    envelope = Envelope(
        installation=uuid.uuid4(), channel="a.Channel", listener="a.listener", ids=(int(sys.argv[1]),), dispatches=1
    )
    settled = threading.Event()
    requests.settle_later(app, "giving back", requests._give_back(envelope))
    requests.settle_later(app, "telling", lambda store, connection: settled.set())
    assert settled.wait(60)
    print("imported:", *imported)
    """
)


def test_settling_a_lost_run_imports_nothing_while_the_pool_may_fork(
    installed_url: str, notifications: Notifications
) -> None:
    """A module that a thread is importing while its process forks stays locked in the child, which would hang."""
    id = notifications.add_one(state="dispatched", dispatches=1)
    done = subprocess.run(
        [sys.executable, "-c", SETTLING, str(id)],
        env={**os.environ, "PGPUBSUB_DATABASE_URL": installed_url, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["imported:"]), done.stderr
    assert [row["state"] for row in notifications.rows()] == ["waiting"]
