"""Deaths in the middle of a step, ordered from outside: whoever passes the step next, kills itself there.

Owns the folder in which the harness leaves its orders, a file for each, and the file in which deaths are recorded
before they happen. Kept apart from the application, which only says where the steps are.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

FOLDER = "CHAOS_FOLDER"
CHANCE = "CHAOS_CHANCE"
"""How likely it is that a process that finds an order carries it out: 1 would always kill the first that passes."""

STEPS = {
    "bridge": (
        "statement-before",
        "statement-after",
        "publish-before",
        "message-before",
        "message-after",
        "publish-after",
    ),
    "worker": ("received",),
    "child": (
        "statement-before",
        "statement-after",
        "prerun",
        "listener-before",
        "listener-after",
        "commit-before",
        "commit-after",
        "success",
        "postrun",
    ),
}

_role = os.environ.get("CHAOS_ROLE", "")
# Children inherit the state of their parent's generator.
_chance = random.SystemRandom()


def become(role: str) -> None:
    """Say what this process is: bridge, worker (the pool's parent) or child."""
    global _role
    _role = role


def step(name: str) -> None:
    """Die here, if that was ordered."""
    folder = os.environ.get(FOLDER)
    if not folder or not _role:
        return
    order = f"{folder}/orders/{_role}.{name}"
    if not os.path.exists(order) or _chance.random() > float(os.environ.get(CHANCE, "1")):
        return
    try:
        os.unlink(order)  # one order, one death
    except FileNotFoundError:
        return
    line = json.dumps({"at": time.time(), "pid": os.getpid(), "parent": os.getppid(), "step": f"{_role} {name}"})
    descriptor = os.open(f"{folder}/deaths", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, f"{line}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def order(folder: Path, role: str, name: str) -> Path:
    """Have the next process that passes the step die there; the file is gone once it has."""
    path = folder / "orders" / f"{role}.{name}"
    path.touch()
    return path
