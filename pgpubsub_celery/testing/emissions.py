"""What a test's code has emitted: typed messages and changes, once each, however many listeners they are for.

Owns the reading of what is stored back to channel instances, and the assertions about it. Reads only; sees what the
caller's transaction sees. Channels that are not stored leave nothing to be read, and are refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy import inspect as inspect_model
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import DetachedInstanceError

from pgpubsub_celery.binds import connection_of, session_or_connection
from pgpubsub_celery.channels import Channel, TriggerChannel, channel_field_names, check_declared
from pgpubsub_celery.emit import EnqueuedTask, current_schema
from pgpubsub_celery.errors import ChannelError, DecodeError, did_you_mean
from pgpubsub_celery.payload import decode_message
from pgpubsub_celery.rows import decode_rows
from pgpubsub_celery.schema import Names

C = TypeVar("C", bound=Channel)

_SHOWN = 10
"""Emissions that a failed assertion shows, at most."""

_EMPTY = object()

_STORED = """
SELECT n.id, n.subscription, n.operation, n.payload, n.context, n.created_at
FROM {n} n WHERE n.channel = ANY (CAST(:names AS text[])) ORDER BY n.id
"""


def emitted(bind: Any, channel: type[C], /) -> list[C]:
    """Return what is stored for a channel and not done yet, in order: each emission once, not once for each listener.

    Waiting, in flight, held and failed ones; what all its listeners have acknowledged is gone. Changes are instances of
    the trigger channel with `old` and `new`. `bind` is a Session (flushed first), scoped_session or Connection, or an
    Engine, which sees what is committed.

    Raises:
        ChannelError: the channel is not stored: what it sends is gone, or not sent before the commit.
        DecodeError: what is stored cannot be read with the channel's present declaration.
    """
    return [emission.message for emission in _read(bind, channel, "emitted")]


def assert_emitted(
    bind: Any,
    channel: type[C],
    /,
    *,
    times: int | None = None,
    operation: str | Iterable[str] | None = None,
    context: Mapping[str, Any] | None = None,
    **fields: Any,
) -> list[C]:
    """Fail unless something was emitted whose fields are these; return what was.

    Args:
        bind: as for `emitted`.
        channel: a stored channel.
        times: exactly so often; default: at least once.
        operation: for trigger channels: insert, update, delete, truncate, or several.
        context: entries that the notification's context must have.
        **fields: values that the message's fields must equal. For trigger channels `old` and `new`: a dict of
            attributes (`new={"name": "Ann"}`), or None for a row that must not be there.

    Raises:
        AssertionError: shows what was emitted instead, the most similar first.
        ChannelError: as `emitted`, or the channel has no such field.
    """
    __tracebackhide__ = True
    wanted = _Wanted(channel, operation, context, fields)
    found = _read(bind, channel, "assert_emitted")
    matching = [emission for emission in found if not wanted.differences(emission)]
    if len(matching) == times or (times is None and matching):
        return [emission.message for emission in matching]
    expected = "at least one" if times is None else str(times)
    raise AssertionError(f"{expected} {wanted} expected, {len(matching)} emitted.{_shown(found, wanted)}")


def refute_emitted(
    bind: Any,
    channel: type[Channel],
    /,
    *,
    operation: str | Iterable[str] | None = None,
    context: Mapping[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Fail if anything was emitted whose fields are these; without any, if anything was. As `assert_emitted`."""
    __tracebackhide__ = True
    wanted = _Wanted(channel, operation, context, fields)
    found = _read(bind, channel, "refute_emitted")
    matching = [emission for emission in found if not wanted.differences(emission)]
    if matching:
        raise AssertionError(f"no {wanted} expected, {len(matching)} emitted.{_shown(matching, wanted)}")


@dataclasses.dataclass(frozen=True)
class _Emission:
    """One emission."""

    message: Any
    operation: str
    context: Mapping[str, Any]

    def __str__(self) -> str:
        message = self.message
        if not isinstance(message, TriggerChannel):
            told = repr(message)
        else:
            sides = [f"{side}={_row(getattr(message, side))}" for side in ("old", "new")]
            told = f"{type(message).__name__}({self.operation}, {', '.join(sides)})"
        return f"{told} with the context {dict(self.context)!r}" if self.context else told


def _read(bind: Any, channel: type[Channel], caller: str) -> list[_Emission]:
    check_declared(channel)
    if channel is EnqueuedTask or not channel.lock_notifications:
        raise ChannelError(
            f"{caller}(): {channel.name()} does not store its messages, so there is nothing to look at: set "
            "lock_notifications = True on it, or call its listener directly."
        )
    if isinstance(bind, Engine):
        with bind.connect() as connection:
            return _read_on(connection, channel)
    owner = session_or_connection(bind, caller)
    if isinstance(owner, Session):
        owner.flush()
    return _read_on(connection_of(bind, caller), channel)


def _read_on(connection: Connection, channel: type[Channel]) -> list[_Emission]:
    statement = text(_STORED.format(n=Names(current_schema()).notification))
    rows = connection.execute(statement, {"names": [channel.name(), *channel.aliases]}).all()
    rows = _once_each(rows)
    messages = _decoded(channel, rows, connection)
    return [_Emission(message, row.operation, row.context or {}) for message, row in zip(messages, rows, strict=True)]


def _once_each(rows: Sequence[Any]) -> list[Any]:
    """Leave out what is there for a second listener: the same change, again.

    Equal emissions of one transaction cannot be told apart; but each listener has as many rows as there were.
    """
    seen: Counter[tuple[Any, ...]] = Counter()
    told: Counter[tuple[Any, ...]] = Counter()
    found = []
    for row in rows:
        content = json.dumps([row.payload, row.context], sort_keys=True)
        key = (row.operation, row.created_at, content)
        seen[row.subscription, key] += 1
        if seen[row.subscription, key] > told[key]:
            told[key] += 1
            found.append(row)
    return found


def _decoded(channel: type[Channel], rows: Sequence[Any], connection: Connection) -> list[Any]:
    if not issubclass(channel, TriggerChannel):
        return [decode_message(channel, row.payload) for row in rows]
    changes = []
    for change in decode_rows(channel, [row.payload for row in rows], connection):
        if isinstance(change, DecodeError):
            raise change
        message: Any = channel.__new__(channel)
        for side, value in zip(("old", "new"), change, strict=True):
            object.__setattr__(message, side, value)
        changes.append(message)
    return changes


class _Wanted:
    """What an assertion asks for."""

    def __init__(
        self,
        channel: type[Channel],
        operation: str | Iterable[str] | None,
        context: Mapping[str, Any] | None,
        fields: Mapping[str, Any],
    ) -> None:
        known = ("old", "new") if issubclass(channel, TriggerChannel) else channel_field_names(channel)
        for name in fields:
            if name not in known:
                raise ChannelError(
                    f"{channel.name()} has no field {name!r}: expected some of {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
        self._channel = channel
        self._operations = (operation,) if isinstance(operation, str) else operation and tuple(operation)
        self._context = context or {}
        self._fields = fields

    def differences(self, emission: _Emission) -> list[str]:
        """Return what is not as wanted."""
        found = []
        if self._operations and emission.operation not in self._operations:
            found.append(f"operation is {emission.operation!r}, not {' or '.join(map(repr, self._operations))}")
        for name, value in self._fields.items():
            found += _differences(name, getattr(emission.message, name), value)
        for name, value in self._context.items():
            found += _difference(f"context[{name!r}]", emission.context.get(name), value)
        return found

    def __str__(self) -> str:
        told = [f"operation {' or '.join(self._operations)}"] if self._operations else []
        told += [f"{name}={value!r}" for name, value in self._fields.items()]
        told += [f"context[{name!r}]={value!r}" for name, value in self._context.items()]
        return f"{self._channel.__name__} with {', '.join(told)}" if told else self._channel.__name__


def _differences(name: str, has: Any, wanted: Any) -> list[str]:
    if isinstance(wanted, Mapping) and name in ("old", "new"):
        if has is None:
            return [f"{name} is None"]
        return [
            difference
            for attribute, value in wanted.items()
            for difference in _difference(f"{name}.{attribute}", _attribute(has, attribute), value)
        ]
    return _difference(name, has, wanted)


def _attribute(row: Any, name: str) -> Any:
    try:
        return getattr(row, name, _EMPTY)
    except DetachedInstanceError:  # excluded, or of another table: not loaded, and it cannot be any more
        return _EMPTY


def _difference(name: str, has: Any, wanted: Any) -> list[str]:
    if has is _EMPTY:
        return [f"{name} was not stored"]
    return [] if has == wanted else [f"{name} is {has!r}, not {wanted!r}"]


def _shown(found: Sequence[_Emission], wanted: _Wanted) -> str:
    """Return what there is, with what is not as wanted, the nearest first."""
    if not found:
        return " Nothing of this channel was emitted."
    ranked = sorted(((wanted.differences(one), one) for one in found), key=lambda pair: len(pair[0]))
    lines = [f"\n  {one}" + "".join(f"\n    {difference}" for difference in differences) for differences, one in ranked]
    more = f"\n  … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return " There is:" + "".join(lines[:_SHOWN]) + more


def _row(value: Any) -> str:
    """Return a stored row as text: an instance of a model has seldom a representation that says more than its class."""
    if value is None:
        return "None"
    try:
        state = inspect_model(value)
        values = {name: state.dict[name] for name in state.mapper.column_attrs.keys() if name in state.dict}  # noqa: SIM118
    except (NoInspectionAvailable, AttributeError):
        return str(value)
    return f"{type(value).__name__}({', '.join(f'{name}={one!r}' for name, one in values.items())})"
