"""Publisher confirms on a RabbitMQ of yours: each awaited by itself, as kombu does, and a batch's together.

    python -m bench.confirms amqp://guest:guest@127.0.0.1:5672//

Owns two queues while it runs. Apart from `make bench`, whose broker comes with a wheel; RabbitMQ does not.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from kombu import Queue

from pgpubsub_celery.broker import Broker
from pgpubsub_celery.messages import Envelope, Message
from pgpubsub_celery.publishing import Publisher

BATCH = 500
ROUNDS = 9
TASK = "bench.confirms.task"


def messages() -> list[Message]:
    """Return a batch of messages."""
    installation = uuid.uuid4()
    envelope = functools.partial(Envelope, installation=installation, channel="bench", listener=TASK, subscription=1)
    return [
        Message(task=TASK, task_id=str(uuid.uuid4()), envelope=envelope(dispatches=1, ids=(number,)))
        for number in range(1, BATCH + 1)
    ]


def one_by_one(app: Celery) -> Callable[[], None]:
    """Return what publishes a batch and awaits each confirmation."""
    connection = app.connection_for_write(transport_options={"confirm_publish": True})
    producer = app.amqp.Producer(connection, auto_declare=False)

    def publish() -> None:
        publisher = Publisher()
        for message in messages():
            publisher.publish(message, app, producer)

    return publish


def together(app: Celery) -> Callable[[], None]:
    """Return what publishes a batch as the bridge does."""
    broker = Broker(app, timeout=30)

    def publish() -> None:
        publisher = Publisher()
        outcomes = broker.publish([functools.partial(publisher.publish, message) for message in messages()])
        assert outcomes == [None] * BATCH, outcomes

    return publish


def rates(ways: Sequence[Callable[[], None]]) -> list[float]:
    """Return messages a second of each, in turns, so that whatever else the machine does is everybody's."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 1):
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            taken.append(time.perf_counter() - began)
    # The first connects and declares.
    return [BATCH / statistics.median(taken[1:]) for taken in seconds]


def main(url: str) -> None:
    """Measure, and print a line for each kind of queue."""
    for kind in ("classic", "quorum"):
        name = f"bench-confirms-{kind}"
        app = Celery("confirms", broker=url, set_as_current=False)
        queue = Queue(name, routing_key=name, queue_arguments={"x-queue-type": kind})
        app.conf.update(task_queues=[queue], task_default_queue=name)
        app.task(_task, name=TASK, ignore_result=True)
        app.finalize(auto=True)
        single, pipelined = rates([one_by_one(app), together(app)])
        print(f"{kind}: one by one {single:.0f}/s, together {pipelined:.0f}/s, ratio {pipelined / single:.1f}")
        with app.connection_for_write() as connection:
            connection.default_channel.queue_delete(name)


def _task(**_: Any) -> None: ...


if __name__ == "__main__":
    main(sys.argv[1])
