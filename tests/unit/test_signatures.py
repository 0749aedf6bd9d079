"""What `enqueue` stores is published as the signature's own `apply_async()` would have published it."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import Signature
from celery.result import GroupResult
from kombu.exceptions import ContentDisallowed

from pgpubsub_celery.errors import DecodeError, PayloadError
from pgpubsub_celery.signatures import Prepared, load_signature, publish_signature

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
NOON = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.timezone.utc)

_numbers = itertools.count()


def add(a: int, b: int) -> int:
    return a + b


def total(numbers: list[int]) -> int:
    return sum(numbers)


class Publisher:
    """An application on a broker in memory, and the messages that it publishes."""

    def __init__(self) -> None:
        self.app = Celery("signatures", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.task_default_queue = f"signatures-{next(_numbers)}"
        self.app.conf.accept_content = ["json", "pickle"]
        self.add = self.app.task(name="add", shared=False)(add)
        self.total = self.app.task(name="total", shared=False)(total)
        self.pickled = self.app.task(name="pickled", serializer="pickle", shared=False)(total)

    def publish(self, payload: Any) -> None:
        """Publish a payload as a bridge does: after its way through the database, with the bridge's producer."""
        with self.app.connection_for_write() as connection:
            producer = self.app.amqp.Producer(connection, auto_declare=False)
            publish_signature(json.loads(json.dumps(payload)), self.app, producer)

    def published(self) -> list[Any]:
        """Take what has been published since, with ids numbered in the order of their appearance."""
        found = []
        with self.app.connection_for_read() as connection:
            queue = connection.SimpleQueue(self.app.conf.task_default_queue)
            queue.consumer.accept = {"application/json", "application/x-python-serialize"}
            while True:
                try:
                    message = queue.get(block=False)
                except queue.Empty:
                    break
                properties = {k: v for k, v in message.properties.items() if k != "delivery_tag"}
                found.append([message.headers, properties, message.payload])
                message.ack()
            queue.close()
        seen: dict[str, str] = {}
        numbered = UUID.sub(
            lambda found: seen.setdefault(found.group(), f"id {len(seen)}"),
            json.dumps(found, default=repr, sort_keys=True),
        )
        return list(json.loads(numbered))


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """An application whose messages can be looked at."""
    publisher = Publisher()
    yield publisher
    publisher.app.close()


SIGNATURES: dict[str, Callable[[Any, Any], Any]] = {
    "a task": lambda add, total: add.s(1, 2),
    "keyword arguments": lambda add, total: add.s(1, b=2),
    "options": lambda add, total: add.s(1, 2).set(priority=3, time_limit=9, headers={"x": 1}, ignore_result=True),
    "another routing key": lambda add, total: add.s(1, 2).set(shadow="other", retries=2),
    "links": lambda add, total: add.s(1, 2).set(link=[total.s(), add.s(1)], link_error=[total.si([1])]),
    "a chain": lambda add, total: chain(add.s(1, 2), add.s(3), add.s(4)),
    "a chain with a link": lambda add, total: _linked(chain(add.s(1, 2), add.s(3)), add.s(9)),
    "a group": lambda add, total: group(add.s(1, n) for n in range(3)),
    "nested groups": lambda add, total: group(
        add.s(1, 2), group(add.s(3, 4), chain(add.s(5, 6), add.s(7))), add.s(8, 9)
    ),
    "a chord": lambda add, total: chord([add.s(1, 2), add.s(3, 4)], total.s()),
    "a chord with a chain": lambda add, total: chord([add.s(1, 2), add.s(3, 4)], chain(total.s(), add.s(1))),
    "a chain with a group": lambda add, total: chain(add.s(1, 2), group(add.s(3), add.s(4)), total.s(), add.s(9)),
    "a set time of expiry": lambda add, total: add.s(1, 2).set(expires="2030-01-01T12:00:00+00:00"),
    "immutable": lambda add, total: add.si(1, 2),
    "a task of another application": lambda add, total: Signature("elsewhere", (1,), app=add.app),
}


def _linked(signature: Any, callback: Any) -> Any:
    signature.link(callback)
    return signature


@pytest.mark.parametrize("kind", SIGNATURES)
def test_published_messages_are_those_of_apply_async(publisher: Publisher, kind: str) -> None:
    """Headers, properties and bodies are the same, but for the ids."""

    def make() -> Any:
        return SIGNATURES[kind](publisher.add, publisher.total)

    make().apply_async()
    expected = publisher.published()
    publisher.publish(Prepared(make()).payload())
    published = publisher.published()
    for message in (*expected, *published):
        message[1].pop("expiration", None)  # counted down
    assert published == expected
    assert len(expected) >= 1


@pytest.mark.parametrize("kind", SIGNATURES)
def test_the_result_knows_the_ids_of_the_messages_that_will_be_published(publisher: Publisher, kind: str) -> None:
    """The caller can wait for the result of what is not published yet."""
    prepared = Prepared(SIGNATURES[kind](publisher.add, publisher.total))
    ids: list[str] = []
    publisher.app.amqp.send_task_message = _keep_ids(publisher.app.amqp.send_task_message, ids)
    publisher.publish(prepared.payload())
    assert ids
    assert set(ids) <= set(_ids_of(prepared.result))


def _keep_ids(send: Any, ids: list[str]) -> Any:
    def keep(producer: Any, name: str, message: Any, **options: Any) -> Any:
        ids.append(message.headers["id"])
        return send(producer, name, message, **options)

    return keep


def _ids_of(result: Any) -> Iterator[str]:
    while result is not None:
        if isinstance(result, GroupResult):
            for one in result.results:
                yield from _ids_of(one)
        else:
            yield result.id
        result = result.parent


@pytest.mark.parametrize("kind", SIGNATURES)
def test_the_signature_given_is_left_as_it_was(publisher: Publisher, kind: str) -> None:
    """A signature kept in a module can be enqueued again and again, each time with new ids."""
    signature = SIGNATURES[kind](publisher.add, publisher.total)
    before = json.dumps(signature)
    first = Prepared(signature).result.id
    second = Prepared(signature).result.id
    assert json.dumps(signature) == before
    assert first != second


def test_publishing_twice_publishes_the_same_ids(publisher: Publisher) -> None:
    """A bridge that died after publishing makes a duplicate that can be recognised, not another task."""
    payload = Prepared(chain(publisher.add.s(1, 2), publisher.add.s(3))).payload()
    ids: list[str] = []
    publisher.app.amqp.send_task_message = _keep_ids(publisher.app.amqp.send_task_message, ids)
    publisher.publish(payload)
    publisher.publish(payload)
    assert len(ids) == 2
    assert ids[0] == ids[1]


def test_chunks_and_maps_are_routed_as_their_task(publisher: Publisher) -> None:
    """`chunks`, `map` and `starmap` go where the messages of the task itself go."""
    queue = publisher.app.conf.task_default_queue
    publisher.app.conf.task_default_queue = "elsewhere"
    publisher.app.conf.task_routes = {"add": {"queue": queue}, "total": {"queue": queue}}
    publisher.publish(Prepared(publisher.add.chunks([(1, 2), (3, 4), (5, 6)], 2)).payload())
    publisher.publish(Prepared(publisher.add.starmap([(1, 2)])).payload())
    publisher.publish(Prepared(publisher.total.map([[1, 2], [3]])).payload())
    publisher.app.conf.task_default_queue = queue
    messages = publisher.published()
    assert [message[0]["task"] for message in messages] == [
        "celery.starmap",
        "celery.starmap",
        "celery.starmap",
        "celery.map",
    ]
    assert [message[2][1]["it"] for message in messages] == [[[1, 2], [3, 4]], [[5, 6]], [[1, 2]], [[1, 2], [3]]]


def test_a_countdown_and_an_eta_are_taken_out_of_the_message(publisher: Publisher) -> None:
    """The row waits, not a worker's memory."""
    later = Prepared(publisher.add.s(1, 2).set(countdown=60))
    assert later.due == 60.0
    at_noon = Prepared(group(publisher.add.s(1, 2), publisher.add.s(3, 4)).set(eta=NOON))
    assert at_noon.due == NOON
    publisher.publish(later.payload())
    publisher.publish(at_noon.payload())
    assert [message[0]["eta"] for message in publisher.published()] == [None, None, None]


def test_an_eta_without_time_zone_is_read_as_celery_reads_it(publisher: Publisher) -> None:
    """Celery's workers take a naive eta for UTC."""
    assert Prepared(publisher.add.s(1, 2).set(eta=datetime.datetime(2030, 1, 1, 12))).due == NOON  # noqa: DTZ001
    assert Prepared(publisher.add.s(1, 2).set(eta="2030-01-01T12:00:00")).due == NOON


def test_a_relative_expiry_counts_from_the_call(publisher: Publisher) -> None:
    """As with `apply_async`, not from whenever the bridge publishes, also inside a group."""
    earliest = publisher.app.now() + datetime.timedelta(seconds=60)
    payload = Prepared(group(publisher.add.s(1, 2).set(expires=60), publisher.add.s(1, 2))).payload()
    latest = publisher.app.now() + datetime.timedelta(seconds=60)
    first, second = load_signature(payload, publisher.app).tasks
    assert earliest <= first.options["expires"] <= latest
    assert "expires" not in second.options


def test_the_expiry_of_the_task_itself_counts_from_the_call(publisher: Publisher) -> None:
    """What the task declares is no later than what a call gives."""
    publisher.add.expires = 60
    earliest = publisher.app.now() + datetime.timedelta(seconds=60)
    signature = load_signature(Prepared(publisher.add.s(1, 2)).payload(), publisher.app)
    assert signature.options["expires"] >= earliest


def test_arguments_that_json_has_no_form_for_go_through_pickle(publisher: Publisher) -> None:
    """The task's own serializer is used, and bytes are stored as base64."""
    payload = Prepared(publisher.pickled.s({1, 2})).payload()
    assert payload["content_type"] == "application/x-python-serialize"
    publisher.publish(payload)
    (message,) = publisher.published()
    assert message[2][0] == [repr({1, 2})]


def test_models_become_what_their_task_dumps_them_to(publisher: Publisher) -> None:
    """A task with pydantic=True takes models; its message has them dumped."""
    publisher.add._dump_pydantic_arguments = lambda args, kwargs: ([*args, "dumped"], kwargs)
    signature = load_signature(Prepared(publisher.add.s(1, 2)).payload(), publisher.app)
    assert signature.args == (1, 2, "dumped")


def test_dates_uuids_and_nul_characters_survive(publisher: Publisher) -> None:
    """What kombu's JSON knows comes back as it went in; NUL is escaped twice, so that jsonb can hold it."""
    arguments = (NOON, "a\x00b")
    payload = json.loads(json.dumps(Prepared(publisher.add.s(*arguments)).payload()))
    assert "\x00" not in payload["body"]
    assert load_signature(payload, publisher.app).args == arguments


def test_arguments_that_cannot_be_serialized_are_refused_by_name(publisher: Publisher) -> None:
    """The writer learns it, not a bridge much later."""
    with pytest.raises(PayloadError, match=r"arguments of add cannot be serialized as 'json'"):
        Prepared(publisher.add.s(object(), 2)).payload()


def test_arguments_that_do_not_fit_the_task_are_refused(publisher: Publisher) -> None:
    """As `apply_async` does, also for the members of a group."""
    with pytest.raises(PayloadError, match="arguments do not fit the task add"):
        Prepared(publisher.add.s(1))
    with pytest.raises(PayloadError, match="arguments do not fit the task add"):
        Prepared(group(publisher.add.s(1, 2), publisher.add.s(1, 2, 3)))


@pytest.mark.parametrize("given", [1, "add", None, {"args": ()}])
def test_what_is_no_signature_is_refused(given: Any) -> None:
    """The message shows what was given and what is expected."""
    with pytest.raises(PayloadError, match=r"expected a Celery signature, for example send_email\.s\(1\)"):
        Prepared(given)


def test_a_task_without_arguments_is_refused_with_the_fix(publisher: Publisher) -> None:
    """`enqueue(session, send_email)` is an easy mistake."""
    with pytest.raises(PayloadError, match=r"pass a signature of it, add\.s\("):
        Prepared(publisher.add)


def test_a_serializer_that_the_application_does_not_accept_is_not_read(publisher: Publisher) -> None:
    """Whoever may emit must not make a bridge unpickle."""
    payload = Prepared(publisher.pickled.s({1, 2})).payload()
    publisher.app.conf.accept_content = ["json"]
    with pytest.raises(DecodeError, match="accept_content does not allow") as raised:
        load_signature(payload, publisher.app)
    assert isinstance(raised.value.__cause__, ContentDisallowed)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"format": 1},
        {"format": 1, "content_type": "application/json", "content_encoding": "utf-8", "body": "{"},
        {"format": 1, "content_type": "application/json", "content_encoding": "utf-8", "body": "[]"},
        {"format": 1, "content_type": "application/json", "content_encoding": "utf-8", "body": "é", "base64": True},
    ],
)
def test_a_malformed_payload_is_a_decode_error(publisher: Publisher, payload: Any) -> None:
    """Whatever psql has stored, the bridge must fail that row alone."""
    with pytest.raises(DecodeError):
        load_signature(payload, publisher.app)


def test_a_payload_of_a_newer_release_says_so(publisher: Publisher) -> None:
    """A rolling deployment that upgrades writers first is told what to do."""
    payload = Prepared(publisher.add.s(1, 2)).payload() | {"format": 2}
    with pytest.raises(DecodeError, match="upgrade the bridge"):
        load_signature(payload, publisher.app)


@pytest.mark.parametrize("kind", ["a task", "a chain", "a group", "a chord", "a chain with a group"])
def test_every_message_goes_through_the_given_producer(publisher: Publisher, kind: str) -> None:
    """Chains and chords, too: the outcome of the bridge's own connection is what settles the row."""
    payload = Prepared(SIGNATURES[kind](publisher.add, publisher.total)).payload()
    with publisher.app.connection_for_write() as connection:
        producer = publisher.app.amqp.Producer(connection, auto_declare=False)
        sent_through: list[Any] = []
        send = publisher.app.amqp.send_task_message

        def note(given: Any, *args: Any, **options: Any) -> Any:
            sent_through.append((given, options["retry"]))
            return send(given, *args, **options)

        publisher.app.amqp.send_task_message = note
        publish_signature(payload, publisher.app, producer)
    assert sent_through
    assert {id(given) for given, _ in sent_through} == {id(producer)}
    assert {retry for _, retry in sent_through} == {False}


def test_publishing_leaves_the_application_as_it_was(publisher: Publisher) -> None:
    """Also when it fails."""
    payload = Prepared(publisher.add.s(1, 2)).payload()
    before = publisher.app.amqp.send_task_message

    class Broken:
        connection = None

    with pytest.raises(AttributeError):
        publish_signature(payload, publisher.app, Broken())
    assert publisher.app.amqp.send_task_message is before
    assert "producer_or_acquire" not in vars(publisher.app)
