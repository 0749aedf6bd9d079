"""What the harness gives to an application and to a worker, by environment, and how tasks say when they began."""

from __future__ import annotations

import os
import time
from pathlib import Path

DATABASE = os.environ.get("BENCH_DATABASE", "postgresql://localhost/bench")
BROKER = os.environ.get("BENCH_BROKER", "memory://")
KIND = os.environ.get("BENCH_KIND", "nothing")
"""What a task does: "nothing", "insert" (a row), or "start" (says when it began)."""
VARIANT = os.environ.get("BENCH_VARIANT", "")

COLUMNS = "(name, email, amount, note, a, b)"
ROW = "('name', 'somebody@example.com', 12.5, 'a note of ordinary length', %s, 0)"

BULK = f"""
INSERT INTO item {COLUMNS}
SELECT 'name ' || g, 'somebody' || g || '@example.com', g, 'a note of ordinary length', g, 0
FROM generate_series(1, %s) g
"""
"""One statement, many rows."""

INSERT = f"INSERT INTO item {COLUMNS} VALUES {ROW}"
"""One row; its `a` is the number."""

_notes: tuple[int, int] | None = None


def note(number: int) -> None:
    """Write down that the task of this number has begun, now."""
    global _notes
    now = time.time()
    if _notes is None or _notes[0] != os.getpid():
        folder = Path(os.environ["BENCH_NOTES"])
        file = os.open(folder / f"{os.getpid()}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        _notes = (os.getpid(), file)
    os.write(_notes[1], f"{number} {now!r}\n".encode())


def noted(number: int) -> bool:
    """Note a task whose beginning is asked for: all of the kind "start", and negative ones, which try the way."""
    if number < 0 or KIND == "start":
        note(number)
        return True
    return False
