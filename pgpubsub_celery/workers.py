"""What a worker does when it starts, because settings say so: serve metrics, log as we do.

Owns the receivers of Celery's signals for that. A worker that imports a listener has them; without the settings they do
nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import current_app, signals

from pgpubsub_celery import logs, metrics
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.settings import Settings

logger = logging.getLogger(__name__)


def _on_setup(instance: Any = None, **_: Any) -> None:
    """Logging is configured, and the pool's children are not there yet: they inherit what is set up here."""
    settings = _settings(getattr(instance, "app", None))
    if settings is not None and settings.worker_metrics_port is not None:
        metrics.start(settings.health_host, settings.worker_metrics_port)


def _on_logger(logger: logging.Logger, **_: Any) -> None:
    settings = _settings(None)
    if settings is None or settings.worker_logformat is None:
        return
    try:
        logs.set_format(logger, settings.worker_logformat)
    except PgPubSubError as exc:
        logger.error("worker_logformat is not used: %s", exc)


def _settings(app: Any) -> Settings | None:
    """Return the settings; None where they cannot be used, which whatever needs them says."""
    try:
        return Settings.load((app or current_app).conf)
    except PgPubSubError:
        return None


def prepare() -> None:
    """Have workers of this process do so; repeating is harmless."""
    signals.celeryd_after_setup.connect(_on_setup, weak=False)
    signals.after_setup_logger.connect(_on_logger, weak=False)
    signals.after_setup_task_logger.connect(_on_logger, weak=False)
