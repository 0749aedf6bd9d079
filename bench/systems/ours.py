"""pgpubsub_celery: a bridge, and a Celery worker."""

from __future__ import annotations

import dataclasses

from bench.ground import Stage
from bench.processes import MeasurementError
from bench.systems import WORKER, System

CHANNELS = {
    "rows": "ItemRows",
    "keys": "ItemKeys",
    "floor": "ItemKeys",
    "owned": "ItemOwned",
    "drained": "ItemDrained",
    "work": "Work",
    "sent": "Sent",
}


def bridge(variant: str, *options: str) -> list[str]:
    """Return the command of a bridge for one channel."""
    channel = f"bench.applications.ours.{CHANNELS[variant]}"
    return ["pgpubsub_celery.cli", "-A", "bench.applications.ours", "listen", "--channels", channel, *options]


def _unfinished(stage: Stage) -> bool:
    state = stage.last("pgpubsub_notification", "state")
    if state == "failed":
        raise MeasurementError(stage.last("pgpubsub_notification", "error"))
    return state is not None


def variant(name: str, **settings: int) -> System:
    """Return the system for one of the application's channels, with other settings than the defaults where given."""
    return dataclasses.replace(
        SYSTEM,
        consumers=[
            bridge(name, "--recover", "--loglevel=warning"),
            ["celery", "-A", "bench.applications.ours", *WORKER],
        ],
        environment={
            "BENCH_VARIANT": name,
            **{f"PGPUBSUB_{setting.upper()}": str(value) for setting, value in settings.items()},
        },
    )


SYSTEM = System(
    name="pgpubsub_celery",
    application="ours",
    consumers=[],
    unfinished=_unfinished,
    settings={
        "bridge": "`listen --recover`, all settings at their defaults",
        "worker": "prefork, 2 processes",
        "listener": "with `session`, `bundle` automatic, unless said otherwise",
    },
)
