"""django-celery-outbox: a relay, and a Celery worker."""

from __future__ import annotations

from bench.ground import Stage
from bench.systems import WORKER, System

RELAY = ("celery_outbox_relay", "--batch-size", "500")


def _unfinished(stage: Stage) -> bool:
    return stage.last("celery_outbox") is not None or stage.unfinished() > 0


SYSTEM = System(
    name="django-celery-outbox",
    application="celery_outbox",
    consumers=[
        ["django", *RELAY],
        ["celery", "-A", "bench.applications.celery_outbox", *WORKER],
    ],
    unfinished=_unfinished,
    settings={
        "relay": "`--batch-size 500` (default 100), `--idle-time` 1 s (default: it looks once a second when idle)",
        "logs and metrics": "off",
        "worker": "prefork, 2 processes, results ignored",
    },
    environment={
        "DJANGO_SETTINGS_MODULE": "bench.applications.django_settings",
        "BENCH_DJANGO": "outbox",
    },
)
