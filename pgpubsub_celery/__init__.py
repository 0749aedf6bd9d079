"""Committed changes in Postgres become Celery tasks, exactly when the transaction commits.

Reading order: `channels` and `listeners` (what users declare), `emit` and `triggers` (how a notification gets stored),
`bridge` (wake, claim, build, publish, settle), `tasks`, `delivery` and `locked` (take, decode, run, acknowledge),
`store` (every statement), `wakeups` (the doorbell), `supervisor` and `cli` (what people run).
"""

import importlib
from typing import TYPE_CHECKING, Any

from pgpubsub_celery._version import __version__

if TYPE_CHECKING:
    from pgpubsub_celery.channels import Channel, TriggerChannel
    from pgpubsub_celery.emit import (
        aenqueue,
        anotify,
        anotify_many,
        aset_notification_context,
        enqueue,
        notify,
        notify_many,
        set_notification_context,
        suppress_notifications,
    )
    from pgpubsub_celery.errors import PgPubSubError
    from pgpubsub_celery.migrations import install, install_on_create_all, uninstall
    from pgpubsub_celery.models import Notification, metadata
    from pgpubsub_celery.runs import NotificationInfo
    from pgpubsub_celery.tasks import (
        channel_task,
        listener,
        post_delete_listener,
        post_insert_listener,
        post_save_listener,
        post_update_listener,
        pre_delete_listener,
        pre_insert_listener,
        pre_save_listener,
        pre_update_listener,
    )
    from pgpubsub_celery.upkeep import process_stored_notifications

__all__ = [
    "Channel",
    "Notification",
    "NotificationInfo",
    "PgPubSubError",
    "TriggerChannel",
    "__version__",
    "aenqueue",
    "anotify",
    "anotify_many",
    "aset_notification_context",
    "channel_task",
    "enqueue",
    "install",
    "install_on_create_all",
    "listener",
    "metadata",
    "notify",
    "notify_many",
    "post_delete_listener",
    "post_insert_listener",
    "post_save_listener",
    "post_update_listener",
    "pre_delete_listener",
    "pre_insert_listener",
    "pre_save_listener",
    "pre_update_listener",
    "process_stored_notifications",
    "set_notification_context",
    "suppress_notifications",
    "uninstall",
]

# Imported when first asked for: a writer that only calls notify() needs no Celery worker, a server of the tests no ORM.
_HOMES = {
    "channels": ("Channel", "TriggerChannel"),
    "emit": (
        "aenqueue",
        "anotify",
        "anotify_many",
        "aset_notification_context",
        "enqueue",
        "notify",
        "notify_many",
        "set_notification_context",
        "suppress_notifications",
    ),
    "errors": ("PgPubSubError",),
    "migrations": ("install", "install_on_create_all", "uninstall"),
    "models": ("Notification", "metadata"),
    "runs": ("NotificationInfo",),
    "tasks": (
        "channel_task",
        "listener",
        "post_delete_listener",
        "post_insert_listener",
        "post_save_listener",
        "post_update_listener",
        "pre_delete_listener",
        "pre_insert_listener",
        "pre_save_listener",
        "pre_update_listener",
    ),
    "upkeep": ("process_stored_notifications",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
