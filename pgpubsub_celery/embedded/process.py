"""Child processes that die with their parent, whatever kills it.

Owns how they are started, nothing of what they are: servers, and in the demo and the tests bridges and workers too.
Never waits for them. It exists because a SIGKILLed parent runs no clean-up of its own.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Spawner(threading.Thread):
    """The thread that starts all child processes.

    Linux sends the parent-death signal when the *thread* that forked ends. This one ends with the process only, so a
    server may be started or restarted from any thread, however short-lived.
    """

    def __init__(self) -> None:
        super().__init__(name="pgpubsub-spawner", daemon=True)
        self.pid = os.getpid()
        self._requests: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            future, function = self._requests.get()
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the caller
                future.set_exception(error)
            del future, function  # a popen kept here would be kept until the next request

    def call(self, function: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self._requests.put((future, function))
        return future.result()


_spawner: _Spawner | None = None
_spawner_lock = threading.Lock()


def start_process(
    command: Sequence[str | Path], *, death_signal: int = signal.SIGTERM, **options: Any
) -> subprocess.Popen[bytes]:
    """Start `command` so that Linux sends it `death_signal` when this process dies, even by SIGKILL.

    It gets a session of its own, so that Ctrl-C in a terminal reaches this process only. `options` are those of
    `subprocess.Popen`. Raises what Popen raises.
    """
    global _spawner
    parent = os.getpid()

    def die_with_parent() -> None:
        # In the child, after the change of user, which would have cleared it.
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal))
            if os.getppid() != parent:  # died before it could be asked for
                os._exit(1)

    def start() -> subprocess.Popen[bytes]:
        # The function does two system calls and takes no lock: nothing that another thread could hold.
        return subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent, **options)  # noqa: PLW1509

    with _spawner_lock:
        if _spawner is None or _spawner.pid != parent:  # a fork does not take threads along
            _spawner = _Spawner()
            _spawner.start()
    started: subprocess.Popen[bytes] = _spawner.call(start)
    return started
