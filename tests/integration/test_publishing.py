"""Messages that are alike are published alike: what the template saves is time, not a header."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Task, signals

from pgpubsub_celery.messages import Envelope, Message
from pgpubsub_celery.publishing import Publisher

INSTALLATION = uuid.UUID(int=7)


@pytest.fixture
def app() -> Iterator[Celery]:
    """An application with two tasks, one with options of its own."""
    app = Celery("publishing", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = "publishing"
    app.conf.task_routes = {"publishing.routed": {"queue": "publishing-routed", "priority": 5}}

    @app.task(name="publishing.plain", ignore_result=True, shared=False)
    def plain() -> None: ...

    @app.task(name="publishing.routed", ignore_result=True, time_limit=30, expires=600, shared=False)
    def routed() -> None: ...

    yield app
    app.close()


def messages(task: str) -> list[Message]:
    """A single one, a bundle, and a single one again."""
    return [
        Message(
            task=task,
            task_id=str(uuid.UUID(int=number)),
            envelope=Envelope(
                installation=INSTALLATION, channel="c", listener=task, subscription=1, dispatches=1, ids=ids
            ),
        )
        for number, ids in enumerate([(1,), (2, 3, 4, 5), (6,)])
    ]


def published(app: Celery, task: str, publisher: Publisher) -> list[Any]:
    """Publish; return what a worker would receive: headers, properties, body."""
    queue = "publishing-routed" if task == "publishing.routed" else "publishing"
    with app.connection_for_write() as connection, app.amqp.Producer(connection, auto_declare=False) as producer:
        for message in messages(task):
            publisher.publish(message, app, producer)
        simple = connection.SimpleQueue(queue)
        received = [simple.get(block=False) for _ in range(3)]
        for one in received:
            one.ack()
        simple.close()
    return [
        (
            {name: value for name, value in one.headers.items() if name != "expires"},
            (one.headers["expires"] is None, one.properties.pop("delivery_tag") and None),
            one.properties,
            one.content_type,
            one.payload,
        )
        for one in received
    ]


@pytest.mark.parametrize("task", ["publishing.plain", "publishing.routed"])
def test_what_a_template_publishes_is_what_celery_would(app: Celery, task: str) -> None:
    """Header for header and property for property, with the ids of each message."""
    seen: list[str] = []

    def watch(sender: str, headers: dict[str, Any], **_: Any) -> None:
        seen.append(headers["id"])

    quick = published(app, task, Publisher())
    assert seen == []
    signals.before_task_publish.connect(watch)
    try:
        each = published(app, task, Publisher())
    finally:
        signals.before_task_publish.disconnect(watch)
    assert seen == [message.task_id for message in messages(task)], "a receiver sees each message"
    assert quick == each
    assert [headers["id"] for headers, *_ in quick] == seen
    assert [headers["shadow"] for headers, *_ in quick] == [None, f"{task} ×4", None]


def test_a_result_a_router_function_or_another_send_task_gets_each_message_from_celery(app: Celery) -> None:
    """What could treat one message otherwise than the other is asked for each."""
    called: list[str] = []

    def router(name: str, args: Any, kwargs: Any, options: Any, task: Task | None = None, **_: Any) -> None:
        called.append(name)

    app.conf.task_routes = [router]
    app.amqp.flush_routes()
    del app.amqp.router
    app.amqp.__dict__.pop("router", None)
    published(app, "publishing.plain", Publisher())
    assert called == ["publishing.plain"] * 3


def test_what_a_message_is_like_is_asked_once_for_each_connection(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one cost no more than others; with another producer, queues are declared again."""
    asked: list[str] = []
    send_task = Celery.send_task

    def counting(self: Celery, name: str, *args: Any, **options: Any) -> Any:
        asked.append(name)
        return send_task(self, name, *args, **options)

    monkeypatch.setattr(Celery, "send_task", counting)
    # Applications of other tests have receivers.
    for signal in (signals.before_task_publish, signals.after_task_publish):
        monkeypatch.setattr(signal, "receivers", [])
    publisher = Publisher()
    for _ in range(2):
        with app.connection_for_write() as connection, app.amqp.Producer(connection, auto_declare=False) as producer:
            for message in messages("publishing.plain"):
                publisher.begin()
                publisher.publish(message, app, producer)
    assert asked == ["publishing.plain"] * 2


def test_a_time_of_expiry_is_each_batchs_own(app: Celery) -> None:
    """It is counted from the publication: one remembered would let a message expire at once, some time later."""
    publisher = Publisher()
    produced: list[str] = []
    with app.connection_for_write() as connection, app.amqp.Producer(connection, auto_declare=False) as producer:
        publish = producer.publish

        def noting(body: Any, **options: Any) -> Any:
            produced.append(options["headers"]["expires"])
            return publish(body, **options)

        producer.publish = noting
        for message in messages("publishing.routed"):
            publisher.begin()
            publisher.publish(message, app, producer)
    assert len(set(produced)) == len(produced) == 3
