"""Django's settings for its three peers; `BENCH_VARIANT` says which of them is installed."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from bench.applications.given import DATABASE

_url = urlsplit(DATABASE)
_peer = os.environ.get("BENCH_DJANGO", "")

SECRET_KEY = "of a benchmark"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = {
    "pgpubsub": ["pgtrigger", "pgpubsub", "bench.applications.shop"],
    "outbox": ["django_celery_outbox", "bench.applications.shop"],
    "": ["bench.applications.shop"],
}[_peer]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path.lstrip("/"),
        "HOST": _url.hostname,
        "PORT": _url.port,
        "USER": _url.username,
        "CONN_MAX_AGE": None,
    }
}
CELERY_OUTBOX_APP = "bench.applications.celery_outbox.app"
MONITORING_METRICS_ENABLED = False
LOGGING_CONFIG = None
