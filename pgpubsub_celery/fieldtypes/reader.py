"""From an annotation to its codec.

Owns which types are supported, and what is said of those that are not.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from typing_extensions import override

from pgpubsub_celery.errors import ChannelError
from pgpubsub_celery.fieldtypes.choices import ANY, Enum, Flag, literal_of, union_of
from pgpubsub_celery.fieldtypes.codec import Codec
from pgpubsub_celery.fieldtypes.containers import Dataclass, Dict, Field, Items, Tuple
from pgpubsub_celery.fieldtypes.moments import MOMENTS
from pgpubsub_celery.fieldtypes.places import ALIASES, LITERALS, UNIONS, Place
from pgpubsub_celery.fieldtypes.scalars import NONE, SCALARS
from pgpubsub_celery.hints import Scope, is_init_variable, own_annotations, substitute, type_variables

SUPPORTED = (
    "bool, int, float, str, None, Decimal, date, datetime, time, timedelta, UUID, bytes, Enum, Literal, list, tuple, "
    "set, frozenset, dict, dataclasses, unions of these, and Any"
)
_INSTEAD: dict[str, str] = {
    "Sequence": "list[…] or tuple[…, ...]",
    "MutableSequence": "list[…]",
    "Iterable": "list[…]",
    "Collection": "list[…]",
    "Mapping": "dict[…]",
    "MutableMapping": "dict[…]",
    "Set": "set[…] or frozenset[…]",
    "AbstractSet": "set[…] or frozenset[…]",
    "object": "Any",
    "bytearray": "bytes",
}
_SIMPLE = {**SCALARS, **MOMENTS}
_BARE: dict[Any, Any] = {
    **{kind: kind for kind in (list, set, frozenset, tuple, dict)},
    **{getattr(typing, kind.__name__.title()): kind for kind in (list, set, tuple, dict)},
    typing.FrozenSet: frozenset,  # noqa: UP006 - users may write so
}
_DEEPEST = 60

_codecs: dict[type, Dataclass] = {}
_lock = threading.Lock()
"""For writing `_codecs`."""


def codec_of(cls: type, where: str) -> Dataclass:
    """Return the codec of a dataclass; made once. `where` names it in errors.

    Raises:
        ChannelError: an annotation cannot be resolved, or has a type that is not supported; names field, type and fix.
    """
    codec = _codecs.get(cls)
    if codec is None:
        with _lock:
            codec = _codecs.get(cls)
            if codec is None:
                codec = _Reader().dataclass(cls, {}, Scope(cls), where)
                _codecs[cls] = codec
    return codec


class _Reader:
    """Reads the annotations of one class and of the dataclasses inside it, which may contain each other."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._depth = 0

    def dataclass(self, kind: Any, variables: Mapping[Any, Any], outer: Scope, where: str) -> Dataclass:
        """Return the codec of a dataclass whose type variables are `variables`."""
        arguments = f"[{', '.join(map(_told, variables.values()))}]" if variables else ""
        key = (kind, *map(_hashable, variables.values()))
        if key in self._known:
            known: Dataclass = self._known[key]
            return known
        codec = self._known[key] = Dataclass(kind, arguments)
        bound = type_variables(kind, variables)
        annotations: dict[str, tuple[type, Any]] = {}
        for base in reversed(kind.__mro__):
            for name, annotation in own_annotations(base).items():
                annotations[name] = base, annotation
                if is_init_variable(annotation):
                    raise ChannelError(
                        f"{where}.{name} is an InitVar, which is not kept: make it a field, or leave it out."
                    )
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            owner, annotation = annotations.get(field.name, (kind, field.type))
            place = Place(f"{where}.{field.name}", Scope(owner, outer.names), bound.get(owner, {}), kind)
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            codec.fields.append(Field(field.name, self.codec(annotation, place), required))
        return codec

    def codec(self, annotation: Any, place: Place) -> Codec:
        """Return the codec for an annotation."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ChannelError(f"{place.where}: its type contains ever more of itself: give it an end.")
        try:
            hint = place.read(annotation)
            if isinstance(hint, ALIASES):
                return self._alias(hint, place)
            codec = self._plain(hint, place)
        finally:
            self._depth -= 1
        if codec is None:
            raise ChannelError(_unsupported(hint, place))
        return codec

    def _alias(self, alias: Any, place: Place) -> Codec:
        """Return the codec of a `type X = …`, which may contain X."""
        known: Codec | None = self._known.get(alias)
        if known is None:
            itself = self._known[alias] = _Itself(alias)
            known = self._known[alias] = itself.codec = self.codec(place.value_of(alias), place)
        return known

    def _plain(self, hint: Any, place: Place) -> Codec | None:
        if hint is Any:
            return ANY
        if _hashable(hint) in _BARE:
            return Dict(ANY, ANY) if _BARE[hint] is dict else Items(_BARE[hint], ANY)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is not None:
            return self._generic(origin, arguments, place)
        if hint is None:
            return NONE
        if not isinstance(hint, type):
            return None
        if hint in _SIMPLE:
            return _SIMPLE[hint]
        if isinstance(hint, enum.EnumMeta):
            return None if not len(hint) else Flag(hint) if issubclass(hint, enum.Flag) else Enum(hint)
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, {}, place.scope, f"{place.where}: {hint.__name__}")
        return None

    def _generic(self, origin: Any, arguments: tuple[Any, ...], place: Place) -> Codec | None:
        if origin in LITERALS:
            return literal_of(arguments)
        if origin in UNIONS:
            try:
                return union_of(self._all(place.flattened(arguments), place))
            except ValueError as exc:
                raise ChannelError(f"{place.where}: {exc}: rename one of them.") from None
        if origin is tuple:
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return Items(tuple, self.codec(arguments[0], place))
            # Python 3.10 says that tuple[()] has the argument ().
            return Tuple(self._all((one for one in arguments if one != ()), place))
        if origin in (list, set, frozenset):
            return Items(origin, self.codec(arguments[0], place))
        if origin is dict:
            return Dict(*self._all(arguments, place))
        if isinstance(origin, type) and dataclasses.is_dataclass(origin):
            parameters = getattr(origin, "__parameters__", ())
            given = [substitute(place.read(one), place.variables) for one in arguments]
            variables = dict(zip(parameters, given, strict=True))
            return self.dataclass(origin, variables, place.scope, f"{place.where}: {origin.__name__}")
        return None

    def _all(self, annotations: Iterable[Any], place: Place) -> list[Codec]:
        return [self.codec(annotation, place) for annotation in annotations]


class _Itself(Codec):
    """A `type X = …` inside of itself."""

    def __init__(self, alias: Any) -> None:
        super().__init__(alias.__name__, f"{alias.__module__}.{alias.__name__}", {"any"})
        self.codec: Codec = ANY

    @override
    def encode(self, value: Any, /) -> Any:
        return self.codec.encode(value)

    @override
    def decode(self, json: Any, /) -> Any:
        return self.codec.decode(json)

    @override
    def exact(self, value: Any, /) -> bool:
        return self.codec.exact(value)


def _unsupported(hint: Any, place: Place) -> str:
    kind = typing.get_origin(hint) or hint
    name = getattr(kind, "__name__", str(kind))
    told = _told(hint)
    if isinstance(hint, enum.EnumMeta):
        return f"{place.where} has the type {told}, an Enum without members: use one that has some."
    instead = f"use {_INSTEAD[name]}" if name in _INSTEAD else f"use {SUPPORTED}"
    return f"{place.where} has the type {told}, which cannot be stored: {instead}."


def _hashable(hint: Any) -> Any:
    try:
        hash(hint)
    except TypeError:  # Annotated[int, [...]]
        return repr(hint)
    return hint


def _told(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
