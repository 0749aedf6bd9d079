"""What listeners receive as old and new: compared with what the ORM loads from the same row."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    ARRAY,
    CHAR,
    JSON,
    BigInteger,
    Boolean,
    Column,
    Computed,
    Connection,
    Date,
    DateTime,
    Engine,
    Enum,
    Float,
    ForeignKey,
    Identity,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    PickleType,
    SmallInteger,
    String,
    Table,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    create_engine,
    event,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY as PG_ARRAY
from sqlalchemy.dialects.postgresql import CIDR, INET, INT4RANGE, JSONB, MONEY, OID, TIMESTAMP, TSTZRANGE, TSVECTOR
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    column_property,
    composite,
    deferred,
    mapped_column,
    reconstructor,
    registry,
    relationship,
)
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.types import NullType, UserDefinedType

from pgpubsub_celery import channels, rows
from pgpubsub_celery.channels import check_declared
from pgpubsub_celery.errors import ChannelError, DecodeError
from pgpubsub_celery.rows import decode_rows
from tests.conftest import DRIVER
from tests.fixtures.changes import channel_of, create, listener_of, rows_of

pytestmark = pytest.mark.usefixtures("registry")

BERLIN = datetime.timezone(datetime.timedelta(hours=1))


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


class Kind(enum.Enum):
    PERSON = 1
    MANAGER = 2
    ALIEN = 3


class Reversed(TypeDecorator[str]):
    """Stores its text backwards, and knows what to make of NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]

    def process_result_value(self, value: str | None, dialect: Any) -> str:
        return "nothing" if value is None else value[::-1]


class Shouted(UserDefinedType[str]):
    """Is selected through a function."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "text"

    def column_expression(self, colexpr: Any) -> Any:
        return func.upper(colexpr, type_=self)


@pytest.fixture(autouse=True)
def _fresh_worker() -> None:
    """Nothing is known of the tables that earlier tests had in the same database."""
    rows._shapes.clear()


@pytest.fixture(params=["UTC", "Europe/Berlin"])
def connection(request: pytest.FixtureRequest, shared_engine: Engine) -> Iterator[Connection]:
    """A worker's connection, in the trigger's time zone or another. What is done on it is rolled back."""
    with shared_engine.connect() as connection:
        connection.execute(text(f"SET TIME ZONE '{request.param}'"))
        yield connection


@pytest.fixture
def psycopg_connection(shared_engine: Engine) -> Iterator[Connection]:
    """A connection of a driver whose values only Postgres can convert."""
    engine = create_engine(shared_engine.url.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def change(channel: Any, connection: Connection, position: int = -1) -> tuple[Any, Any]:
    """Decode one stored notification."""
    (decoded,) = decode_rows(channel, [rows_of(connection)[position].payload], connection)
    assert not isinstance(decoded, DecodeError), decoded
    return decoded


def read(decoded: Sequence[Any]) -> Sequence[tuple[Any, Any]]:
    """Nothing of it is an error."""
    assert not [one for one in decoded if isinstance(one, DecodeError)]
    return decoded


def watch(connection: Connection, model: Any, *operations: str, **attributes: Any) -> Any:
    """Make the table and its triggers."""
    channel = channel_of(model, **attributes)
    table = model if isinstance(model, Table) else inspect(model).local_table
    table.metadata.create_all(connection)
    create(connection, listener_of(channel, *operations))
    return channel


def exact(value: Any) -> Any:
    """What equality does not tell: types, time zones, digits, signs of zero, NaN."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [exact(one) for one in value]
    if isinstance(value, dict):
        return {key: exact(one) for key, one in value.items()}
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, (datetime.datetime, datetime.time)):
        return type(value).__name__, value.isoformat(), value.utcoffset()
    return type(value).__name__, value if isinstance(value, (memoryview, bytes)) else repr(value)


UTC = datetime.timezone.utc
NAIVE = datetime.datetime(2026, 2, 3, 4, 5, 6, 700000, UTC).replace(tzinfo=None)
TYPES: dict[str, tuple[Any, list[Any]]] = {
    "integers": (Integer, [0, -(2**31), 2**31 - 1]),
    "small integers": (SmallInteger, [-(2**15), 7]),
    "big integers": (BigInteger, [-(2**63), 2**63 - 1]),
    "oids": (OID, [2**32 - 1]),
    "texts": (Text, ["", "a", "é\n\t\\\"'%s:x {}", "𝄞" * 1000, "NULL", "\u007f\u0001"]),
    "varchars": (String(5), ["", "abcde", "  "]),
    "chars, which are padded": (CHAR(5), ["", "ab", "abcde"]),
    "booleans": (Boolean, [True, False]),
    "numerics": (Numeric, [decimal.Decimal("1.500"), decimal.Decimal("-1e-30"), decimal.Decimal("NaN"), 10**40]),
    "numerics with scale": (Numeric(10, 2), [decimal.Decimal("1.50"), 3]),
    "numerics as floats": (Numeric(asdecimal=False), [1.5, 0]),
    "floats": (Float(53), [0.1, 1e300, 5e-324, -0.0, math.inf, -math.inf, math.nan, 0.1 + 0.2]),
    "short floats": (Float(24), [0.1, 1e30]),
    "floats as decimals": (Float(53, asdecimal=True), [0.1]),
    "dates": (Date, [datetime.date(2026, 2, 3), datetime.date.min, datetime.date.max]),
    "times": (Time, [datetime.time(0), datetime.time(23, 59, 59, 999999)]),
    "times with time zone": (Time(timezone=True), [datetime.time(1, 2, 3, 4, tzinfo=BERLIN)]),
    "timestamps": (DateTime, [NAIVE, NAIVE.replace(year=1)]),
    "timestamps with time zone": (
        DateTime(timezone=True),
        [datetime.datetime(2026, 7, 3, 4, 5, 6, tzinfo=UTC), datetime.datetime(1900, 1, 1, tzinfo=BERLIN)],
    ),
    "timestamps of three digits": (
        TIMESTAMP(timezone=True, precision=3),
        [datetime.datetime(2026, 1, 1, 1, 1, 1, 123456, UTC)],
    ),
    "intervals": (
        Interval,
        [datetime.timedelta(0), datetime.timedelta(-3, 4, 5), datetime.timedelta(days=4000, microseconds=1)],
    ),
    "uuids": (Uuid, [uuid.UUID(int=0), uuid.UUID("12345678-1234-5678-1234-567812345678")]),
    "uuids as texts": (Uuid(as_uuid=False), ["12345678-1234-5678-1234-567812345678"]),
    "json": (JSON, [{"b": 1, "a": [None, 1.5, "é", {"": True}]}, [], "text", 7, JSON.NULL]),
    "jsonb": (JSONB, [{"b": 1, "a": [None, 1e100, "\\u0000"]}, "x", False, JSON.NULL, 12345678901234567890]),
    "bytes": (LargeBinary, [b"", b"\x00\xff\\'"]),
    "pickles": (PickleType, [{"a": {1, 2}}]),
    "enumerations": (Enum(Color), [Color.RED, Color.BLUE]),
    "enumerations by value": (
        Enum(Color, values_callable=lambda e: [c.value for c in e], name="by_value"),
        [Color.BLUE],
    ),
    "enumerations of strings": (Enum("x y", "it's", name="strings"), ["x y", "it's"]),
    "enumerations as varchars": (Enum(Color, native_enum=False), [Color.RED]),
    "arrays": (ARRAY(Integer), [[], [1, None], [[1, 2], [3, 4]]]),
    "arrays of texts": (PG_ARRAY(Text), [["", 'a"b', "NULL", None, "{,}", "\\"]]),
    "arrays as tuples": (PG_ARRAY(Text, as_tuple=True), [["a"]]),
    "arrays of numerics": (ARRAY(Numeric), [[decimal.Decimal("1.50"), None]]),
    "arrays of timestamps": (ARRAY(DateTime(timezone=True)), [[datetime.datetime(2026, 7, 3, tzinfo=UTC)]]),
    "arrays of enumerations": (ARRAY(Enum(Color)), [[Color.RED, Color.BLUE], []]),
    "arrays of json": (ARRAY(JSONB), [[{"a": [1, "}"]}, None]]),
    "addresses": (INET, ["10.0.0.1", "10.1.2.3/8", "::1"]),
    "networks": (CIDR, ["10.0.0.0/8"]),
    "ranges": (INT4RANGE, [text("'[1,5]'"), text("'empty'"), text("'(,5)'")]),
    "ranges of timestamps": (TSTZRANGE, [text("'[2026-07-01 00:00+02, 2026-07-02 00:00+02)'")]),
    "money": (MONEY, [text("'-1234567.89'"), text("'0'")]),
    "search vectors": (TSVECTOR, [text("'''it''''s''\\:1A b\\:2'")]),
    "decorated types": (Reversed, ["abc", ""]),
    "types selected through a function": (Shouted, ["abc"]),
}


def load(connection: Connection, model: Any) -> list[Any]:
    with Session(connection) as session:
        loaded = list(session.scalars(select(model).order_by(model.id)))
        session.expunge_all()
    return loaded


def model_of(column_type: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        value = Column("The Value", column_type)

    return Thing


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_that_the_orm_loads(connection: Connection, kind: str) -> None:
    """Of each type, with NULL, in sessions of different time zones."""
    column_type, values = TYPES[kind]
    model = model_of(column_type)
    channel = watch(connection, model)
    with Session(connection) as session:
        session.add_all(model(id=number, value=value) for number, value in enumerate([*values, None]))
        session.flush()
    loaded = load(connection, model)
    decoded = decode_rows(channel, [row.payload for row in rows_of(connection)], connection)
    assert [exact(new.value) for _, new in read(decoded)] == [exact(one.value) for one in loaded]
    assert [new.id for _, new in read(decoded)] == [one.id for one in loaded]
    assert all(old is None for old, _ in read(decoded))


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_that_the_orm_loads_with_another_driver(psycopg_connection: Connection, kind: str) -> None:
    """Postgres converts, this driver loads."""
    column_type, values = TYPES[kind]
    model = model_of(column_type)
    channel = watch(psycopg_connection, model)
    with Session(psycopg_connection) as session:
        session.add_all(model(id=number, value=value) for number, value in enumerate([*values, None]))
        session.flush()
    loaded = load(psycopg_connection, model)
    decoded = decode_rows(channel, [row.payload for row in rows_of(psycopg_connection)], psycopg_connection)
    assert [exact(new.value) for _, new in read(decoded)] == [exact(one.value) for one in loaded]


@pytest.mark.parametrize(
    ("declared", "actual", "values"),
    [
        (Integer, "numeric", ["1", "1.5"]),
        (String(3), "char(5)", ["'ab'"]),
        (String(3), "text", ["'longer than three'"]),
        (DateTime, "timestamptz", ["'2026-07-03 04:05:06+00'"]),
        (DateTime(timezone=True), "timestamp", ["'2026-07-03 04:05:06'"]),
        (Float, "numeric", ["1.10"]),
        (Numeric, "float8", ["1.1"]),
        (String, "uuid", ["'12345678-1234-5678-1234-567812345678'"]),
        (Text, "jsonb", ["'{\"a\": 1}'"]),
        (NullType, "point", ["'(1,2)'"]),
        (NullType, "pair", ["ROW(1, 'x')", "ROW(NULL, NULL)"]),
        (Integer, "positive", ["5"]),
        (NullType, "very_positive", ["5"]),
        (Text, "filled", ["'x'"]),
        (ARRAY(Integer), "int[]", ["'[2:3]={1,2}'"]),
        (NullType, "bit(3)", ["B'101'"]),
        (NullType, "macaddr", ["'08:00:2b:01:02:03'"]),
        # psycopg 3 reads these nowhere.
        *([] if os.environ.get(DRIVER) == "psycopg" else [(Date, "date", ["'infinity'", "'-infinity'"])]),
        *([] if os.environ.get(DRIVER) == "psycopg" else [(DateTime(timezone=True), "timestamptz", ["'infinity'"])]),
    ],
)
def test_the_type_in_the_database_counts_where_the_model_says_otherwise(
    connection: Connection, declared: Any, actual: str, values: list[str]
) -> None:
    """As in a query, whose values come with the database's types; domains are their base types."""
    connection.execute(
        text(
            "CREATE TYPE pair AS (a int, b text); CREATE DOMAIN positive AS int CHECK (value > 0); "
            "CREATE DOMAIN very_positive AS positive CHECK (value > 1); CREATE DOMAIN filled AS text NOT NULL; "
            f'CREATE TABLE thing (id int PRIMARY KEY, "The Value" {actual})'
        )
    )
    model = model_of(declared)
    channel = channel_of(model)
    create(connection, listener_of(channel))
    for number, value in enumerate(values):
        connection.execute(text(f"INSERT INTO thing VALUES ({number}, {value.replace(':', chr(92) + ':')})"))
    loaded = load(connection, model)
    decoded = decode_rows(channel, [row.payload for row in rows_of(connection)], connection)
    assert [exact(new.value) for _, new in read(decoded)] == [exact(one.value) for one in loaded]


class PropertyBase(DeclarativeBase):
    pass


class Sample(PropertyBase):
    """One column of each type that hypothesis can make values of."""

    __tablename__ = "sample"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    i: Mapped[int | None] = mapped_column(BigInteger)
    t: Mapped[str | None] = mapped_column(Text)
    b: Mapped[bool | None]
    n: Mapped[decimal.Decimal | None] = mapped_column(Numeric)
    f: Mapped[float | None] = mapped_column(Float(53))
    d: Mapped[datetime.date | None]
    ts: Mapped[datetime.datetime | None] = mapped_column(DateTime)
    tz: Mapped[datetime.datetime | None] = mapped_column(DateTime(timezone=True))
    u: Mapped[uuid.UUID | None]
    y: Mapped[bytes | None]
    j: Mapped[Any] = mapped_column(JSONB(none_as_null=True), nullable=True)
    a: Mapped[list[Any] | None] = mapped_column(ARRAY(Text))
    v: Mapped[datetime.timedelta | None]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NUMBERS = st.decimals(allow_infinity=False, min_value=-(10**30), max_value=10**30)
AWARE = st.datetimes(min_value=NAIVE.replace(year=2), max_value=NAIVE.replace(year=9998), timezones=st.just(UTC))
SAMPLES = st.fixed_dictionaries(
    {
        "i": st.none() | st.integers(-(2**63), 2**63 - 1),
        "t": st.none() | TEXTS,
        "b": st.none() | st.booleans(),
        "n": st.none() | NUMBERS,
        "f": st.none() | st.floats(),
        "d": st.none() | st.dates(),
        "ts": st.none() | st.datetimes(),
        "tz": st.none() | AWARE,
        "u": st.none() | st.uuids(),
        "y": st.none() | st.binary(),
        "j": st.none()
        | st.recursive(st.booleans() | st.integers() | TEXTS, lambda e: st.lists(e) | st.dictionaries(TEXTS, e)),
        "a": st.none() | st.lists(st.none() | TEXTS),
        "v": st.none() | st.timedeltas(datetime.timedelta(-1000000), datetime.timedelta(1000000)),
    }
)


def test_any_values_survive_the_way_through_the_trigger(connection: Connection) -> None:
    """Inserted, changed and deleted: what was loaded is what listeners get."""
    channel = watch(connection, Sample)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(before=SAMPLES, after=SAMPLES)
    def survive(before: dict[str, Any], after: dict[str, Any]) -> None:
        connection.execute(text("DELETE FROM pgpubsub_notification"))

        def loaded() -> Any:
            (row,) = load(connection, Sample)
            return {name: exact(getattr(row, name)) for name in before}

        with Session(connection) as session:
            sample = Sample(**before)
            session.add(sample)
            session.flush()
            first = loaded()
            for name, value in after.items():
                setattr(sample, name, value)
            session.flush()
            second = loaded()
            session.delete(sample)
            session.flush()
        stored = rows_of(connection)
        decoded = decode_rows(channel, [row.payload for row in stored], connection)
        states = [
            tuple(None if row is None else {name: exact(getattr(row, name)) for name in before} for row in pair)
            for pair in decoded
            if not isinstance(pair, DecodeError)
        ]
        changed = [(first, second)] if len(stored) == 3 else []
        assert states == [(None, first), *changed, (second, None)]

    survive()


# The instances


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    key: Mapped[int] = mapped_column("id", primary_key=True)
    name: Mapped[str] = mapped_column()
    secret: Mapped[str] = mapped_column(default="hidden")
    settings: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSON), default=dict)
    long: Mapped[str | None] = deferred(mapped_column(Text))
    books: Mapped[list[Book]] = relationship(back_populates="author")
    shouted: Mapped[str] = column_property(func.upper(name))
    made: ClassVar[str] = "by nobody"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__["made"] = "by __init__"

    @reconstructor
    def remember(self) -> None:
        self.__dict__["made"] = "by loading"


class Book(Base):
    __tablename__ = "book"

    shelf: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


@pytest.fixture
def author_changes(connection: Connection) -> Any:
    """A channel of authors; one has been stored and renamed."""
    channel = watch(connection, Author, exclude=("secret",))
    with Session(connection) as session:
        author = Author(key=1, name="Ann", settings={"a": 1}, long="text")
        session.add(author)
        session.flush()
        author.name = "Bea"
        session.flush()
    return channel


def test_inserts_have_new_updates_both_and_deletes_old(connection: Connection, author_changes: Any) -> None:
    """And truncations neither."""
    connection.execute(text("DELETE FROM author; TRUNCATE author CASCADE"))
    decoded = decode_rows(author_changes, [row.payload for row in rows_of(connection)], connection)
    assert [tuple(None if row is None else (type(row), row.key, row.name) for row in pair) for pair in decoded] == [  # type: ignore[union-attr]
        (None, (Author, 1, "Ann")),
        ((Author, 1, "Ann"), (Author, 1, "Bea")),
        ((Author, 1, "Bea"), None),
        (None, None),
    ]


def test_instances_are_detached_as_if_loaded_and_expunged(connection: Connection, author_changes: Any) -> None:
    """Never in a session, never through __init__, with the identity of their row and nothing to be flushed."""
    old, new = change(author_changes, connection)
    for one in (old, new):
        state = inspect(one)
        assert state.detached
        assert state.session is None
        assert state.identity == (1,)
        assert not state.modified
        assert one.made == "by loading"
    assert inspect(new).key == inspect(Author).identity_key_from_primary_key((1,))


def test_what_was_not_stored_is_not_loaded(connection: Connection, author_changes: Any) -> None:
    """Excluded columns, relationships and expressions: reading them says so, rather than None."""
    _, new = change(author_changes, connection)
    assert inspect(new).unloaded == {"secret", "books", "shouted"}
    for name in ("secret", "books", "shouted"):
        with pytest.raises(DetachedInstanceError):
            getattr(new, name)
    assert new.long == "text"


def test_instances_can_be_added_to_a_session(connection: Connection, author_changes: Any) -> None:
    """Then what was not loaded is, and changes are written."""
    _, new = change(author_changes, connection)
    with Session(connection) as session:
        session.add(new)
        assert (new.secret, new.books, new.shouted) == ("hidden", [], "BEA")
        new.name = "Cleo"
        new.settings["b"] = 2
        session.flush()
    assert connection.execute(text("SELECT name, settings ->> 'b' FROM author")).one() == ("Cleo", "2")


def test_instances_can_be_merged(connection: Connection, author_changes: Any) -> None:
    """Over what the row is now; what was excluded stays as it is."""
    connection.execute(text("UPDATE author SET name = 'Dora', secret = 'changed'"))
    old, _ = change(author_changes, connection, 1)
    with Session(connection) as session:
        merged = session.merge(old)
        assert merged is not old
        session.flush()
    assert connection.execute(text("SELECT name, secret FROM author")).one() == ("Ann", "changed")


def test_mutable_values_know_their_instance(connection: Connection, author_changes: Any) -> None:
    """As those that were loaded."""
    _, new = change(author_changes, connection)
    assert isinstance(new.settings, MutableDict)
    new.settings["a"] = 2
    assert inspect(new).modified


def test_composite_keys(connection: Connection, author_changes: Any) -> None:
    """In the order that the mapper has them, and changed ones too."""
    books = channel_of(Book, "books", include="key")
    create(connection, listener_of(books, name="books"))
    connection.execute(text("INSERT INTO book VALUES ('a', 7, 1)"))
    connection.execute(text("UPDATE book SET number = 8"))
    old, new = change(books, connection)
    assert (inspect(old).identity, inspect(new).identity) == (("a", 7), ("a", 8))
    assert inspect(new).unloaded == {"author_id", "author"}


def test_single_table_inheritance_gives_the_rows_class(connection: Connection) -> None:
    """And the class's own attributes; of a class nobody has declared, a clear error."""

    class Own(DeclarativeBase):
        pass

    class Person(Own):
        __tablename__ = "person"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[Kind]
        name: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": Kind.PERSON}  # noqa: RUF012

    class Manager(Person):
        budget: Mapped[int | None]
        __mapper_args__ = {"polymorphic_identity": Kind.MANAGER}  # noqa: RUF012

    channel = watch(connection, Person)
    connection.execute(
        text("INSERT INTO person VALUES (1, 'PERSON', 'a', 1), (2, 'MANAGER', 'b', 2), (3, 'ALIEN', 'c', 3)")
    )
    decoded: list[Any] = decode_rows(channel, [row.payload for row in rows_of(connection)], connection)
    assert [type(new) for _, new in decoded[:2]] == [Person, Manager]
    assert (decoded[1][1].budget, decoded[1][1].name) == (2, "b")
    assert inspect(decoded[1][1]).key == inspect(Person).identity_key_from_primary_key((2,))
    assert isinstance(decoded[2], DecodeError)
    assert "no class has the polymorphic identity <Kind.ALIEN: 3>" in str(decoded[2])


def test_joined_inheritance_loads_what_the_models_own_table_has(connection: Connection) -> None:
    """Of the base: the subclass that the row says; of the subclass: the base's attributes are to be loaded."""

    class Own(DeclarativeBase):
        pass

    class Person(Own):
        __tablename__ = "person"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        name: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    class Manager(Person):
        __tablename__ = "manager"
        id: Mapped[int] = mapped_column("manager_id", ForeignKey("person.id"), primary_key=True)
        budget: Mapped[int]
        __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012

    people = watch(connection, Person)
    managers = channel_of(Manager, "managers")
    create(connection, listener_of(managers, name="managers"))
    with Session(connection) as session:
        session.add(Manager(id=1, name="a", budget=5))
        session.flush()
    _, person = change(people, connection, 0)
    assert type(person) is Manager
    assert (person.id, person.name, person.kind) == (1, "a", "manager")
    assert inspect(person).unloaded == {"budget"}
    _, manager = change(managers, connection, 1)
    assert (type(manager), manager.id, manager.budget) == (Manager, 1, 5)
    assert inspect(manager).unloaded == {"name", "kind"}
    assert inspect(manager).key == inspect(person).key == inspect(Person).identity_key_from_primary_key((1,))
    with Session(connection) as session:
        session.add(manager)
        assert manager.name == "a"


def test_mapped_dataclasses_are_not_initialised(connection: Connection) -> None:
    """Whatever their __init__ wants; their defaults do not stand in for what was not loaded."""

    class Own(MappedAsDataclass, DeclarativeBase):
        pass

    class Thing(Own):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(default="default", kw_only=True)
        other: Mapped[str] = mapped_column(default="default", kw_only=True)
        computed: Mapped[int] = mapped_column(init=False)

        def __post_init__(self) -> None:
            raise AssertionError("initialised")

    channel = watch(connection, Thing, exclude=("other",))
    connection.execute(text("INSERT INTO thing VALUES (1, 'a', 'b', 3)"))
    _, new = change(channel, connection)
    assert (new.id, new.name, new.computed) == (1, "a", 3)
    with pytest.raises(DetachedInstanceError):
        _ = new.other


def test_imperative_mappings(connection: Connection) -> None:
    """With attributes named otherwise than columns, and a composite."""

    @dataclasses.dataclass
    class Point:
        x: int
        y: int

    class Vertex:
        pass

    metadata = MetaData()
    table = Table(
        "vertex", metadata, Column("id", Integer, primary_key=True), Column("x", Integer), Column("y", Integer)
    )
    registry(metadata=metadata).map_imperatively(
        Vertex, table, properties={"number": table.c.id, "point": composite(Point, table.c.x, table.c.y)}
    )
    channel = watch(connection, Vertex)
    connection.execute(text("INSERT INTO vertex VALUES (1, 2, 3)"))
    _, new = change(channel, connection)
    assert (new.number, new.point) == (1, Point(2, 3))
    assert inspect(new).identity == (1,)


def test_an_attribute_may_be_another_columns_name(connection: Connection) -> None:
    """Names of attributes and of columns are never confused."""

    class Own(DeclarativeBase):
        pass

    class Swapped(Own):
        __tablename__ = "swapped"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[str] = mapped_column("b")
        b: Mapped[str] = mapped_column("a")

    channel = watch(connection, Swapped)
    connection.execute(text("INSERT INTO swapped (id, a, b) VALUES (1, 'column a', 'column b')"))
    _, new = change(channel, connection)
    assert (new.a, new.b) == ("column b", "column a")


def test_a_key_that_the_mapper_chose_identifies(connection: Connection) -> None:
    """Tables without a primary key can be mapped."""
    table = Table("log", MetaData(), Column("line", Integer), Column("what", Text))

    class Own(DeclarativeBase):
        pass

    class Log(Own):
        __table__ = table
        __mapper_args__ = {"primary_key": [table.c.line]}  # noqa: RUF012

    channel = watch(connection, Log)
    connection.execute(text("INSERT INTO log VALUES (1, 'a')"))
    _, new = change(channel, connection)
    assert inspect(new).identity == (1,)


def test_a_table_as_model_gives_rows(connection: Connection) -> None:
    """As its SELECT does: by attribute, by position, by column; what was not stored is not there."""
    table = Table(
        "plain",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("The Name", String, key="name"),
        Column("x", JSONB),
    )
    channel = watch(connection, table, exclude=("x",))
    connection.execute(table.insert(), {"id": 1, "name": "a", "x": {}})
    connection.execute(table.update().values(name=None))
    old, new = change(channel, connection)
    assert old == (1, "a")
    assert (new.id, new.name) == (1, None)
    assert new._mapping[table.c.name] is None
    assert new._fields == ("id", "name")
    with pytest.raises(AttributeError):
        _ = new.x


def test_generated_columns_are_loaded_where_triggers_can_see_them(connection: Connection) -> None:
    """Stored ones. Of virtual ones (Postgres 18) triggers have no value, so they are not loaded."""

    class Own(DeclarativeBase):
        pass

    class Thing(Own):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        double: Mapped[int] = mapped_column(Computed("id * 2", persisted=True))

    channel = watch(connection, Thing)
    connection.execute(text("INSERT INTO thing (id) VALUES (4)"))
    _, new = change(channel, connection)
    assert new.double == 8


@pytest.mark.parametrize("persisted", [None, False])
def test_virtual_columns_do_no_harm_and_are_not_loaded(connection: Connection, persisted: bool | None) -> None:
    """Postgres 18 has them, and fails whoever reads one in a transition table. Before, such columns are stored."""
    virtual = connection.dialect.server_version_info >= (18,)  # type: ignore[operator]
    kind = "VIRTUAL" if virtual else "STORED"
    connection.execute(
        text(f'CREATE TABLE thing (id int PRIMARY KEY, "Dou""ble" int GENERATED ALWAYS AS (id * 2) {kind}, name text)')
    )

    class Own(DeclarativeBase):
        pass

    class Thing(Own):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        double: Mapped[int] = mapped_column('Dou"ble', Computed("id * 2", persisted=persisted))
        name: Mapped[str | None]

    channel = channel_of(Thing)
    create(connection, listener_of(channel, changed=("double", "name"), condition="coalesce(new.id, old.id) <> 99"))
    connection.execute(text("INSERT INTO thing (id) VALUES (4), (99)"))
    connection.execute(text("UPDATE thing SET name = 'x'"))
    connection.execute(text("DELETE FROM thing"))
    decoded = [change(channel, connection, position) for position in range(3)]
    assert len(rows_of(connection)) == 3
    assert [row.id for pair in decoded for row in pair if row is not None] == [4] * 4
    _, new = decoded[0]
    if virtual or persisted is False:
        assert inspect(new).unloaded == {"double"}
    else:
        assert new.double == 8


# What happens to tables, and what goes wrong


def test_a_column_dropped_since_is_ignored(connection: Connection, author_changes: Any) -> None:
    """By the release that has it no more, and by the one that still has it."""
    payload = {"new": {"id": "1", "name": "Ann", "gone": "x", "settings": "{}", "long": None}}
    _, new = change_of(author_changes, payload, connection)
    assert new.name == "Ann"
    connection.execute(text("ALTER TABLE author DROP COLUMN long"))
    rows._shapes.clear()
    _, new = change_of(author_changes, payload, connection)
    assert "long" in inspect(new).unloaded


def test_a_column_added_since_is_not_loaded(connection: Connection, author_changes: Any) -> None:
    """What was stored before it was there says nothing of it."""
    _, new = change_of(author_changes, {"new": {"id": "1", "name": "Ann"}}, connection)
    assert inspect(new).unloaded == {"secret", "books", "shouted", "settings", "long"}


def test_a_column_renamed_since_is_read_under_its_new_name(connection: Connection) -> None:
    """Where the channel says so; a row that has the new name already is taken as it is."""
    Base.metadata.create_all(connection)
    channel = channel_of(Author, "renamed", renamed={"title": "name", "nick": Author.name, "key": "id"})
    _, new = change_of(channel, {"new": {"key": "1", "title": "Ann"}}, connection)
    assert (new.key, new.name) == (1, "Ann")
    old, new = change_of(channel, {"old": {"id": "1", "nick": "Ann"}, "new": {"id": "1", "name": "Bea"}}, connection)
    assert (old.name, new.name) == ("Ann", "Bea")
    _, new = change_of(channel, {"new": {"id": "1", "name": "Ann", "title": "Dr"}}, connection)
    assert new.name == "Ann"


def test_a_column_added_since_has_the_default_that_is_declared(connection: Connection) -> None:
    """In instances and in rows of tables, a value or what a function returns; what was stored stays, null too."""
    Base.metadata.create_all(connection)
    channel = channel_of(Author, "defaults", defaults={"settings": dict, "name": "nobody"})
    _, first = change_of(channel, {"new": {"id": "1"}}, connection)
    _, second = change_of(channel, {"new": {"id": "2", "name": "Ann"}}, connection)
    assert (first.name, first.settings, second.name) == ("nobody", {}, "Ann")
    assert first.settings is not second.settings
    assert "long" in inspect(first).unloaded
    _, third = change_of(channel, {"new": {"id": "1", "name": None}}, connection)
    assert third.name is None
    rows_channel = channel_of(Author.__table__, "of_rows", defaults={"name": "nobody"})
    assert change_of(rows_channel, {"new": {"id": "1"}}, connection)[1]._mapping == {"id": 1, "name": "nobody"}


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"renamed": {"title": "nme"}}, r"renamed has 'nme', which is no column of author.*Did you mean 'name'"),
        ({"renamed": ("title", "name")}, r"renamed = .*: expected a dictionary by names of columns"),
        ({"defaults": {"nme": ""}}, r"defaults has 'nme', which is no column of author"),
        ({"defaults": {"secret": ""}, "exclude": ("secret",)}, r"defaults has 'secret', which is not stored"),
        ({"default": {}}, r"default = .* means nothing. Did you mean 'defaults'"),
    ],
)
def test_what_is_said_of_unknown_columns_is_refused(attributes: dict[str, Any], told: str) -> None:
    """At the declaration, or when the channel is first used."""
    with pytest.raises(ChannelError, match=told):
        check_declared(channel_of(Author, "wrong", **attributes))


def change_of(channel: Any, payload: Any, connection: Connection) -> tuple[Any, Any]:
    (decoded,) = decode_rows(channel, [payload], connection)
    assert not isinstance(decoded, DecodeError), decoded
    return decoded


def test_a_worker_notices_that_a_column_was_altered(connection: Connection) -> None:
    """When values no longer fit what it found the table to be."""
    model = model_of(Integer)
    channel = watch(connection, model)
    connection.execute(text("INSERT INTO thing VALUES (1, 5)"))
    assert change(channel, connection)[1].value == 5
    connection.execute(text('ALTER TABLE thing ALTER "The Value" TYPE text'))
    connection.execute(text("INSERT INTO thing VALUES (2, 'many')"))
    assert change(channel, connection)[1].value == "many"


BAD: dict[str, tuple[Any, str, str]] = {
    "here": (Integer, "int", "not a number"),
    "in Postgres": (NullType, "point", "not a point"),
    "by the model's type": (Enum("a", name="letters", native_enum=False), "text", "b"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_value_that_cannot_be_read_fails_its_own_notification_alone(connection: Connection, kind: str) -> None:
    """And says which column of which channel, and what types, but not the value, which may be a secret."""
    declared, actual, value = BAD[kind]
    connection.execute(text(f'CREATE TABLE thing (id int PRIMARY KEY, "The Value" {actual})'))
    channel = channel_of(model_of(declared))
    good = {"id": "1", "The Value": {"int": "7", "point": "(1,2)", "text": "a"}[actual]}
    bad = {"id": "2", "The Value": value}
    payloads = [{"new": good}, {"new": bad}, {"old": good, "new": good}, {"old": bad, "new": good}, {"old": good}]
    decoded = decode_rows(channel, payloads, connection)
    assert [isinstance(one, DecodeError) for one in decoded] == [False, True, False, True, False]
    error = str(decoded[1])
    named = "integer" if actual == "int" else actual
    assert error.startswith("changes: the value of the column 'The Value', ")
    assert f"which is of the type {named} in the database, cannot be read as {declared!r}"[:60] in error
    assert len(value) == 1 or value not in error
    assert connection.execute(text("SELECT 1")).scalar() == 1


@pytest.mark.parametrize("payload", [None, [], "text", {"new": "text"}, {"new": {"id": 1}}, {"old": []}])
def test_a_payload_that_no_trigger_stored_is_an_error_of_its_own(
    connection: Connection, author_changes: Any, payload: Any
) -> None:
    """Somebody else may have written into the table."""
    good = {"new": {"id": "1", "name": "Ann"}}
    first, second = decode_rows(author_changes, [payload, good], connection)
    assert isinstance(first, DecodeError)
    assert "not one that a trigger stored" in str(first)
    assert not isinstance(second, DecodeError)


def test_a_table_that_is_gone_is_an_error(connection: Connection) -> None:
    """Not a crash."""
    channel = channel_of(model_of(Integer))
    (decoded,) = decode_rows(channel, [{"new": {"id": "1"}}], connection)
    assert isinstance(decoded, DecodeError)
    assert "there is no table thing" in str(decoded)


def test_an_error_while_loading_is_an_error_of_that_row(connection: Connection, author_changes: Any) -> None:
    """What an application does when an object is loaded may fail."""

    def refuse(target: Author, _: Any) -> None:
        if target.name == "Bea":
            raise RuntimeError("no Bea")

    event.listen(Author, "load", refuse)
    try:
        first, second = decode_rows(author_changes, [row.payload for row in rows_of(connection)], connection)
    finally:
        event.remove(Author, "load", refuse)
    assert not isinstance(first, DecodeError)
    assert isinstance(second, DecodeError)
    assert "(RuntimeError)" in str(second)


def test_a_lost_connection_is_not_the_values_fault(installed_engine: Engine) -> None:
    """The notifications are healthy, and come again."""
    with installed_engine.begin() as connection:
        connection.execute(text('CREATE TABLE thing (id int PRIMARY KEY, "The Value" point)'))
    channel = channel_of(model_of(NullType))
    payloads = [{"new": {"id": "1", "The Value": "(1,2)"}}]
    with installed_engine.connect() as connection, installed_engine.connect() as other:
        assert decode_rows(channel, payloads, connection)[0] is not None
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
        other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        with pytest.raises(DBAPIError) as caught:
            decode_rows(channel, payloads, connection)
        assert caught.value.connection_invalidated


# Cost


@pytest.fixture
def count(connection: Connection) -> Iterator[Callable[[], int]]:
    """The number of statements since it was last asked."""
    statements: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "SAVEPOINT" not in statement:
            statements.append(statement)

    event.listen(connection, "before_cursor_execute", note)

    def counted() -> int:
        number = len(statements)
        statements.clear()
        return number

    yield counted
    event.remove(connection, "before_cursor_execute", note)


def test_a_bundle_costs_one_statement_at_most(connection: Connection, count: Callable[[], int]) -> None:
    """None where its values can be read here; one more for the table's types, once a minute."""
    simple, difficult = model_of(Integer), model_of(TSVECTOR)
    easy = watch(connection, simple)
    connection.execute(text("INSERT INTO thing SELECT i, i FROM generate_series(1, 100) i"))
    payloads = [row.payload for row in rows_of(connection)]
    count()
    assert len(decode_rows(easy, payloads, connection)) == 100
    assert count() == 1
    decode_rows(easy, payloads, connection)
    assert count() == 0
    connection.execute(text("ALTER TABLE thing ALTER \"The Value\" TYPE tsvector USING 'a'"))
    rows._shapes.clear()
    channels._registry.clear()
    hard = channel_of(difficult)
    decode_rows(hard, payloads, connection)
    count()
    assert len(decode_rows(hard, payloads, connection)) == 100
    assert count() == 1


@pytest.mark.parametrize("isolation", ["AUTOCOMMIT", "READ COMMITTED"])
def test_the_callers_transaction_goes_on(installed_engine: Engine, isolation: str) -> None:
    """Whatever fails in a bundle, and where there is none, none is left."""
    with installed_engine.begin() as connection:
        connection.execute(text('CREATE TABLE thing (id int PRIMARY KEY, "The Value" point)'))
    channel = channel_of(model_of(NullType))
    with installed_engine.connect().execution_options(isolation_level=isolation) as connection:
        connection.execute(text("CREATE TABLE mine (id int)"))
        first, second = decode_rows(
            channel, [{"new": {"id": "1", "The Value": "x"}}, {"new": {"id": "1", "The Value": "(1,2)"}}], connection
        )
        assert isinstance(first, DecodeError)
        assert not isinstance(second, DecodeError)
        connection.execute(text("INSERT INTO mine VALUES (1)"))
        connection.commit()
    with installed_engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM mine")).scalar() == 1


def test_schemas_and_their_translation_are_followed(connection: Connection) -> None:
    """A table of the same name elsewhere has other types."""
    connection.execute(
        text(
            "CREATE SCHEMA one; CREATE SCHEMA two; CREATE TABLE one.thing (id int PRIMARY KEY, value int);"
            "CREATE TABLE two.thing (id int PRIMARY KEY, value text)"
        )
    )
    table = Table("thing", MetaData(), Column("id", Integer, primary_key=True), Column("value", Integer), schema="one")
    channel = channel_of(table)
    payload = {"new": {"id": "1", "value": "7"}}
    assert change_of(channel, payload, connection)[1].value == 7
    translated = connection.execution_options(schema_translate_map={"one": "two"})
    assert change_of(channel, payload, translated)[1].value == "7"


def test_other_encodings_are_read_as_well(connection: Connection, author_changes: Any) -> None:
    """A session may have asked for another than UTF-8."""
    connection.execute(text("UPDATE author SET name = 'Zoë'"))
    payload = rows_of(connection)[-1].payload
    connection.execute(text("SET client_encoding = 'LATIN1'"))
    _, new = change_of(author_changes, payload, connection)
    assert new.name == "Zoë"
