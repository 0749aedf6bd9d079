"""django-pgpubsub: one `listen` process, which runs the listeners itself."""

from __future__ import annotations

from bench.ground import Stage
from bench.systems import System


def _unfinished(stage: Stage) -> bool:
    return stage.last("pgpubsub_notification") is not None


SYSTEM = System(
    name="django-pgpubsub",
    application="django_pgpubsub",
    consumers=[["django", "listen", "--worker", "--loglevel", "warning"]],
    unfinished=_unfinished,
    stranded="DELETE FROM pgpubsub_notification",
    settings={
        "listener": "one process, `lock_notifications = True`, `--loglevel warning` (each notification logs at info)",
        "driver": "psycopg 3 (`PGPUBSUB_USE_PSYCOPG_V3=True`), persistent connections",
    },
    environment={
        "DJANGO_SETTINGS_MODULE": "bench.applications.django_settings",
        "BENCH_DJANGO": "pgpubsub",
        "PGPUBSUB_USE_PSYCOPG_V3": "True",
    },
)
