"""Pipelined publisher confirms, word by word: whatever the broker says or does not say, each message has its outcome.

What a real RabbitMQ says is tests/rabbitmq's to show.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import Blocked, ChannelError, MessageNacked
from celery import Celery
from kombu import Producer

from pgpubsub_celery.broker import Broker, Publication
from pgpubsub_celery.messages import Envelope, Message
from pgpubsub_celery.publishing import Publisher as MessagePublisher
from tests.fixtures.amqp_stub import BLOCK, CLOSE, DROP, NACK, RETURN, SILENCE, AmqpStub
from tests.fixtures.processes import eventually

TIMEOUT = 0.5


def _publish(numbers: tuple[int, ...], queue: str, app: Celery, producer: Producer) -> None:
    for number in numbers:
        app.send_task("some.task", (number,), producer=producer, retry=False, queue=queue)


def message(*numbers: int, queue: str = "celery") -> Publication:
    return functools.partial(_publish, numbers, queue)


class Publisher:
    """A bridge's side of the stub."""

    def __init__(self, stub: AmqpStub) -> None:
        self.app = Celery("confirms", broker=stub.url, set_as_current=False)
        self.broker = Broker(self.app, timeout=TIMEOUT)

    def publish(self, *publications: Publication | int) -> list[Any]:
        """Publish; return "confirmed", "refused", "outage", or the error, for each."""
        outcomes = self.broker.publish([message(p) if isinstance(p, int) else p for p in publications])
        assert len(outcomes) == len(publications)
        return [self._named(outcome) for outcome in outcomes]

    def _named(self, outcome: BaseException | None) -> Any:
        if outcome is None:
            return "confirmed"
        if self.broker.is_refusal(outcome):
            return "refused"
        return "outage" if self.broker.is_outage(outcome) else outcome


@pytest.fixture
def stub() -> Iterator[AmqpStub]:
    """A broker that answers as it is told to."""
    stub = AmqpStub()
    yield stub
    stub.close()


@pytest.fixture
def publisher(stub: AmqpStub) -> Iterator[Publisher]:
    """Connected to the stub at its first message."""
    publisher = Publisher(stub)
    yield publisher
    stub.unblock.set()
    publisher.broker.close()


def test_a_batch_is_published_without_waiting_for_single_confirmations(stub: AmqpStub, publisher: Publisher) -> None:
    """The broker says nothing until it has all of them, and then one word for all."""
    stub.acknowledges_at = 200
    assert publisher.publish(*range(200)) == ["confirmed"] * 200
    assert stub.received == list(range(200))


def test_confirmations_of_one_batch_are_not_taken_for_those_of_the_next(stub: AmqpStub, publisher: Publisher) -> None:
    """Delivery tags go on counting for as long as the channel is open."""
    stub.verdicts = {11: NACK}
    assert publisher.publish(1, 2, 3) == ["confirmed"] * 3
    assert publisher.publish(10, 11, 12) == ["confirmed", "refused", "confirmed"]
    assert publisher.publish(21, 22) == ["confirmed"] * 2
    assert stub.connections == 1


@pytest.mark.parametrize(("verdict", "error"), [(NACK, MessageNacked), (RETURN, ChannelError)])
def test_a_message_that_is_nacked_or_comes_back_is_refused_and_no_other(
    stub: AmqpStub, publisher: Publisher, verdict: str, error: type[Exception]
) -> None:
    """Its queue is full, or there is none; the others' are not."""
    stub.verdicts = {2: verdict, 4: verdict}
    outcomes = publisher.broker.publish([message(number) for number in range(1, 6)])
    assert [outcome is None for outcome in outcomes] == [True, False, True, False, True]
    assert isinstance(outcomes[1], error)
    assert publisher.broker.is_refusal(outcomes[1])
    assert stub.received == [1, 2, 3, 4, 5]


def test_a_queue_that_has_gone_is_declared_anew_by_the_next_attempt(stub: AmqpStub, publisher: Publisher) -> None:
    """Somebody has deleted it: what was declared before, and is remembered of a task's messages, is out of date."""

    @publisher.app.task(name="confirms.task", ignore_result=True, shared=False)
    def listener(**_: Any) -> None:
        raise AssertionError("published only")

    remembering = MessagePublisher()

    def of_listener(number: int) -> Publication:
        envelope = Envelope(installation=uuid.uuid4(), channel="c", listener="l", dispatches=1, ids=(number,))
        message = Message(task="confirms.task", task_id=str(uuid.uuid4()), envelope=envelope)
        return functools.partial(remembering.publish, message)

    assert publisher.publish(of_listener(1), of_listener(2)) == ["confirmed"] * 2
    assert publisher.publish(of_listener(3)) == ["confirmed"]
    assert stub.declared == ["celery"]
    stub.verdicts = {4: RETURN}
    assert publisher.publish(of_listener(4)) == ["refused"]
    assert publisher.publish(of_listener(5)) == ["confirmed"]
    assert stub.declared == ["celery", "celery"]


@pytest.mark.parametrize("guilty", [{3}, {1}, {5}, {2, 4}, {1, 2, 3, 4, 5}], ids=str)
def test_a_message_that_closes_the_channel_is_found_and_refused_alone(
    stub: AmqpStub, publisher: Publisher, guilty: set[int]
) -> None:
    """The broker does not say which it was, and drops all that came after it."""
    stub.verdicts = dict.fromkeys(guilty, CLOSE)
    expected = ["refused" if number in guilty else "confirmed" for number in range(1, 6)]
    assert publisher.publish(*range(1, 6)) == expected
    assert set(stub.received) == {1, 2, 3, 4, 5}
    stub.verdicts = {}
    assert publisher.publish(6, 7) == ["confirmed"] * 2
    assert stub.connections == 1


def test_a_queue_that_was_declared_otherwise_takes_no_other_message_with_it(
    stub: AmqpStub, publisher: Publisher
) -> None:
    """The channel that its declaration closes is not the one that messages are on: none is sent twice."""
    stub.otherwise = {"other"}
    assert publisher.publish(1, message(2, queue="other"), 3, message(4, queue="other"), 5) == [
        "confirmed",
        "refused",
        "confirmed",
        "refused",
        "confirmed",
    ]
    assert stub.received == [1, 3, 5]


def test_what_was_confirmed_before_the_connection_was_lost_is_published(stub: AmqpStub, publisher: Publisher) -> None:
    """Of the rest nothing is known; the next batch has a connection of its own."""
    assert publisher.publish(0) == ["confirmed"]
    stub.verdicts = {3: DROP}
    outcomes = publisher.publish(*range(1, 6))
    assert set(outcomes[2:]) == {"outage"}
    assert set(outcomes[:2]) <= {"confirmed", "outage"}
    assert publisher.publish(6) == ["confirmed"]
    assert stub.connections == 2


def test_what_is_not_confirmed_in_time_does_not_count_as_published(stub: AmqpStub, publisher: Publisher) -> None:
    """One deadline for all: what the broker has spoken of is settled, and the rest is said in numbers."""
    stub.verdicts = {2: SILENCE, 4: SILENCE}
    outcomes = publisher.broker.publish([message(number) for number in range(1, 6)])
    assert [outcome is None for outcome in outcomes] == [True, False, True, False, True]
    assert str(outcomes[1]) == "the broker has not confirmed 2 of 5 message(s) within 0.5 s"
    assert publisher.broker.is_outage(outcomes[1] or OSError())
    assert not publisher.broker.is_refusal(outcomes[1] or OSError())


def test_a_broker_that_is_full_is_given_nothing_until_it_says_so(stub: AmqpStub, publisher: Publisher) -> None:
    """Its alarm is an outage; the connection stays, because that is where it tells of the alarm's end."""
    stub.verdicts = {2: BLOCK}
    assert publisher.publish(1) == ["confirmed"]
    assert set(publisher.publish(2, 3)) == {"outage"}
    for _ in range(2):
        assert publisher.publish(4, 5) == ["outage"] * 2
        assert isinstance(publisher.broker.reachable(), Blocked)
    before = list(stub.received)
    stub.unblock.set()
    eventually(lambda: publisher.broker.reachable() is None, "the broker has said that it is not full any more")
    assert publisher.publish(6) == ["confirmed"]
    assert not {4, 5} & set(before)
    assert stub.connections == 1


def test_a_connection_lost_while_idle_costs_no_message(stub: AmqpStub, publisher: Publisher) -> None:
    """It is noticed before the batch, not by the batch."""
    assert publisher.publish(1) == ["confirmed"]
    stub.disconnect()
    assert publisher.publish(2, 3) == ["confirmed"] * 2
    assert stub.connections == 2


def test_a_publication_of_several_messages_is_published_with_its_last(stub: AmqpStub, publisher: Publisher) -> None:
    """A group that was enqueued is not out while one of its tasks is not."""
    stub.verdicts = {3: NACK, 11: CLOSE}
    assert publisher.publish(message(1, 2), message(3, 4), message(5, 6)) == ["confirmed", "refused", "confirmed"]
    assert publisher.publish(message(7, 8), message(10, 11), message(12, 13)) == ["confirmed", "refused", "confirmed"]


def test_a_message_that_cannot_be_made_holds_up_no_other(stub: AmqpStub, publisher: Publisher) -> None:
    """Its error is its own: neither the broker's refusal nor an outage."""

    def unmade(app: Celery, producer: Producer) -> None:
        raise KeyError("field")

    first, error, last = publisher.publish(1, unmade, 2)
    assert (first, last) == ("confirmed", "confirmed")
    assert isinstance(error, KeyError)


def test_a_delayed_message_may_be_without_a_queue(stub: AmqpStub, publisher: Publisher) -> None:
    """An exchange that holds it back calls it unroutable when asked to say so."""

    def delayed(app: Celery, producer: Producer) -> None:
        app.send_task("some.task", (1,), producer=producer, retry=False, headers={"x-delay": 1000})

    asked: list[Any] = []
    publisher.publish(0)
    confirms: Any = publisher.broker._confirms
    send = confirms._send

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options["mandatory"])
        return send(*args, **options)

    confirms._send = watched
    assert publisher.publish(delayed, 2) == ["confirmed"] * 2
    assert asked == [False, True]
