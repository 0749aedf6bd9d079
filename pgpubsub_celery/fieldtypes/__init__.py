"""The types that fields may have: from a dataclass's annotations to one codec.

Owns the reading of annotations, and what is said of those that are not supported. How values become JSON is `scalars`',
`containers`' and `choices`'; what the names in annotations mean is `hints`'. Pure.

What was sent is what the listener receives, type for type and value for value, whatever Postgres' jsonb makes of numbers,
texts and the order of keys on the way.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import typing_extensions

from pgpubsub_celery.errors import ChannelError
from pgpubsub_celery.fieldtypes.choices import ANY, enum_codec, identity_of, literal_codec, union_codec
from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError, MissingError, show
from pgpubsub_celery.fieldtypes.containers import Field, dataclass_codec, dict_codec, items_codec, tuple_codec
from pgpubsub_celery.fieldtypes.scalars import SCALARS
from pgpubsub_celery.hints import (
    Scope,
    UnreadableError,
    UnresolvedNameError,
    is_init_variable,
    own_annotations,
    substitute,
    type_variables,
)

__all__ = ["Codec", "Field", "MismatchError", "MissingError", "codec_of", "fields_of", "show"]

SUPPORTED = (
    "bool, int, float, str, None, Decimal, date, datetime, time, timedelta, UUID, bytes, Enum, Literal, list, tuple, set, "
    "frozenset, dict, dataclasses, unions of these, and Any"
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
_DEEPEST = 60

_codecs: dict[type, Codec] = {}
_fields: dict[type, tuple[Field, ...]] = {}
_lock = threading.Lock()
"""Guards the two; whoever reads them before they are complete waits for it."""


def codec_of(cls: type, where: str) -> Codec:
    """Return the codec of a dataclass; made once. `where` names it in errors.

    Raises:
        ChannelError: an annotation cannot be resolved, or has a type that is not supported; names field, type and fix.
    """
    codec = _codecs.get(cls)
    if codec is None:
        with _lock:
            if cls not in _codecs:
                reader = _Reader(where)
                codec = reader.dataclass(cls, {}, Scope(cls), where)
                _fields[cls] = tuple(reader.fields[codec])
                _codecs[cls] = codec
        return _codecs[cls]
    return codec


def fields_of(cls: type, where: str) -> tuple[Field, ...]:
    """Return the fields of a dataclass that its __init__ takes, with their codecs. Raises as `codec_of`."""
    codec_of(cls, where)
    return _fields[cls]


class _Reader:
    """Reads the annotations of one class and of the dataclasses inside it, which may contain each other."""

    def __init__(self, where: str) -> None:
        self._channel = where
        self._known: dict[Any, Codec] = {}
        self._depth = 0
        self.fields: dict[Codec, list[Field]] = {}
        """Of each dataclass."""

    def dataclass(self, kind: type, variables: Mapping[Any, Any], outer: Scope, where: str) -> Codec:
        """Return the codec of a dataclass whose type variables are `variables`."""
        key = (kind, *map(repr, variables.values()))
        known = self._known.get(key)
        if known is not None:
            return known
        arguments = ", ".join(repr(one) for one in variables.values())
        fields: list[Field] = []
        codec = dataclass_codec(kind, f"{identity_of(kind)}[{arguments}]" if arguments else identity_of(kind), fields)
        self._known[key] = codec
        self.fields[codec] = fields
        bound = type_variables(kind, variables)
        annotations: dict[str, tuple[type, Any]] = {}
        for base in reversed(kind.__mro__):
            for name, annotation in own_annotations(base).items():
                annotations[name] = base, annotation
                if is_init_variable(annotation):
                    raise ChannelError(
                        f"{where}.{name} is an InitVar, which is not kept: make it a field, or leave it out."
                    )
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            if not field.init:
                continue
            owner, annotation = annotations.get(field.name, (kind, field.type))
            place = _Place(f"{where}.{field.name}", Scope(owner, outer.names), bound.get(owner, {}), kind)
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            fields.append(Field(field.name, self.codec(annotation, place), required))
        return codec

    def codec(self, annotation: Any, place: _Place) -> Codec:
        """Return the codec for an annotation."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ChannelError(f"{place.where}: its type contains ever more of itself: give it an end.")
        try:
            hint = place.read(annotation)
            if isinstance(hint, _ALIASES):
                return self._alias(hint, place)
            codec = self._plain(hint, place)
        finally:
            self._depth -= 1
        if codec is None:
            raise ChannelError(_unsupported(hint, place))
        return codec

    def _alias(self, alias: Any, place: _Place) -> Codec:
        """Return the codec of a `type X = …`, which may contain X."""
        known = self._known.get(alias)
        if known is None:
            target: list[Codec] = []
            self._known[alias] = Codec(
                expected=alias.__name__,
                identity=f"{alias.__module__}.{alias.__name__}",
                encode=lambda value: target[0].encode(value),
                decode=lambda json: target[0].decode(json),
                exact=lambda value: target[0].exact(value),
                kinds=frozenset({"any"}),
            )
            known = self._known[alias] = self.codec(alias.__value__, place)
            target.append(known)
        return known

    def _plain(self, hint: Any, place: _Place) -> Codec | None:
        if hint is Any:
            return ANY
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is not None:
            return self._generic(origin, arguments, place)
        if not isinstance(hint, type) and hint is not None:
            return None
        if hint in SCALARS:
            return SCALARS[hint]
        if hint in (list, set, frozenset, tuple):
            return items_codec(hint, ANY)
        if hint is dict:
            return dict_codec(ANY, ANY)
        if isinstance(hint, enum.EnumMeta):
            return enum_codec(hint) if len(hint) else None
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, {}, place.scope, f"{place.where}: {hint.__name__}")
        return None

    def _generic(self, origin: Any, arguments: tuple[Any, ...], place: _Place) -> Codec | None:
        if origin in _LITERALS:
            return literal_codec(arguments)
        if origin in _UNIONS:
            try:
                return union_codec(self._all(place.flattened(arguments), place))
            except ValueError as exc:
                raise ChannelError(f"{place.where}: {exc}: rename one of them.") from None
        if origin is tuple:
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return items_codec(tuple, self.codec(arguments[0], place))
            # Python 3.10 says that tuple[()] has the argument ().
            return tuple_codec(self._all((one for one in arguments if one != ()), place))
        if origin in (list, set, frozenset):
            return items_codec(origin, self.codec(arguments[0], place))
        if origin is dict:
            return dict_codec(*self._all(arguments, place))
        if isinstance(origin, type) and dataclasses.is_dataclass(origin):
            parameters = getattr(origin, "__parameters__", ())
            given = [substitute(place.read(one), place.variables) for one in arguments]
            variables = dict(zip(parameters, given, strict=True))
            return self.dataclass(origin, variables, place.scope, f"{place.where}: {origin.__name__}")
        return None

    def _all(self, annotations: Iterable[Any], place: _Place) -> list[Codec]:
        return [self.codec(annotation, place) for annotation in annotations]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an annotation stands."""

    where: str
    """Channel and field, for errors."""
    scope: Scope
    variables: Mapping[Any, Any]
    owner: type

    def read(self, annotation: Any) -> Any:
        """Return the type that an annotation means, without what only type checkers care for.

        Raises:
            ChannelError: a name is not defined, or a type variable stands for nothing.
        """
        while True:
            try:
                annotation = self.scope.resolve(annotation)
            except UnresolvedNameError as exc:
                raise ChannelError(
                    f"{self.where}: the name {exc.name!r} in its annotation {exc.annotation!r} is not defined when the "
                    f"program runs: import or define it in {self.scope.module}, at the top and not only under "
                    "`if TYPE_CHECKING`."
                ) from None
            except UnreadableError as exc:
                raise ChannelError(f"{self.where}: {exc}.") from exc
            if isinstance(annotation, typing.TypeVar):
                annotation = self._stands_for(annotation)
            elif annotation is typing_extensions.Self:
                return self.owner
            elif isinstance(typing.get_origin(annotation), _ALIASES):
                alias = typing.get_origin(annotation)
                given = dict(zip(alias.__type_params__, typing.get_args(annotation), strict=False))
                annotation = substitute(alias.__value__, given)
            elif hasattr(annotation, "__supertype__"):  # NewType
                annotation = annotation.__supertype__
            elif typing.get_origin(annotation) in _TRANSPARENT:
                annotation = typing.get_args(annotation)[0]
            else:
                return annotation

    def _stands_for(self, variable: Any) -> Any:
        found = self.variables.get(variable, variable)
        if found is variable:
            default = getattr(variable, "__default__", typing_extensions.NoDefault)
            if default is typing_extensions.NoDefault or default is None:
                raise ChannelError(
                    f"{self.where} has the type variable {variable.__name__}, which stands for nothing here: declare a "
                    f"subclass with a type in its place, such as class IntBox(Box[int])."
                )
            found = default
        return found

    def flattened(self, annotations: Iterable[Any]) -> Iterable[Any]:
        """Return the types of a union, and of the unions in it."""
        for annotation in annotations:
            hint = self.read(annotation)
            while isinstance(hint, _ALIASES):
                hint = self.read(hint.__value__)  # type: ignore[attr-defined]
            if typing.get_origin(hint) in _UNIONS:
                yield from self.flattened(typing.get_args(hint))
            elif typing.get_origin(hint) in _LITERALS:
                # Told apart by their types, each with all its values.
                by_type: dict[type, list[Any]] = {}
                for value in typing.get_args(hint):
                    by_type.setdefault(type(value), []).append(value)
                yield from (typing.Literal[tuple(values)] for values in by_type.values())
            else:
                yield hint


_UNIONS = (typing.Union, types.UnionType)
_LITERALS = (typing.Literal, typing_extensions.Literal)
_ALIASES: tuple[Any, ...] = (
    typing_extensions.TypeAliasType,
    getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType),
)
_TRANSPARENT = (typing.Annotated, typing.Final)


def _unsupported(hint: Any, place: _Place) -> str:
    kind = typing.get_origin(hint) or hint
    name = getattr(kind, "__name__", str(kind))
    told = hint.__qualname__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    if isinstance(hint, enum.EnumMeta):
        return f"{place.where} has the type {told}, an Enum without members: use one that has some."
    instead = f"use {_INSTEAD[name]}" if name in _INSTEAD else f"use {SUPPORTED}"
    return f"{place.where} has the type {told}, which cannot be stored: {instead}."
