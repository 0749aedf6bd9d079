"""Removing temporary folders when the demo itself cannot any more, because it was killed.

Owns a tiny process that outlives this one: it is told of folders, waits until this process is gone or closes the pipe,
and removes what is left of them. Never touches anything else.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from pgpubsub_celery.embedded import start_process

# Whatever has written there gets a signal at the same moment, and may write on until it is gone: again and again.
_SCRIPT = """
import os, shutil, sys, time
folders = [line.rstrip("\\n") for line in sys.stdin]
deadline = time.monotonic() + 30
while folders and time.monotonic() < deadline:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    folders = [folder for folder in folders if os.path.lexists(folder)]
    if folders:
        time.sleep(0.1)
"""


class Leftovers:
    """A context whose folders are gone after it, even when it never ends because this process is killed."""

    def __enter__(self) -> Leftovers:
        # No death signal: it is the one that stays. No site: it is there in a few milliseconds.
        self._process = start_process(
            [sys.executable, "-I", "-S", "-c", _SCRIPT],
            death_signal=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return self

    def note(self, folder: Path) -> None:
        """Have a folder removed at the end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n".encode())
        self._process.stdin.flush()

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
