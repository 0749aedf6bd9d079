"""Keys as declared: what they may name, and what is refused with a fix."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from sqlalchemy import Column, Computed, Integer, MetaData, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgpubsub_celery import Channel, TriggerChannel
from pgpubsub_celery.channels import Keys, check_declared, keys_of
from pgpubsub_celery.errors import ChannelError


class Base(DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "seat"
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    holder: Mapped[str] = mapped_column("holder_name")


PLAIN = Table("plain", MetaData(), Column("id", Integer), Column("twice", Integer, Computed("id * 2", persisted=False)))


def message(**attributes: Any) -> type[Channel]:
    """Declare a channel of messages with the fields `account` and `number`."""
    namespace = {"__annotations__": {"account": int, "number": int}, "__module__": __name__, **attributes}
    return dataclasses.dataclass(type("Booked", (Channel,), {"lock_notifications": True, **namespace}))


def changes(model: Any, **attributes: Any) -> type[Channel]:
    """Declare a channel of a table's changes."""
    namespace = {"__module__": __name__, "lock_notifications": True, "model": model, **attributes}
    return type("Changes", (TriggerChannel,), namespace)


@pytest.mark.parametrize(
    ("attributes", "keys"),
    [
        ({}, Keys()),
        ({"ordering_key": "account"}, Keys(ordering=("account",))),
        ({"ordering_key": ("account", "number")}, Keys(ordering=("account", "number"))),
        ({"unique_key": ["number"]}, Keys(unique=("number",))),
        (
            {"ordering_key": "account", "unique_key": "number", "failed_key": "passes"},
            Keys(ordering=("account",), unique=("number",), passes=True),
        ),
    ],
)
def test_fields_of_a_message_are_its_keys(registry: None, attributes: dict[str, Any], keys: Keys) -> None:
    """One or several, for each kind of key."""
    channel = message(**attributes)
    check_declared(channel)
    assert keys_of(channel) == keys


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        ("row", ("row", "number")),
        (("row",), ("row",)),
        ("holder", ("holder_name",)),
        ("holder_name", ("holder_name",)),
        ((Seat.holder, "row"), ("holder_name", "row")),
    ],
)
def test_columns_of_a_table_are_the_keys_of_its_changes(registry: None, given: Any, columns: tuple[str, ...]) -> None:
    """By their name, or that of the model's attribute; "row" is the primary key, even where a column is called so."""
    channel = changes(Seat, ordering_key=given, unique_key=given)
    check_declared(channel)
    assert keys_of(channel) == Keys(ordering=columns, unique=columns)


def test_a_key_may_be_a_column_that_is_not_stored(registry: None) -> None:
    """It tells notifications apart; no listener is given it."""
    assert keys_of(changes(Seat, ordering_key="holder", exclude=("holder",))).ordering == ("holder_name",)


def test_keys_are_inherited(registry: None) -> None:
    """As lock_notifications is, by channels that differ in their name."""
    base = message(ordering_key="account")
    sub: type[Channel] = dataclasses.dataclass(type("Sub", (base,), {"__module__": __name__}))
    assert keys_of(sub) == Keys(ordering=("account",))


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"ordering_key": "acount"}, "ordering_key has 'acount', which is no field of it.*mean 'account'"),
        ({"unique_key": ("number", "row")}, '"row" is for trigger channels'),
    ],
)
def test_an_unknown_field_is_refused_with_what_was_meant(registry: None, attributes: dict[str, Any], told: str) -> None:
    """When the channel is first used: fields are known then."""
    with pytest.raises(ChannelError, match=told):
        check_declared(message(**attributes))


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"ordering_key": "account", "lock_notifications": False}, "nothing is stored: set lock_notifications = True"),
        ({"unique_key": "account", "lock_notifications": False}, "nothing is stored"),
        ({"ordering_key": "account", "acknowledge": "published"}, "nobody knows when a notification is done"),
        ({"failed_key": "passes"}, "is said of an ordering_key"),
        ({"ordering_key": "account", "failed_key": "passed"}, 'expected "holds" or "passes"'),
        ({"ordering_key": 5}, "expected a field's name, several in a tuple, or None"),
        ({"ordering_key": ()}, "expected a field's name"),
        ({"unique_key": {"account"}}, "expected a field's name"),
        ({"ordering_keys": "account"}, "Did you mean 'ordering_key'"),
    ],
)
def test_what_cannot_be_a_key_is_refused_in_the_class_statement(
    registry: None, attributes: dict[str, Any], told: str
) -> None:
    """With what to write instead."""
    with pytest.raises(ChannelError, match=told):
        message(**attributes)


@pytest.mark.parametrize(
    ("model", "given", "told"),
    [
        (Seat, "holdr", "ordering_key has 'holdr', which is no column of seat.*mean 'holder'"),
        (PLAIN, "row", "plain has no primary key: name the columns"),
        (PLAIN, "twice", "a virtual column of plain, which triggers are not given"),
    ],
)
def test_what_cannot_be_the_key_of_a_table_is_refused(registry: None, model: Any, given: str, told: str) -> None:
    """When a listener is declared, or on install."""
    with pytest.raises(ChannelError, match=told):
        check_declared(changes(model, ordering_key=given))


def test_a_published_channel_may_have_a_unique_key(registry: None) -> None:
    """Its notifications are coalesced while they wait, which is all that it asks for."""
    check_declared(message(unique_key="account", acknowledge="published"))
