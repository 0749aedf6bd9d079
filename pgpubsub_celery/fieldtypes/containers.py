"""Values with parts to JSON and back: lists, tuples, sets, dicts and dataclasses.

Owns their JSON: lists, and objects. jsonb sorts an object's keys, so that a dict comes back equal, but in another order.
An instance of a subclass of list, tuple, set or dict is stored as what the field says it is; one of a dataclass's is refused,
because its further fields would be lost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError, MissingError, key_step
from pgpubsub_celery.fieldtypes.scalars import INT


def items_codec(kind: Any, item: Codec) -> Codec:
    """Return the codec of list, set, frozenset, or of tuples of any length."""
    expected = f"{kind.__name__}[{item.expected}{', ...' if kind is tuple else ''}]"
    encode_item, decode_item, exact_item = item.encode, item.decode, item.exact

    def encode(value: Any) -> list[Any]:
        if not isinstance(value, kind):
            raise MismatchError(value, expected)
        encoded: list[Any] = []
        try:
            for one in value:
                encoded.append(encode_item(one))  # noqa: PERF401 - its length says where an error is
        except MismatchError as exc:
            exc.under(f"[{len(encoded)}]")
            raise
        return encoded

    def decode(json: Any) -> Any:
        if type(json) is not list:
            raise MismatchError(json, expected)
        decoded: list[Any] = []
        try:
            for one in json:
                decoded.append(decode_item(one))  # noqa: PERF401 - as above
        except MismatchError as exc:
            exc.under(f"[{len(decoded)}]")
            raise
        return decoded if kind is list else _built(kind, decoded, json, expected)

    return Codec(
        expected=expected,
        identity=f"{kind.__name__}[{item.identity},...]",
        encode=encode,
        decode=decode,
        exact=lambda value: type(value) is kind and all(map(exact_item, value)),
        kinds=frozenset({"list"}),
    )


def _built(kind: Callable[[Any], Any], decoded: Any, json: Any, expected: str) -> Any:
    try:
        return kind(decoded)
    except TypeError as exc:
        raise MismatchError(json, expected, str(exc)) from exc  # not hashable


def tuple_codec(items: Sequence[Codec]) -> Codec:
    """Return the codec of tuples of a fixed length."""
    expected = f"tuple[{', '.join(item.expected for item in items) or '()'}]"
    count = len(items)

    def convert(values: Any, converters: Iterable[Callable[[Any], Any]]) -> list[Any]:
        converted: list[Any] = []
        try:
            for converter, one in zip(converters, values, strict=True):
                converted.append(converter(one))  # noqa: PERF401 - its length says where an error is
        except MismatchError as exc:
            exc.under(f"[{len(converted)}]")
            raise
        return converted

    def encode(value: Any) -> list[Any]:
        if not isinstance(value, tuple):
            raise MismatchError(value, expected)
        if len(value) != count:
            raise MismatchError(value, expected, f"it has {len(value)} items")
        return convert(value, [item.encode for item in items])

    def decode(json: Any) -> tuple[Any, ...]:
        if type(json) is not list:
            raise MismatchError(json, expected)
        if len(json) != count:
            raise MismatchError(json, expected, f"it has {len(json)} items")
        return tuple(convert(json, [item.decode for item in items]))

    return Codec(
        expected=expected,
        identity=f"tuple[{','.join(item.identity for item in items)}]",
        encode=encode,
        decode=decode,
        exact=lambda value: (
            type(value) is tuple
            and len(value) == count
            and all(item.exact(one) for item, one in zip(items, value, strict=True))
        ),
        kinds=frozenset({"list"}),
    )


PAIRS = "$dict"
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,1000}")


def as_object(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return JSON for a dict's encoded keys and values: an object if it can be one, else its pairs in `$dict`."""
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        converted = dict(pairs)
        if len(converted) == len(pairs):
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


def dict_codec(key: Codec, item: Codec) -> Codec:
    """Return the codec of dicts. Keys that are ints are written as JSON does, `{"1": …}`."""
    expected = f"dict[{key.expected}, {item.expected}]"
    encode_key, decode_key, encode_item, decode_item = key.encode, key.decode, item.encode, item.decode
    if key is INT:

        def encode_key(value: Any) -> Any:
            json = INT.encode(value)
            return str(json) if type(json) is int else json

        def decode_key(json: Any) -> Any:
            return int(json) if type(json) is str and _WHOLE_NUMBER.fullmatch(json) else INT.decode(json)

    def encode(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise MismatchError(value, expected)
        encoded: list[tuple[Any, Any]] = []
        step = None
        try:
            for one, other in value.items():
                step = None
                json_key = encode_key(one)
                step = one
                encoded.append((json_key, encode_item(other)))
        except MismatchError as exc:
            # Of the key itself, or of what is behind it.
            exc.under(f".keys()[{len(encoded)}]" if step is None else key_step(step))
            raise
        return as_object(encoded)

    def decode(json: Any) -> dict[Any, Any]:
        decoded: dict[Any, Any] = {}
        step: Any = None
        try:
            for one, other in pairs_of(json, expected):
                step = one
                decoded[decode_key(one)] = decode_item(other)
        except MismatchError as exc:
            if exc.value is not json:
                exc.under(key_step(step))
            raise
        except TypeError as exc:
            raise MismatchError(json, expected, str(exc)) from exc  # not hashable
        return decoded

    return Codec(
        expected=expected,
        identity=f"dict[{key.identity},{item.identity}]",
        encode=encode,
        decode=decode,
        exact=lambda value: (
            type(value) is dict and all(key.exact(one) and item.exact(other) for one, other in value.items())
        ),
        kinds=frozenset({"object", PAIRS}),
    )


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a dataclass that its __init__ takes."""

    name: str
    codec: Codec
    required: bool


def dataclass_codec(kind: Any, identity: str, fields: list[Field]) -> Codec:
    """Return the codec of a dataclass: an object of its fields. `fields` may be filled later, so that it can recur.

    Fields that JSON lacks have their default; what else is in the JSON is ignored: other releases have other fields.
    """
    expected = kind.__name__

    def encode(value: Any) -> dict[str, Any]:
        if type(value) is not kind:
            why = "an instance of a subclass: its own fields would be lost" if isinstance(value, kind) else ""
            raise MismatchError(value, expected, why)
        encoded: dict[str, Any] = {}
        for field in fields:
            try:
                encoded[field.name] = field.codec.encode(getattr(value, field.name))
            except MismatchError as exc:
                exc.under(f".{field.name}")
                raise
            except AttributeError:
                if hasattr(value, field.name):
                    raise
                raise MissingError(value, field.codec.expected).under(f".{field.name}") from None
        return encoded

    def decode(json: Any) -> Any:
        if type(json) is not dict:
            raise MismatchError(json, expected)
        arguments: dict[str, Any] = {}
        for field in fields:
            name = field.name
            if name in json:
                try:
                    arguments[name] = field.codec.decode(json[name])
                except MismatchError as exc:
                    exc.under(f".{name}")
                    raise
            elif field.required:
                raise MissingError(json, field.codec.expected).under(f".{name}")
        try:
            return kind(**arguments)
        except RecursionError:
            raise
        except Exception as exc:  # of a __post_init__
            raise MismatchError(json, expected, f"it was refused with {type(exc).__name__}: {show_error(exc)}") from exc

    return Codec(
        expected=expected,
        identity=identity,
        encode=encode,
        decode=decode,
        exact=lambda value: (
            type(value) is kind and all(field.codec.exact(getattr(value, field.name, None)) for field in fields)
        ),
        kinds=frozenset({"object"}),
    )


def show_error(exc: Exception) -> str:
    """Return the text of somebody's exception, shortened."""
    text = " ".join(str(exc).split())
    return text if len(text) <= 200 else f"{text[:199]}…"
