"""`-A library.celery_app`."""

import os

from celery import Celery

app = Celery("library", broker=os.environ.get("LIBRARY_BROKER_URL", "memory://"), include=["library.listeners"])
app.conf.update(broker_connection_retry_on_startup=True, task_default_queue="library")
