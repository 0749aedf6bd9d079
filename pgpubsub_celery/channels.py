"""Channels: what users declare, and the registry that they are found in.

Owns `Channel` and `TriggerChannel`, the names of channels, and the checks that refuse a declaration that cannot work.
Pure: it reads classes and, for trigger channels, the columns of a table's declaration; it never opens a connection.
What a value of a field may be, and how it is stored, is `codecs`' and `payload`'s.

A class is registered by being declared. Whether it can be used is known when its decorator has run and the names in
its annotations are defined: `check_declared`, called when a listener is declared for it or a message emitted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import re
import sys
import types
import typing
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, Literal

from sqlalchemy import Column, Table
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper, class_mapper
from sqlalchemy.orm.exc import UnmappedClassError
from typing_extensions import TypeVar

from pgpubsub_celery.errors import ChannelError, UnknownChannelError, did_you_mean
from pgpubsub_celery.fieldtypes import fields_of
from pgpubsub_celery.hints import (
    Scope,
    UnresolvedNameError,
    is_class_variable,
    is_init_variable,
    own_annotations,
    remember_local_names,
    type_variables,
)

LONGEST_NAME = 200
"""Of a channel, in characters."""
LONGEST_IDENTIFIER = 63
"""Bytes of a Postgres identifier."""
_HASH_DIGITS = 20

INJECTED = ("session", "context", "notification")
"""Parameters of listeners that are no fields."""

M = TypeVar("M", default=Any)
_model_variable: Any = M

_registry: dict[tuple[str, str], type[Channel]] = {}
"""Channels by module and qualified name, in the order of declaration. Written by `Channel.__init_subclass__`."""


class Channel:
    """A kind of message. Subclass it as a dataclass: fields are the message's, attributes without annotation set it up.

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
    aliases: ClassVar[Sequence[str]] = ()
    """Earlier names, whose notifications are this channel's. Not inherited."""
    lease: ClassVar[float | None] = None
    """Seconds for a listener to begin or show life before its notification is given to another; None: the setting."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check what can be seen in the class statement, and register the class."""
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return  # TriggerChannel
        remember_local_names(cls, sys._getframe(1))  # noqa: SLF001 - CPython's way to see who declares the class
        # Identity is not inherited: a subclass is another channel.
        for name, default in (("channel_name", None), ("aliases", ())):
            if name not in cls.__dict__:
                setattr(cls, name, default)
        _check_attributes(cls)
        _check_annotations(cls)
        _check_names_are_free(cls)
        # A reload, and the second class that dataclass(slots=True) makes, take the place of the first.
        _registry[cls.__module__, cls.__qualname__] = cls

    @classmethod
    def name(cls) -> str:
        """Return the name that the database knows the channel by."""
        return cls.channel_name or path_of(cls)

    @classmethod
    def listen_safe_name(cls) -> str:
        """Return a name to LISTEN to: at most 63 bytes of a-z, 0-9 and _, and no other channel's."""
        name = cls.name()
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
        readable = re.sub(r"[^a-z0-9]+", "_", name.lower())
        return f"{readable[-(LONGEST_IDENTIFIER - _HASH_DIGITS - 1) :].strip('_') or 'channel'}_{digest}"


class TriggerChannel(Channel, Generic[M]):
    """The changes of a table: `class AuthorChanges(TriggerChannel[Author])`, or with `model = Author`.

    Listeners may take `old` and `new`, the row before and after (None where there is none). No fields of its own;
    `@dataclass` may be left out.
    """

    __slots__ = ()

    model: ClassVar[Any]
    """A mapped class or a Table."""
    include: ClassVar[Literal["all", "key"] | Iterable[Any]] = "all"
    """What is stored of a row: "all", "key" (the primary key alone) or columns, to which the primary key is added."""
    exclude: ClassVar[Iterable[Any]] = ()
    """Columns whose values never leave the table."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Find the model in `TriggerChannel[Model]`."""
        bound = type_variables(cls).get(TriggerChannel, {}).get(_model_variable)
        # A subclass of a channel that has its model inherits that.
        if "__orig_bases__" in cls.__dict__ and bound is not None and not isinstance(bound, typing.TypeVar):
            own = cls.__dict__.get("model", bound)
            if own is not bound:
                raise ChannelError(
                    f"{path_of(cls)} is a TriggerChannel[{_shown(bound)}] with model = {_shown(own)}: write either."
                )
            cls.model = bound
        super().__init_subclass__(**kwargs)


_FIELDS_OF_TRIGGERS = ("old", "new")
_ATTRIBUTES = tuple(name for name in vars(Channel) if not name.startswith("_"))


def path_of(cls: type) -> str:
    """Return `module.QualifiedName`."""
    return f"{cls.__module__}.{cls.__qualname__}"


# What can be seen in the class statement


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
        if field in _ATTRIBUTES:
            raise ChannelError(
                f"{what} declares the field {field!r}, which is an attribute of every channel: {_instead(field)}."
            )
        if field in INJECTED:
            raise ChannelError(
                f"{what} declares the field {field!r}, which listeners receive from the worker: give it another name."
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


# What is known once the decorator has run and other modules are imported

_checked: weakref.WeakSet[type[Channel]] = weakref.WeakSet()


def check_declared(cls: type[Channel]) -> None:
    """Refuse a class that cannot be used as a channel.

    Raises:
        ChannelError: says what is wrong with the declaration, and how to write it.
    """
    if cls in _checked:
        return
    given: Any = cls
    if not (isinstance(given, type) and issubclass(given, Channel)):
        raise ChannelError(f"{given!r} is not a channel: expected a subclass of Channel.")
    if cls in (Channel, TriggerChannel):
        raise ChannelError(f"{cls.__name__} itself is not a channel: declare a subclass of it.")
    if issubclass(cls, TriggerChannel):
        captured_columns(cls)
    else:
        _check_dataclass(cls)
        fields_of(cls, path_of(cls))
    _checked.add(cls)


def _check_dataclass(cls: type[Channel]) -> None:
    if "__dataclass_fields__" not in cls.__dict__:
        fields = [name for name, annotation in own_annotations(cls).items() if not is_class_variable(annotation)]
        if fields or not dataclasses.is_dataclass(cls):
            raise ChannelError(
                f"{path_of(cls)} is not a dataclass: write @dataclass above class {cls.__name__}"
                f"{f', so that {fields[0]!r} becomes a field of it' if fields else ''}."
            )


def channel_field_names(cls: type[Channel]) -> tuple[str, ...]:
    """Return the names that listeners of the channel may take: its fields, or old and new."""
    if issubclass(cls, TriggerChannel):
        return _FIELDS_OF_TRIGGERS
    fields = getattr(cls, "__dataclass_fields__", None)
    return () if fields is None else tuple(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]


# Trigger channels


def table_of(cls: type[TriggerChannel[Any]]) -> Table:
    """Return the table whose changes a trigger channel is about.

    Raises:
        ChannelError: `model` is missing, or neither a mapped class nor a Table.
    """
    what = path_of(cls)
    model: Any = getattr(cls, "model", None)
    if model is None:
        raise ChannelError(
            f"{what} has no model: write class {cls.__name__}(TriggerChannel[YourModel]), or model = YourModel in it."
        )
    if not isinstance(model, (type, Table)):
        try:
            model = Scope(cls).resolve(model)
        except UnresolvedNameError as exc:
            raise ChannelError(
                f"{what}: its model {exc.name!r} is not defined in {cls.__module__}: import it there, "
                "not under TYPE_CHECKING only."
            ) from None
        cls.model = model
    if isinstance(model, Table):
        return model
    mapper = _mapper_of(model)
    if mapper is None:
        raise ChannelError(f"{what}: model = {_shown(model)}: expected a class mapped by SQLAlchemy, or a Table.")
    if not isinstance(mapper.local_table, Table):
        raise ChannelError(
            f"{what}: {_shown(model)} is mapped to a {type(mapper.local_table).__name__}: only tables have triggers."
        )
    return mapper.local_table


def captured_columns(cls: type[TriggerChannel[Any]]) -> tuple[Column[Any], ...]:
    """Return the columns that a trigger channel stores of each row, in the table's order: `include` without `exclude`.

    Raises:
        ChannelError: there is no table, a column is unknown, or the primary key excluded.
    """
    table = table_of(cls)
    include, exclude = cls.include, _columns(cls, table, "exclude")
    keys = tuple(table.primary_key.columns)
    for column in exclude:
        if column in keys:
            raise ChannelError(
                f"{path_of(cls)}: exclude has {column.name!r}, of the primary key of {table.fullname}: without it a "
                "listener could not tell which row was changed. Leave it out of exclude."
            )
    if include == "key":
        if not keys:
            raise ChannelError(
                f'{path_of(cls)}: include = "key", but {table.fullname} has no primary key: name the columns.'
            )
        return keys
    wanted = set(table.columns) if include == "all" else {*keys, *_columns(cls, table, "include")}
    return tuple(column for column in table.columns if column in wanted and column not in exclude)


def _columns(cls: type[TriggerChannel[Any]], table: Table, attribute: str) -> list[Column[Any]]:
    """Return the columns that `include` or `exclude` names: by their own name, or by that of the model's attribute."""
    mapper = _mapper_of(cls.model)
    by_attribute = {} if mapper is None else {key: c for key, c in mapper.columns.items() if c.table is table}
    by_name = {column.name: column for column in table.columns}
    found: list[Column[Any]] = []
    for given in getattr(cls, attribute):
        if isinstance(given, Column):
            column = given if given.table is table else None
        else:
            key = given if isinstance(given, str) else given.key
            column = by_name.get(key) if key in by_name else by_attribute.get(key)
        if column is None:
            known = list(dict.fromkeys([*by_name, *by_attribute]))
            raise ChannelError(
                f"{path_of(cls)}: {attribute} has {str(given)!r}, which is no column of {table.fullname}: "
                f"expected some of {', '.join(known)}.{did_you_mean(str(given), known)}"
            )
        found.append(column)
    return found


def _mapper_of(model: Any) -> Mapper[Any] | None:
    if not isinstance(model, type):
        return None
    try:
        # Other models may be missing still: relationships are not needed, and not configured.
        return class_mapper(model, configure=False)
    except (UnmappedClassError, InvalidRequestError):
        return None


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


# The registry


def registered_channels() -> list[type[Channel]]:
    """Return all channels, classes that only serve as bases included, in the order of their declaration."""
    return list(_registry.values())


def find_channel(path: str) -> type[Channel]:
    """Return the channel with this name, earlier name or path; imports the path's module if need be.

    Raises:
        UnknownChannelError: there is none; says why, and suggests near names.
    """
    found = _registered(path)
    if found is not None:
        return found
    module, names = _import(path)
    found = _registered(path)
    if found is not None:
        return found
    value: Any = module
    for name in names:
        if not hasattr(value, name):
            raise UnknownChannelError(_nothing_there(path, value, name))
        value = getattr(value, name)
    if not (isinstance(value, type) and issubclass(value, Channel)):
        raise UnknownChannelError(f"{path!r} is {_kind(value)}, not a channel: expected a subclass of Channel.")
    return value


def _registered(path: str) -> type[Channel] | None:
    # The latest declaration of a module's own name goes first, as it would in the module.
    for cls in list(_registry.values()):
        if path == cls.name() or path in cls.aliases:
            return cls
    return next((cls for cls in list(_registry.values()) if path_of(cls) == path), None)


def _import(path: str) -> tuple[types.ModuleType, list[str]]:
    """Return the module of a path, imported, and the names that are left."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UnknownChannelError(
            f"There is no channel {path!r}: expected a full path such as blog.channels.PostReads.{_suggest(path)}"
        )
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            return importlib.import_module(name), parts[count:]
        except ModuleNotFoundError as exc:
            if exc.name is None or not (name == exc.name or name.startswith(f"{exc.name}.")):
                raise UnknownChannelError(f"{path!r} cannot be looked up: importing {name} failed: {exc}.") from exc
        except Exception as exc:
            raise UnknownChannelError(
                f"{path!r} cannot be looked up: importing {name} failed: {type(exc).__name__}: {exc}"
            ) from exc
    raise UnknownChannelError(f"There is no channel {path!r}: no module {parts[0]!r} can be imported.{_suggest(path)}")


def _nothing_there(path: str, owner: Any, name: str) -> str:
    if isinstance(owner, types.ModuleType):
        where = f"the module {owner.__name__} has no {name!r}"
        prefix = f"{owner.__name__}."
    else:
        where, prefix = f"{_kind(owner)} has no {name!r}", f"{path.rpartition('.')[0]}."
    near = [
        f"{prefix}{key}" for key, value in vars(owner).items() if isinstance(value, type) and issubclass(value, Channel)
    ]
    return f"There is no channel {path!r}: {where}.{did_you_mean(f'{prefix}{name}', near) or _suggest(path)}"


def _suggest(path: str) -> str:
    return did_you_mean(path, [cls.name() for cls in registered_channels()])


def _kind(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"the module {value.__name__}"
    return f"the class {path_of(value)}" if isinstance(value, type) else f"a {type(value).__name__}"


def select_channels(paths: Sequence[str] | None) -> list[type[Channel]]:
    """Return the usable channels that `paths` name, in the order of declaration; of a base class, its subclasses too.

    Without paths: all registered ones. Classes that only serve as bases are left out.

    Raises:
        UnknownChannelError: a path names no channel, or a base class without a usable subclass.
        ChannelError: a channel that was meant to be used is declared in a way that cannot work.
    """
    if not paths:
        return [cls for cls in registered_channels() if _usable(cls) or not _only_a_base(cls)]
    selected: set[type[Channel]] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        named = find_channel(path)
        found = [cls for cls in registered_channels() if issubclass(cls, named) and _usable(cls)]
        if _usable(named) and named not in found:
            found.append(named)  # declared again since; whoever imported the first goes on using it
        if not found:
            raise UnknownChannelError(f"{path!r} has no subclass that could be listened to, and {_why_unusable(named)}")
        selected.update(found)
    known = registered_channels()
    return sorted(selected, key=lambda cls: known.index(cls) if cls in known else len(known))


def _usable(cls: type[Channel]) -> bool:
    try:
        check_declared(cls)
    except ChannelError:
        return False
    return True


def _why_unusable(cls: type[Channel]) -> str:
    try:
        check_declared(cls)
    except ChannelError as exc:
        return f"cannot be listened to itself: {exc}"
    return "is usable"


def _only_a_base(cls: type[Channel]) -> bool:
    """Whether an unusable class is none by intention. Raises what is wrong with it otherwise."""
    if any(other is not cls and issubclass(other, cls) for other in registered_channels()):
        return True
    if issubclass(cls, TriggerChannel):
        if getattr(cls, "model", None) is None:
            return True
    elif not dataclasses.is_dataclass(cls) and not own_annotations(cls):
        return True
    check_declared(cls)
    return False
