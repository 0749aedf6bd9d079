"""Signals of our own: what happens to notifications, and to the bridges that publish them.

Owns the names, when each is sent and with which arguments, in Celery's manner: `signal.connect(receiver)`, receivers
take keyword arguments, and what they raise is logged and goes no further. Metrics, traces and health checks are
receivers like any other. Sends nothing itself; whoever does looks at `signal.receivers` first, so that nothing is built
for nobody.

Every signal about notifications has `sender`, the listener's task name (connect with `sender="blog.tasks.read"` to hear
of one listener only), and `channel`, `ids`, `count`. One signal tells of a whole bundle: `ids` has one to several
hundred ids, and is empty where there is no row (channels without `lock_notifications`), so `count` is what to add up.
Receivers run where it happens (in the bridge, a worker, the writer), and hold it up for as long as they take.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = [
    "bridge_connected",
    "bridge_interrupted",
    "bridge_looked",
    "bridge_restored",
    "bridge_stopped",
    "bridge_woken",
    "notification_acknowledged",
    "notification_claimed",
    "notification_discarded",
    "notification_dropped",
    "notification_emitted",
    "notification_failed",
    "notification_published",
    "notification_recovered",
    "notification_released",
    "notification_retried",
    "notification_superseded",
]

# In the writer's process

notification_emitted = Signal(name="notification_emitted", providing_args={"channel", "ids", "count"})
"""`notify`, `notify_many` or `enqueue` has emitted messages of one channel (`sender` is its name; `ids` is empty).

The transaction is still open and may yet be rolled back. Not sent for changes of tables: Postgres emits those.
"""

# In a bridge

notification_claimed = Signal(
    name="notification_claimed",
    providing_args={"channel", "ids", "count", "created_at", "lost", "connection"},
)
"""Rows are under lease, and are about to be published.

`created_at` has the start of each one's transaction; `lost` is how many had been published before, and their lease ran
out; `connection` is the bridge's own, in autocommit, for a receiver that must look something up.
"""

notification_published = Signal(name="notification_published", providing_args={"channel", "ids", "count", "created_at"})
"""The broker has confirmed their messages."""

notification_released = Signal(name="notification_released", providing_args={"channel", "ids", "count", "reason"})
"""Given back, to be published again. `reason` is "unpublished" (the broker did not take it), "refused" (its queue did
not), or, in a worker, "circumstances" (a deadlock, a lost connection, a soft time limit …) or "lost" (its process)."""

notification_superseded = Signal(name="notification_superseded", providing_args={"channel", "ids", "count"})
"""Deleted without having been published, because a newer one of the same `unique_key` waits."""

# In a worker, and in a bridge for channels with acknowledge="published"

notification_acknowledged = Signal(
    name="notification_acknowledged", providing_args={"channel", "ids", "count", "created_at"}
)
"""Finished, committed, and gone from the table."""

notification_retried = Signal(name="notification_retried", providing_args={"channel", "ids", "count", "error"})
"""They wait for their next attempt. `error` is what the listener raised, in one line, where it did."""

notification_failed = Signal(name="notification_failed", providing_args={"channel", "ids", "count", "error"})
"""Failed for good: they stay in the table, with `error`, until somebody retries or discards them."""

notification_dropped = Signal(name="notification_dropped", providing_args={"channel", "ids", "count"})
"""Duplicates: a message told of them, but they are finished, taken by another, or published again since."""

# In whatever process somebody mends in; in a bridge for those past `failed_retention`

notification_discarded = Signal(name="notification_discarded", providing_args={"channel", "ids", "count"})
"""Deleted without having been finished. `sender` is None; `channel` is None for those past their retention."""

notification_recovered = Signal(name="notification_recovered", providing_args={"channel", "ids", "count"})
"""Failed or held ones, or some that waited for later, were made due. `sender` is None, as is `channel` for those of
`listen --recover`."""

# Of bridges. `sender` is the number of the process among those of its `listen`

bridge_connected = Signal(name="bridge_connected", providing_args={"again"})
"""It listens, and claims from now on; `again` after it had lost the database."""

bridge_interrupted = Signal(name="bridge_interrupted", providing_args={"what", "error", "seconds"})
"""`what`, "database" or "broker", is unavailable: it tries again after `seconds`, and until it is back."""

bridge_restored = Signal(name="bridge_restored", providing_args={"what", "seconds"})
"""`what` is available again, after `seconds`."""

bridge_woken = Signal(name="bridge_woken", providing_args={"reason", "count"})
""""doorbell": it was rung, `count` times; "sweep": it looks without having been rung."""

bridge_looked = Signal(name="bridge_looked", providing_args={"claimed", "in_flight"})
"""One look at the table is done; `in_flight` has, by subscription, what was published and not finished before it.

At least one comes in every `poll_interval`, while the database can be reached.
"""

bridge_stopped = Signal(name="bridge_stopped", providing_args=set())
"""It has finished its last batch, after it was asked to stop."""
