"""Dates, times and durations to JSON and back.

Owns their text: ISO 8601, and in brackets what it lacks, as in RFC 9557:
`2026-10-25T02:30:00+01:00[Europe/Berlin][fold=1]`. Moment and offset come back exactly; with a ZoneInfo its key, too.
Also reads what Postgres and people write.
"""

from __future__ import annotations

import datetime
import decimal
import re
import zoneinfo
from typing import Any

from pgpubsub_celery.fieldtypes.codec import Codec, MismatchError
from pgpubsub_celery.fieldtypes.scalars import Scalar, plain_of

_plain_date = plain_of(
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


_plain_time = plain_of(datetime.time, _clock)
_plain_datetime = plain_of(
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
_BY_HAND = re.compile(
    r"(?:(\d{4}-\d\d-\d\d)[Tt ])?(\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?\s*"
    r"([Zz]|[+-]\d\d(?::?\d\d(?::?\d\d(?:\.\d{1,6})?)?)?)?"
)


def _decode_datetime(json: Any) -> Any:
    if type(json) is not str:
        raise MismatchError(json, "datetime")
    return _moment(json, datetime.datetime, _LONGEST_DATETIME)


def _decode_time(json: Any) -> Any:
    if type(json) is not str:
        raise MismatchError(json, "time")
    return _moment(json, datetime.time, _LONGEST_TIME)


_LONGEST_DATETIME = len("2026-01-01T00:00:00.000000")
_LONGEST_TIME = len("00:00:00.000000")


def _moment(json: str, kind: Any, longest: int) -> Any:
    """Return the datetime or time of a text. `longest`: characters of one without offset."""
    if json.endswith("]"):
        return _suffixed(json, kind, longest)
    if len(json) <= longest or json[-7] != ".":  # Python 3.11 reads an offset of microseconds as none
        try:
            return kind.fromisoformat(json)
        except ValueError:
            pass
    return _by_hand(json, kind)


def _by_hand(json: str, kind: Any) -> Any:
    """Read what Postgres and people write, and Python does not always read: `Z`, `+00`, fractions of any length."""
    found = _BY_HAND.fullmatch(json)
    if found is not None and (found[1] is None) is (kind is datetime.time):
        date, hour, minute, second, fraction, offset = found.groups(default="")
        tidy = f"{date}{'T' if date else ''}{hour}:{minute}:{second or '00'}.{fraction[:6]:0<6}"
        try:
            return kind.fromisoformat(tidy).replace(tzinfo=_zone_of(offset))
        except ValueError:
            pass
    raise MismatchError(json, kind.__name__)


def _zone_of(offset: str) -> datetime.timezone | None:
    if not offset:
        return None
    digits, _, fraction = offset[1:].replace(":", "").partition(".")
    hours, minutes, seconds = (int(digits[at : at + 2] or 0) for at in (0, 2, 4)) if digits else (0, 0, 0)
    shift = datetime.timedelta(hours=hours, minutes=minutes, seconds=seconds, microseconds=int(f"{fraction:0<6}"))
    return datetime.timezone(-shift if offset[0] == "-" else shift)


def _suffixed(json: str, kind: Any, longest: int) -> Any:
    found = _SUFFIX.fullmatch(json)
    assert found is not None  # it matches everything
    text, key, fold = found.groups()
    if text == json:
        raise MismatchError(json, kind.__name__)
    moment = _moment(text, kind, longest).replace(fold=int(fold or 0))
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


_plain_timedelta = plain_of(
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


MOMENTS: dict[Any, Codec] = {
    datetime.date: Scalar(datetime.date, _encode_date, _decode_date, "string"),
    datetime.datetime: Scalar(datetime.datetime, _encode_datetime, _decode_datetime, "string"),
    datetime.time: Scalar(datetime.time, _encode_time, _decode_time, "string"),
    datetime.timedelta: Scalar(datetime.timedelta, _encode_timedelta, _decode_timedelta, "string"),
}
