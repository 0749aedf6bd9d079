"""Listeners: what their functions and operations say, and what is refused at import."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table

from pgpubsub_celery import listeners
from pgpubsub_celery.channels import Channel, TriggerChannel
from pgpubsub_celery.errors import ChannelError, ListenerError
from pgpubsub_celery.listeners import (
    Listener,
    listeners_of,
    read_operations,
    read_parameters,
    register_listener,
    registered_listeners,
)

pytestmark = pytest.mark.usefixtures("registry")


@dataclasses.dataclass
class Reads(Channel):
    """A message."""

    channel_name = "test_listeners.Reads"
    model_id: int
    unit: str = "reads"


class Changes(TriggerChannel[Any]):
    """A table's changes."""

    channel_name = "test_listeners.Changes"
    model = Table("author", MetaData(), Column("id", Integer, primary_key=True))


def listener(name: str, channel: type[Channel] = Reads, **options: Any) -> Listener:
    return Listener(name=name, channel=channel, operations=("message",), fields=(), injected=frozenset(), **options)


# Operations


@pytest.mark.parametrize(
    ("on", "operations"),
    [
        ("insert", ("insert",)),
        ("save", ("insert", "update")),
        (["delete", "insert"], ("insert", "delete")),
        (("save", "update", "truncate"), ("insert", "update", "truncate")),
        (iter(["delete"]), ("delete",)),
    ],
)
def test_operations_are_read_in_one_order(on: Any, operations: tuple[str, ...]) -> None:
    """However they are written."""
    assert read_operations(Changes, on) == operations


def test_messages_have_one_operation() -> None:
    """Which nobody has to name."""
    assert read_operations(Reads, None) == ("message",)


@pytest.mark.parametrize(
    ("channel", "on", "told"),
    [
        (
            Changes,
            None,
            "test_listeners.Changes is a trigger channel: say which operations its listener wants, for example",
        ),
        (
            Changes,
            "inserts",
            "on='inserts' is not an operation: expected some of insert, update, delete, truncate, save",
        ),
        (Changes, "inserts", "Did you mean 'insert'?"),
        (Changes, ("insert", 5), "on=5 is not an operation"),
        (Changes, 5, "on=5 is not an operation"),
        (Changes, (), "on=() names no operation for test_listeners.Changes"),
        (
            Reads,
            "insert",
            "on='insert' was given for test_listeners.Reads, which is not a trigger channel: leave it out",
        ),
    ],
)
def test_mistaken_operations_are_refused(channel: type[Channel], on: Any, told: str) -> None:
    """At import, with what was expected."""
    with pytest.raises(ListenerError) as refused:
        read_operations(channel, on)
    assert told in str(refused.value)
    assert isinstance(refused.value, TypeError)


# Parameters


def wants(function: Callable[..., Any], channel: type[Channel] = Reads, *, bound: bool = False) -> tuple[Any, ...]:
    return read_parameters(function, channel, bound=bound)


def test_a_listener_takes_what_it_names() -> None:
    """Some of the channel's fields, and what the worker adds."""

    def some(unit: str, session: Any) -> None: ...
    def others(*, notification: Any, model_id: int, context: Any) -> None: ...
    def nothing() -> None: ...
    def task(self: Any, model_id: int) -> None: ...
    def defaults(model_id: int, more: int = 5) -> None: ...

    assert wants(some) == (("unit",), {"session"})
    assert wants(others) == (("model_id",), {"notification", "context"})
    assert wants(nothing) == ((), set())
    assert wants(task, bound=True) == (("model_id",), set())
    assert wants(defaults) == (("model_id",), set())


def test_a_listener_with_variable_keywords_takes_all_fields() -> None:
    """Each once; what the worker adds is asked for by name."""

    def everything(unit: str, session: Any, **others: Any) -> None: ...

    assert wants(everything) == (("unit", "model_id"), {"session"})


def test_a_listener_of_a_table_takes_old_and_new() -> None:
    """Either, or both."""

    def both(new: Any, old: Any) -> None: ...
    def one(old: Any, context: Any) -> None: ...

    assert wants(both, Changes) == (("new", "old"), set())
    assert wants(one, Changes) == (("old",), {"context"})


def test_the_parameters_of_a_wrapped_function_are_those_inside() -> None:
    """A decorator that keeps the signature is no obstacle."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapped

    @decorate
    def inside(model_id: int, session: Any) -> None: ...

    assert wants(inside) == (("model_id",), {"session"})


def test_mistaken_parameters_are_refused() -> None:
    """At import, with near names."""

    def unknown(modelid: int) -> None: ...
    def variable(*arguments: int) -> None: ...
    def positional(model_id: int, /) -> None: ...
    def unbound() -> None: ...
    def of_a_message(new: Any) -> None: ...

    told: dict[Callable[..., Any], str] = {
        unknown: "has the parameter 'modelid', which test_listeners.Reads has no field for: expected some of model_id, "
        "unit, session, context, notification. Did you mean 'model_id'?",
        variable: "takes *arguments: 'int' by position: listeners receive their arguments by name",
        positional: "takes model_id: 'int' by position",
        of_a_message: "has the parameter 'new', which test_listeners.Reads has no field for",
    }
    for function, text in told.items():
        with pytest.raises(ListenerError) as refused:
            wants(function)
        assert text in str(refused.value)
        assert function.__qualname__ in str(refused.value)
    with pytest.raises(
        ListenerError, match=r"bind=True but no first parameter for the task: write def unbound\(self, …\)"
    ):
        wants(unbound, bound=True)


def test_a_channel_that_cannot_be_used_is_refused_with_its_listener() -> None:
    """That is when its decorator has run for certain."""

    class Undecorated(Channel):
        number: int

    def take(number: int) -> None: ...

    with pytest.raises(ChannelError, match="Undecorated is not a dataclass"):
        wants(take, Undecorated)


# The registry


def test_listeners_are_kept_in_order_and_by_channel() -> None:
    """A reload takes the place of what was declared before; another channel's of the same name does not."""
    listeners._registry.clear()
    first, other, second = listener("a"), listener("a", Changes), listener("b")
    for one in (first, other, second):
        register_listener(one)
    assert registered_listeners() == [first, other, second]
    again = listener("a")
    register_listener(again)
    assert registered_listeners() == [again, other, second]
    assert listeners_of(Reads) == [again, second]
    assert listeners_of(Changes) == [other]


def test_a_listener_knows_its_names_and_whether_it_wants_the_session() -> None:
    """The present name first."""
    one = listener("new", aliases=("older", "oldest"))
    assert one.names == ("new", "older", "oldest")
    assert not one.wants_session
    assert dataclasses.replace(one, injected=frozenset({"session"})).wants_session
