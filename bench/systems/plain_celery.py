"""Plain Celery: tasks sent by `delay()` or `apply_async` after the commit, and a worker."""

from __future__ import annotations

from bench.systems import WORKER, System, celery_unfinished

SYSTEM = System(
    name="Celery delay()",
    application="plain_celery",
    consumers=[["celery", "-A", "bench.applications.plain_celery", *WORKER]],
    unfinished=celery_unfinished,
    settings={"worker": "prefork, 2 processes, results ignored, the default prefetch and early acknowledgement"},
    piled_up_paused=True,
)
