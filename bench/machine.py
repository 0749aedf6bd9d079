"""What the figures depend on: the machine, the versions, the servers' settings."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from bench.ground import Ground

PACKAGES = (
    "pgpubsub-celery",
    "celery",
    "kombu",
    "redis",
    "SQLAlchemy",
    "psycopg2-binary",
    "psycopg",
    "asyncpg",
    "Django",
    "django-pgpubsub",
    "procrastinate",
    "pgqueuer",
    "django-celery-outbox",
)

SERVER_SETTINGS = (
    "server_version",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "max_wal_size",
)


def describe(ground: Ground) -> dict[str, Any]:
    """Return it, for the results' file."""
    return {
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        "postgres": {name: ground.scalar("SELECT current_setting(%s)", name) for name in SERVER_SETTINGS},
        "valkey": _valkey(ground),
        "load_before": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _valkey(ground: Ground) -> dict[str, str]:
    import redis

    client: Any = redis.Redis.from_url(ground.valkey.url, decode_responses=True)
    with contextlib.closing(client):
        server = client.info("server")
        return {
            "version": str(server.get("valkey_version") or server["redis_version"]),
            "appendonly": client.config_get("appendonly")["appendonly"],
        }
