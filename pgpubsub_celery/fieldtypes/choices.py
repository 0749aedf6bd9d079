"""Values of one of several types, or out of a few, to JSON and back: unions, enums, literals, Any.

Owns how they are told apart. Where the JSON of a union's types differs in kind (`int | str`), it is plain JSON; where
not (`date | datetime`, both strings), one goes plain and the others with a tag: `{"$type": "datetime", "value": "…"}`.
Which one does not depend on the order in the annotation, because Python does not always keep that.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from pgpubsub_celery.fieldtypes.codec import TAG, VALUE, Codec, MismatchError, key_step, kind_of, path_of
from pgpubsub_celery.fieldtypes.containers import PAIRS, as_object, pairs_of
from pgpubsub_celery.fieldtypes.scalars import FLOAT, INT, NONE, SCALARS, STR, decode_text, encode_text


def union_of(members: Iterable[Codec]) -> Codec:
    """Return the codec of a union.

    Raises:
        ValueError: two of its types have the same name, so that no tag could tell them apart.
    """
    known = {member.key: member for member in members}
    ordered = sorted(known.values(), key=lambda member: (member.rank, member.expected, member.path))
    if len(ordered) == 1:
        return ordered[0]
    if NONE in ordered and len(ordered) == 2:
        return Optional(ordered[1])
    return Union(ordered)


class Optional(Codec):
    """None or one type."""

    def __init__(self, member: Codec) -> None:
        """`member`: the one."""
        super().__init__(
            f"{member.expected} | None", f"{member.path}|None", {*member.kinds, "null"}, (Optional, member.key)
        )
        self.rank = member.rank
        self.tags = member.tags
        self._member = member

    @override
    def encode(self, value: Any, /) -> Any:
        if value is None:
            return None
        try:
            return self._member.encode(value)
        except MismatchError as exc:
            self._adopt(exc)
            raise

    @override
    def decode(self, json: Any, /) -> Any:
        if json is None:
            return None
        try:
            return self._member.decode(json)
        except MismatchError as exc:
            self._adopt(exc)
            raise

    def _adopt(self, exc: MismatchError) -> None:
        if not exc.path:
            exc.expected = self.expected

    @override
    def exact(self, value: Any, /) -> bool:
        return value is None or self._member.exact(value)


class Union(Codec):
    """Several types, in an order of its own."""

    def __init__(self, members: Sequence[Codec]) -> None:
        """`members`: those that may go without a tag first."""
        names = [member.expected for member in members if member is not NONE]
        if NONE in members:
            names.append("None")
        self._members = members
        self._plain: dict[str, Codec] = {}
        self._tagged: dict[str, Codec] = {}
        self._tags: dict[Codec, str] = {}
        for member in members:
            tag = member.expected if names.count(member.expected) == 1 else member.path
            if tag in self._tagged:
                raise ValueError(f"two types of the union have the same name {tag}")
            # Read for all of them: the next release may have other types, and tag others.
            self._tagged[tag] = member
            if self._plain.keys().isdisjoint(member.kinds) and not (self._plain and "any" in member.kinds):
                self._plain.update(dict.fromkeys(member.kinds, member))
            else:
                self._tags[member] = tag
        paths = "|".join(sorted(member.path for member in members))
        super().__init__(" | ".join(names), paths, self._plain, frozenset(member.key for member in members))

    @override
    def encode(self, value: Any, /) -> Any:
        for member in self._members:
            if member.exact(value):
                return self._write(member, value)
        inside: list[MismatchError] = []
        for member in self._members:
            try:
                return self._write(member, value)
            except MismatchError as exc:
                inside.append(exc)
        raise self._of(inside, value)

    def _write(self, member: Codec, value: Any) -> Any:
        json = member.encode(value)
        return {TAG: self._tags[member], VALUE: json} if member in self._tags else json

    @override
    def decode(self, json: Any, /) -> Any:
        if type(json) is dict and json.keys() == {TAG, VALUE} and type(json[TAG]) is str and json[TAG] in self._tagged:
            return self._tagged[json[TAG]].decode(json[VALUE])
        plain = self._plain.get(kind_of(json))
        inside: list[MismatchError] = []
        # What was written by hand has no tag: whatever fits, then.
        for member in self._members if plain is None else (plain, *self._members):
            try:
                return member.decode(json)
            except MismatchError as exc:
                inside.append(exc)
        raise self._of(inside, json)

    def _of(self, mismatches: list[MismatchError], value: Any) -> MismatchError:
        """Return the one error that knows better than "none of these", if there is one."""
        deep = {exc.path: exc for exc in mismatches if exc.path}
        return next(iter(deep.values())) if len(deep) == 1 else MismatchError(value, self.expected)

    @override
    def exact(self, value: Any, /) -> bool:
        return any(member.exact(value) for member in self._members)


class Enum(Codec):
    """A member: by its value if all values are text, or if members are ints (IntEnum); otherwise by its name.

    Names stay what they are when members are added in between; values of `auto()` do not. Both are read.
    """

    def __init__(self, kind: Any) -> None:
        """`kind`: an Enum with members."""
        by_value = issubclass(kind, int) or all(type(member.value) is str for member in kind)
        self._kind = kind
        self._json: dict[str, Any] = {}
        self._members: dict[tuple[type, Any], Any] = {}
        for member in kind:
            value = STR.encode(member.value) if type(member.value) is str else int(member) if by_value else None
            self._json[member.name] = value if by_value else STR.encode(member.name)
        # The later one wins: a text that is one member's name and another's value is what would have been written.
        names: dict[tuple[type, Any], Any] = {(str, member.name): member for member in kind}
        values = {(type(one.value), one.value): one for one in kind if type(one.value) in (str, int)}
        self._members = {**names, **values} if by_value else {**values, **names}
        super().__init__(kind.__name__, path_of(kind), map(kind_of, self._json.values()), kind)

    @override
    def encode(self, value: Any, /) -> Any:
        if type(value) is not self._kind:
            raise MismatchError(value, self.expected)
        return self._json[value.name]

    @override
    def decode(self, json: Any, /) -> Any:
        plain = decode_text(json) if kind_of(json) == "$text" else json
        if type(plain) not in (str, int):
            raise MismatchError(json, self.expected)
        found = self._members.get((type(plain), plain))
        if found is not None:
            return found
        try:
            return self._kind(plain)  # the user's _missing_ may know it
        except Exception as exc:
            raise MismatchError(json, self.expected) from exc

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is self._kind


class Flag(Codec):
    """Any combination of a Flag's members, as an int."""

    def __init__(self, kind: Any) -> None:
        """`kind`: a Flag or IntFlag."""
        super().__init__(kind.__name__, path_of(kind), INT.kinds, kind)
        self._kind = kind

    @override
    def encode(self, value: Any, /) -> Any:
        if type(value) is not self._kind:
            raise MismatchError(value, self.expected)
        return INT.encode(value.value)

    @override
    def decode(self, json: Any, /) -> Any:
        try:
            return self._kind(INT.decode(json))
        except (ValueError, MismatchError) as exc:
            raise MismatchError(json, self.expected) from exc

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is self._kind


def literal_of(values: Iterable[Any]) -> Codec:
    """Return the codec of a Literal: a union of its values' types, with those values alone."""
    by_type: dict[type, list[Any]] = {}
    for value in values:
        by_type.setdefault(type(value), []).append(value)
    return union_of(NONE if kind is type(None) else Literal(kind, known) for kind, known in by_type.items())


class Literal(Codec):
    """Some values of one type."""

    def __init__(self, kind: type, values: list[Any]) -> None:
        """`kind`: what Literal allows: bool, int, str, bytes, or an Enum."""
        base = Enum(kind) if issubclass(kind, enum.Enum) else SCALARS[kind]
        shown = ", ".join(str(value) if isinstance(value, enum.Enum) else repr(value) for value in values)
        super().__init__(f"Literal[{shown}]", f"Literal[{base.path}: {shown}]", base.kinds, (kind, *values))
        self.rank = base.rank
        self._kind = kind
        self._values = values
        self._base = base

    @override
    def encode(self, value: Any, /) -> Any:
        if not self.exact(value):
            raise MismatchError(value, self.expected)
        return self._base.encode(value)

    @override
    def decode(self, json: Any, /) -> Any:
        try:
            value = self._base.decode(json)
        except MismatchError as exc:
            raise MismatchError(json, self.expected) from exc
        if value not in self._values:
            raise MismatchError(json, self.expected)
        return value

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is self._kind and value in self._values


class AnyJson(Codec):
    """What JSON itself knows. Nothing is converted: a tuple would come back as a list."""

    rank = 9

    def __init__(self) -> None:
        super().__init__(
            "a JSON value (None, bool, int, float, str, or a list or a dict with str keys of these)", "Any", {"any"}
        )

    @override
    def encode(self, value: Any, /) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return encode_text(value)
        if kind is int:
            return INT.encode(value)
        if kind is float:
            # jsonb writes numbers from 1e16 on as ints.
            return FLOAT.encode(value) if abs(value) < 1e16 else {"$float": repr(value)}
        if kind is list:
            return [self._encode_part(f"[{index}]", one) for index, one in enumerate(value)]
        if kind is dict:
            return as_object(
                [(self._encode_key(key, value), self._encode_part(key_step(key), one)) for key, one in value.items()]
            )
        raise MismatchError(value, self.expected)

    def _encode_part(self, step: str, value: Any) -> Any:
        try:
            return self.encode(value)
        except MismatchError as exc:
            exc.under(step)
            raise

    def _encode_key(self, key: Any, owner: Any) -> Any:
        if type(key) is not str:
            raise MismatchError(owner, self.expected, f"the key {key_step(key)[1:-1]} is no str")
        return encode_text(key)

    @override
    def decode(self, json: Any, /) -> Any:
        if type(json) is list:
            return [self.decode(one) for one in json]
        if type(json) is not dict:
            return json
        kind = kind_of(json)
        if kind == PAIRS:
            return {self.decode(key): self.decode(value) for key, value in pairs_of(json, self.expected)}
        if kind in _SPECIAL:
            return _SPECIAL[kind].decode(json)
        return {key: self.decode(value) for key, value in json.items()}

    @override
    def exact(self, value: Any, /) -> bool:
        try:
            self.encode(value)
        except MismatchError:
            return False
        return True


_SPECIAL = {"$text": STR, "$int": INT, "$float": FLOAT}
ANY = AnyJson()
