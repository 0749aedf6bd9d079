"""How much waits in the broker for listeners: the lengths of their queues.

Read-only, with a connection of its own and little patience. Never declares a queue and never takes a message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu import Connection

from pgpubsub_celery.errors import BrokerError
from pgpubsub_celery.listeners import Listener

SECONDS = 3.0
"""How long the broker may take to accept a connection, and for each answer."""


def read_queues(app: Celery, listeners: Sequence[Listener]) -> dict[str, int]:
    """Return how many messages are ready in each queue that those of these listeners go to; BrokerError if it is away.

    What workers have prefetched is not counted.
    """
    names = {_queue(app, listener.name) for listener in listeners if listener.name in app.tasks}
    try:
        with app.connection_for_read(connect_timeout=SECONDS, heartbeat=0) as connection:
            options: dict[str, Any] = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
            patience = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
            if connection.transport.driver_type == "redis":
                connection.transport_options = {**connection.transport_options, **patience}
            connection.ensure_connection(**options, timeout=SECONDS)
            return {name: _length(connection, name) for name in sorted(names)}
    except Exception as exc:  # whatever the transport raises
        raise BrokerError(f"The broker cannot be asked ({type(exc).__name__}).") from exc


def _length(connection: Connection, name: str) -> int:
    # A queue that is not there has nothing in it; with RabbitMQ, asking for it costs the channel.
    with contextlib.suppress(*connection.channel_errors), connection.channel() as channel:
        return int(channel.queue_declare(queue=name, passive=True).message_count)
    return 0


def _queue(app: Celery, task: str) -> str:
    own = {name: getattr(app.tasks[task], name, None) for name in ("queue", "exchange", "routing_key")}
    route = app.amqp.router.route({name: value for name, value in own.items() if value is not None}, task)
    queue = route.get("queue")
    return str(getattr(queue, "name", queue) or app.conf.task_default_queue)
