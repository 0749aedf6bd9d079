"""Values without parts to JSON and back: numbers, text, bytes, UUIDs.

Owns their JSON: the form that a person would write, where there is one, so that psql can emit too, and never one that
jsonb would change or refuse. An object with one key such as `$float` or `$text` stands for what plain JSON cannot hold.

A value of a subclass is stored as what the field says it is (a `Markup` as str, a `numpy.float64` as float), if that is
equal to it. Not so a bool for an int, or a datetime for a date: those are mistakes. An int will do for a float.
"""

from __future__ import annotations

import base64
import decimal
import math
import re
import types
import uuid
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError, path_of

LARGEST_INT = 1 << 4096
"""Larger ones are written in hexadecimal: Python reads at most 4,300 decimal digits, jsonb at most 131,072."""


def plain_of(kind: Any, convert: Callable[[Any], Any], not_of: type | tuple[type, ...] = ()) -> Callable[[Any], Any]:
    """Return the way to the plain value of a subclass's instance, for values that are not of `kind` itself."""

    def plain(value: Any) -> Any:
        if isinstance(value, kind) and not isinstance(value, not_of):
            try:
                converted = convert(value)
                if converted == value or converted != converted:
                    return converted  # equal, or NaN
            except Exception as exc:
                raise MismatchError(value, kind.__name__) from exc
        raise MismatchError(value, kind.__name__)

    return plain


class Scalar(Codec):
    """A type whose values have no parts."""

    def __init__(
        self, kind: Any, encode: Callable[[Any], Any], decode: Callable[[Any], Any], *kinds: str, rank: int = 5
    ) -> None:
        """`encode` and `decode` become its methods."""
        super().__init__("None" if kind is types.NoneType else kind.__name__, path_of(kind), kinds)
        self.kind = kind
        self.rank = rank
        # Not methods that call them: every value of every field passes here.
        self.encode = encode  # type: ignore[method-assign]
        self.decode = decode  # type: ignore[method-assign]

    @override
    def exact(self, value: Any, /) -> bool:
        return type(value) is self.kind


# None, bool, int, float, str


def _none(value: Any) -> None:
    if value is not None:
        raise MismatchError(value, "None")


def _bool(value: Any) -> Any:
    if value is True or value is False:
        return value
    raise MismatchError(value, "bool")


_plain_int = plain_of(int, int.__int__, not_of=bool)


def _encode_int(value: Any) -> Any:
    if type(value) is not int:
        value = _plain_int(value)
    if -LARGEST_INT < value < LARGEST_INT:
        return value
    return {"$int": hex(value)}


def _decode_int(json: Any) -> Any:
    if type(json) is int:
        return json
    if type(json) is dict and json.keys() == {"$int"} and type(json["$int"]) is str:
        try:
            return int(json["$int"], 16)
        except ValueError:
            pass
    raise MismatchError(json, "int")


_plain_float = plain_of(float, float.__float__)


def _encode_float(value: Any) -> Any:
    if type(value) is not float:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        value = _float_of_int(value) if is_int else _plain_float(value)
    # jsonb has numbers of any size, but neither infinities nor a negative zero.
    if value - value == 0.0 and (value != 0.0 or math.copysign(1.0, value) > 0.0):
        return value
    return {"$float": repr(value)}


def _float_of_int(value: Any) -> float:
    # As type checkers have it: an int will do for a float, as long as it is the same number.
    number = _plain_int(value) if type(value) is not int else value
    try:
        same = float(number)
    except OverflowError:
        raise MismatchError(value, "float", "this int is too large") from None
    if same != number:
        raise MismatchError(value, "float", "this int cannot be represented exactly")
    return same


_BY_HAND = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _decode_float(json: Any) -> Any:
    if type(json) is float:
        return json
    if type(json) is int:
        # jsonb writes 1e16 as 10000000000000000.
        return _float_from_int(json)
    if type(json) is dict and json.keys() == {"$float"} and type(json["$float"]) is str:
        try:
            return float(json["$float"])
        except ValueError:
            pass
    elif type(json) is str and json in _BY_HAND:
        return _BY_HAND[json]
    raise MismatchError(json, "float")


def _float_from_int(json: int) -> float:
    try:
        return float(json)
    except OverflowError:
        raise MismatchError(json, "float", "too large") from None


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_ESCAPED = re.compile("[\x00\ud800-\udfff%]")
_plain_str = plain_of(str, str.__str__)


def encode_text(value: str) -> Any:
    """Return JSON for a str: jsonb refuses NUL characters, and UTF-8 lone surrogates; those go as %0000 and %d800."""
    if value.isascii():
        if "\x00" not in value:
            return value
    elif _UNSTORABLE.search(value) is None:
        return value
    return {"$text": _ESCAPED.sub(lambda found: f"%{ord(found[0]):04x}", value)}


def decode_text(json: Any) -> Any:
    """Return the str of a `$text` object."""
    text = json["$text"]
    if type(text) is not str:
        raise MismatchError(json, "str")
    return re.sub("%([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), text)


def _encode_str(value: Any) -> Any:
    return encode_text(value if type(value) is str else _plain_str(value))


def _decode_str(json: Any) -> Any:
    if type(json) is str:
        return json
    if type(json) is dict and json.keys() == {"$text"}:
        return decode_text(json)
    raise MismatchError(json, "str")


# Decimal, bytes, UUID

_plain_decimal = plain_of(decimal.Decimal, decimal.Decimal)


def _encode_decimal(value: Any) -> str:
    return str(value if type(value) is decimal.Decimal else _plain_decimal(value))


def _decode_decimal(json: Any) -> Any:
    if type(json) is str or type(json) is int:
        try:
            return decimal.Decimal(json)
        except (ArithmeticError, ValueError):
            pass
    elif type(json) is float:
        return decimal.Decimal(repr(json))  # the shortest form is what was written
    raise MismatchError(json, "Decimal")


_plain_bytes = plain_of(bytes, lambda value: bytes(memoryview(value)))


def _encode_bytes(value: Any) -> str:
    return base64.b64encode(value if type(value) is bytes else _plain_bytes(value)).decode("ascii")


def _decode_bytes(json: Any) -> Any:
    if type(json) is str:
        try:
            return base64.b64decode(json, validate=True)
        except ValueError:
            pass
    raise MismatchError(json, "bytes", "in base64")


_plain_uuid = plain_of(uuid.UUID, lambda value: uuid.UUID(int=value.int))


def _encode_uuid(value: Any) -> str:
    return str(value if type(value) is uuid.UUID else _plain_uuid(value))


def _decode_uuid(json: Any) -> Any:
    if type(json) is str:
        try:
            return uuid.UUID(json)
        except ValueError:
            pass
    raise MismatchError(json, "UUID")


NONE = Scalar(types.NoneType, _none, _none, "null", rank=0)
INT = Scalar(int, _encode_int, _decode_int, "number", "$int", rank=2)
FLOAT = Scalar(float, _encode_float, _decode_float, "number", "$float", rank=3)
STR = Scalar(str, _encode_str, _decode_str, "string", "$text", rank=4)

SCALARS: dict[Any, Codec] = {
    types.NoneType: NONE,
    bool: Scalar(bool, _bool, _bool, "bool", rank=1),
    int: INT,
    float: FLOAT,
    str: STR,
    decimal.Decimal: Scalar(decimal.Decimal, _encode_decimal, _decode_decimal, "string"),
    bytes: Scalar(bytes, _encode_bytes, _decode_bytes, "string"),
    uuid.UUID: Scalar(uuid.UUID, _encode_uuid, _decode_uuid, "string"),
}
