"""Signals as something to wait for: one file descriptor that becomes readable when a signal arrives.

Owns the installation of handlers and their restoration. Decides nothing: who reads the descriptor does.
Handlers that act would run in the middle of arbitrary code, and not at all while the main thread is inside a C call;
a descriptor can be waited for together with pipes and deadlines, from another thread too.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SUPERVISOR_SIGNALS = (*STOP_SIGNALS, signal.SIGCHLD)

_PR_SET_PDEATHSIG = 1


class Signals:
    """A context in which the given signals do nothing but make `fileno()` readable. Main thread only."""

    def __init__(self, *signums: signal.Signals) -> None:
        self._signums = signums
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # The descriptor first: a signal between the two calls must not go unnoticed.
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in self._signums:
            self._previous[signum] = signal.signal(signum, _noted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            # None: the handler was not installed from Python, and cannot be put back from Python.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable while `take()` has something to return."""
        return self._reader.fileno()

    def take(self) -> list[int]:
        """Return the numbers of the signals that arrived since the last call, in order; never waits."""
        try:
            return list(self._reader.recv(4096))
        except BlockingIOError:
            return []


def _noted(signum: int, frame: FrameType | None) -> None:
    """Do nothing: the interpreter has written the number to the descriptor already."""


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold SIGTERM and SIGINT back while a child starts, so that it gets none before it can deal with one.

    The child inherits the mask, also through exec, and lifts it with `let_through()`.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def let_through() -> None:
    """Lift what `held_back()` put on the process that started this one."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ask_for_sigterm_when_parent_dies() -> None:
    """Have the kernel send SIGTERM when the parent dies, on Linux; elsewhere the end of the line has to do."""
    if sys.platform != "linux":
        return
    # A sandbox may forbid it: then the end of the line has to do here too.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
