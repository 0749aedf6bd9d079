"""Values of one of several types, or of a few known values, to JSON and back: unions, enums, literals, Any.

Owns how they are told apart. Where the JSON of the types of a union differs in kind (`int | str`), it is plain JSON; where
not (`date | datetime`, both strings), one goes plain and the others with a tag: `{"$type": "datetime", "value": "…"}`.
Which one does not depend on the order in the annotation, because Python does not always keep it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError, key_step, kind_of
from pgpubsub_celery.fieldtypes.containers import as_object, pairs_of
from pgpubsub_celery.fieldtypes.scalars import INT, NONE, SCALARS, STR, decode_text, encode_text

TAG = "$type"
VALUE = "value"


def optional_codec(member: Codec) -> Codec:
    """Return the codec of None or one type."""
    expected = f"{member.expected} | None"
    encode_member, decode_member, exact_member = member.encode, member.decode, member.exact

    def encode(value: Any) -> Any:
        if value is None:
            return None
        try:
            return encode_member(value)
        except MismatchError as exc:
            if not exc.path:
                exc.expected = expected
            raise

    def decode(json: Any) -> Any:
        if json is None:
            return None
        try:
            return decode_member(json)
        except MismatchError as exc:
            if not exc.path:
                exc.expected = expected
            raise

    return Codec(
        expected=expected,
        identity=f"{member.identity}|None",
        encode=encode,
        decode=decode,
        exact=lambda value: value is None or exact_member(value),
        kinds=member.kinds | {"null"},
        rank=member.rank,
    )


def union_codec(members: Iterable[Codec]) -> Codec:
    """Return the codec of a union.

    Raises:
        ValueError: two of its types have the same name, so that no tag could tell them apart.
    """
    known = {member.identity: member for member in members}
    ordered = sorted(known.values(), key=lambda member: (member.rank, member.expected, member.identity))
    if len(ordered) == 1:
        return ordered[0]
    if NONE in ordered and len(ordered) == 2:
        return optional_codec(ordered[1])
    return _tagged_union(ordered)


def _tagged_union(members: Sequence[Codec]) -> Codec:
    expected = " | ".join(
        [*(one.expected for one in members if one is not NONE), *(["None"] if NONE in members else [])]
    )
    plain: dict[str, Codec] = {}
    tagged: dict[str, Codec] = {}
    tags: dict[Codec, str] = {}
    for member in members:
        if plain.keys().isdisjoint(member.kinds) and not (plain and "any" in member.kinds):
            plain.update(dict.fromkeys(member.kinds, member))
            continue
        tag = member.expected
        if [other.expected for other in members].count(tag) > 1:
            tag = member.identity
        if tag in tagged:
            raise ValueError(f"two types of the union {expected} have the same name")
        tagged[tag], tags[member] = member, tag

    def write(member: Codec, value: Any) -> Any:
        json = member.encode(value)
        return {TAG: tags[member], VALUE: json} if member in tags else json

    def encode(value: Any) -> Any:
        for member in members:
            if member.exact(value):
                return write(member, value)
        inside: list[MismatchError] = []
        for member in members:
            try:
                return write(member, value)
            except MismatchError as exc:
                if exc.path:
                    inside.append(exc)
        raise inside[0] if len(inside) == 1 else MismatchError(value, expected)

    def decode(json: Any) -> Any:
        if type(json) is dict and json.keys() == {TAG, VALUE} and json[TAG] in tagged:
            return tagged[json[TAG]].decode(json[VALUE])
        first = plain.get(kind_of(json)) or plain.get("any")
        inside: list[MismatchError] = []
        # Written by hand it has no tag: then whatever fits.
        for member in members if first is None else (first, *(one for one in members if one is not first)):
            try:
                return member.decode(json)
            except MismatchError as exc:
                if exc.path:
                    inside.append(exc)
        raise inside[0] if len(inside) == 1 else MismatchError(json, expected)

    return Codec(
        expected=expected,
        identity="|".join(sorted(member.identity for member in members)),
        encode=encode,
        decode=decode,
        exact=lambda value: any(member.exact(value) for member in members),
        kinds=frozenset(plain) | (frozenset({TAG}) if tagged else frozenset()),
    )


def enum_codec(kind: Any) -> Codec:
    """Return the codec of an Enum: its value if that is text, or if members are ints (IntEnum, Flag); else its name.

    Names stay when members are added in between; values of `auto()` do not.
    """
    if issubclass(kind, enum.Flag):
        return _flag_codec(kind)
    by_value = issubclass(kind, int) or all(type(member.value) is str for member in kind)
    by_json: dict[tuple[type, Any], Any] = {}
    to_json: dict[Any, Any] = {}
    for member in kind:
        value = member.value
        json = encode_text(member.name)
        if by_value:
            json = encode_text(value) if type(value) is str else INT.encode(int(member))
        to_json[member.name] = json
        for text in (value, member.name) if by_value else (member.name, value):
            if type(text) in (str, int):
                by_json.setdefault((type(text), text), member)
    # A name of one that is the value of another means the value.
    if by_value:
        by_json.update(
            {(type(member.value), member.value): member for member in kind if type(member.value) in (str, int)}
        )
    else:
        by_json.update({(str, member.name): member for member in kind})

    def encode(value: Any) -> Any:
        if type(value) is not kind:
            raise MismatchError(value, kind.__name__)
        return to_json[value.name]

    def decode(json: Any) -> Any:
        plain = json
        if type(json) is dict:
            plain = STR.decode(json) if "$text" in json else INT.decode(json)
        found = by_json.get((type(plain), plain)) if type(plain) in (str, int) else None
        if found is not None:
            return found
        try:
            return kind(plain)  # an alias's value, or a _missing_ of the user's
        except Exception as exc:
            raise MismatchError(json, kind.__name__) from exc

    return _codec_of_enum(kind, encode, decode, to_json.values())


def _flag_codec(kind: Any) -> Codec:
    def encode(value: Any) -> Any:
        if type(value) is not kind:
            raise MismatchError(value, kind.__name__)
        return INT.encode(value.value)

    def decode(json: Any) -> Any:
        try:
            return kind(INT.decode(json))
        except (ValueError, MismatchError) as exc:
            raise MismatchError(json, kind.__name__) from exc

    return _codec_of_enum(kind, encode, decode, [0, {"$int": ""}])


def _codec_of_enum(kind: Any, encode: Any, decode: Any, jsons: Iterable[Any]) -> Codec:
    return Codec(
        expected=kind.__name__,
        identity=identity_of(kind),
        encode=encode,
        decode=decode,
        exact=lambda value: type(value) is kind,
        kinds=frozenset(map(kind_of, jsons)),
    )


def identity_of(kind: type) -> str:
    """Return a class's path."""
    return f"{kind.__module__}.{kind.__qualname__}"


def literal_codec(values: Iterable[Any]) -> Codec:
    """Return the codec of a Literal: a union of its values' types, with those values alone.

    Raises:
        ValueError: a value that no Literal can have.
    """
    by_type: dict[type, list[Any]] = {}
    for value in values:
        by_type.setdefault(type(value), []).append(value)
    return union_codec([_literal_of(kind, known) for kind, known in by_type.items()])


def _literal_of(kind: type, values: list[Any]) -> Codec:
    if kind is type(None):
        return NONE
    base = enum_codec(kind) if issubclass(kind, enum.Enum) else SCALARS.get(kind)
    if base is None:
        raise ValueError(f"a Literal cannot be {values[0]!r}")
    expected = f"Literal[{', '.join(str(one) if isinstance(one, enum.Enum) else repr(one) for one in values)}]"

    def encode(value: Any) -> Any:
        if type(value) is not kind or value not in values:
            raise MismatchError(value, expected)
        return base.encode(value)

    def decode(json: Any) -> Any:
        try:
            value = base.decode(json)
        except MismatchError as exc:
            raise MismatchError(json, expected) from exc
        if value not in values:
            raise MismatchError(json, expected)
        return value

    return Codec(
        expected=expected,
        identity=f"Literal[{base.identity}: {', '.join(map(repr, values))}]",
        encode=encode,
        decode=decode,
        exact=lambda value: type(value) is kind and value in values,
        kinds=base.kinds,
        rank=base.rank,
    )


_ANY = "a JSON value: None, bool, int, float, str, or a list or dict (with str keys) of them"


def _encode_any(value: Any) -> Any:  # noqa: PLR0911
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return encode_text(value)
    if kind is int:
        return INT.encode(value)
    if kind is float:
        # jsonb writes numbers from 1e16 on as ints.
        return SCALARS[float].encode(value) if abs(value) < 1e16 else {"$float": repr(value)}
    if kind is list:
        encoded: list[Any] = []
        try:
            for one in value:
                encoded.append(_encode_any(one))  # noqa: PERF401 - its length says where an error is
        except MismatchError as exc:
            exc.under(f"[{len(encoded)}]")
            raise
        return encoded
    if kind is dict:
        return as_object([_encode_any_pair(key, one, value) for key, one in value.items()])
    raise MismatchError(value, _ANY)


def _encode_any_pair(key: Any, value: Any, owner: Any) -> tuple[Any, Any]:
    if type(key) is not str:
        raise MismatchError(owner, _ANY, f"its key {key_step(key)[1:-1]} is no str")
    try:
        return encode_text(key), _encode_any(value)
    except MismatchError as exc:
        exc.under(key_step(key))
        raise


def _decode_any(json: Any) -> Any:
    if type(json) is list:
        return [_decode_any(one) for one in json]
    if type(json) is not dict:
        return json
    kind = kind_of(json)
    if kind == "$dict":
        return {_decode_any(key): _decode_any(value) for key, value in pairs_of(json, _ANY)}
    if kind == "$text" and type(json["$text"]) is str:
        return decode_text(json)
    if kind in ("$int", "$float"):
        return SCALARS[int if kind == "$int" else float].decode(json)
    return {key: _decode_any(value) for key, value in json.items()}


def _exact_any(value: Any) -> bool:
    try:
        _encode_any(value)
    except MismatchError:
        return False
    return True


ANY = Codec(
    expected=_ANY,
    identity="Any",
    encode=_encode_any,
    decode=_decode_any,
    exact=_exact_any,
    kinds=frozenset({"any"}),
    rank=9,
)
