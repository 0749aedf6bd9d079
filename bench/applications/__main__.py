"""Serve one application: a JSON request on each line of standard input, a JSON answer on each line of standard output.

A process of its own, so that each system has its own drivers and settings, and starts once for many measurements.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from types import ModuleType
from typing import Any


def paced(application: ModuleType, rate: float, seconds: float, first: int) -> list[tuple[int, float]]:
    """Write `rate` transactions a second; return for each its number and when its COMMIT was sent."""
    sent = []
    begin = time.monotonic()
    for number in range(int(rate * seconds)):
        due = begin + number / rate
        # One that is late is made up for at once: those that wait are waited for as well.
        while (left := due - time.monotonic()) > 0:
            time.sleep(left)
        sent.append((first + number, application.write(first + number)))
    return sent


def hammered(application: ModuleType, seconds: float, plain: bool) -> tuple[int, float]:
    """Write one transaction after the other; return how many, and in how many seconds."""
    write = application.write_plain if plain else application.write
    begin = time.monotonic()
    count = 0
    while time.monotonic() - begin < seconds:
        count += 1
        write(count)
    return count, time.monotonic() - begin


def answer(application: ModuleType, action: str, arguments: list[Any]) -> Any:
    """Do what was asked."""
    if action == "paced":
        return paced(application, *arguments)
    if action == "hammered":
        return hammered(application, *arguments)
    return getattr(application, action)(*arguments)


def main() -> None:
    """Serve until standard input ends."""
    # Whatever a library prints belongs to the log.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    application = importlib.import_module(f"bench.applications.{sys.argv[1]}")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"value": answer(application, request["action"], request["arguments"])}
        except Exception as exc:  # noqa: BLE001 - whatever it is, the measurement has no figure
            traceback.print_exc()
            reply = {"error": f"{type(exc).__name__}: {exc}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
