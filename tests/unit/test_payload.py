"""Payloads: what was sent is what the listener receives, type for type and value for value."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import importlib
import json
import math
import sys
import threading
import typing
import uuid
import zoneinfo
from typing import Annotated, Any, Literal

import pytest
import typing_extensions
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json
from sqlalchemy import Column, Integer, MetaData, Table

from pgpubsub_celery.channels import Channel, TriggerChannel, check_declared
from pgpubsub_celery.errors import ChannelError, DecodeError, PayloadError
from pgpubsub_celery.payload import build_message, decode_message, encode_message
from tests.fixtures.typed_values import (
    Access,
    Color,
    Kind,
    Mixed,
    Node,
    Number,
    Plain,
    Point,
    fits,
    json_values,
    kinds,
    sameness,
    through_jsonb,
)

pytestmark = pytest.mark.usefixtures("registry")

steady = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

DAY = datetime.date(2026, 1, 1)
NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)
WEST = datetime.timezone(-datetime.timedelta(hours=5, minutes=30))
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def channel_of(annotation: Any, **options: Any) -> Any:
    """Return a channel with one field, `value`."""
    return dataclasses.make_dataclass(
        "Generated", [("value", annotation)], bases=(Channel,), namespace={"__module__": __name__}, **options
    )


def stored(message: Channel) -> str:
    """Return a message's payload as it is sent to the database."""
    text = json.dumps(encode_message(message), allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")  # no lone surrogates
    assert "\\u0000" not in text.replace("\\\\", "")
    return text


def value_through(annotation: Any, value: Any) -> Any:
    """Return a value as a listener receives it."""
    channel = channel_of(annotation)
    return decode_message(channel, through_jsonb(stored(channel(value)))).value  # type: ignore[attr-defined]


def json_of(annotation: Any, value: Any) -> Any:
    return json.loads(stored(channel_of(annotation)(value)))["value"]


def value_of(annotation: Any, written: Any) -> Any:
    """Return what a listener receives of a payload written by hand."""
    return decode_message(channel_of(annotation), {"value": written}).value  # type: ignore[attr-defined]


def refusal(annotation: Any, value: Any) -> str:
    with pytest.raises(PayloadError) as refused:
        encode_message(channel_of(annotation)(value))
    return str(refused.value)


def undecodable(annotation: Any, written: Any) -> str:
    with pytest.raises(DecodeError) as refused:
        value_of(annotation, written)
    return str(refused.value)


# Whatever the type


@given(kinds(), st.data())
@settings(steady, max_examples=300)
def test_a_value_of_any_supported_type_comes_back_as_it_was(kind: Kind, data: st.DataObject) -> None:
    """Through JSON, and through what jsonb does to it."""
    channel = channel_of(kind.annotation)
    for _ in range(3):
        message = channel(data.draw(kind.values))
        text = stored(message)
        note(text)
        for payload in (json.loads(text), through_jsonb(text)):
            assert sameness(decode_message(channel, payload)) == sameness(message)


@given(kinds(), kinds(), st.data())
@settings(steady, max_examples=300)
def test_a_value_is_accepted_if_and_only_if_it_fits(kind: Kind, other: Kind, data: st.DataObject) -> None:
    """A field takes values of its type, and of subclasses of it, which become its type; nothing else."""
    channel = channel_of(kind.annotation)
    value = data.draw(other.values)
    if fits(kind.annotation, value):
        received = decode_message(channel, json.loads(stored(channel(value))))
        assert fits(kind.annotation, received.value)  # type: ignore[attr-defined]
        assert sameness(decode_message(channel, json.loads(stored(received)))) == sameness(received)
        assert isinstance(build_message(channel, {"value": value}), channel)
    else:
        with pytest.raises(PayloadError, match=r"^tests\.unit\.test_payload\.Generated: value"):
            encode_message(channel(value))
        with pytest.raises(PayloadError, match=r"^tests\.unit\.test_payload\.Generated: value"):
            build_message(channel, {"value": value})


@given(kinds(), json_values())
@settings(steady, max_examples=500)
def test_a_payload_written_by_hand_gives_a_value_that_fits_or_a_decode_error(kind: Kind, written: Any) -> None:
    """Never another error, and never a value of another type."""
    try:
        value = value_of(kind.annotation, written)
    except DecodeError as exc:
        refused = str(exc)
    else:
        assert fits(kind.annotation, value)
        return
    assert refused.startswith("tests.unit.test_payload.Generated: value")


# Plain types in plain JSON


@pytest.mark.parametrize(
    ("annotation", "value", "written"),
    [
        (bool, True, True),
        (int, 2**80, 2**80),
        (float, 1.5, 1.5),
        (str, "häß", "häß"),
        (None, None, None),
        (decimal.Decimal, decimal.Decimal("1.10"), "1.10"),
        (datetime.date, DAY, "2026-01-01"),
        (datetime.datetime, NOON, "2026-01-01T12:00:00+00:00"),
        (datetime.datetime, NOON.replace(tzinfo=None), "2026-01-01T12:00:00"),
        (datetime.datetime, NOON.astimezone(BERLIN), "2026-01-01T13:00:00+01:00[Europe/Berlin]"),
        (datetime.time, datetime.time(1, 2), "01:02:00"),
        (datetime.timedelta, datetime.timedelta(minutes=-1.5), "PT-90S"),
        (uuid.UUID, uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (bytes, b"\x00\xff", "AP8="),
        (Color, Color.RED, "red"),
        (Mixed, Mixed.A, "B"),
        (Number, Number.ONE, 1),
        (Plain, Plain.PAIR, "PAIR"),
        (Access, Access.READ | Access.RUN, 5),
        (Literal["a", 1], "a", "a"),
        (list[int], [1, 2], [1, 2]),
        (tuple[int, str], (1, "a"), [1, "a"]),
        (set[int], {1}, [1]),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (dict[int, str], {1: "a", -2: "b"}, {"1": "a", "-2": "b"}),
        (dict[datetime.date, int], {DAY: 1}, {"2026-01-01": 1}),
        (Point, Point(1, 2.5, "p"), {"x": 1, "y": 2.5, "label": "p"}),
        (int | None, None, None),
        (int | str, "1", "1"),
        (int | str, 1, 1),
        (datetime.date | datetime.datetime, DAY, "2026-01-01"),
        (datetime.date | datetime.datetime, NOON, {"$type": "datetime", "value": "2026-01-01T12:00:00+00:00"}),
        (Any, {"a": [1, None, "b", 2.5]}, {"a": [1, None, "b", 2.5]}),
    ],
)
def test_plain_values_have_the_json_that_a_person_would_write(annotation: Any, value: Any, written: Any) -> None:
    """So that psql can emit, and a payload can be read and filtered on."""
    assert json_of(annotation, value) == written
    assert sameness(value_of(annotation, written)) == sameness(value)


@pytest.mark.parametrize(
    ("annotation", "written", "value"),
    [
        (float, 3, 3.0),
        (float, "NaN", math.nan),
        (float, "-Infinity", -math.inf),
        (decimal.Decimal, 1, decimal.Decimal(1)),
        (decimal.Decimal, 0.1, decimal.Decimal("0.1")),
        (datetime.datetime, "2026-01-01T12:00:00Z", NOON),
        (datetime.datetime, "2026-01-01 12:00:00+00", NOON),
        (datetime.datetime, "2026-01-01 12:00:00.1234+00", NOON.replace(microsecond=123400)),
        (datetime.datetime, "2026-01-01T12:00", NOON.replace(tzinfo=None)),
        (datetime.datetime, "2026-01-01T12:00:00[Europe/Berlin]", datetime.datetime(2026, 1, 1, 12, tzinfo=BERLIN)),
        (datetime.datetime, "2026-01-01T12:00:00-0530", NOON.replace(tzinfo=WEST)),
        (datetime.time, "01:02", datetime.time(1, 2)),
        (datetime.time, "01:02:03.5Z", datetime.time(1, 2, 3, 500000, datetime.timezone.utc)),
        (datetime.timedelta, 90, datetime.timedelta(seconds=90)),
        (datetime.timedelta, 0.000001, datetime.timedelta(microseconds=1)),
        (datetime.timedelta, "P1DT2H3M4.5S", datetime.timedelta(days=1, hours=2, minutes=3, seconds=4.5)),
        (datetime.timedelta, "-P1W", datetime.timedelta(weeks=-1)),
        (Color, "RED", Color.RED),
        (Plain, "ONE", Plain.ONE),
        (date_or_time := datetime.date | datetime.datetime, "2026-01-01T12:00:00Z", NOON),
        (date_or_time, {"$type": "date", "value": "2026-01-01"}, DAY),
        (int | float, 1.5, 1.5),
    ],
)
def test_what_people_and_postgres_write_is_understood(annotation: Any, written: Any, value: Any) -> None:
    """On every version of Python."""
    assert sameness(value_of(annotation, written)) == sameness(value)


# Exactly


@pytest.mark.parametrize("value", [2**53 + 1, -(10**400), 2**20_000, -(2**20_000)], ids=int.bit_length)
def test_an_int_of_any_size_is_exact(value: int) -> None:
    """Also beyond the digits that Python and Postgres read."""
    for annotation in (int, Any, int | str, dict[int, int]):
        sent: Any = {value: value} if annotation == dict[int, int] else value
        assert value_through(annotation, sent) == sent


@pytest.mark.parametrize("value", [-0.0, 0.1, 1e16, 1e300, sys.float_info.max, 5e-324, math.inf, -math.inf, math.nan])
def test_a_float_is_exact_and_stays_a_float(value: float) -> None:
    """Although jsonb has neither infinities nor negative zeros, and writes 1e16 as an int."""
    for annotation in (float, Any, float | None, float | int, list[float]):
        sent: Any = [value] if annotation == list[float] else value
        assert sameness(value_through(annotation, sent)) == sameness(sent)


@pytest.mark.parametrize("value", ["\x00", "\ud800", "\ud800\udc00", "a\x00%0000\\u0000", "𝄞", "\\", "%", ""])
def test_a_text_may_have_any_characters(value: str) -> None:
    """Also those that jsonb refuses, and two surrogates that JSON would take for one character."""
    for annotation in (str, Any, dict[str, str], str | bytes, Literal["\x00", "%"] | str):
        sent: Any = {value: value} if annotation == dict[str, str] else value
        assert value_through(annotation, sent) == sent


def test_a_json_value_may_look_like_what_payloads_use_for_something_else() -> None:
    """Nothing is taken for a tag that was sent as data."""
    for key in ("$text", "$int", "$float", "$dict", "$type", "$"):
        for sent in ({key: "nan"}, {key: [["a", 1]]}, {key: {key: 1}}, {"$type": "int", "value": 1}):
            assert value_through(Any, sent) == sent
            assert value_through(dict[str, Any], sent) == sent
            assert value_through(int | Any, sent) == sent


def test_a_json_value_may_look_like_what_brokers_use_for_something_else() -> None:
    """Payloads of channels that are not stored pass through kombu's JSON."""
    for annotation in (Any, dict[str, str]):
        channel = channel_of(annotation)
        message = channel({"__type__": "datetime", "__value__": "tomorrow"})
        assert decode_message(channel, kombu_json.loads(kombu_json.dumps(encode_message(message)))) == message


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("clock", [datetime.datetime(2026, 10, 25, 2, 30), datetime.datetime(2026, 3, 29, 2, 30)])  # noqa: DTZ001
def test_a_time_zone_comes_back_with_its_key_and_the_fold(clock: datetime.datetime, fold: int) -> None:
    """Also in the hour that there is twice, and in the one that there is not."""
    sent = clock.replace(tzinfo=BERLIN, fold=fold)
    assert sameness(value_through(datetime.datetime, sent)) == sameness(sent)
    assert value_through(datetime.datetime, sent).utcoffset() == sent.utcoffset()


def test_the_moment_stays_when_a_zone_has_new_rules() -> None:
    """What was one moment for the writer is the same for the listener, with the offset that it had."""
    received = value_of(datetime.datetime, "2026-01-01T12:00:00+05:00[Europe/Berlin]")
    assert received == datetime.datetime(2026, 1, 1, 7, tzinfo=datetime.timezone.utc)
    assert received.utcoffset() == datetime.timedelta(hours=5)


def test_offsets_are_exact_to_the_microsecond() -> None:
    """As Python allows them."""
    for offset in (datetime.timedelta(microseconds=1), -datetime.timedelta(hours=23, microseconds=1)):
        sent = NOON.replace(tzinfo=datetime.timezone(offset))
        assert value_through(datetime.datetime, sent).utcoffset() == offset
        assert value_through(datetime.time, sent.timetz()).utcoffset() == offset


def test_an_unknown_time_zone_is_a_decode_error() -> None:
    """Which says what is missing."""
    assert "'Mars/Olympus' is not known here: install tzdata" in undecodable(
        datetime.datetime, "2026-01-01T00:00:00+00:00[Mars/Olympus]"
    )


@pytest.mark.parametrize("value", [datetime.timedelta.min, datetime.timedelta.max, datetime.timedelta(microseconds=-1)])
def test_a_timedelta_is_exact(value: datetime.timedelta) -> None:
    """To the microsecond, however long."""
    assert value_through(datetime.timedelta, value) == value


@pytest.mark.parametrize("text", ["1.10", "-0", "1E+400", "NaN", "sNaN", "-Infinity", "0E-10", "1" * 100])
def test_a_decimal_keeps_its_digits(text: str) -> None:
    """And its exponent, its sign and what it is not."""
    sent = decimal.Decimal(text)
    assert value_through(decimal.Decimal, sent).as_tuple() == sent.as_tuple()


def test_keys_that_look_the_same_are_all_kept() -> None:
    """NaN is a key as often as one likes."""
    sent = {decimal.Decimal("NaN"): 1, decimal.Decimal("NaN"): 2, decimal.Decimal(1): 3}
    assert sameness(value_through(dict[decimal.Decimal, int], sent)) == sameness(sent)


# Subclasses


class Loud(str):
    """A str of somebody's."""


class Moment(datetime.datetime):
    """A datetime of somebody's."""


class Fine(datetime.datetime):
    """A datetime that has more to it, as pandas' have nanoseconds."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Fine

    __hash__ = datetime.datetime.__hash__


class Spot(typing.NamedTuple):
    """A tuple with names."""

    x: int
    y: int


@pytest.mark.parametrize(
    ("annotation", "value", "received"),
    [
        (int, Number.ONE, 1),
        (str, Loud("a"), "a"),
        (str, Mixed.A, "B"),
        (float, 3, 3.0),
        (datetime.datetime, Moment(2026, 1, 1, 12, tzinfo=datetime.timezone.utc), NOON),
        (tuple[int, int], Spot(1, 2), (1, 2)),
        (tuple[int, ...], Spot(1, 2), (1, 2)),
        (dict[str, float], typing.cast("Any", type("Ordered", (dict,), {}))(a=1), {"a": 1.0}),
        (list[int], typing.cast("Any", type("Mutable", (list,), {}))([1]), [1]),
    ],
)
def test_a_value_of_a_subclass_becomes_what_the_field_says(annotation: Any, value: Any, received: Any) -> None:
    """The field's type is the contract, and the value is equal."""
    assert sameness(value_through(annotation, value)) == sameness(received)


def test_ids_that_asyncpg_reads_are_uuids() -> None:
    """Its class is its own."""
    own: Any = importlib.import_module("asyncpg.pgproto.pgproto")
    sent = own.UUID("00000000-0000-0000-0000-000000000001")
    assert type(sent) is not uuid.UUID
    assert sameness(value_through(uuid.UUID, sent)) == sameness(uuid.UUID(int=1))


@pytest.mark.parametrize(
    ("annotation", "value", "told"),
    [
        (int, True, "True (bool): expected int"),
        (int, 1.0, "1.0 (float): expected int"),
        (int, "1", "'1' (str): expected int"),
        (bool, 1, "1 (int): expected bool"),
        (float, "1", "expected float"),
        (float, True, "expected float"),
        (float, 2**53 + 1, "expected float (this int cannot be represented exactly)"),
        (float, 10**400, "expected float (this int is too large)"),
        (str, b"a", "expected str"),
        (str, None, "value is None: expected str"),
        (str | None, 1, "1 (int): expected str | None"),
        (datetime.date, NOON, "(datetime): expected date"),
        (datetime.datetime, DAY, "(date): expected datetime"),
        (datetime.datetime, Fine(2026, 1, 1), "(Fine): expected datetime"),
        (decimal.Decimal, 1, "expected Decimal"),
        (bytes, bytearray(b"a"), "expected bytes"),
        (uuid.UUID, str(uuid.UUID(int=1)), "expected UUID"),
        (Color, "red", "'red' (str): expected Color"),
        (Number, 1, "1 (int): expected Number"),
        (Literal["a", "b"], "c", "'c' (str): expected Literal['a', 'b']"),
        (Literal[1], True, "expected Literal[1]"),
        (list[int], (1,), "(1,) (tuple): expected list[int]"),
        (list[int], [1, "a"], "value[1] is 'a' (str): expected int"),
        (set[int], {"a"}, "value[0] is 'a' (str): expected int"),
        (tuple[int, str], (1, "a", 2), "expected tuple[int, str] (3 items instead of 2)"),
        (tuple[int, ...], [1], "expected tuple[int, ...]"),
        (dict[str, int], {"a": 1, "b": "c"}, "value['b'] is 'c' (str): expected int"),
        (dict[int, int], {1: 1, "b": 2}, "value.keys()[1] is 'b' (str): expected int"),
        (dict[str, int], [("a", 1)], "expected dict[str, int]"),
        (Point, {"x": 1}, "expected Point"),
        (Point, Point("a"), "value.x is 'a' (str): expected int"),  # type: ignore[arg-type]
        (list[Point], [Point(1), Point(1, label=2)], "value[1].label is 2 (int): expected str | None"),  # type: ignore[arg-type]
        (int | str | None, 2.5, "2.5 (float): expected int | str | None"),
        (list[int] | None, ["a"], "value[0] is 'a' (str): expected int"),
        (list[int] | str, ["a"], "value[0] is 'a' (str): expected int"),
        (Any, (1, 2), "(1, 2) (tuple): expected a JSON value"),
        (Any, {"a": [1, {2: 3}]}, "value['a'][1] is {2: 3} (dict): expected a JSON value"),
        (Any, {"a": Color.RED}, "value['a'] is"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(annotation: Any, value: Any, told: str) -> None:
    """Channel, field, value and expected type, before anything is stored."""
    message = refusal(annotation, value)
    assert message.startswith("tests.unit.test_payload.Generated: value")
    assert told in message


class Verbose:
    """Says much of itself."""

    def __repr__(self) -> str:
        return "x" * 1_000_000


class Broken:
    """Says nothing of itself."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    [b"x" * 10**7, [["x" * 10**6]] * 10**4, {"k" * 10**6: 1}, 10**5000, Verbose(), Broken(), {1: Broken()}],
    ids=lambda value: type(value).__name__,
)
def test_an_error_shows_no_more_than_a_line_of_a_value(value: Any) -> None:
    """However large it is, and whatever its repr does."""
    assert len(refusal(str, value)) < 200


def test_a_value_deep_inside_is_shown_alone() -> None:
    """With a path that stays short."""
    assert len(refusal(dict[str, int], {"k" * 1000: "v"})) < 300


def test_a_time_zone_without_an_offset_is_refused() -> None:
    """Nobody could tell which moment it is."""

    class Vague(datetime.tzinfo):
        def utcoffset(self, _: Any) -> None:
            return None

        dst = tzname = utcoffset

    assert "its time zone gives no offset" in refusal(datetime.datetime, NOON.replace(tzinfo=Vague()))


# Unions


@dataclasses.dataclass(frozen=True)
class Circle:
    """A shape."""

    radius: float


@dataclasses.dataclass(frozen=True)
class Square:
    """A shape with a field of the same name."""

    radius: float


def test_members_of_a_union_are_told_apart() -> None:
    """By a tag, where their JSON would be the same."""
    for shape in (Circle(1.0), Square(1.0)):
        assert value_through(Circle | Square, shape) == shape
    items: list[Any] = [[1], ["1"], [], [1.0]]
    for sent in items:
        assert sameness(value_through(list[int] | list[str] | list[float], sent)) == sameness(sent)
    for number in (1, 1.0, True):
        assert sameness(value_through(int | float | bool, number)) == sameness(number)


def test_the_order_of_a_union_does_not_matter() -> None:
    """Python itself makes list[int | str] of list[str | int], if it has seen that before."""
    forms = [datetime.date, datetime.datetime, str, uuid.UUID]
    one, other = typing.Union[tuple(forms)], typing.Union[tuple(reversed(forms))]  # noqa: UP007
    for sent in (DAY, NOON, "2026-01-01", uuid.UUID(int=1)):
        assert json_of(one, sent) == json_of(other, sent)
        assert value_of(one, json_of(other, sent)) == sent


def test_a_union_that_lost_or_got_members_reads_what_is_stored() -> None:
    """Rows outlive releases."""
    tagged = json_of(datetime.date | datetime.datetime | None, NOON)
    for later in (datetime.datetime, datetime.datetime | None, datetime.datetime | list[int]):
        assert value_of(later, tagged) == NOON
    assert value_of(datetime.date | datetime.datetime, json_of(datetime.datetime, NOON)) == NOON
    assert "expected date" in undecodable(datetime.date, tagged)


def test_two_types_of_one_name_are_told_apart_by_their_modules() -> None:
    """Or refused, if they have those in common too."""
    far = dataclasses.make_dataclass("Circle", [("radius", float)], frozen=True)
    far.__module__ = "elsewhere"
    for sent in (Circle(1.0), far(1.0)):
        assert sameness(value_through(Circle | far, sent)) == sameness(sent)
    near = dataclasses.make_dataclass("Circle", [("radius", float)])
    near.__module__ = __name__
    with pytest.raises(ChannelError, match=r"Generated\.value: two types of the union have the same name"):
        check_declared(channel_of(Circle | near))


# Dataclasses


@dataclasses.dataclass
class Item:
    """Has defaults."""

    price: decimal.Decimal
    count: int = 1
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Order(Channel):
    """Has everything that dataclasses have."""

    number: int
    items: list[Item] = dataclasses.field(default_factory=list)
    total: int = dataclasses.field(init=False)
    _: dataclasses.KW_ONLY
    urgent: bool = False

    def __post_init__(self) -> None:
        """Compute, and check."""
        if self.number < 0:
            raise ValueError("a number below zero")
        self.total = sum(item.count for item in self.items)


def test_fields_that_a_payload_lacks_have_their_default() -> None:
    """Of the message and of what is inside: it was stored before they were added."""
    received = decode_message(Order, {"number": 1, "items": [{"price": "1.5"}]})
    assert received == Order(1, [Item(decimal.Decimal("1.5"))])
    other = decode_message(Order, {"number": 1})
    assert isinstance(other, Order)
    assert isinstance(received, Order)
    assert other.items is not received.items


def test_fields_that_a_channel_has_no_longer_are_ignored() -> None:
    """Of the message and of what is inside."""
    payload = {"number": 1, "gone": True, "items": [{"price": "1", "gone": {"$type": "x"}}]}
    assert decode_message(Order, payload) == Order(1, [Item(decimal.Decimal(1))])


def test_fields_outside_of_init_are_computed_and_not_stored() -> None:
    """By __post_init__, which runs for the listener too."""
    message = Order(1, [Item(decimal.Decimal(1), 3)], urgent=True)
    assert encode_message(message).keys() == {"number", "items", "urgent"}
    received = decode_message(Order, json.loads(stored(message)))
    assert isinstance(received, Order)
    assert received == message
    assert received.total == 3


def test_what_post_init_refuses_is_a_decode_error_with_its_cause() -> None:
    """The message is the user's own."""
    with pytest.raises(DecodeError, match="ValueError: a number below zero") as refused:
        decode_message(Order, {"number": -1})
    assert isinstance(refused.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="a number below zero"):
        build_message(Order, {"number": -1})


def test_a_field_without_a_value_is_missing() -> None:
    """Of the message and of what is inside."""
    with pytest.raises(PayloadError, match=r"Order: number is missing: expected int\."):
        build_message(Order, {})
    with pytest.raises(DecodeError, match=r"Order: number is missing: expected int\."):
        decode_message(Order, {})
    with pytest.raises(DecodeError, match=r"Order: items\[1\]\.price is missing: expected Decimal\."):
        decode_message(Order, {"number": 1, "items": [{"price": 1}, {}]})
    bare = Order.__new__(Order)
    with pytest.raises(PayloadError, match=r"Order: number is missing"):
        encode_message(bare)


def test_an_unknown_field_is_refused_with_a_near_one() -> None:
    """A mistyped name must not be lost."""
    with pytest.raises(PayloadError, match=r"Order has no field 'numbr'.*Did you mean 'number'\?"):
        build_message(Order, {"numbr": 1})
    with pytest.raises(PayloadError, match=r"Order: total is set by the channel itself \(init=False\)"):
        build_message(Order, {"number": 1, "total": 2})


def test_the_type_is_named_when_post_init_stumbles_over_it() -> None:
    """The wrong type is the news, not what it led to."""
    with pytest.raises(PayloadError, match=r"Order: number is 'a' \(str\): expected int"):
        build_message(Order, {"number": "a"})


def test_an_instance_of_a_dataclass_with_further_fields_is_refused() -> None:
    """They would be lost."""

    @dataclasses.dataclass
    class Rich(Item):
        colour: str = "red"

    with pytest.raises(
        PayloadError, match=r"items\[0\].*expected Item \(of a subclass, whose own fields would be lost\)"
    ):
        encode_message(Order(1, [Rich(decimal.Decimal(1))]))


def test_a_payload_that_is_no_object_is_a_decode_error() -> None:
    """Somebody may have written anything."""
    payload: Any
    for payload in (None, [], 1, "a"):
        with pytest.raises(DecodeError, match=r"the payload is .*: expected an object"):
            decode_message(Order, payload)


def test_frozen_and_slotted_channels_survive() -> None:
    """What the decorator makes of the class does not matter."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Small(Channel):
        number: int
        at: datetime.datetime | None = None

    message = Small(number=1, at=NOON)
    assert not hasattr(message, "__dict__")
    assert decode_message(Small, json.loads(stored(message))) == message


def test_deep_values_survive_and_endless_ones_are_refused() -> None:
    """Up to what Python's own json writes."""
    node = Node(decimal.Decimal(0))
    for depth in range(100):
        node = Node(decimal.Decimal(depth), [], node)
    assert value_through(Node, node) == node
    node.next = node
    assert "contains itself, or is nested too deeply" in refusal(Node, node)
    endless: list[Any] = []
    endless.append(endless)
    assert "contains itself, or is nested too deeply" in refusal(Any, endless)


def test_large_values_survive() -> None:
    """There is no limit."""
    numbers = list(range(100_000))
    assert value_through(list[int], numbers) == numbers
    text = "é" * 1_000_000
    assert value_through(str, text) == text


# Enums


def test_members_of_an_enum_may_be_added_between_others() -> None:
    """auto() numbers them anew: what is stored are names."""
    before = enum.Enum("Level", ["LOW", "HIGH"])  # type: ignore[misc]
    after = enum.Enum("Level", ["LOW", "MIDDLE", "HIGH"])  # type: ignore[misc]
    assert value_of(after, json_of(before, before["HIGH"])) is after["HIGH"]


def test_a_members_earlier_value_is_what_missing_says() -> None:
    """The user's own hook is asked."""

    class State(enum.Enum):
        DONE = "done"

        @classmethod
        def _missing_(cls, value: object) -> State | None:
            return cls.DONE if value == "finished" else None

    assert value_of(State, "finished") is State.DONE
    assert "expected State" in undecodable(State, "unknown")


# Annotations


def test_an_alias_may_contain_itself() -> None:
    """As the type of JSON does."""
    tree = typing_extensions.TypeAliasType("tree", dict[str, "tree"] | list[int])  # type: ignore[misc]  # mypy knows none inside
    globals()["tree"] = tree
    try:
        sent = {"a": {"b": [1]}, "c": [2, 3]}
        assert value_through(tree, sent) == sent
        assert "value['a']['b'][0] is 'x' (str): expected int" in refusal(tree, {"a": {"b": ["x"]}})
    finally:
        del globals()["tree"]


def test_what_only_type_checkers_care_for_is_ignored() -> None:
    """Annotated, with whatever metadata, Final and NewType."""
    numbers = typing.NewType("numbers", list[int])
    for annotation in (Annotated[list[int], ["unhashable"]], numbers, typing.Final[list[int]], typing.List[int]):  # noqa: UP006
        assert value_through(annotation, [1]) == [1]


@pytest.mark.parametrize(
    ("annotation", "value"), [(list, [1, "a", [None]]), (tuple, (1, "a")), (set, {1, "a"}), (dict, {1: "a", "b": [2]})]
)
def test_a_container_that_says_nothing_of_its_items_has_json_values(annotation: Any, value: Any) -> None:
    """And is itself what it is."""
    assert sameness(value_through(annotation, value)) == sameness(value)


def test_a_channels_codec_is_made_once_for_all_threads() -> None:
    """Ten that come at the same time."""
    channel = channel_of(dict[str, list[Point | Node]])
    barrier = threading.Barrier(10)
    payloads: list[Any] = []

    def encode() -> None:
        barrier.wait(10)
        payloads.append(encode_message(channel({"a": [Point(1)]})))

    threads = [threading.Thread(target=encode) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert payloads == [payloads[0]] * 10


def test_trigger_channels_have_no_messages() -> None:
    """Their payload is rows, which is for others to read."""

    class Changes(TriggerChannel[Any]):
        model = Table("author", MetaData(), Column("id", Integer, primary_key=True))

    with pytest.raises(ChannelError, match="is a trigger channel: it has no messages"):
        decode_message(Changes, {})
