"""What a channel's `ordering_key` and `unique_key` name: fields of a message, or columns of the table.

Owns their meaning, and what is refused of them once fields and columns can be known. What a key does to notifications
is `keyed`'s; how its text is made is the database's (`schema`, `capture`), so that psql and other services share it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

from pgpubsub_celery.channels.declaration import Channel, TriggerChannel, path_of
from pgpubsub_celery.channels.tables import columns_of, table_of
from pgpubsub_celery.errors import ChannelError, did_you_mean

Attribute: TypeAlias = Literal["ordering_key", "unique_key"]
ATTRIBUTES: tuple[Attribute, ...] = ("ordering_key", "unique_key")

ROW = "row"
"""Of a trigger channel: the primary key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """What a channel's notifications are ordered and made unique by; nothing in most channels."""

    ordering: tuple[str, ...] = ()
    """Fields or columns."""
    unique: tuple[str, ...] = ()
    passes: bool = False
    """Whether a failed notification lets the later ones of its key pass."""


def keys_of(cls: type[Channel]) -> Keys:
    """Return what a channel has declared.

    Raises:
        ChannelError: a field or column is unknown, or the table has no primary key.
    """
    if cls.ordering_key is None and cls.unique_key is None:
        return Keys()
    ordering, unique = (_parts(cls, attribute) for attribute in ATTRIBUTES)
    return Keys(ordering=ordering, unique=unique, passes=cls.failed_key == "passes")


def _parts(cls: type[Channel], attribute: Attribute) -> tuple[str, ...]:
    given: Any = getattr(cls, attribute)
    if given is None:
        return ()
    if issubclass(cls, TriggerChannel):
        return _columns(cls, attribute, given)
    # The fields, but not by way of checks, which is above this.
    declared: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
    known = [name for name, field in declared.items() if field.init]
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            row = ' "row" is for trigger channels.' if name == ROW else ""
            raise ChannelError(
                f"{path_of(cls)}: {attribute} has {name!r}, which is no field of it: expected some of "
                f"{', '.join(known) or 'none'}.{row}{did_you_mean(str(name), known)}"
            )
    return names


def _columns(cls: type[TriggerChannel[Any]], attribute: Attribute, given: Any) -> tuple[str, ...]:
    table = table_of(cls)
    if isinstance(given, str) and given == ROW:
        columns = list(table.primary_key.columns)
        if not columns:
            raise ChannelError(
                f'{path_of(cls)}: {attribute} = "row", but {table.fullname} has no primary key: name the columns that '
                "tell its rows apart."
            )
    else:
        columns = columns_of(cls, table, attribute, given if isinstance(given, (tuple, list)) else (given,))
    for column in columns:
        if column.computed is not None and column.computed.persisted is False:
            raise ChannelError(
                f"{path_of(cls)}: {attribute} has {column.name!r}, a virtual column of {table.fullname}, which "
                "triggers are not given: name the columns that it is computed from, or store it."
            )
    return tuple(str(column.name) for column in columns)
