"""From claimed rows to messages, and what a worker reads of them."""

from __future__ import annotations

import datetime
import json
import random
import uuid
from typing import Any

import pytest

from pgpubsub_celery.errors import DecodeError
from pgpubsub_celery.messages import FORMAT, KEYWORD, Address, Envelope, build_messages, notification_task_id
from pgpubsub_celery.store import Claimed

INSTALLATION = uuid.UUID(int=7)
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.timezone.utc)


def row(id: int, subscription: int = 1, dispatches: int = 1, **values: Any) -> Claimed:
    return Claimed(
        **{
            "id": id,
            "subscription": subscription,
            "dispatches": dispatches,
            "retries": 0,
            "operation": "insert",
            "created_at": NOW,
            **values,
        }
    )


def address(name: str, bundle: int = 1, *, carries: bool = False) -> Address:
    return Address(
        channel=f"{name}.Channel", listener=f"{name}.listener", task=f"{name}.task", bundle=bundle, carries=carries
    )


def built(rows: list[Claimed], **addresses: Address) -> list[tuple[str, tuple[int, ...], int]]:
    """Build; return task, ids and dispatches of each message. Addresses by `_subscription`."""
    by_subscription = {int(key[1:]): value for key, value in addresses.items()}
    messages = build_messages(rows, by_subscription, INSTALLATION)
    return [(message.task, message.envelope.ids, message.envelope.dispatches) for message in messages]


# Building


def test_nothing_claimed_makes_no_message() -> None:
    """Not an empty one."""
    assert built([], _1=address("a")) == []


def test_rows_of_one_ordering_key_share_a_message_whatever_the_bundle_size() -> None:
    """They are run one after the other, which two messages could not promise; rows without key fill up the rest."""
    rows = [row(n, ordering_key=key) for n, key in enumerate(("a", "b", "a", None, "c", "a", "b"), 1)]
    assert built(rows, _1=address("a", bundle=2)) == [
        ("a.task", (1, 3, 6), 1),
        ("a.task", (2, 7), 1),
        ("a.task", (4, 5), 1),
    ]
    assert built(rows, _1=address("a", bundle=10)) == [("a.task", (1, 2, 3, 4, 5, 6, 7), 1)]


def test_each_row_travels_alone_by_default() -> None:
    """One crash must not repeat others' side effects."""
    assert built([row(1), row(2)], _1=address("a")) == [("a.task", (1,), 1), ("a.task", (2,), 1)]


def test_first_dispatches_of_a_listener_share_messages() -> None:
    """Up to its bundle size, in order; the last one carries what is left."""
    rows = [row(id) for id in range(1, 8)]
    assert [ids for _, ids, _ in built(rows, _1=address("a", bundle=3))] == [(1, 2, 3), (4, 5, 6), (7,)]


def test_rows_published_before_travel_alone() -> None:
    """A suspect must not kill its neighbours again and again, nor two suspects each other."""
    rows = [row(1), row(2, dispatches=2), row(3), row(4, dispatches=2), row(5, dispatches=9)]
    assert built(rows, _1=address("a", bundle=100)) == [
        ("a.task", (1, 3), 1),
        ("a.task", (2,), 2),
        ("a.task", (4,), 2),
        ("a.task", (5,), 9),
    ]


def test_listeners_do_not_share_messages() -> None:
    """Each has its own task, and its own bundles."""
    rows = [row(1, 1), row(2, 2), row(3, 1), row(4, 2), row(5, 1)]
    assert built(rows, _1=address("a", bundle=2), _2=address("b", bundle=10)) == [
        ("a.task", (1, 3), 1),
        ("b.task", (2, 4), 1),
        ("a.task", (5,), 1),
    ]


def test_messages_follow_the_order_in_which_their_first_rows_were_stored() -> None:
    """Whatever becomes of the rest, each row is in one message, and no message is out of order in itself."""
    generator = random.Random(3)
    for _ in range(50):
        rows = [row(id, generator.randint(1, 3), generator.choice([1, 1, 1, 2])) for id in range(1, 40)]
        messages = built(rows, _1=address("a", bundle=4), _2=address("b", bundle=1), _3=address("c", bundle=100))
        firsts = [ids[0] for _, ids, _ in messages]
        assert firsts == sorted(firsts)
        assert all(list(ids) == sorted(ids) for _, ids, _ in messages)
        assert sorted(id for _, ids, _ in messages for id in ids) == [row.id for row in rows]


def test_a_message_speaks_for_its_rows_at_their_dispatch() -> None:
    """What is given back when it is not published."""
    (message,) = build_messages([row(1), row(2)], {1: address("a", bundle=2)}, INSTALLATION)
    assert message.claimed == [(1, 1), (2, 1)]


def test_a_notification_has_the_same_task_id_in_each_of_its_runs() -> None:
    """As Celery keeps it over retries; another installation's row with the same id has another."""
    ids = {
        message.task_id
        for dispatches in (1, 2, 3)
        for message in build_messages([row(5, dispatches=dispatches)], {1: address("a", bundle=9)}, INSTALLATION)
    }
    assert ids == {notification_task_id(INSTALLATION, 5)} == {str(uuid.uuid5(INSTALLATION, "5"))}
    assert notification_task_id(uuid.UUID(int=8), 5) not in ids
    assert notification_task_id(INSTALLATION, 6) not in ids


def test_a_bundle_has_a_task_id_of_its_own() -> None:
    """Published twice, it is two messages."""
    rows, addresses = [row(1), row(2)], {1: address("a", bundle=2)}
    ids = {build_messages(rows, addresses, INSTALLATION)[0].task_id for _ in range(3)}
    assert len(ids) == 3
    assert not ids & {notification_task_id(INSTALLATION, id) for id in (1, 2)}


# Envelopes


def over_the_wire(envelope: Envelope) -> dict[str, Any]:
    wire: dict[str, Any] = json.loads(json.dumps(envelope.to_kwargs()))
    return wire


def test_a_message_carries_ids_and_no_contents() -> None:
    """Payloads and secrets stay in Postgres."""
    (message,) = build_messages([row(3, payload={"secret": 1}, context={"s": 2})], {1: address("a")}, INSTALLATION)
    assert over_the_wire(message.envelope) == {
        KEYWORD: {
            "format": FORMAT,
            "installation": str(INSTALLATION),
            "channel": "a.Channel",
            "listener": "a.listener",
            "subscription": 1,
            "dispatches": 1,
            "ids": [3],
        }
    }


def test_a_worker_reads_what_the_bridge_wrote() -> None:
    """Through JSON and back."""
    (message,) = build_messages([row(3, 2), row(2**60, 2)], {2: address("a", bundle=2)}, INSTALLATION)
    assert Envelope.from_kwargs(over_the_wire(message.envelope)) == message.envelope


def test_a_message_whose_rows_go_carries_what_they_tell_of() -> None:
    """Once it is published nothing is left to look up."""
    contents: dict[str, Any] = {"payload": {"a": [1, None]}, "context": {"user": 1}, "db_version": "abc", "retries": 2}
    (message,) = build_messages([row(3, **contents)], {1: address("a", carries=True)}, INSTALLATION)
    envelope = Envelope.from_kwargs(over_the_wire(message.envelope))
    assert envelope is not None
    assert envelope.carried == ({"id": 3, "operation": "insert", "created_at": NOW.isoformat(), **contents},)
    assert envelope.ids == ()
    assert message.claimed == [(3, 1)]


def test_another_call_of_the_task_is_not_the_bridges() -> None:
    """`.delay()` and direct calls stay Celery's own."""
    assert Envelope.from_kwargs({}) is None
    assert Envelope.from_kwargs({"value": 1}) is None


def envelope_body(**changes: Any) -> dict[str, Any]:
    body = {
        "format": FORMAT,
        "installation": str(INSTALLATION),
        "channel": "a",
        "listener": "b",
        "subscription": 1,
        "dispatches": 1,
        "ids": [1],
        **changes,
    }
    return {KEYWORD: {key: value for key, value in body.items() if value != "missing"}}


def test_a_newer_format_is_refused_with_what_to_do() -> None:
    """Whatever else it may have that this release does not know."""
    with pytest.raises(DecodeError) as refused:
        Envelope.from_kwargs(envelope_body(format=FORMAT + 1, ids={"other": "form"}))
    assert str(refused.value) == (
        f"The message has format {FORMAT + 1}; this release reads up to {FORMAT}: upgrade the workers first."
    )


def test_what_a_newer_release_adds_to_this_format_is_ignored() -> None:
    """Additions do not need a new format."""
    assert Envelope.from_kwargs(envelope_body(more=1)) == Envelope.from_kwargs(envelope_body())


@pytest.mark.parametrize(
    "body",
    [
        {KEYWORD: 5},
        {KEYWORD: []},
        {KEYWORD: {}},
        envelope_body(format="one"),
        envelope_body(installation="not a uuid"),
        envelope_body(installation=None),
        envelope_body(channel="missing"),
        envelope_body(listener="missing"),
        envelope_body(dispatches="missing"),
        envelope_body(subscription="x"),
        envelope_body(ids="12"),
        envelope_body(ids=["x"]),
        envelope_body(ids=[]),
        envelope_body(ids="missing"),
        envelope_body(carried=[{}]),
        envelope_body(ids="missing", carried=["x"]),
    ],
    ids=str,
)
def test_a_malformed_envelope_is_refused(body: dict[str, Any]) -> None:
    """It is said that it is the message, and what is wrong with it."""
    with pytest.raises(DecodeError, match=r"The message's envelope is malformed \(\w+: .+\)\."):
        Envelope.from_kwargs(body)


def test_task_ids_are_version_5_uuids_of_the_installation() -> None:
    """Whatever makes them quicker, they are what uuid.uuid5 says."""
    for id in (1, 42, 10**18, *random.Random(5).sample(range(10**12), 500)):
        assert notification_task_id(INSTALLATION, id) == str(uuid.uuid5(INSTALLATION, str(id)))
