"""What Postgres and Valkey have in common as servers of ours: directory, port, log, start and stop.

Owns the port (chosen anew when somebody else is quicker to take it, then the same for the server's life), the
readiness check with its deadline, and the removal of temporary files. Never knows what the server is.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pgpubsub_celery.embedded.process import start_process
from pgpubsub_celery.errors import EmbeddedServerError

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

HOST = "127.0.0.1"
INSTALL = "pip install 'pgpubsub-celery[embedded]'"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02
PORT_ATTEMPTS = 10
# Below the range that Linux takes the ports of outgoing connections from: the port of a server that is down for a
# moment must not become somebody's, or the server could not come back at the same address.
PORTS = range(20_000, 32_000)
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
# Nothing of the caller's: PGDATA, LANG, LD_PRELOAD and the like change what servers do. In English: a message is read.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


class NotReady(Exception):
    """The server does not answer yet, or something else answers at its port."""


class PortTaken(Exception):
    """Somebody was quicker to bind the port."""


class EmbeddedServer(abc.ABC):
    """A server process on 127.0.0.1. A context manager: starts it, and closes it at the end."""

    name: str
    _stop_signal: int
    _immediate_signal: int
    _account: pwd.struct_passwd | None = None
    """The account to run as, where it is not the caller's."""

    def __init__(self, directory: str | Path | None) -> None:
        """Put the server's files in `directory`, and keep them; None takes a temporary one, which goes with `close`."""
        self._temporary = directory is None
        self._given = None if directory is None else Path(directory).absolute()
        self._directory: Path | None = None
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def directory(self) -> Path:
        """Where data and log are. Made when first asked for."""
        if self._directory is None:
            self._directory = self._make_directory()
        return self._directory

    @property
    def log_path(self) -> Path:
        """The file that has everything the server printed, over all its starts."""
        return self.directory / "server.log"

    @property
    def port(self) -> int:
        """The port, the same for all starts. Raises EmbeddedServerError before the first."""
        if self._port is None:
            raise EmbeddedServerError(f"{self.name} has no port yet: call start() first.")
        return self._port

    @property
    def pid(self) -> int:
        """The id of the server's (main) process. Raises EmbeddedServerError when it does not run."""
        if self._process is None or self._process.poll() is not None:
            raise EmbeddedServerError(f"{self.name} is not running: call start() first.")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists; a paused one does."""
        return self._process is not None and self._process.poll() is None

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """The address, as SQLAlchemy or Celery takes it."""

    def start(self) -> Self:
        """Start the server if it does not run, and return when it answers.

        Raises:
            EmbeddedServerError: its binaries are missing, or it did not start; shows the end of its log.
        """
        if self.running:
            return self
        atexit.register(self.close)
        try:
            self._prepare()
            if self._port is None:
                self._port = self._start_somewhere()
            else:
                self._start_at(self._port)
        except BaseException:
            if self._port is None:  # it never ran: leave nothing behind
                self.close()
            raise
        return self

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server if it runs, and keep its data; `start` goes on with them.

        `immediate` lets it finish nothing. A server that does not stop within half a minute is killed.
        """
        if self._process is None:
            return
        self._process.send_signal(self._immediate_signal if immediate else self._stop_signal)
        self._process.send_signal(signal.SIGCONT)  # paused, it would not notice
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL the server if it runs; it does not any more on return."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)

    def restart(self, *, immediate: bool = False) -> None:
        """Stop if it runs, and start again at the same port with the same data."""
        self.stop(immediate=immediate)
        self.start()

    def pause(self) -> None:
        """SIGSTOP the server: connections stay open, nothing answers. On return it does nothing any more."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a paused server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop the server and remove its temporary directory."""
        atexit.unregister(self.close)
        # Data that nobody will read again need no orderly end.
        self.stop(immediate=self._temporary)
        if self._temporary and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
            self._port = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Make the files that the server needs to start."""

    @abc.abstractmethod
    def _command(self, port: int) -> list[str | Path]:
        """Return what to run."""

    @abc.abstractmethod
    def _check(self, port: int) -> None:
        """Connect and make sure that it is this server that answers; NotReady otherwise."""

    def _make_directory(self) -> Path:
        if self._given is not None:
            new = not self._given.exists()
            self._given.mkdir(parents=True, exist_ok=True)
            directory = self._given
            if self._account is not None and not reachable(directory, self._account):
                raise EmbeddedServerError(
                    f"'{directory}' cannot be reached by the user {self._account.pw_name!r}, which {self.name} runs as "
                    "because you are root: choose a directory under /var/lib or /tmp, or run this as a normal user."
                )
        else:
            new = True
            places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108 - mkdtemp makes the folder
            parent = next((place for place in places if reachable(Path(place), self._account)), None)
            directory = Path(tempfile.mkdtemp(prefix=f"pgpubsub-{self.name.lower()}-", dir=parent))
        if new and self._account is not None:
            os.chown(directory, self._account.pw_uid, self._account.pw_gid)
        return directory

    def _as_account(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}

    def _start_somewhere(self) -> int:
        port = 0
        for _ in range(PORT_ATTEMPTS):
            port = free_port()
            with contextlib.suppress(PortTaken):
                self._start_at(port)
                return port
        raise self._did_not_start(port, "somebody else was quicker to take the port, again and again")

    def _start_at(self, port: int) -> None:
        log_begins = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = start_process(
                self._command(port),
                death_signal=self._immediate_signal,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=ENVIRONMENT,
                **self._as_account(),
            )
        deadline = time.monotonic() + START_SECONDS
        reason = "it does not answer"
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(POLL_SECONDS)
                if self._port is None and b"Address already in use" in self.log_path.read_bytes()[log_begins:]:
                    raise PortTaken
                raise self._did_not_start(port, f"it ended with code {code}")
            try:
                return self._check(port)
            except NotReady as error:
                reason = str(error)
        self.kill()
        raise self._did_not_start(port, f"not ready within {START_SECONDS:g} s: {reason}")

    def _did_not_start(self, port: int, reason: str) -> EmbeddedServerError:
        return EmbeddedServerError(
            f"{self.name} did not start at {HOST}:{port}: {reason}. Its log ends:\n{self.log_tail()}"
        )


def free_port() -> int:
    """Return a port that is free at this moment; who wants it must be ready to find it taken."""
    for port in random.sample(PORTS, 100):
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise EmbeddedServerError(f"No free port was found in {PORTS.start} to {PORTS.stop} on {HOST}.")


def package_folder(name: str) -> Path | None:
    """Return where an installed package is, without importing it."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def reachable(path: Path, account: pwd.struct_passwd | None) -> bool:
    """Return whether `account` (None: the caller) can enter every folder on the way to `path`."""
    if account is None:
        return True
    for folder in (path, *path.parents):
        stat = folder.stat()
        bit = 0o100 if stat.st_uid == account.pw_uid else 0o010 if stat.st_gid == account.pw_gid else 0o001
        if not stat.st_mode & bit:
            return False
    return True
