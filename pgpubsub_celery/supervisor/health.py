"""What probes from outside are told of the processes: whether they live, and whether they do what they are for.

Owns the pages `/livez` and `/readyz`, the file whose age says the same, and how both follow from what each process
tells of itself (`Control.beat`). Decides nothing and ends nothing: whoever probes does.

*Alive* means that the loop of each process has turned when it said it would. A process that waits for a server which is
down turns, so it is alive: starting it anew would not help. One that hangs is not. *Ready* means that each process says
so. While a process is being replaced there is nobody to be ready, and nothing to be gained from killing the rest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.supervisor.serving import Page, Server

logger = logging.getLogger("pgpubsub_celery.supervisor")

FILE_SECONDS = 5.0
"""How often the file is renewed."""

STARTING_SECONDS = 900.0
"""How long a process may take until its first beat: it imports an application."""


@dataclass(frozen=True)
class State:
    """One process, as a probe sees it."""

    process: int
    pid: int | None
    alive: bool
    ready: bool


@dataclass(frozen=True, kw_only=True)
class Watching:
    """Where the processes' health is to be seen; and what else is to be served there."""

    host: str = ""
    """Empty for all addresses."""
    port: int | None = None
    file: str | None = None
    pages: Mapping[str, Callable[[Sequence[State]], Page]] = field(default_factory=dict)
    """Further pages, by path, given the processes. Made in the loop of the process above all others: never wait."""
    told: Callable[[int, bytes], None] | None = None
    """Called with a process's number and what it has told (`Control.tell`). Not always from the same thread."""


class Watcher:
    """Serves the pages and renews the file, from whichever loop has it."""

    def __init__(self, watching: Watching | None) -> None:
        """Listen where that was asked for; SettingsError when it cannot be."""
        self._watching = watching or Watching()
        self.active = watching is not None
        """Whether processes are to tell anything of themselves."""
        self.states: Callable[[], Sequence[State]] = tuple
        """Returns the processes as they are. Set by the loop that knows them."""
        self._server: Server | None = None
        self._renew_at = 0.0 if self._watching.file else float("inf")
        if self._watching.file:
            _check_writable(self._watching.file)
        if self._watching.port is not None:
            pages = {"/livez": self._livez, "/readyz": self._readyz}
            pages |= {path: functools.partial(self._further, page) for path, page in self._watching.pages.items()}
            self._server = Server(self._watching.host, self._watching.port, pages)
            logger.info("health on port %d: %s", self._server.port, ", ".join(pages))

    @property
    def sockets(self) -> list[Any]:
        """What a forked child has copies of, and must close."""
        return [] if self._server is None else self._server.sockets

    def readers(self) -> list[Any]:
        """Return what to wait for, to be read."""
        return [] if self._server is None else self._server.readers()

    def writers(self) -> list[Any]:
        """Return what to wait for, to be written."""
        return [] if self._server is None else self._server.writers()

    def due(self) -> float:
        """Return when `act` is to be called though nothing is ready, in monotonic time."""
        served = None if self._server is None else self._server.due()
        return self._renew_at if served is None else min(served, self._renew_at)

    def act(self, ready: Collection[Any]) -> None:
        """Serve who is ready, and renew the file when that is due."""
        if self._server is not None:
            self._server.serve(ready)
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew_at = now + FILE_SECONDS
            self._renew()

    def told(self, process: int, message: bytes) -> None:
        """Hand on what a process has told."""
        if self._watching.told is not None:
            self._watching.told(process, message)

    def close(self) -> None:
        """Serve nothing any more; the file goes."""
        if self._server is not None:
            self._server.close()
        if self._watching.file:
            with contextlib.suppress(OSError):
                os.unlink(self._watching.file)

    def _livez(self) -> Page:
        states = self.states()
        return _page(all(one.alive for one in states), states)

    def _readyz(self) -> Page:
        states = self.states()
        return _page(_ready(states), states)

    def _further(self, page: Callable[[Sequence[State]], Page]) -> Page:
        return page(self.states())

    def _renew(self) -> None:
        states = self.states()
        if not all(one.alive for one in states):
            return
        assert self._watching.file is not None
        told = json.dumps({"ready": _ready(states), "processes": [asdict(one) for one in states]})
        try:
            # Whole, whenever somebody reads it.
            beside = f"{self._watching.file}.{os.getpid()}"
            with open(beside, "w", encoding="utf-8") as file:
                file.write(told + "\n")
            os.replace(beside, self._watching.file)
        except OSError as exc:
            logger.warning("the health file is not renewed: %s", exc)


def _ready(states: Sequence[State]) -> bool:
    return bool(states) and all(one.ready and one.alive for one in states)


def _page(holds: bool, states: Sequence[State]) -> Page:
    body = json.dumps({"ok": holds, "processes": [asdict(one) for one in states]})
    return Page(body + "\n", 200 if holds else 503, "application/json")


def _check_writable(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise SettingsError(
            f"The health file {path!r} cannot be written: name a file in a folder that exists and can be written to, "
            "for example /tmp/pgpubsub-health."
        )
