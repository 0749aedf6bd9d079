"""One message to the broker, as Celery sends any task, at a fraction of the price where many are alike.

Owns how a message becomes a published task: with each connection to the broker, the first of each task goes through
Celery's own `send_task`, and what that hands to the producer is the template of the others, which differ in ids and
arguments only. Whatever wants to see or change each message (a signal's receiver, a router function, task-sent events)
sees each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from celery import Celery, signals
from celery.app.routes import MapRoute
from kombu import Producer

from pgpubsub_celery.messages import Message


@dataclasses.dataclass
class _Template:
    """What one message's publication was like."""

    body: tuple[Any, Any, Any]
    headers: Mapping[str, Any]
    options: dict[str, Any]

    @property
    def is_timed(self) -> bool:
        """Whether it says a time that was counted from its own publication."""
        return self.headers.get("expires") is not None or self.headers.get("eta") is not None


class _Recorder:
    """Stands for a producer, and keeps what it is to publish."""

    def __init__(self, producer: Producer) -> None:
        self.connection = producer.connection
        self.published: list[tuple[Any, dict[str, Any]]] = []

    def publish(self, body: Any, **options: Any) -> None:
        self.published.append((body, options))


class Publisher:
    """Publishes messages, and remembers for as long as their producer lives what each task's are like."""

    def __init__(self) -> None:
        self._templates: dict[str, _Template] = {}
        self._seen: dict[str, bool] = {}
        """For the tasks of this batch, whether somebody sees or changes each message."""
        self._producer: Producer | None = None

    def begin(self) -> None:
        """Begin a batch: what is so only for a moment, such as a time of expiry, is asked for again."""
        self._templates = {task: template for task, template in self._templates.items() if not template.is_timed}
        self._seen.clear()

    def publish(self, message: Message, app: Celery, producer: Producer) -> None:
        """Publish with `producer`; raises what the broker or Celery raises."""
        if producer is not self._producer:
            # Another connection, perhaps to a broker that has lost its queues: what was declared is declared again.
            self._templates, self._producer = {}, producer
        seen = self._seen.get(message.task)
        if seen is None:
            seen = self._seen[message.task] = _each_is_seen(message, app)
        if seen:
            _send(message, app, producer)
            return
        template = self._templates.get(message.task)
        if template is None:
            template = self._templates[message.task] = _template(message, app, producer)
        id, told = message.task_id, _told(message)
        headers = {**template.headers, **told, "id": id, "root_id": id, "shadow": _shadow(message)}
        # Celery has them among the properties, too.
        own = {name: value for name, value in told.items() if name in template.options}
        args, _, embedded = template.body
        producer.publish(
            (args, message.envelope.to_kwargs(), embedded),
            **{**template.options, **own, "headers": headers, "correlation_id": id},
        )
        # Its queue is declared by now; looking that up for each is half of what a message costs.
        template.options["declare"] = None


def _template(message: Message, app: Celery, producer: Producer) -> _Template:
    """Return what this message's publication is like."""
    recorder = _Recorder(producer)
    _send(message, app, recorder)
    ((body, options),) = recorder.published
    headers = options.pop("headers")
    return _Template(body, headers, options)


def _each_is_seen(message: Message, app: Celery) -> bool:
    return bool(
        signals.before_task_publish.receivers
        or signals.after_task_publish.receivers
        or signals.task_sent.receivers
        or app.conf.task_send_sent_event
        or app.conf.task_protocol != 2
        or not app.tasks[message.task].ignore_result
        or not all(isinstance(route, MapRoute) for route in app.amqp.routes)
        or type(app).send_task is not Celery.send_task
    )


def _send(message: Message, app: Celery, producer: Any) -> None:
    task = app.tasks[message.task]
    options = {name: value for name, value in task._get_exec_options().items() if value is not None}  # noqa: SLF001
    # As the task's apply_async does, but for task_always_eager, which is for tests of the writer's process.
    app.send_task(
        task.name,
        (),
        message.envelope.to_kwargs(),
        task_id=message.task_id,
        producer=producer,
        task_type=task,
        retry=False,
        shadow=_shadow(message),
        add_to_parent=False,
        **_told(message),
        **{"ignore_result": task.ignore_result, **options},
    )


def _shadow(message: Message) -> str | None:
    count = len(message.envelope.ids or message.envelope.carried)
    return None if count == 1 else f"{message.task} ×{count}"


def _told(message: Message) -> dict[str, str]:
    """What monitors show of the arguments."""
    envelope = message.envelope
    count = len(envelope.ids or envelope.carried)
    what = "notification" if count == 1 else f"{count} notifications"
    ids = f"{', '.join(map(str, envelope.ids[:3]))}{', …' if count > 3 else ''}"
    return {"argsrepr": "()", "kwargsrepr": f"<{what} {ids} of {envelope.channel}>"}
