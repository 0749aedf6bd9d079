"""Who did what when: what the demo shows of each notification on its way.

Celery's own signals, in the bridge's and the worker's process, append a line to a file; the demo reads it. A user's
application needs nothing of this.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery import Celery, signals

from pgpubsub_celery.messages import KEYWORD

FILE = "PGPUBSUB_DEMO_ACCOUNT"
"""The environment variable that names the file; without it nothing is kept."""

_receivers: list[Any] = []
"""Signals keep no reference themselves. Written by `keep`, once."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One step of one or more notifications."""

    step: str
    """"claimed", "published", "started", or "ended" with Celery's state."""
    task_id: str
    ids: Sequence[int]
    """Of the notifications; none for an ordinary task, which `enqueue` has sent."""
    at: float
    """Seconds since the epoch."""


def keep(app: Celery) -> None:
    """Keep the account in this process, if it is asked for."""
    if FILE not in os.environ or _receivers:
        return
    path = os.environ[FILE]

    def note(step: str, task_id: str, ids: Sequence[int]) -> None:
        line = json.dumps(dataclasses.asdict(Line(step, task_id, ids, time.time()))) + "\n"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # one write: lines of several processes do not mix
        finally:
            os.close(file)

    def publishing(body: Any, headers: Any, **_: Any) -> None:
        note("claimed", headers["id"], _ids_of_message(body))

    def published(body: Any, headers: Any, **_: Any) -> None:
        note("published", headers["id"], _ids_of_message(body))

    def started(task_id: str, task: Any, **_: Any) -> None:
        note("started", task_id, _ids_of_run(task))

    def ended(task_id: str, task: Any, state: str | None = None, **_: Any) -> None:
        note(f"ended {state}", task_id, _ids_of_run(task))

    for signal, receiver in (
        (signals.before_task_publish, publishing),
        (signals.after_task_publish, published),
        (signals.task_prerun, started),
        (signals.task_postrun, ended),
    ):
        signal.connect(receiver, weak=False)
        _receivers.append(receiver)


def _ids_of_message(body: Any) -> Sequence[int]:
    """Return the ids that a message of the bridge carries; see `messages.Envelope`."""
    ids: Sequence[int] = body[1].get(KEYWORD, {}).get("ids", ())
    return ids


def _ids_of_run(task: Any) -> Sequence[int]:
    notification = getattr(task, "notification", None)
    return () if notification is None else (notification.id,)


def read(path: Path, position: int = 0) -> tuple[list[Line], int]:
    """Return the whole lines written since `position`, and where they end."""
    if not path.exists():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return [Line(**json.loads(line)) for line in data[:end].splitlines()], position + end
