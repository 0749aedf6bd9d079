"""Publishing to a real RabbitMQ: what counts as published is in the queue, and what is refused is refused alone."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import Blocked, MessageNacked, NotFound, PreconditionFailed
from celery import Celery
from kombu import Connection, Exchange, Producer, Queue

from pgpubsub_celery.broker import Broker, Publication
from tests.fixtures.processes import eventually
from tests.rabbitmq.server import RabbitMQ

TIMEOUT = 2.0
KINDS = ["classic", "quorum"]


def _publish(number: int, queue: str | None, app: Celery, producer: Producer) -> None:
    app.send_task("some.task", (number,), producer=producer, retry=False, queue=queue)


def message(number: int, queue: str | None = None) -> Publication:
    return functools.partial(_publish, number, queue)


class Publisher:
    """A bridge's side of a node, with the queues that an application has declared."""

    def __init__(self, node: RabbitMQ, *queues: Queue) -> None:
        self.node = node
        self.app = Celery("publisher", broker=node.url, set_as_current=False)
        self.app.conf.update(task_queues=queues, task_default_queue=queues[0].name)
        self.broker = Broker(self.app, timeout=TIMEOUT)

    def publish(self, *publications: Publication | int) -> list[BaseException | None]:
        """Publish; numbers are messages with that number, for the first queue."""
        outcomes = self.broker.publish([message(p) if isinstance(p, int) else p for p in publications])
        assert len(outcomes) == len(publications)
        return outcomes

    def received(self, queue: str) -> list[int]:
        """Take all messages out of a queue; return their numbers."""
        numbers = []
        with Connection(self.node.url) as connection:
            channel = connection.channel()
            while (found := channel.basic_get(queue)) is not None:
                numbers.append(channel.message_to_python(found).decode()[0][0])
                channel.basic_ack(found.delivery_tag)
        return numbers


def declared(name: str, kind: str = "classic", *, exchange: str = "direct", arguments: Any = None) -> Queue:
    queue_arguments = {"x-queue-type": kind, **(arguments or {})}
    return Queue(name, Exchange(name, type=exchange), routing_key=name, queue_arguments=queue_arguments)


@pytest.fixture
def published(rabbitmq: RabbitMQ, queue: str) -> Iterator[Publisher]:
    """On the node that all tests share, with one queue."""
    publisher = Publisher(rabbitmq, declared(queue))
    yield publisher
    publisher.broker.close()


@contextlib.contextmanager
def on_a_channel(node: RabbitMQ) -> Iterator[Any]:
    with Connection(node.url) as connection:
        yield connection.channel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_confirmed_and_can_be_consumed(rabbitmq: RabbitMQ, queue: str, kind: str) -> None:
    """Every message has arrived, in order, in the form that workers read."""
    publisher = Publisher(rabbitmq, declared(queue, kind))
    for _ in range(2):
        assert publisher.publish(*range(300)) == [None] * 300
        assert publisher.received(queue) == list(range(300))
    publisher.broker.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_queue_refuses_its_messages_and_no_others(rabbitmq: RabbitMQ, queue: str, kind: str) -> None:
    """The node says no to each that is too many, among the confirmations of the rest."""
    limits = {"x-max-length": 2, "x-overflow": "reject-publish"}
    publisher = Publisher(rabbitmq, declared(queue), declared(f"{queue}-full", kind, arguments=limits))
    full = functools.partial(message, queue=f"{queue}-full")
    for number in (1, 2, 3):  # a quorum queue takes one more than it should
        publisher.publish(full(number))
    outcomes = publisher.publish(10, full(11), 12, full(13), 14)
    assert [outcome is None for outcome in outcomes] == [True, False, True, False, True]
    assert isinstance(outcomes[1], MessageNacked)
    assert publisher.broker.is_refusal(outcomes[1])
    assert publisher.received(queue) == [10, 12, 14]
    assert set(publisher.received(f"{queue}-full")) <= {1, 2, 3}
    assert publisher.publish(full(15)) == [None]
    publisher.broker.close()


def test_a_queue_with_other_arguments_refuses_its_messages_and_no_others(rabbitmq: RabbitMQ, queue: str) -> None:
    """Somebody has declared it otherwise; none of the others is sent twice."""
    seven, eight = ({"x-max-length": length} for length in (7, 8))
    other = declared(f"{queue}-other", arguments=seven)
    with on_a_channel(rabbitmq) as channel:
        declared(f"{queue}-other", arguments=eight)(channel).declare()
    publisher = Publisher(rabbitmq, declared(queue), other)
    outcomes = publisher.publish(1, message(2, queue=other.name), 3, message(4, queue=other.name), 5)
    assert [outcome is None for outcome in outcomes] == [True, False, True, False, True]
    assert isinstance(outcomes[1], PreconditionFailed)
    assert "inequivalent arg 'x-max-length'" in str(outcomes[1])
    assert publisher.received(queue) == [1, 3, 5]
    publisher.broker.close()


def test_a_deleted_queue_loses_nothing(rabbitmq: RabbitMQ, queue: str, published: Publisher) -> None:
    """The node confirms what no queue takes: that does not count as published, and the next attempt declares it."""
    assert published.publish(1) == [None]
    with on_a_channel(rabbitmq) as channel:
        channel.queue_delete(queue)
    (outcome,) = published.publish(2)
    assert outcome is not None
    assert published.broker.is_refusal(outcome)
    assert "no queue takes messages" in str(outcome)
    assert published.publish(3) == [None]
    assert published.received(queue) == [3]


def test_a_deleted_exchange_takes_no_other_message_with_it(rabbitmq: RabbitMQ, queue: str) -> None:
    """The node closes the channel, and drops what came after, without a word of which message it was."""
    # Celery publishes to the queue itself where its exchange is a direct one.
    publisher = Publisher(rabbitmq, declared(queue), declared(f"{queue}-gone", exchange="topic"))
    gone = functools.partial(message, queue=f"{queue}-gone")
    assert publisher.publish(1, gone(2)) == [None, None]
    with on_a_channel(rabbitmq) as channel:
        channel.exchange_delete(f"{queue}-gone")
    outcomes = publisher.publish(3, gone(4), 5, gone(6), 7)
    assert [outcome is None for outcome in outcomes] == [True, False, True, False, True]
    assert isinstance(outcomes[1], NotFound)
    assert publisher.broker.is_refusal(outcomes[1])
    assert set(publisher.received(queue)) == {1, 3, 5, 7}
    publisher.broker.close()


@pytest.mark.parametrize(
    ("full", "free"),
    [
        ("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1}).", "{absolute, 4000000000}"),
        ("rabbit_disk_monitor:set_disk_free_limit(1000000000000000).", "1000000"),
    ],
    ids=["memory", "disk"],
)
def test_an_alarm_is_an_outage_until_it_is_over(own: RabbitMQ, queue: str, full: str, free: str) -> None:
    """The node reads nothing more; what is published when it is over goes through the same connection."""
    publisher = Publisher(own, declared(queue))
    assert publisher.publish(1) == [None]
    own.evaluate(full)
    # The node blocks a connection when it publishes; it may still take the first.
    eventually(lambda: publisher.publish(2)[0] is not None, "the node takes nothing more")
    (outcome,) = publisher.publish(3)
    assert isinstance(outcome, Blocked)
    assert publisher.broker.is_outage(outcome)
    assert not publisher.broker.is_refusal(outcome)
    assert isinstance(publisher.broker.reachable(), Blocked)
    own.evaluate(f"{full.partition('(')[0]}({free}).")
    eventually(lambda: publisher.broker.reachable() is None, "the alarm is over")
    assert publisher.publish(4, 5) == [None, None]
    received = publisher.received(queue)
    assert received[-2:] == [4, 5]
    assert 3 not in received
    publisher.broker.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(240)
def test_what_counts_as_published_outlives_the_node(own: RabbitMQ, queue: str, kind: str) -> None:
    """Killed in the middle of batches: each confirmed message is in the queue when the node is back."""
    publisher = Publisher(own, declared(queue, kind))
    assert publisher.publish(0) == [None]
    declared_at = time.monotonic()
    confirmed = {0}
    lost = threading.Event()
    begun = threading.Event()

    def publish() -> None:
        first = 1
        while not lost.is_set():
            outcomes = publisher.publish(*range(first, first + 100))
            confirmed.update(number for number, outcome in enumerate(outcomes, start=first) if outcome is None)
            if None not in outcomes or any(outcome is not None for outcome in outcomes):
                assert all(outcome is None or publisher.broker.is_outage(outcome) for outcome in outcomes)
                lost.set()
            first += 100
            # A node writes the name of a new quorum queue to disk twice a second only.
            if first > 1000 and time.monotonic() > declared_at + 2:
                begun.set()

    thread = threading.Thread(target=publish)
    thread.start()
    assert begun.wait(60)
    own.kill()
    thread.join(60)
    assert lost.is_set()
    assert publisher.broker.reachable() is not None
    own.start()
    # A quorum queue elects its leader first.
    eventually(lambda: publisher.publish(1_000_000) == [None], "the queue takes messages")
    assert confirmed <= set(publisher.received(queue))
    publisher.broker.close()


def test_a_node_that_restarts_costs_an_idle_publisher_nothing(own: RabbitMQ, queue: str) -> None:
    """It says goodbye, which is read before the next batch; what was published before is still there."""
    publisher = Publisher(own, declared(queue))
    assert publisher.publish(1) == [None]
    own.restart()
    assert publisher.publish(2, 3) == [None, None]
    assert publisher.received(queue) == [1, 2, 3]
    publisher.broker.close()


def test_a_paused_node_publishes_nothing_that_is_known(own: RabbitMQ, queue: str) -> None:
    """No word in time counts as not published; connecting anew does not hang either."""
    publisher = Publisher(own, declared(queue))
    assert publisher.publish(0) == [None]
    own.pause()
    try:
        for _ in range(2):
            outcomes = publisher.publish(1, 2)
            assert all(outcome is not None and publisher.broker.is_outage(outcome) for outcome in outcomes)
        assert publisher.broker.reachable() is not None
    finally:
        own.resume()
    assert publisher.publish(3) == [None]
    publisher.broker.close()
