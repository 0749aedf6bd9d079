"""Finding channels: by name, by earlier name, by path.

Owns what `--channels` and the channel names given to `notify` mean.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Sequence
from typing import Any

from pgpubsub_celery.channels.checks import check_declared
from pgpubsub_celery.channels.declaration import (
    EVERY_DATABASE,
    Channel,
    TriggerChannel,
    _registry,
    databases_of,
    is_in_database,
    path_of,
)
from pgpubsub_celery.errors import ChannelError, UnknownChannelError, did_you_mean
from pgpubsub_celery.hints import own_annotations


def registered_channels(database: str | None = None) -> list[type[Channel]]:
    """Return all channels in the order of their declaration, without classes that only serve as bases.

    With the alias of a `database`: those that are in it.

    Raises:
        ChannelError: a channel is declared in a way that cannot work.
    """
    found = [cls for cls in _declared() if _usable(cls) or not _only_a_base(cls)]
    return found if database is None else [cls for cls in found if is_in_database(cls, database)]


def _declared() -> list[type[Channel]]:
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
    declared = _declared()
    for cls in declared:
        if path == cls.name() or path in cls.aliases:
            return cls
    return next((cls for cls in declared if path_of(cls) == path), None)


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
    return did_you_mean(path, [cls.name() for cls in _declared()])


def _kind(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"the module {value.__name__}"
    return f"the class {path_of(value)}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_databases(aliases: Sequence[str]) -> None:
    """Refuse channels that are in a database without a configuration: nobody would ever listen to them.

    Raises:
        ChannelError: names the first such channel, its database and the fix.
    """
    for cls in registered_channels():
        for alias in databases_of(cls):
            if alias != EVERY_DATABASE and alias not in aliases:
                raise ChannelError(
                    f"{path_of(cls)} is in the database {alias!r}, which is not configured: add it to "
                    f"pgpubsub_databases, or change the channel's `database`.{did_you_mean(alias, aliases)}"
                )


def select_channels(paths: Sequence[str] | None, database: str | None = None) -> list[type[Channel]]:
    """Return the usable channels that `paths` name, in the order of declaration; of a base class, its subclasses too.

    Without paths: all registered ones. Classes that only serve as bases are left out; with the alias of a `database`,
    those that are in others, too.

    Raises:
        UnknownChannelError: a path names no channel, one that is in another database, or a base class without a usable
            subclass.
        ChannelError: a channel that was meant to be used is declared in a way that cannot work.
    """
    if not paths:
        return registered_channels(database)
    selected: set[type[Channel]] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        named = find_channel(path)
        found = [cls for cls in _declared() if issubclass(cls, named) and _usable(cls)]
        if _usable(named) and named not in found:
            found.append(named)  # declared again since; whoever imported the first goes on using it
        if not found:
            raise UnknownChannelError(f"{path!r} has no subclass that could be listened to, and {_why_unusable(named)}")
        there = [cls for cls in found if database is None or is_in_database(cls, database)]
        if not there:
            aliases = " or ".join(repr(alias) for alias in databases_of(named))
            raise UnknownChannelError(
                f"{path!r} is not in the database {database!r}, but in {aliases}: name that with --database, or leave "
                "the channel out."
            )
        selected.update(there)
    known = _declared()
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
    if any(other is not cls and issubclass(other, cls) for other in _declared()):
        return True
    if issubclass(cls, TriggerChannel):
        if getattr(cls, "model", None) is None:
            return True
    elif not dataclasses.is_dataclass(cls) and not own_annotations(cls):
        return True
    check_declared(cls)
    return False
