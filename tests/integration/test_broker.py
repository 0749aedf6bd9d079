"""Publishing to a real Valkey: what counts as published, whatever the broker does, and in no more time than allowed."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import amqp.exceptions
import pytest
import redis
from celery import Celery
from celery.exceptions import NotRegistered
from kombu import Producer
from kombu.exceptions import EncodeError, OperationalError

from pgpubsub_celery.broker import Broker, Publication
from pgpubsub_celery.embedded import EmbeddedValkey
from pgpubsub_celery.errors import BrokerError

TIMEOUT = 0.5
"""What the brokers of these tests are given; a call may take a few times that, on a machine with much to do."""
SOON = 20 * TIMEOUT
QUEUE = "publisher"
"""Of these tests alone: a broker in memory is shared by all of a process."""


class Publisher:
    """An application, and the bridge's side of its broker."""

    def __init__(self, url: Any, **configuration: Any) -> None:
        self.app = Celery("publisher", broker=url, set_as_current=False)
        self.app.conf.update({"task_default_queue": QUEUE, **configuration})
        self.broker = Broker(self.app, timeout=TIMEOUT)

    def publish(self, *publications: Publication | int) -> list[BaseException | None]:
        """Publish; numbers are messages with that number."""
        began = time.monotonic()
        outcomes = self.broker.publish([message(p) if isinstance(p, int) else p for p in publications])
        assert time.monotonic() - began < SOON, "the bridge hung"
        assert len(outcomes) == len(publications)
        return outcomes

    def outages(self, *publications: Publication | int) -> list[str]:
        """Publish, and return the errors' texts; all are the broker's."""
        outcomes = self.publish(*publications)
        assert all(outcome is not None and self.broker.is_outage(outcome) for outcome in outcomes)
        return [str(outcome) for outcome in outcomes]

    def received(self) -> list[Any]:
        """Consume everything as a worker would; return the first arguments."""
        numbers = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue(QUEUE) as queue:
            while (message := _next(queue)) is not None:
                numbers.append(message.decode()[0][0])
                assert message.headers["task"] == "some.task"
                message.ack()
        return numbers


def _next(queue: Any) -> Any:
    try:
        return queue.get(block=False)
    except queue.Empty:
        return None


def message(number: Any) -> Publication:
    return functools.partial(_publish, number)


def _publish(number: Any, app: Celery, producer: Producer) -> None:
    app.send_task("some.task", (number,), producer=producer, retry=False)


def raising(error: Exception) -> Publication:
    def publication(app: Celery, producer: Producer) -> None:
        raise error

    return publication


@pytest.fixture
def publisher(broker_url: str) -> Iterator[Publisher]:
    """On the Valkey that all tests share."""
    publisher = Publisher(broker_url)
    yield publisher
    publisher.broker.close()


@pytest.fixture
def server() -> Iterator[EmbeddedValkey]:
    """A Valkey of the test's own, to be treated badly."""
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
def own(server: EmbeddedValkey) -> Iterator[Publisher]:
    """On the test's own Valkey, connected."""
    publisher = Publisher(server.url)
    assert publisher.publish(0) == [None]
    yield publisher
    publisher.broker.close()


def admin(server: EmbeddedValkey, password: str | None = None) -> redis.Redis:
    return redis.Redis.from_url(server.url, password=password)


# What is published


def test_a_batch_is_confirmed_and_can_be_consumed(publisher: Publisher) -> None:
    """Every message has arrived, in order, in the form that workers read."""
    assert publisher.publish(*range(100)) == [None] * 100
    assert publisher.received() == list(range(100))


def test_nothing_to_publish_is_no_error(publisher: Publisher) -> None:
    """An empty batch has no outcomes."""
    assert publisher.publish() == []


@pytest.mark.parametrize(
    "configuration",
    [{}, {"broker_transport_options": {"retry_on_timeout": True, "socket_timeout": None, "visibility_timeout": 60}}],
    ids=["default", "with the application's own options"],
)
def test_a_batch_travels_in_one_pipeline(broker_url: str, configuration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a round trip for each message: 480 messages a second would be the end of it."""
    publisher = Publisher(broker_url, **configuration)
    assert publisher.publish(0) == [None]
    sent = []
    send: Any = redis.Connection.send_packed_command

    def count(self: Any, command: Any, *arguments: Any, **options: Any) -> Any:
        sent.append(command)
        return send(self, command, *arguments, **options)

    monkeypatch.setattr(redis.Connection, "send_packed_command", count)
    assert publisher.publish(*range(200)) == [None] * 200
    assert len(sent) <= 2  # and a health check, perhaps
    publisher.broker.close()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (message(object()), EncodeError),
        (raising(NotRegistered("gone.task")), NotRegistered),
        (raising(KeyError("field")), KeyError),
        (raising(TypeError("not a signature")), TypeError),
        (raising(ValueError("no such queue")), ValueError),
    ],
    ids=["unencodable", "unknown task", "KeyError", "TypeError", "ValueError"],
)
def test_one_message_that_cannot_be_made_does_not_hold_up_the_others(
    publisher: Publisher, bad: Publication, error: type[Exception]
) -> None:
    """Its error is its own, and no outage: it would be the same the next time."""
    first, outcome, last = publisher.publish(1, bad, 2)
    assert (first, last) == (None, None)
    assert isinstance(outcome, error)
    assert not publisher.broker.is_outage(outcome)
    assert publisher.received() == [1, 2]


def test_an_outage_of_the_result_backend_is_not_the_brokers(broker_url: str) -> None:
    """Publishing neither waits for it nor subscribes to results."""
    publisher = Publisher(broker_url, result_backend="redis://127.0.0.1:1/0", task_ignore_result=False)
    assert publisher.publish(1, 2) == [None, None]
    assert publisher.received() == [1, 2]
    publisher.broker.close()


# What the broker does


def test_a_stopped_broker_publishes_nothing(server: EmbeddedValkey, own: Publisher) -> None:
    """Refused connections are an outage of all messages; the first publish after it works."""
    server.stop()
    for _ in range(2):
        assert all("refused" in told for told in own.outages(1, 2, 3))
    error = own.broker.reachable()
    assert error is not None
    assert own.broker.is_outage(error)
    server.start()
    assert own.broker.reachable() is None
    assert own.publish(4) == [None]
    assert own.received() == [4]


def test_a_broker_that_restarted_empty_is_used_at_once(server: EmbeddedValkey, own: Publisher) -> None:
    """A connection that was lost while there was nothing to publish costs no message."""
    server.restart(immediate=True, empty=True)
    assert own.publish(1, 2) == [None, None]
    assert own.received() == [1, 2]


def test_a_hanging_broker_publishes_nothing_that_is_known(server: EmbeddedValkey, own: Publisher) -> None:
    """No answer in time counts as not published; connecting anew does not hang either."""
    server.pause()
    try:
        for _ in range(2):
            assert all("Timeout" in told for told in own.outages(1, 2))
        assert own.broker.reachable() is not None
    finally:
        server.resume()
    assert own.publish(3) == [None]
    # What hung may have arrived after all, which is why it is not known.
    assert own.received()[-1] == 3


def test_a_password_changed_at_runtime_is_an_outage(server: EmbeddedValkey, own: Publisher) -> None:
    """Nothing is wrong with the messages; once the password is right they go out."""
    admin(server).config_set("requirepass", "secret")
    client = admin(server, "secret")
    client.client_kill_filter(_type="normal", skipme=True)
    for _ in range(2):
        assert all("Authentication" in told for told in own.outages(1, 2))
    client.config_set("requirepass", "")
    assert own.publish(1, 2) == [None, None]


def test_a_broker_that_is_full_is_an_outage(server: EmbeddedValkey, own: Publisher) -> None:
    """The reason is told, and not what was in the message."""
    client = admin(server)
    client.config_set("maxmemory", "1")
    told = own.outages(message("top secret"), 2)
    assert "used memory > 'maxmemory'" in told[0]
    assert "body" not in told[0]
    client.config_set("maxmemory", "0")
    assert own.publish(1) == [None]
    assert own.received() == [0, 1]


def test_the_next_of_several_brokers_is_used(server: EmbeddedValkey) -> None:
    """Failover: each is tried before it is an outage."""
    publisher = Publisher(["redis://127.0.0.1:1/0", "redis://127.0.0.1:2/0", server.url])
    assert publisher.publish(1) == [None]
    publisher.broker.close()


def test_a_broker_can_be_closed_at_any_time(server: EmbeddedValkey, own: Publisher) -> None:
    """Also when it is gone, and twice."""
    server.kill()
    own.broker.close()
    own.broker.close()
    server.start()
    assert own.publish(1) == [None]


# Without a pipeline: other transports, and kombu before 5.7


@pytest.fixture
def single() -> Iterator[Publisher]:
    """On a broker in memory, which confirms each message by itself."""
    publisher = Publisher("memory://")
    yield publisher
    publisher.received()
    publisher.broker.close()


def test_what_was_confirmed_before_an_outage_is_published(single: Publisher) -> None:
    """The rest is not tried."""
    lost = ConnectionResetError("lost")
    assert single.publish(1, 2, raising(lost), 3, 4) == [None, None, lost, lost, lost]
    assert single.received() == [1, 2]


@pytest.mark.parametrize(
    "refusal", [amqp.exceptions.MessageNacked(), amqp.exceptions.PreconditionFailed("other arguments")], ids=type
)
def test_a_message_that_the_broker_refuses_does_not_hold_up_the_others(single: Publisher, refusal: Exception) -> None:
    """A queue that is full or declared otherwise is that queue's trouble, and may be over later."""
    assert single.publish(1, raising(refusal), 2) == [None, refusal, None]
    assert single.broker.is_refusal(refusal)
    assert single.received() == [1, 2]


def test_no_message_is_blamed_for_an_error_of_the_whole_batch(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody expected is treated as an outage: failing the rows would need somebody to take them up again."""

    def flush(batch: Any) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr("kombu.transport.redis.PublishBatch.flush", flush)
    outcomes = publisher.publish(1, 2)
    assert [str(outcome) for outcome in outcomes] == ["RuntimeError: unexpected"] * 2
    assert all(isinstance(outcome, OperationalError) for outcome in outcomes)


# URLs that never work


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redsi://host", r"kind 'redsi' cannot be used \(No such transport: redsi.  Did you mean redis\?\)"),
        ("http://host", r"kind 'http' cannot be used \(No such transport: http\): expected for example 'redis://"),
        ("sqs://", r"kind 'sqs' cannot be used \(No module named"),
        ("redis://:pass/word@host:6379/0", r"cannot be read: expected .*percent-encoded"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_an_example(url: str, told: str) -> None:
    """A mistake in the configuration is no outage to wait for."""
    with pytest.raises(BrokerError, match=told) as refused:
        Broker.check(Celery("app", broker=url, set_as_current=False))
    assert "word" not in str(refused.value).replace("password", "")
    assert refused.value.__suppress_context__ or "word" not in url


@pytest.mark.parametrize(
    "url", ["redis://host", "rediss://host", "amqp://", "memory://", None, ["redis://a", "redis://b"], "sentinel://a;b"]
)
def test_a_url_that_can_work_is_not_refused(url: Any) -> None:
    """Whether somebody answers there is another matter: nothing is connected."""
    Broker.check(Celery("app", broker=url, set_as_current=False))
