"""Values with parts to JSON and back: lists, tuples, sets, dicts and dataclasses.

Owns their JSON: lists, and objects. jsonb sorts an object's keys: a dict comes back equal, but in another order.

An instance of a subclass of list, tuple, set or dict is stored as what the field says it is; one of a subclass of a
dataclass is refused, because its further fields would be lost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from pgpubsub_celery.fieldtypes.codec import TAG, VALUE, Codec, MismatchError, MissingError, key_step, path_of
from pgpubsub_celery.fieldtypes.scalars import INT

PAIRS = "$dict"
_KOMBU = {"__type__", "__value__"}
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,1300}")


class Items(Codec):
    """list, set, frozenset, and tuples of any length."""

    def __init__(self, kind: Any, item: Codec) -> None:
        """`item`: of each of the items."""
        super().__init__(
            f"{kind.__name__}[{item.expected}{', ...' if kind is tuple else ''}]",
            f"{kind.__name__}[{item.path},...]",
            {"list"},
            (kind, item.key, ...),
        )
        self._kind = kind
        self._item = item

    @override
    def encode(self, value: Any, /) -> Any:
        if not isinstance(value, self._kind):
            raise MismatchError(value, self.expected)
        encode = self._item.encode
        encoded: list[Any] = []
        try:
            for one in value:
                encoded.append(encode(one))  # noqa: PERF401 - its length says where an error is
        except MismatchError as exc:
            exc.under(f"[{len(encoded)}]")
            raise
        return encoded

    @override
    def decode(self, json: Any, /) -> Any:
        if type(json) is not list:
            raise MismatchError(json, self.expected)
        decode = self._item.decode
        decoded: list[Any] = []
        try:
            for one in json:
                decoded.append(decode(one))  # noqa: PERF401 - its length says where an error is
        except MismatchError as exc:
            exc.under(f"[{len(decoded)}]")
            raise
        if self._kind is list:
            return decoded
        try:
            return self._kind(decoded)
        except TypeError as exc:  # not hashable
            raise MismatchError(json, self.expected, str(exc)) from exc

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is self._kind and all(map(self._item.exact, value))


class Tuple(Codec):
    """A tuple of a fixed length."""

    def __init__(self, items: Sequence[Codec]) -> None:
        """`items`: of each item its own."""
        super().__init__(
            f"tuple[{', '.join(item.expected for item in items) or '()'}]",
            f"tuple[{','.join(item.path for item in items)}]",
            {"list"},
            (tuple, *(item.key for item in items)),
        )
        self._items = items

    @override
    def encode(self, value: Any, /) -> Any:
        if not isinstance(value, tuple):
            raise MismatchError(value, self.expected)
        return self._convert(value, "encode")

    @override
    def decode(self, json: Any, /) -> Any:
        if type(json) is not list:
            raise MismatchError(json, self.expected)
        return tuple(self._convert(json, "decode"))

    def _convert(self, values: Any, method: str) -> list[Any]:
        if len(values) != len(self._items):
            raise MismatchError(values, self.expected, f"{len(values)} items instead of {len(self._items)}")
        converted: list[Any] = []
        try:
            for item, one in zip(self._items, values, strict=True):
                converted.append(getattr(item, method)(one))
        except MismatchError as exc:
            exc.under(f"[{len(converted)}]")
            raise
        return converted

    @override
    def exact(self, value: Any, /) -> bool:
        return (
            type(value) is tuple
            and len(value) == len(self._items)
            and all(item.exact(one) for item, one in zip(self._items, value, strict=True))
        )


class Dict(Codec):
    """An object where the keys' JSON is text (that of ints is made so), else the pairs as a list in `$dict`."""

    def __init__(self, key: Codec, item: Codec) -> None:
        """`item`: of the values."""
        super().__init__(
            f"dict[{key.expected}, {item.expected}]",
            f"dict[{key.path},{item.path}]",
            {"object", PAIRS},
            (dict, key.key, item.key),
        )
        self._key = key
        self._item = item

    @override
    def encode(self, value: Any, /) -> Any:
        if not isinstance(value, dict):
            raise MismatchError(value, self.expected)
        encode = self._item.encode
        pairs: list[tuple[Any, Any]] = []
        for key, one in value.items():
            json_key = self._encode_key(key, len(pairs))
            try:
                pairs.append((json_key, encode(one)))
            except MismatchError as exc:
                exc.under(key_step(key))
                raise
        return as_object(pairs)

    def _encode_key(self, key: Any, position: int) -> Any:
        try:
            json = self._key.encode(key)
        except MismatchError as exc:
            exc.under(f".keys()[{position}]")
            raise
        return str(json) if self._key is INT and type(json) is int else json

    @override
    def decode(self, json: Any, /) -> Any:
        decode = self._item.decode
        decoded: dict[Any, Any] = {}
        for json_key, one in pairs_of(json, self.expected):
            try:
                decoded[self._decode_key(json_key)] = decode(one)
            except MismatchError as exc:
                exc.under(key_step(json_key))
                raise
            except TypeError as exc:  # not hashable
                raise MismatchError(json, self.expected, str(exc)) from exc
        return decoded

    def _decode_key(self, json: Any) -> Any:
        if self._key is INT and type(json) is str and _WHOLE_NUMBER.fullmatch(json):
            return int(json)
        return self._key.decode(json)

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is dict and all(self._key.exact(key) and self._item.exact(one) for key, one in value.items())


def as_object(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return JSON for a dict's encoded keys and values: an object if it can be one, else its pairs in `$dict`."""
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        converted = dict(pairs)
        # NaN is a key as often as one likes; and what looks like kombu's own values would not pass through a broker.
        if len(converted) == len(pairs) and converted.keys() != _KOMBU:
            return converted
    return {PAIRS: [[key, value] for key, value in pairs]}


def pairs_of(json: Any, expected: str) -> Iterable[Any]:
    """Return the encoded keys and values of a dict's JSON."""
    if type(json) is not dict:
        raise MismatchError(json, expected)
    if json.keys() != {PAIRS}:
        return json.items()
    pairs = json[PAIRS]
    if type(pairs) is not list or not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise MismatchError(json, expected)
    return pairs


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a dataclass that its __init__ takes."""

    name: str
    codec: Codec
    required: bool


class Dataclass(Codec):
    """An object of the fields that `__init__` takes.

    Fields that JSON lacks have their default, and what else is in it is ignored: other releases have other fields.
    """

    def __init__(self, kind: Any, arguments: str = "") -> None:
        """`arguments`: what a generic one's type variables are."""
        super().__init__(f"{kind.__name__}{arguments}", f"{path_of(kind)}{arguments}", {"object"}, (kind, arguments))
        self.fields: list[Field] = []
        """Added by whoever reads the annotations, later: it may contain itself."""
        self._kind = kind

    @override
    def encode(self, value: Any, /) -> Any:
        if type(value) is not self._kind:
            subclass = isinstance(value, self._kind)
            raise MismatchError(
                value, self.expected, "of a subclass, whose own fields would be lost" if subclass else ""
            )
        encoded: dict[str, Any] = {}
        for field in self.fields:
            name = field.name
            try:
                encoded[name] = field.codec.encode(getattr(value, name))
            except MismatchError as exc:
                exc.under(f".{name}")
                raise
            except AttributeError:
                if hasattr(value, name):
                    raise
                raise MissingError(value, field.codec.expected).under(f".{name}") from None
        return encoded

    @override
    def decode(self, json: Any, /) -> Any:
        if type(json) is not dict:
            raise MismatchError(json, self.expected)
        arguments: dict[str, Any] = {}
        for field in self.fields:
            name = field.name
            if name in json:
                try:
                    arguments[name] = field.codec.decode(json[name])
                except MismatchError as exc:
                    if _was_of_union(json[name], field.codec):
                        arguments[name] = field.codec.decode(json[name][VALUE])
                        continue
                    exc.under(f".{name}")
                    raise
            elif field.required:
                raise MissingError(json, field.codec.expected).under(f".{name}")
        try:
            return self._kind(**arguments)
        except RecursionError:
            raise
        except Exception as exc:  # of a __post_init__
            why = " ".join(f"{type(exc).__name__}: {exc}".split())
            raise MismatchError(json, self.expected, f"refused with {why[:200]}") from exc

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is self._kind and all(
            field.codec.exact(getattr(value, field.name, None)) for field in self.fields
        )


def _was_of_union(json: Any, codec: Codec) -> bool:
    """Whether JSON is of a release in which the field had further types, and of one that it still has."""
    return type(json) is dict and json.keys() == {TAG, VALUE} and json[TAG] in codec.tags
