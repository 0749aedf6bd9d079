"""Django's `on_commit` with Celery's `delay()`, and a worker."""

from __future__ import annotations

from bench.systems import WORKER, System, celery_unfinished

SYSTEM = System(
    name="on_commit + delay()",
    application="on_commit",
    consumers=[["celery", "-A", "bench.applications.on_commit", *WORKER]],
    unfinished=celery_unfinished,
    settings={"worker": "prefork, 2 processes, results ignored", "Django": "persistent connections"},
    environment={"DJANGO_SETTINGS_MODULE": "bench.applications.django_settings"},
)
