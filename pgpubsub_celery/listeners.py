"""Listeners: which function wants which changes of which channel.

Owns the declaration of a listener as plain data, the reading of its function's parameters, and the
registry that `install`, the bridge and the worker look listeners up in. Pure: it knows nothing of
Celery tasks or databases, so that what a listener wants can be checked at import.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pgpubsub_celery.channels import Channel, TriggerChannel, channel_field_names, check_declared
from pgpubsub_celery.errors import ListenerError, did_you_mean

INJECTED = ("session", "context", "notification")
BATCH_INJECTED = ("session", "notifications")
"""What a listener with batch= may declare besides its list."""
"""Parameters that the worker fills by name."""

MESSAGE = "message"
TRIGGER_OPERATIONS = ("insert", "update", "delete", "truncate")
_READINGS = {"save": ("insert", "update")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Listener:
    """One listener of one channel, as declared."""

    name: str
    """The name of its Celery task."""
    channel: type[Channel]
    operations: tuple[str, ...]
    """`("message",)`, or some of insert, update, delete, truncate."""
    fields: tuple[str, ...]
    """The channel's fields that the function declares."""
    injected: frozenset[str]
    """Which of session, context, notification the function declares."""
    changed: tuple[str, ...] = ()
    condition: Any = None
    filter: Any = None
    aliases: tuple[str, ...] = ()
    """Names that the task had in earlier releases."""
    batch: int | None = None
    """Notifications that its function is given as a list, at most; None for a function of one."""
    bundle: int | Literal["auto"] | None = None
    """Notifications in one message, at most; "auto" as many as are soon done; None is "auto" with `session`, else 1."""

    @property
    def wants_session(self) -> bool:
        """Whether the function runs inside the transaction that acknowledges its notification."""
        return "session" in self.injected

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its earlier names."""
        return (self.name, *self.aliases)


_registry: dict[tuple[str, str], Listener] = {}


def register_listener(listener: Listener) -> None:
    """Add a listener; the same name on the same channel again (a reload) replaces the first."""
    _registry[listener.channel.name(), listener.name] = listener


def registered_listeners() -> list[Listener]:
    """Return all listeners in the order of their declaration."""
    return list(_registry.values())


def listeners_of(channel: type[Channel]) -> list[Listener]:
    """Return the listeners of one channel in the order of their declaration."""
    return [listener for listener in _registry.values() if listener.channel.name() == channel.name()]


def read_operations(channel: type[Channel], on: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the operations that `on=` means for this channel.

    Raises:
        ListenerError: `on` is missing for a trigger channel, given for another, or not an operation.
    """
    if not issubclass(channel, TriggerChannel):
        if on is not None:
            raise ListenerError(
                f"on={on!r} was given for {channel.name()}, which is not a trigger channel: leave it out; "
                "its listeners receive every message."
            )
        return (MESSAGE,)
    if on is None:
        raise ListenerError(
            f"{channel.name()} is a trigger channel: say which operations its listener wants, for example "
            'on="insert", on="save" or on=("insert", "delete").'
        )
    wanted: list[str] = []
    words: Iterable[Any] = [on] if isinstance(on, str) or not isinstance(on, Iterable) else on
    for word in words:
        known = (*TRIGGER_OPERATIONS, *_READINGS)
        if word not in known:
            raise ListenerError(
                f"on={word!r} is not an operation: expected some of {', '.join(known)}.{did_you_mean(str(word), known)}"
            )
        wanted.extend(_READINGS.get(word, (word,)))
    if not wanted:
        raise ListenerError(f"on={on!r} names no operation for {channel.name()}.")
    return tuple(operation for operation in TRIGGER_OPERATIONS if operation in wanted)


def read_parameters(
    function: Callable[..., Any], channel: type[Channel], *, bound: bool
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the channel fields and the injected names that a listener's function declares.

    `bound` says that the first parameter is the task itself (`bind=True`).

    Raises:
        ListenerError: a parameter is neither a field of the channel nor injected, or cannot be given by name.
    """
    check_declared(channel)
    known = channel_field_names(channel)
    parameters = list(inspect.signature(function).parameters.values())
    if bound:
        if not parameters:
            raise ListenerError(
                f"{function.__qualname__} has bind=True but no first parameter for the task: "
                f"write def {function.__name__}(self, …)."
            )
        parameters = parameters[1:]
    fields: list[str] = []
    injected: set[str] = set()
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            fields.extend(name for name in known if name not in fields and name not in INJECTED)
        elif parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.POSITIONAL_ONLY:
            raise ListenerError(
                f"{function.__qualname__} takes {parameter} by position: listeners receive their arguments by name."
            )
        elif parameter.name in INJECTED:
            injected.add(parameter.name)
        elif parameter.name in known:
            if parameter.name not in fields:
                fields.append(parameter.name)
        elif parameter.default is parameter.empty:
            names = (*known, *INJECTED)
            raise ListenerError(
                f"{function.__qualname__} has the parameter {parameter.name!r}, which {channel.name()} has no field "
                f"for: expected some of {', '.join(names)}.{did_you_mean(parameter.name, names)}"
            )
    return tuple(fields), frozenset(injected)


def read_batch_parameters(function: Callable[..., Any], *, bound: bool) -> tuple[tuple[str], frozenset[str]]:
    """Return the parameter that takes the list, in a tuple, and the injected names that a batch listener declares.

    Raises:
        ListenerError: there is not exactly one parameter for the list, or one cannot be given by name.
    """
    parameters = list(inspect.signature(function).parameters.values())[1 if bound else 0 :]
    lists = [one for one in parameters if one.name not in BATCH_INJECTED and one.default is one.empty]
    wrong = [one for one in parameters if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if wrong or len(lists) != 1 or lists[0].name in INJECTED:
        given = ", ".join(one.name for one in parameters) or "none"
        raise ListenerError(
            f"{function.__qualname__} has batch= and the parameters {given}: expected one for the list of messages, "
            f"and of {' and '.join(BATCH_INJECTED)} what it needs: "
            f"def {function.__name__}(messages, session)."
        )
    return (lists[0].name,), frozenset(one.name for one in parameters if one.name in BATCH_INJECTED)
