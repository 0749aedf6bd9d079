"""Emit, as far as it needs no database: what is refused before one is asked, and where the schema's name comes from."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import pytest
from celery import Celery, _state
from sqlalchemy.orm import Session

from pgpubsub_celery import emit, schemas
from pgpubsub_celery.channels import Channel
from pgpubsub_celery.emit import BATCH, BATCH_CHANNELS, BATCH_CHARACTERS, notify, notify_many
from pgpubsub_celery.errors import BindError, PayloadError, SettingsError
from pgpubsub_celery.scopes import encode_json
from pgpubsub_celery.subscriptions import Row, changes, match

pytestmark = pytest.mark.usefixtures("registry")


@dataclasses.dataclass
class Message(Channel):
    channel_name = "test_emit_unit.Message"
    lock_notifications = True
    value: int


# Batches


def sizes(payloads: Sequence[tuple[type[Channel], str]]) -> list[int]:
    return [sum(len(group.payloads) for group in groups) for groups in emit._batches(list(payloads))]


def test_batches_are_bounded_in_messages() -> None:
    """No statement carries more than some thousand."""
    assert sizes([(Message, "{}")] * (2 * BATCH + 1)) == [BATCH, BATCH, 1]


def test_batches_are_bounded_in_characters_and_hold_at_least_one() -> None:
    """A message larger than the bound goes alone."""
    half = "x" * (BATCH_CHARACTERS // 2)
    assert sizes([(Message, half)] * 4 + [(Message, half * 3), (Message, "x")]) == [2, 2, 1, 1]


def test_batches_are_bounded_in_channels() -> None:
    """Each channel is a call of its own in the statement."""
    channels: list[Any] = [type(f"Channel{n}", (), {}) for n in range(2 * BATCH_CHANNELS + 1)]
    groups = list(emit._batches([(channel, "{}") for channel in channels for _ in range(3)]))
    assert [len(batch) for batch in groups] == [BATCH_CHANNELS, BATCH_CHANNELS, 1]


# Refusals


def test_a_session_without_a_database_says_what_to_bind() -> None:
    """In our words, with the fix."""
    with pytest.raises(BindError, match=r"bind pgpubsub_celery\.Notification to the database that has it"):
        notify(Session(), Message(value=1))


@pytest.mark.parametrize(
    "countdown", [-1, float("nan"), float("inf"), "1", True, datetime.timedelta(seconds=-1), 1e300]
)
def test_a_countdown_that_cannot_be_is_refused(countdown: Any) -> None:
    """Before a connection is asked for."""
    with pytest.raises(PayloadError, match="countdown is"):
        notify(Session(), Message(value=1), countdown=countdown)


def test_many_messages_are_all_checked_before_a_database_is_asked() -> None:
    """A generator, too."""
    with pytest.raises(PayloadError, match="value"):
        notify_many(Session(), (Message(value=value) for value in (1, "two")))  # type: ignore[arg-type]


# JSON


@pytest.mark.parametrize(
    "value", [None, True, 1, -1.5, "é🐘", "\\u0000", "\\\\u0000", [1, [2]], {"a": {"b": [None]}}, (1, 2), 10**30]
)
def test_json_that_postgres_can_store_is_encoded(value: Any) -> None:
    """Also what only looks like an escaped NUL."""
    import json

    assert json.loads(encode_json(value, "it")) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": ["\x00"]}, r"it\['a'\]\[0\] contains the character NUL"),
        ({"a\x00": 1}, r"contains the character NUL"),
        (["\\\x00"], r"it\[0\] contains the character NUL"),
        ("\ud800", "it contains half a surrogate pair"),
        ({"a": {1, 2}}, r"it\['a'\] is a set"),
        (float("nan"), "it is nan"),
        ([float("-inf")], r"it\[0\] is -inf"),
        ({(1,): 1}, "it has the key"),
    ],
)
def test_what_postgres_cannot_store_is_refused_with_its_place(value: Any, where: str) -> None:
    """The server would find it, too, and abort the transaction."""
    with pytest.raises(PayloadError, match=where):
        encode_json(value, "it")


def test_json_that_is_nested_too_deeply_is_refused() -> None:
    """Postgres would run out of stack, Python out of recursion."""
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(PayloadError, match="nested too deeply"):
        encode_json(value, "it")


# Where the functions are


@pytest.fixture
def no_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a Celery application."""
    monkeypatch.setattr(_state, "default_app", None)
    monkeypatch.setattr(_state, "_tls", _state._TLS())
    monkeypatch.setattr(schemas, "_schemas_without_app", None)


@pytest.mark.usefixtures("no_app")
def test_without_an_application_the_schema_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer need not have Celery configured, and none is made for it."""
    monkeypatch.setenv("PGPUBSUB_SCHEMA", "queue")
    assert schemas.current_schema() == "queue"
    assert _state.default_app is None


@pytest.mark.usefixtures("no_app")
def test_the_schema_is_the_current_applications_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read once for each application."""
    first = Celery("first", set_as_current=True)
    first.conf.pgpubsub_schema = "of_first"
    assert schemas.current_schema() == "of_first"
    first.conf.pgpubsub_schema = "changed"
    assert schemas.current_schema() == "of_first"
    monkeypatch.setenv("PGPUBSUB_SCHEMA", "queue")
    second = Celery("second", set_as_current=True)
    second.conf.pgpubsub_schema = "of_second"
    assert schemas.current_schema() == "queue"
    first.close()
    second.close()


@pytest.mark.usefixtures("no_app")
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is wrong, not where it is used."""
    monkeypatch.setenv("PGPUBSUB_SCHEMA", "x" * 64)
    with pytest.raises(SettingsError, match="schema"):
        schemas.current_schema()


# Which subscription is whose


def row(
    id: int, listener: str = "a", *, aliases: tuple[str, ...] = (), operations: tuple[str, ...] = ("message",)
) -> Row:
    return Row(
        id=id,
        channel=Message.name(),
        channel_aliases=frozenset(),
        listener=listener,
        aliases=frozenset(aliases),
        operations=frozenset(operations),
    )


def listener(name: str, *aliases: str) -> Any:
    return dataclasses.replace(emit.ENQUEUE_LISTENER, name=name, channel=Message, aliases=aliases)


def test_a_row_is_the_listeners_that_has_its_present_name() -> None:
    """Rather than one's that had the name, or whose name the row had."""
    a, b = listener("a"), listener("b", "a")
    assert match([row(1, "a")], [b, a]) == {b: [], a: [row(1, "a")]}
    renamed = row(1, "b", aliases=("a",))
    assert match([renamed], [a, b]) == {a: [], b: [renamed]}
    assert match([renamed], [a]) == {a: [renamed]}


def test_an_older_release_never_renames_back() -> None:
    """Nor takes a name or an operation away."""
    assert changes([row(1, "b", aliases=("a",), operations=("message", "x"))], [listener("a")], exact=False) == []


def test_only_install_leaves_a_listener_one_of_two_subscriptions() -> None:
    """A bridge's start takes nothing away, and doubles nothing."""
    rows = [row(1, "old"), row(2, "new", aliases=("old",))]
    (change,) = changes(rows, [listener("new", "old")], exact=True)
    assert (change.was, change.operations) == (rows[0], frozenset())
    assert changes(rows, [listener("new", "old")], exact=False) == []
    emptied = [row(1, "old", operations=()), rows[1]]
    assert changes(emptied, [listener("new", "old")], exact=False) == []
    assert changes(emptied, [listener("new", "old")], exact=True) == []
    # The older release, whose own subscription is the emptied one.
    assert changes(emptied, [listener("old")], exact=False) == []
