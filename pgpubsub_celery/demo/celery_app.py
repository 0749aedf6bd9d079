"""The blog's Celery application. Its database is PGPUBSUB_DATABASE_URL, its broker CELERY_BROKER_URL."""

from __future__ import annotations

from celery import Celery

from pgpubsub_celery.demo import account

app = Celery("blog", broker="redis://127.0.0.1:6379/0")
app.conf.broker_connection_retry_on_startup = True
# How bridge and workers find pgpubsub_celery/demo/listeners.py.
app.autodiscover_tasks(["pgpubsub_celery.demo"], related_name="listeners")

account.keep(app)
