"""`Channel` and `TriggerChannel`: what users subclass, their names, and what is refused in the class statement.

A class is registered by being declared. Whether it can be used is known when its decorator has run and the names in its
annotations are defined: that is for `checks`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import sys
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias

from typing_extensions import TypeVar

from pgpubsub_celery.errors import ChannelError
from pgpubsub_celery.hints import (
    is_class_variable,
    is_init_variable,
    own_annotations,
    remember_local_names,
    type_variables,
)
from pgpubsub_celery.settings import DEFAULT_DATABASE

LONGEST_NAME = 200
"""Of a channel, in characters."""
LONGEST_IDENTIFIER = 63
"""Bytes of a Postgres identifier."""
_HASH_DIGITS = 20
EVERY_DATABASE = "*"

INJECTED = ("session", "context", "notification")
"""Parameters of listeners that are no fields."""

# Not Iterable: a str is one of str.
Columns: TypeAlias = tuple[Any, ...] | list[Any] | set[Any] | frozenset[Any]
M = TypeVar("M", default=Any)
_model_variable: Any = M

_registry: dict[tuple[str, str], type[Channel]] = {}
"""Channels by module and qualified name, in the order of declaration. Written by `Channel.__init_subclass__`."""


class Channel:
    """A kind of message. Subclass it as a dataclass: fields are the message's, attributes without annotation set it up.

    For example::

        @dataclass
        class PostReads(Channel):
            lock_notifications = True
            model_id: int
            date: datetime.date

    Mistakes are a `ChannelError`, in the class statement or, where the decorator and other modules have to be waited
    for, when a first listener is declared or a first message emitted.
    """

    __slots__ = ()

    lock_notifications: ClassVar[bool] = False
    """Stored: each notification is acted on once, and can be recovered. Otherwise sent to whoever listens."""
    acknowledge: ClassVar[Literal["finished", "published"]] = "finished"
    """When a stored notification is dealt with: its listener has finished, or the broker confirmed its message."""
    channel_name: ClassVar[str | None] = None
    """The channel's identity in the database; by default its path. Not inherited."""
    aliases: ClassVar[tuple[str, ...] | list[str]] = ()
    """Earlier names, whose notifications are this channel's. Not inherited."""
    lease: ClassVar[float | None] = None
    """Seconds for a listener to begin or show life before its notification is given to another; None: the setting."""
    database: ClassVar[str | tuple[str, ...]] = DEFAULT_DATABASE
    """Where there are several databases (the setting `databases`): the alias of its own; several; or "*" for all."""
    ordering_key: ClassVar[str | tuple[Any, ...] | list[Any] | None] = None
    """Stored notifications that are equal in this field (or these) run one at a time, in the order of their ids."""
    unique_key: ClassVar[str | tuple[Any, ...] | list[Any] | None] = None
    """Of waiting notifications that are equal in this field (or these) only the newest is run."""
    failed_key: ClassVar[Literal["holds", "passes"]] = "holds"
    """Whether a failed notification holds the later ones of its ordering key, until it is retried or discarded, or
    lets them pass."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check what can be seen in the class statement, and register the class."""
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return  # TriggerChannel
        _take_place_of_first(cls)
        # Of CPython alone, as the way to see the names around the class statement.
        remember_local_names(cls, sys._getframe(1), also=cls.__dict__.get("model"))  # noqa: SLF001
        # Identity is not inherited: a subclass is another channel.
        for name, default in (("channel_name", None), ("aliases", ())):
            if name not in cls.__dict__:
                setattr(cls, name, default)
        _check_spelling(cls)
        _check_attributes(cls)
        _check_annotations(cls)
        _check_names_are_free(cls)
        # A reload takes the place of what was declared before.
        _registry[cls.__module__, cls.__qualname__] = cls

    @classmethod
    def name(cls) -> str:
        """Return the name that the database knows the channel by."""
        return cls.channel_name or path_of(cls)

    @classmethod
    def listen_safe_name(cls) -> str:
        """Return a name to LISTEN to: at most 63 bytes of a-z, 0-9 and _, and no other channel's."""
        return listen_name_of(cls.name())


class TriggerChannel(Channel, Generic[M]):
    """The changes of a table: `class AuthorChanges(TriggerChannel[Author])`, or with `model = Author`.

    Listeners may take `old` and `new`, the row before and after (None where there is none). No fields of its own;
    `@dataclass` may be left out.
    """

    __slots__ = ()

    model: ClassVar[Any]
    """A mapped class or a Table."""
    include: ClassVar[Literal["all", "key"] | Columns] = "all"
    """What is stored of a row: "all", "key" (the primary key alone) or columns, to which the primary key is added."""
    exclude: ClassVar[Columns] = ()
    """Columns whose values never leave the table."""
    renamed: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Columns that had another name in rows stored earlier: `{"name": "full_name"}`, the earlier name first."""
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What rows stored earlier have in columns added since: values, or functions without arguments that return one.
    Without a default, such a column is not loaded."""

    if TYPE_CHECKING:  # no fields: instances are what a listener with batch= is given

        @property
        def old(self) -> M | None:
            """The row before the change; None for an insert."""

        @property
        def new(self) -> M | None:
            """The row after the change; None for a delete."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Find the model in `TriggerChannel[Model]`."""
        bound = type_variables(cls).get(TriggerChannel, {}).get(_model_variable)
        # A subclass of a channel that has its model inherits that.
        if "__orig_bases__" in cls.__dict__ and bound not in (None, Any) and not isinstance(bound, typing.TypeVar):
            own = cls.__dict__.get("model", bound)
            if own is not bound:
                raise ChannelError(
                    f"{path_of(cls)} is a TriggerChannel[{shown(bound)}] with another model, {shown(own)}: write one."
                )
            cls.model = bound
        super().__init_subclass__(**kwargs)


TRIGGER_FIELDS = ("old", "new")
_ATTRIBUTES = tuple(name for name in vars(Channel) if not name.startswith("_"))


def listen_name_of(name: str) -> str:
    """Return what to LISTEN to for the channel of this name: at most 63 bytes, and no other channel's."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    readable = re.sub(r"[^a-z0-9]+", "_", name.lower())
    return f"{readable[-(LONGEST_IDENTIFIER - _HASH_DIGITS - 1) :].strip('_') or 'channel'}_{digest}"


def path_of(cls: type) -> str:
    """Return `module.QualifiedName`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def databases_of(cls: type[Channel]) -> tuple[str, ...]:
    """Return the aliases of the databases that a channel is in; ("*",) for all."""
    given: Any = cls.database
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def is_in_database(cls: type[Channel], alias: str) -> bool:
    """Whether a channel is in the database with this alias."""
    databases = databases_of(cls)
    return EVERY_DATABASE in databases or alias in databases


def _take_place_of_first(cls: type[Channel]) -> None:
    """Give the second class that `dataclass(slots=True)` makes the first one's name: that comes too late for us."""
    fields = cls.__dict__.get("__dataclass_fields__")
    if fields is not None:
        for first in list(_registry.values()):
            if first.__dict__.get("__dataclass_fields__") is fields:
                cls.__qualname__ = first.__qualname__


# What can be seen in the class statement


def _check_spelling(cls: type[Channel]) -> None:
    """Refuse `lock_notification = True`, which would silently mean nothing."""
    known = [name for base in cls.__mro__ if base.__module__ == __name__ for name in own_annotations(base)]
    fields = getattr(cls, "__dataclass_fields__", {}).keys() | own_annotations(cls).keys()
    for name, value in vars(cls).items():
        if name.startswith("_") or name in known or name in fields or hasattr(value, "__get__"):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.83)
        if near:
            raise ChannelError(
                f"{path_of(cls)}: {name} = {value!r} means nothing. Did you mean {near[0]!r}? "
                "If not, give it a name that does not look like it."
            )


def _check_attributes(cls: type[Channel]) -> None:
    what = path_of(cls)
    if not isinstance(cls.lock_notifications, bool):
        raise ChannelError(f"{what}: lock_notifications = {cls.lock_notifications!r}: expected True or False.")
    if cls.acknowledge not in ("finished", "published"):
        raise ChannelError(f'{what}: acknowledge = {cls.acknowledge!r}: expected "finished" or "published".')
    if cls.acknowledge == "published" and not cls.lock_notifications:
        raise ChannelError(
            f'{what}: acknowledge = "published" says when a stored notification may go, but nothing is stored: '
            "set lock_notifications = True, or leave acknowledge out."
        )
    lease: Any = cls.lease
    if lease is not None and (
        isinstance(lease, bool) or not isinstance(lease, (int, float)) or not lease > 0 or not math.isfinite(lease)
    ):
        raise ChannelError(f"{what}: lease = {lease!r}: expected seconds, more than 0, or None for the setting.")
    databases = databases_of(cls)
    if not databases or not all(isinstance(alias, str) and alias for alias in databases):
        raise ChannelError(
            f'{what}: database = {cls.database!r}: expected the alias of a database, a tuple of several, or "*".'
        )
    _check_keys(cls)
    if cls.channel_name is not None:
        _check_name(cls.channel_name, f"{what}: channel_name")
    aliases: Any = cls.aliases
    if not isinstance(aliases, (tuple, list)):
        fix = f" Write aliases = ({aliases!r},)." if isinstance(aliases, str) else ""
        raise ChannelError(f"{what}: aliases = {aliases!r}: expected a tuple of earlier names.{fix}")
    for alias in aliases:
        _check_name(alias, f"{what}: an alias")
    cls.aliases = tuple(alias for alias in dict.fromkeys(aliases) if alias != cls.name())
    if issubclass(cls, TriggerChannel):
        _check_columns_attribute(cls, "include")
        _check_columns_attribute(cls, "exclude")
        for attribute in ("renamed", "defaults"):
            value = getattr(cls, attribute)
            if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
                raise ChannelError(f"{what}: {attribute} = {value!r}: expected a dictionary by names of columns.")


def _check_keys(cls: type[Channel]) -> None:
    """Refuse what cannot be a key of this channel, whatever its fields are. Those are looked at later, by `keys`."""
    what = path_of(cls)
    parts = "a column, several in a tuple" if issubclass(cls, TriggerChannel) else "a field's name, several in a tuple"
    for attribute in ("ordering_key", "unique_key"):
        given: Any = getattr(cls, attribute)
        if given is None:
            continue
        several = given if isinstance(given, (tuple, list)) else (given,)
        if not several or not all(isinstance(one, str) or _is_column(cls, one) for one in several):
            raise ChannelError(f"{what}: {attribute} = {given!r}: expected {parts}, or None.")
        if not cls.lock_notifications:
            raise ChannelError(
                f"{what}: {attribute} = {given!r} says which stored notifications belong together, but nothing is "
                f"stored: set lock_notifications = True, or leave {attribute} out."
            )
    if cls.failed_key not in ("holds", "passes"):
        raise ChannelError(f'{what}: failed_key = {cls.failed_key!r}: expected "holds" or "passes".')
    if cls.ordering_key is None:
        if cls.failed_key != "holds":
            raise ChannelError(f'{what}: failed_key = "passes" is said of an ordering_key, and there is none.')
    elif cls.acknowledge == "published":
        raise ChannelError(
            f'{what}: acknowledge = "published" with ordering_key = {cls.ordering_key!r}: once its row is gone, nobody '
            "knows when a notification is done, and the next may run. Leave one of them out."
        )


def _is_column(cls: type[Channel], given: Any) -> bool:
    return issubclass(cls, TriggerChannel) and isinstance(getattr(given, "key", None), str)


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str):
        raise ChannelError(f"{what} is {name!r}: expected a str.")
    if not name:
        raise ChannelError(f"{what} is empty: give it a name, or leave it out.")
    if len(name) > LONGEST_NAME:
        raise ChannelError(f"{what} has {len(name)} characters ({name[:40]!r}…): expected at most {LONGEST_NAME}.")
    if not name.isprintable() or " " in name:
        raise ChannelError(f"{what} is {name!r}: expected no spaces and no characters that cannot be printed.")


def _check_columns_attribute(cls: type[TriggerChannel[Any]], attribute: str) -> None:
    given: Any = getattr(cls, attribute)
    if attribute == "include" and given in ("all", "key"):
        return
    what = f"{path_of(cls)}: {attribute} = {given!r}"
    if isinstance(given, str):
        choices = '"all", "key" or ' if attribute == "include" else ""
        raise ChannelError(f"{what}: expected {choices}a tuple of columns: write {attribute} = ({given!r},).")
    if not isinstance(given, (tuple, list, set, frozenset)):
        raise ChannelError(f"{what}: expected a tuple of columns.")
    if attribute == "include" and not given:
        raise ChannelError(f'{what} names no column: write include = "key" for the primary key alone.')
    for column in given:
        if not isinstance(column, str) and not isinstance(getattr(column, "key", None), str):
            raise ChannelError(f"{what}: {column!r} is no column: write its name.")


def _check_annotations(cls: type[Channel]) -> None:
    what = path_of(cls)
    for field, annotation in own_annotations(cls).items():
        if is_class_variable(annotation):
            continue
        if is_init_variable(annotation):
            raise ChannelError(
                f"{what}.{field} is an InitVar, which no listener could receive: make it a field, or leave it out."
            )
        if issubclass(cls, TriggerChannel):
            raise ChannelError(
                f"{what} declares the field {field!r}: a trigger channel has old and new, and no fields of its own. "
                "Leave it out; a class attribute is written without annotation."
            )
        check_field_name(cls, field)


def check_field_name(cls: type[Channel], field: str) -> None:
    """Refuse names that mean something else."""
    if field in _ATTRIBUTES:
        raise ChannelError(
            f"{path_of(cls)} has the field {field!r}, which is an attribute of every channel: {_instead(field)}."
        )
    if field in INJECTED:
        raise ChannelError(
            f"{path_of(cls)} has the field {field!r}, which listeners receive from the worker: give it another name."
        )


def _instead(field: str) -> str:
    if callable(getattr(Channel, field)):
        return "give the field another name"
    return f"set it without annotation ({field} = …), or give the field another name"


def _check_names_are_free(cls: type[Channel]) -> None:
    mine = {cls.name(), *cls.aliases}
    for key, other in list(_registry.items()):
        if key == (cls.__module__, cls.__qualname__):
            continue
        for name in sorted(mine & {other.name(), *other.aliases}):
            raise ChannelError(
                f"{path_of(cls)} and {path_of(other)} both have the name {name!r}"
                f"{' (an alias)' if name != cls.name() or name != other.name() else ''}: "
                "notifications of one would be the other's. Change channel_name or aliases of one of them."
            )


def shown(value: Any) -> str:
    """Return a model as errors name it."""
    return value.__name__ if isinstance(value, type) else repr(value)
