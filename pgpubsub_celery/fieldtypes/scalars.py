"""Values without parts to JSON and back: numbers, text, bytes, dates, times, UUIDs.

Owns their JSON: the form that a person would write, where there is one, so that psql can emit too, and never one that
jsonb would change or refuse. An object with one key such as `$float` or `$text` stands for what plain JSON cannot hold.

A value of a subclass is stored as what the field says it is (a `Markup` as str, a `numpy.float64` as float), if that is
equal to it. Not so a bool for an int, or a datetime for a date: those are mistakes. An int will do for a float.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import re
import types
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError, identity_of

LARGEST_INT = 1 << 4096
"""Larger ones are written in hexadecimal: Python reads at most 4,300 decimal digits, jsonb at most 131,072."""


def _plain_of(kind: Any, convert: Callable[[Any], Any], not_of: type | tuple[type, ...] = ()) -> Callable[[Any], Any]:
    """Return the way to the plain value of a subclass's instance, for values that are not of `kind` itself."""

    def plain_of(value: Any) -> Any:
        if isinstance(value, kind) and not isinstance(value, not_of):
            try:
                plain = convert(value)
                if plain == value or plain != plain:
                    return plain  # equal, or NaN
            except Exception as exc:
                raise MismatchError(value, kind.__name__) from exc
        raise MismatchError(value, kind.__name__)

    return plain_of


class Scalar(Codec):
    """A type whose values have no parts."""

    def __init__(
        self, kind: Any, encode: Callable[[Any], Any], decode: Callable[[Any], Any], *kinds: str, rank: int = 5
    ) -> None:
        """`encode` and `decode` become its methods."""
        super().__init__("None" if kind is types.NoneType else kind.__name__, identity_of(kind), kinds)
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


_plain_int = _plain_of(int, int.__int__, not_of=bool)


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


_plain_float = _plain_of(float, float.__float__)


def _encode_float(value: Any) -> Any:
    if type(value) is not float:
        value = _float_of_int(value) if isinstance(value, int) else _plain_float(value)
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
_plain_str = _plain_of(str, str.__str__)


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

_plain_decimal = _plain_of(decimal.Decimal, decimal.Decimal)


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


_plain_bytes = _plain_of(bytes, lambda value: bytes(memoryview(value)))


def _encode_bytes(value: Any) -> str:
    return base64.b64encode(value if type(value) is bytes else _plain_bytes(value)).decode("ascii")


def _decode_bytes(json: Any) -> Any:
    if type(json) is str:
        try:
            return base64.b64decode(json, validate=True)
        except ValueError:
            pass
    raise MismatchError(json, "bytes", "in base64")


_plain_uuid = _plain_of(uuid.UUID, lambda value: uuid.UUID(int=value.int))


def _encode_uuid(value: Any) -> str:
    return str(value if type(value) is uuid.UUID else _plain_uuid(value))


def _decode_uuid(json: Any) -> Any:
    if type(json) is str:
        try:
            return uuid.UUID(json)
        except ValueError:
            pass
    raise MismatchError(json, "UUID")


# Dates and times: ISO 8601, and in brackets what it lacks, as in RFC 9557:
# 2026-10-25T02:30:00+01:00[Europe/Berlin][fold=1]

_plain_date = _plain_of(
    datetime.date, lambda value: datetime.date(value.year, value.month, value.day), not_of=datetime.datetime
)


def _encode_date(value: Any) -> str:
    return (value if type(value) is datetime.date else _plain_date(value)).isoformat()


def _decode_date(json: Any) -> Any:
    if type(json) is str:
        try:
            return datetime.date.fromisoformat(json)
        except ValueError:
            pass
    raise MismatchError(json, "date")


def _clock(value: Any) -> datetime.time:
    return datetime.time(value.hour, value.minute, value.second, value.microsecond, value.tzinfo, fold=value.fold)


_plain_time = _plain_of(datetime.time, _clock)
_plain_datetime = _plain_of(
    datetime.datetime,
    lambda value: datetime.datetime.combine(datetime.date(value.year, value.month, value.day), _clock(value)),
)


def _encode_datetime(value: Any) -> str:
    if type(value) is not datetime.datetime:
        value = _plain_datetime(value)
    if value.tzinfo is None and not value.fold:
        return str(value.isoformat())
    return _with_suffix(value, "datetime")


def _encode_time(value: Any) -> str:
    if type(value) is not datetime.time:
        value = _plain_time(value)
    if value.tzinfo is None and not value.fold:
        return str(value.isoformat())
    return _with_suffix(value, "time")


def _with_suffix(value: Any, expected: str) -> str:
    key = value.tzinfo.key if isinstance(value.tzinfo, zoneinfo.ZoneInfo) else None
    if key is None and value.tzinfo is not None and value.utcoffset() is None:
        raise MismatchError(value, expected, "its time zone gives no offset")
    zone = "" if key is None else f"[{key}]"
    return f"{value.isoformat()}{zone}{'[fold=1]' if value.fold else ''}"


_SUFFIX = re.compile(r"(.*?)(?:\[([^\]=]+)\])?(?:\[fold=([01])\])?", re.DOTALL)
_CLOCK = r"(\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
_OFFSET = r"\s*([Zz]|[+-]\d\d(?::?\d\d)?)?"
_BY_HAND_DATETIME = re.compile(rf"(\d\d\d\d-\d\d-\d\d)[Tt ]{_CLOCK}{_OFFSET}")
_BY_HAND_TIME = re.compile(rf"(){_CLOCK}{_OFFSET}")


def _decode_datetime(json: Any) -> Any:
    if type(json) is not str:
        raise MismatchError(json, "datetime")
    if json.endswith("]"):
        return _decode_suffixed(json, datetime.datetime, _BY_HAND_DATETIME)
    try:
        return datetime.datetime.fromisoformat(json)
    except ValueError:
        return _decode_by_hand(json, datetime.datetime, _BY_HAND_DATETIME, json)


def _decode_time(json: Any) -> Any:
    if type(json) is not str:
        raise MismatchError(json, "time")
    if json.endswith("]"):
        return _decode_suffixed(json, datetime.time, _BY_HAND_TIME)
    try:
        return datetime.time.fromisoformat(json)
    except ValueError:
        return _decode_by_hand(json, datetime.time, _BY_HAND_TIME, json)


def _decode_by_hand(text: str, kind: Any, pattern: re.Pattern[str], json: str) -> Any:
    """Read what Postgres and people write, and Python 3.10 does not read: `Z`, `+00`, fractions of any length."""
    found = pattern.fullmatch(text)
    if found is not None:
        date, hour, minute, second, fraction, offset = found.groups(default="")
        offset = "+00:00" if offset in ("Z", "z") else offset.replace(":", "")
        if 0 < len(offset) < 6:
            offset = f"{offset[:3]}:{offset[3:] or '00'}"
        tidy = f"{date}{'T' if date else ''}{hour}:{minute}:{second or '00'}.{fraction[:6]:0<6}{offset}"
        try:
            return kind.fromisoformat(tidy)
        except ValueError:
            pass
    raise MismatchError(json, kind.__name__)


def _decode_suffixed(json: str, kind: Any, pattern: re.Pattern[str]) -> Any:
    found = _SUFFIX.fullmatch(json)
    assert found is not None  # it matches everything
    text, key, fold = found.groups()
    try:
        moment = kind.fromisoformat(text)
    except ValueError:
        moment = _decode_by_hand(text, kind, pattern, json)
    moment = moment.replace(fold=int(fold or 0))
    if key is None:
        return moment
    try:
        zone = zoneinfo.ZoneInfo(key)
    except (KeyError, ValueError, OSError) as exc:
        raise MismatchError(json, kind.__name__, f"the time zone {key!r} is not known here: install tzdata") from exc
    for candidate in (moment, moment.replace(fold=1 - moment.fold)):
        zoned = candidate.replace(tzinfo=zone)
        if moment.tzinfo is None or zoned.utcoffset() == moment.utcoffset():
            return zoned
        if fold is not None:
            break
    # The rules of the zone have changed since: the moment, and the offset that it was sent with, stay.
    return moment


_plain_timedelta = _plain_of(
    datetime.timedelta, lambda value: datetime.timedelta(value.days, value.seconds, value.microseconds)
)


def _encode_timedelta(value: Any) -> str:
    if type(value) is not datetime.timedelta:
        value = _plain_timedelta(value)
    microseconds = (value.days * 86_400 + value.seconds) * 1_000_000 + value.microseconds
    seconds, fraction = divmod(abs(microseconds), 1_000_000)
    digits = f".{fraction:06d}".rstrip("0") if fraction else ""
    return f"PT{'-' if microseconds < 0 else ''}{seconds}{digits}S"


_DURATION = re.compile(
    r"(-)?P(?:(-?\d+)W)?(?:(-?\d+)D)?(?:T(?:(-?\d+)H)?(?:(-?\d+)M)?(?:(-)?(\d+)(?:[.,](\d{1,6}))?S)?)?"
)


def _decode_timedelta(json: Any) -> Any:
    """Return a timedelta from an ISO 8601 duration, or a number of seconds."""
    try:
        if type(json) is str:
            found = _DURATION.fullmatch(json)
            if found is not None and len(json.strip("-PT")) > 0:
                return _duration(found)
        elif type(json) is int:
            return datetime.timedelta(seconds=json)
        elif type(json) is float:
            microseconds = decimal.Decimal(repr(json)).scaleb(6)
            if microseconds == microseconds.to_integral_value():
                return datetime.timedelta(microseconds=int(microseconds))
    except (OverflowError, ArithmeticError):
        pass
    raise MismatchError(json, "timedelta", "as PT1.5S or a number of seconds")


def _duration(found: re.Match[str]) -> datetime.timedelta:
    minus, weeks, days, hours, minutes, seconds_minus, seconds, fraction = found.groups()
    microseconds = int(seconds or 0) * 1_000_000 + int(f"{fraction or '':0<6}")
    total = datetime.timedelta(
        weeks=int(weeks or 0),
        days=int(days or 0),
        hours=int(hours or 0),
        minutes=int(minutes or 0),
        microseconds=-microseconds if seconds_minus else microseconds,
    )
    return -total if minus else total


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
    datetime.date: Scalar(datetime.date, _encode_date, _decode_date, "string"),
    datetime.datetime: Scalar(datetime.datetime, _encode_datetime, _decode_datetime, "string"),
    datetime.time: Scalar(datetime.time, _encode_time, _decode_time, "string"),
    datetime.timedelta: Scalar(datetime.timedelta, _encode_timedelta, _decode_timedelta, "string"),
}
