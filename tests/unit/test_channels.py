"""Channels: what may be declared, what is refused and how, and how channels are found."""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import datetime
import enum
import importlib
import pickle
import re
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, String, Table, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgpubsub_celery.channels import (
    Channel,
    TriggerChannel,
    captured_columns,
    channel_field_names,
    check_declared,
    find_channel,
    path_of,
    registered_channels,
    select_channels,
    table_of,
)
from pgpubsub_celery.errors import ChannelError, PgPubSubError, UnknownChannelError
from pgpubsub_celery.payload import decode_message, encode_message

pytestmark = pytest.mark.usefixtures("empty_registry")

T = TypeVar("T")
U = TypeVar("U")


@pytest.fixture
def empty_registry(registry: None) -> None:
    """No channels but the test's own."""
    from pgpubsub_celery import channels

    channels._registry.clear()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Write modules of an application, and import them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str = "", *, load: bool = True) -> ModuleType:
        path = tmp_path.joinpath(*name.split("."))
        for folder in path.parents:
            if folder != tmp_path and tmp_path in folder.parents:
                folder.mkdir(exist_ok=True)
                folder.joinpath("__init__.py").touch()
        path.with_suffix(".py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()
        for part in (name, *(name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1))):
            # In two steps: undone, it is as it was before, also where it was not there.
            monkeypatch.setitem(sys.modules, part, sys)
            monkeypatch.delitem(sys.modules, part)
        return importlib.import_module(name) if load else typing.cast("ModuleType", None)

    return write


class Base(DeclarativeBase):
    """Of the models."""


class Author(Base):
    """A model with an attribute that has another name than its column."""

    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    full_name: Mapped[str] = mapped_column("name", String(100))
    password_hash: Mapped[str]
    # Never declared: whoever configures mappers finds out.
    posts: Mapped[list[Any]] = relationship("NeverDeclared")


NOTES = Table("notes", MetaData(), Column("text", String), Column("count", Integer))


def channel(bases: tuple[type, ...] = (Channel,), **body: Any) -> Any:
    """Declare a channel."""
    return dataclasses.dataclass(type("Declared", bases, {"__module__": __name__, **body}))


def refusal(declare: Callable[[], Any]) -> str:
    with pytest.raises(ChannelError) as refused:
        check_declared(declare())
    return str(refused.value)


# Messages


def test_class_attributes_are_no_fields_and_inherit() -> None:
    """Only annotations make fields."""

    @dataclasses.dataclass
    class PostReads(Channel):
        lock_notifications = True
        lease = 5
        unit: ClassVar[str] = "reads"
        model_id: int
        date: datetime.date = datetime.date(2026, 1, 1)

        def day(self) -> str:
            return self.date.isoformat()

    @dataclasses.dataclass
    class SlowReads(PostReads):
        lease = 3600
        reason: str = ""

    check_declared(SlowReads)
    assert channel_field_names(PostReads) == ("model_id", "date")
    assert channel_field_names(SlowReads) == ("model_id", "date", "reason")
    assert (SlowReads.lock_notifications, SlowReads.lease, PostReads.lease) == (True, 3600, 5)
    assert PostReads(1).day() == "2026-01-01"
    assert (Channel.lock_notifications, Channel.acknowledge, Channel.lease) == (False, "finished", None)


@dataclasses.dataclass(frozen=True)
class Frozen(Channel):
    """A message that is a key."""

    number: int


@dataclasses.dataclass(slots=True)
class Slotted(Channel):
    """A message without a dict: the decorator makes a second class."""

    lock_notifications = True
    channel_name = "slotted"
    aliases = ("earlier",)
    number: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Both(Channel):
    """Everything at once."""

    number: int


@pytest.mark.parametrize("cls", [Frozen, Slotted, Both])
def test_messages_are_dataclasses_as_any(cls: Any) -> None:
    """Equal, copied, pickled, replaced, printed."""
    message = cls(number=1)
    assert message == cls(number=1) != cls(number=2)
    assert pickle.loads(pickle.dumps(message)) == copy.copy(message) == copy.deepcopy(message) == message
    assert dataclasses.replace(message, number=2) == cls(number=2)
    assert repr(message) == f"{cls.__name__}(number=1)"
    assert hasattr(message, "__dict__") is (cls is Frozen)


def test_the_class_that_slots_make_is_the_one_that_is_found() -> None:
    """The first one, which the class statement made, is nobody's."""

    @dataclasses.dataclass(slots=True)
    class Thin(Channel):
        aliases = ("fat",)
        number: int

    assert registered_channels() == [Thin]
    assert find_channel("fat") is find_channel(Thin.name()) is Thin


def test_a_generic_channel_is_used_through_a_subclass_with_types() -> None:
    """Fields have the type that stands for the type variable, however far down."""

    @dataclasses.dataclass
    class Box(Channel, Generic[T]):
        content: T
        others: list[T]

    @dataclasses.dataclass
    class Crate(Box[list[U]], Generic[U]):
        label: U | None = None

    @dataclasses.dataclass
    class DateCrate(Crate[datetime.date]):
        pass

    day = datetime.date(2026, 1, 1)
    message = DateCrate([day], [[day]], day)
    payload = encode_message(message)
    assert payload == {"content": ["2026-01-01"], "others": [["2026-01-01"]], "label": "2026-01-01"}
    assert decode_message(DateCrate, payload) == message
    told = refusal(lambda: Box)
    assert "Box.content has the type variable T, which stands for nothing here" in told
    assert "class IntBox(Box[int])" in told
    assert registered_channels() == [DateCrate]


def test_type_parameters_of_the_class_statement_are_found() -> None:
    """As `class Box[Content](Channel)` has them since Python 3.12: no module knows their names."""
    content: Any = TypeVar("Content")  # type: ignore[misc]
    box: Any = dataclasses.dataclass(
        type(
            "Box",
            (Channel,),
            {"__module__": __name__, "__type_params__": (content,), "__annotations__": {"content": "list[Content]"}},
        )
    )
    assert "Box.content has the type variable Content, which stands for nothing here" in refusal(lambda: box)


def test_names_of_the_function_around_a_channel_are_found() -> None:
    """Although its annotations are text, and the function ends."""

    def declare() -> Any:
        class Kind(enum.Enum):
            GOOD = "good"

        @dataclasses.dataclass
        class Part:
            kind: Kind
            parts: list[Part]

        @dataclasses.dataclass(slots=True)
        class Whole(Channel):
            parts: dict[str, Part]

        return Whole, Part, Kind

    whole, part, kind = declare()
    message = whole({"a": part(kind.GOOD, [part(kind.GOOD, [])])})
    assert decode_message(whole, encode_message(message)) == message


def test_channels_of_functions_and_classes_have_names_of_their_own() -> None:
    """Their qualified names."""

    class Outer:
        @dataclasses.dataclass
        class Inner(Channel):
            number: int

    assert Outer.Inner.name().endswith(
        "test_channels_of_functions_and_classes_have_names_of_their_own.<locals>.Outer.Inner"
    )


def test_a_name_for_type_checkers_alone_is_refused_when_it_is_first_needed(module: Callable[..., ModuleType]) -> None:
    """With channel, field, name and fix; not before, because it may be defined later in the module."""
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import TYPE_CHECKING
        from pgpubsub_celery import Channel
        if TYPE_CHECKING:
            from decimal import Decimal

        @dataclass
        class Sale(Channel):
            when: Later | None
            lines: list[dict[str, Decimal]]

        class_after = True
        @dataclass
        class Later:
            number: int
    """
    sale = module("shop", source).Sale
    with pytest.raises(ChannelError) as refused:
        check_declared(sale)
    assert str(refused.value) == (
        "shop.Sale.lines: the name 'Decimal' in its annotation 'list[dict[str, Decimal]]' is not defined when the "
        "program runs: import or define it in shop, at the top and not only under `if TYPE_CHECKING`."
    )


def test_a_missing_name_is_named_wherever_it_stands(module: Callable[..., ModuleType]) -> None:
    """In quotes, in a module's attribute, in a dataclass of the field."""
    source = """
        import datetime
        from dataclasses import dataclass
        from pgpubsub_celery import Channel

        @dataclass
        class Part:
            size: "Missing"

        @dataclass
        class Quoted(Channel):
            value: list["Missing"]

        @dataclass
        class Attribute(Channel):
            value: "datetime.dat"

        @dataclass
        class Inside(Channel):
            parts: list[Part]

        @dataclass
        class Broken(Channel):
            value: "list["
    """
    shop = module("shop", source)
    assert "shop.Quoted.value: the name 'Missing'" in refusal(lambda: shop.Quoted)
    assert "shop.Attribute.value: the name 'dat' in its annotation 'datetime.dat'" in refusal(lambda: shop.Attribute)
    assert "shop.Inside.parts: Part.size: the name 'Missing'" in refusal(lambda: shop.Inside)
    assert "shop.Broken.value: its annotation 'list[' cannot be read (SyntaxError" in refusal(lambda: shop.Broken)


def test_inherited_fields_are_read_in_the_module_that_has_them(module: Callable[..., ModuleType]) -> None:
    """A name means what it means where it is written."""
    far = module(
        "far",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from decimal import Decimal as Number
        from typing import Generic, TypeVar
        from pgpubsub_celery import Channel
        T = TypeVar("T")

        @dataclass
        class Priced(Channel, Generic[T]):
            price: Number
            content: T
        """,
    )
    near = module(
        "near",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from far import Priced
        from pgpubsub_celery import Channel

        @dataclass
        class Number:
            value: int

        @dataclass
        class Sale(Priced["Number"]):
            number: Number
        """,
    )
    message = near.Sale(price=far.Number("1.5"), content=near.Number(1), number=near.Number(2))
    assert decode_message(near.Sale, encode_message(message)) == message


# What is refused


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"lock_notifications": 1}, "lock_notifications = 1: expected True or False"),
        ({"acknowledge": "sent"}, 'acknowledge = \'sent\': expected "finished" or "published"'),
        ({"acknowledge": "published"}, "nothing is stored: set lock_notifications = True"),
        ({"lease": 0}, "lease = 0: expected seconds, more than 0"),
        ({"lease": -1.5}, "lease = -1.5: expected seconds"),
        ({"lease": True}, "lease = True: expected seconds"),
        ({"lease": float("nan")}, "lease = nan: expected seconds"),
        ({"lease": float("inf")}, "lease = inf: expected seconds"),
        ({"lease": "10"}, "lease = '10': expected seconds"),
        (
            {"aliases": "blog.Old"},
            "aliases = 'blog.Old': expected a tuple of earlier names. Write aliases = ('blog.Old',).",
        ),
        ({"aliases": (1,)}, "an alias is 1: expected a str"),
        ({"aliases": ("",)}, "an alias is empty"),
        ({"channel_name": ""}, "channel_name is empty: give it a name, or leave it out"),
        ({"channel_name": "x" * 201}, "channel_name has 201 characters ('xxx"),
        ({"channel_name": 7}, "channel_name is 7: expected a str"),
        ({"channel_name": "two words"}, "channel_name is 'two words': expected no spaces"),
        ({"channel_name": "a\x00b"}, "characters that cannot be printed"),
        ({"lock_notification": True}, "lock_notification = True means nothing. Did you mean 'lock_notifications'?"),
        ({"alias": ("x",)}, "Did you mean 'aliases'?"),
    ],
)
def test_mistaken_attributes_are_refused_in_the_class_statement(attributes: dict[str, Any], told: str) -> None:
    """With the channel, the value and what was expected."""
    with pytest.raises(ChannelError) as refused:
        type("Declared", (Channel,), {"__module__": __name__, **attributes})
    assert str(refused.value).startswith("tests.unit.test_channels.Declared")
    assert told in str(refused.value)
    assert isinstance(refused.value, PgPubSubError)
    assert isinstance(refused.value, TypeError)
    assert registered_channels() == []


def test_constants_of_ones_own_are_welcome() -> None:
    """Only what looks like a misspelt attribute is not."""
    cls = channel(limit=5, TOPIC="reads", names=("a",), __annotations__={"acknowledged": bool}, acknowledged=False)
    check_declared(cls)
    assert channel_field_names(cls) == ("acknowledged",)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("session", "which listeners receive from the worker: give it another name"),
        ("context", "which listeners receive from the worker"),
        ("notification", "which listeners receive from the worker"),
        ("name", "which is an attribute of every channel: give the field another name"),
        ("listen_safe_name", "which is an attribute of every channel"),
        (
            "lock_notifications",
            "which is an attribute of every channel: set it without annotation (lock_notifications = …)",
        ),
        ("aliases", "which is an attribute of every channel: set it without annotation"),
    ],
)
def test_fields_with_reserved_names_are_refused(field: str, told: str) -> None:
    """Also those of a dataclass that is mixed in."""
    with pytest.raises(ChannelError) as refused:
        channel(__annotations__={field: str})
    assert f"Declared has the field {field!r}, {told}" in str(refused.value)
    if field != "listen_safe_name":
        mixin = dataclasses.make_dataclass("Mixin", [(field, Any)])
        assert f"has the field {field!r}" in refusal(lambda: channel((mixin, Channel)))


def test_a_channel_without_the_decorator_is_refused() -> None:
    """When it is used: the decorator runs after the class statement."""

    class Plain(Channel):
        number: int

    class Empty(Channel):
        pass

    @dataclasses.dataclass
    class Good(Channel):
        number: int

    class Forgotten(Good):
        more: int

    class Same(Good):
        """Adds nothing that the decorator would have to see."""

    assert "Plain is not a dataclass: write @dataclass above class Plain, so that 'number' becomes a field" in refusal(
        lambda: Plain
    )
    assert "Empty is not a dataclass: write @dataclass above class Empty." in refusal(lambda: Empty)
    assert "Forgotten is not a dataclass: write @dataclass above class Forgotten, so that 'more'" in refusal(
        lambda: Forgotten
    )
    check_declared(Same)
    assert channel_field_names(Same) == ("number",)


def test_what_is_no_channel_is_refused() -> None:
    """The base classes too."""
    thing: Any
    for thing in (int, Channel, TriggerChannel, "Channel", None, Frozen(1)):
        with pytest.raises(ChannelError, match="is not a channel"):
            check_declared(thing)


def test_an_init_variable_is_refused() -> None:
    """A listener could not receive it."""
    with pytest.raises(ChannelError, match=r"Declared\.raw is an InitVar"):
        channel(__annotations__={"raw": dataclasses.InitVar[int]})
    with pytest.raises(ChannelError, match=r"Declared\.raw is an InitVar"):
        channel(__annotations__={"raw": "dataclasses.InitVar[int]"})
    part = dataclasses.make_dataclass("Part", [("raw", dataclasses.InitVar[int])])
    assert "Declared.part: Part.raw is an InitVar" in refusal(lambda: channel(__annotations__={"part": part}))


class Vacant(enum.Enum):
    """Has no members."""


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        (object, "has the type object, which cannot be stored: use Any"),
        (complex, "has the type complex, which cannot be stored: use bool, int, float"),
        (collections.abc.Sequence[int], "cannot be stored: use list[…] or tuple[…, ...]"),
        (typing.Mapping[str, int], "cannot be stored: use dict[…]"),
        (Callable[[], int], "cannot be stored"),
        (type[int], "has the type type[int], which cannot be stored"),
        (Author, "has the type Author, which cannot be stored"),
        (bytearray, "use bytes"),
        (list[dict[str, object]], "has the type object, which cannot be stored"),
        (Vacant, "has the type Vacant, an Enum without members"),
        (5, "has the type 5, which cannot be stored"),
        (typing.NoReturn, "cannot be stored"),
    ],
)
def test_a_type_that_cannot_be_stored_is_refused(annotation: Any, told: str) -> None:
    """With the field, the type, and what to use."""
    message = refusal(lambda: channel(__annotations__={"good": int, "bad": annotation}))
    assert message.startswith("tests.unit.test_channels.Declared.bad ")
    assert told in message


def test_a_type_that_contains_ever_more_of_itself_is_refused() -> None:
    """Instead of being read for ever."""

    @dataclasses.dataclass
    class Nest(Generic[T]):
        inner: Nest[list[T]] | None = None

    globals()["Nest"] = Nest
    try:
        assert "ever more of itself" in refusal(lambda: channel(__annotations__={"nest": Nest[int]}))
    finally:
        del globals()["Nest"]


def test_two_channels_cannot_have_one_name() -> None:
    """Whichever of their names it is: notifications of one would be the other's."""

    @dataclasses.dataclass
    class First(Channel):
        channel_name = "blog.reads"
        aliases = ("reads",)
        number: int

    for body in ({"channel_name": "blog.reads"}, {"channel_name": "reads"}, {"aliases": ("blog.reads",)}):
        with pytest.raises(ChannelError) as refused:
            type("Second", (Channel,), {"__module__": "blog", **body})
        assert f"blog.Second and {path_of(First)} both have the name" in str(refused.value)
    assert registered_channels() == [First]

    @dataclasses.dataclass
    class Heir(First):
        """A subclass is another channel, with a name of its own."""

    assert Heir.name() == path_of(Heir)
    assert list(Heir.aliases) == []


def test_a_reload_takes_the_place_of_what_was_declared(module: Callable[..., ModuleType]) -> None:
    """Same module, same name: the same channel."""
    source = """
        from dataclasses import dataclass
        from pgpubsub_celery import Channel
        @dataclass
        class Reads(Channel):
            channel_name = "reads"
            number: int
    """
    first = module("blog", source).Reads
    second = importlib.reload(sys.modules["blog"]).Reads
    assert first is not second
    assert registered_channels() == [second]
    assert find_channel("reads") is second


# Names


def test_a_channels_name_is_its_path_unless_it_says_otherwise() -> None:
    """So that it can be moved and renamed."""
    assert Frozen.name() == "tests.unit.test_channels.Frozen"
    assert Slotted.name() == "slotted"
    cls = channel(channel_name="reads", aliases=["a", "reads", "b", "a"])
    assert (cls.name(), cls.aliases) == ("reads", ("a", "b"))


def test_names_to_listen_to_are_readable_and_fit_postgres() -> None:
    """At most 63 bytes of harmless characters."""
    assert re.fullmatch(
        "blog_channels_postreads_[0-9a-f]{20}", channel(channel_name="blog.channels.PostReads").listen_safe_name()
    )
    long = channel(channel_name="x" * 150 + ".PostReads").listen_safe_name()
    assert len(long) == 63
    assert "_postreads_" in long
    assert channel(channel_name="日本").listen_safe_name().startswith("channel_")


@given(
    st.sets(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=200).filter(str.isprintable), min_size=2, max_size=20
    )
)
@settings(derandomize=True, deadline=None, database=None, max_examples=200)
def test_no_two_channels_share_a_name_to_listen_to(names: set[str]) -> None:
    """Not even if they differ in what Postgres or a reader would not see."""
    from pgpubsub_celery import channels

    heard = set()
    for name in (one.replace(" ", "_") for one in names):
        channels._registry.clear()
        safe = channel(channel_name=name).listen_safe_name()
        assert len(safe.encode()) <= 63
        assert set(safe) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
        assert safe == channel(channel_name=name).listen_safe_name()
        heard.add(safe)
    assert len(heard) == len({one.replace(" ", "_") for one in names})


# Trigger channels


def test_a_model_is_given_in_brackets_or_as_an_attribute() -> None:
    """With and without the decorator, and inherited."""

    class Bracketed(TriggerChannel[Author]):
        lock_notifications = True

    @dataclasses.dataclass
    class Assigned(TriggerChannel):
        model = Author

    class Quoted(TriggerChannel["Author"]):
        pass

    class Of(TriggerChannel[T], Generic[T]):
        lease = 9

    class OfAuthor(Of[Author]):
        pass

    class Heir(Bracketed):
        exclude = ("password_hash",)

    class Notes(TriggerChannel[Any]):
        model = NOTES

    for cls in (Bracketed, Assigned, Quoted, OfAuthor, Heir):
        check_declared(cls)
        assert cls.model is Author
        assert table_of(cls) is Author.__table__
        assert channel_field_names(cls) == ("old", "new")
    check_declared(Notes)
    assert table_of(Notes) is NOTES
    assert (OfAuthor.lease, Heir.lock_notifications) == (9, True)
    assert registered_channels() == [Bracketed, Assigned, Quoted, OfAuthor, Heir, Notes]
    assert "Of has no model: write class Of(TriggerChannel[YourModel]), or model = YourModel" in refusal(lambda: Of)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (int, "model = int: expected a class mapped by SQLAlchemy, or a Table"),
        (Base, "model = Base: expected a class mapped by SQLAlchemy"),
        (select(NOTES), "expected a class mapped by SQLAlchemy"),
        ("Missing", "its model 'Missing' is not defined in tests.unit.test_channels: import it there"),
        (None, "has no model"),
    ],
)
def test_what_has_no_table_is_refused(model: Any, told: str) -> None:
    """Only tables have triggers."""
    assert told in refusal(lambda: type("Declared", (TriggerChannel,), {"__module__": __name__, "model": model}))


def test_a_class_mapped_to_something_else_is_refused() -> None:
    """A join has no triggers."""

    class Joined(Base):
        __table__ = select(Author.__table__).subquery()

    assert "Joined is mapped to a Subquery: only tables have triggers" in refusal(
        lambda: type("Declared", (TriggerChannel,), {"model": Joined})
    )


def test_two_models_are_refused() -> None:
    """One of them is a mistake."""
    with pytest.raises(ChannelError, match=r"is a TriggerChannel\[Author\] with another model"):

        class Twice(TriggerChannel[Author]):
            model = NOTES


def columns(include: Any = "all", exclude: Any = (), model: Any = Author) -> list[str]:
    cls: Any = type(
        "Declared", (TriggerChannel,), {"__module__": __name__, "model": model, "include": include, "exclude": exclude}
    )
    check_declared(cls)
    return [column.name for column in captured_columns(cls)]


def test_include_and_exclude_say_which_columns_are_stored() -> None:
    """By column or attribute name, or the thing itself; the primary key is always there."""
    assert columns() == ["id", "name", "password_hash"]
    assert columns(exclude=("password_hash",)) == ["id", "name"]
    assert columns(exclude=["full_name"]) == columns(exclude=("name",)) == ["id", "password_hash"]
    assert columns(exclude=(Author.full_name, Author.__table__.c.password_hash)) == ["id"]
    assert columns(include="key") == ["id"]
    assert columns(include=("name",)) == ["id", "name"]
    assert columns(include=("password_hash", "full_name"), exclude=("name",)) == ["id", "password_hash"]
    assert columns(model=NOTES, exclude=("text",)) == ["count"]


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        (
            {"include": "name"},
            "include = 'name': expected \"all\", \"key\" or a tuple of columns: write include = ('name',)",
        ),
        ({"include": ()}, 'names no column: write include = "key"'),
        ({"include": 5}, "include = 5: expected a tuple of columns"),
        ({"include": (5,)}, "5 is no column: write its name"),
        ({"exclude": "password_hash"}, "expected a tuple of columns: write exclude = ('password_hash',)"),
        ({"exclude": ("passwordhash",)}, "exclude has 'passwordhash', which is no column of author"),
        ({"exclude": ("passwordhash",)}, "Did you mean 'password_hash'?"),
        ({"include": ("nam",)}, "expected some of id, name, password_hash, full_name"),
        ({"exclude": ("id",)}, "exclude has 'id', of the primary key of author"),
        ({"include": (NOTES.c.text,)}, "include has 'notes.text', which is no column of author"),
        ({"include": "key", "model": NOTES}, 'include = "key", but notes has no primary key'),
        ({"excludes": ("id",)}, "Did you mean 'exclude'?"),
    ],
)
def test_mistaken_columns_are_refused(attributes: dict[str, Any], told: str) -> None:
    """With near names, before a secret leaves its table because of a misspelling."""
    body = {"__module__": __name__, "model": Author, **attributes}
    assert told in refusal(lambda: type("Declared", (TriggerChannel,), body))


@pytest.mark.parametrize("field", ["old", "new", "anything"])
def test_fields_of_trigger_channels_are_refused(field: str) -> None:
    """They have old and new."""
    with pytest.raises(ChannelError, match=f"declares the field '{field}': a trigger channel has old and new"):
        type("Declared", (TriggerChannel,), {"model": Author, "__annotations__": {field: int}})


# Finding them


BLOG = """
    from dataclasses import dataclass
    from pgpubsub_celery import Channel, TriggerChannel

    class BlogChannel(Channel):
        lock_notifications = True

    @dataclass
    class PostReads(BlogChannel):
        number: int

    @dataclass
    class PostLikes(BlogChannel):
        channel_name = "likes"
        aliases = ("blog.old.Likes",)
        number: int

    @dataclass
    class RareReads(PostReads):
        pass

    class Group:
        @dataclass
        class Inner(Channel):
            number: int

    def helper(): ...
    LIMIT = 5
"""


def test_a_channel_is_found_by_name_alias_and_path(module: Callable[..., ModuleType]) -> None:
    """Its module is imported if need be."""
    module("blog.channels", BLOG, load=False)
    reads = find_channel("blog.channels.PostReads")
    blog = sys.modules["blog.channels"]
    assert reads is blog.PostReads
    assert find_channel("likes") is find_channel("blog.old.Likes") is find_channel("blog.channels.PostLikes")
    assert find_channel("blog.channels.Group.Inner") is blog.Group.Inner
    assert find_channel("blog.channels.BlogChannel") is blog.BlogChannel
    module("blog.api", "from blog.channels import PostReads as Reads", load=False)
    assert find_channel("blog.api.Reads") is reads


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "PostReads",
            "There is no channel 'PostReads': expected a full path such as blog.channels.PostReads. Did you mean",
        ),
        ("blgo.channels.PostReads", "no module 'blgo' can be imported. Did you mean 'blog.channels.PostReads'"),
        ("blog.chanels.PostReads", "the module blog has no 'chanels'. Did you mean 'blog.channels.PostReads'"),
        (
            "blog.channels.PostRead",
            "the module blog.channels has no 'PostRead'. Did you mean 'blog.channels.PostReads'",
        ),
        (
            "blog.channels.Group.Iner",
            "the class blog.channels.Group has no 'Iner'. Did you mean 'blog.channels.Group.Inner'",
        ),
        ("blog.channels.helper", "'blog.channels.helper' is a function, not a channel"),
        ("blog.channels.LIMIT", "'blog.channels.LIMIT' is a int, not a channel"),
        ("blog.channels.Group", "is the class blog.channels.Group, not a channel"),
        ("blog.channels", "is the module blog.channels, not a channel"),
        ("blog..PostReads", "There is no channel 'blog..PostReads'"),
        ("", "There is no channel ''"),
        ("like", "Did you mean 'likes'?"),
    ],
)
def test_an_unknown_channel_is_refused_with_near_names(module: Callable[..., ModuleType], path: str, told: str) -> None:
    """Saying which part of the path is wrong."""
    module("blog.channels", BLOG)
    with pytest.raises(UnknownChannelError) as refused:
        find_channel(path)
    assert told in str(refused.value)


def test_a_module_that_fails_is_told_from_one_that_is_not_there(module: Callable[..., ModuleType]) -> None:
    """With the cause."""
    module("blog.channels", "import no_such_library", load=False)
    with pytest.raises(
        UnknownChannelError, match=r"importing blog\.channels failed: No module named 'no_such_library'"
    ):
        find_channel("blog.channels.PostReads")
    module("blog.channels", "1 / 0", load=False)
    with pytest.raises(UnknownChannelError, match=r"importing blog\.channels failed: ZeroDivisionError") as refused:
        find_channel("blog.channels.PostReads")
    assert isinstance(refused.value.__cause__, ZeroDivisionError)


def test_a_base_class_selects_its_subclasses(module: Callable[..., ModuleType]) -> None:
    """And itself, if it can be used; in the order of declaration, each once."""
    blog = module("blog.channels", BLOG)
    everything = [blog.PostReads, blog.PostLikes, blog.RareReads, blog.Group.Inner]
    assert select_channels(None) == select_channels([]) == registered_channels() == everything
    assert select_channels(["blog.channels.BlogChannel"]) == [blog.PostReads, blog.PostLikes, blog.RareReads]
    assert select_channels(["blog.channels.PostReads"]) == [blog.PostReads, blog.RareReads]
    assert select_channels(["blog.channels.RareReads", "likes", "likes"]) == [blog.PostLikes, blog.RareReads]
    assert select_channels(["pgpubsub_celery.Channel"]) == everything


def test_a_base_without_a_usable_subclass_is_refused(module: Callable[..., ModuleType]) -> None:
    """With what keeps it from being used itself."""
    module("blog.channels", BLOG)
    with pytest.raises(
        UnknownChannelError, match=r"has no subclass that could be listened to.*TriggerChannel itself is not"
    ):
        select_channels(["pgpubsub_celery.TriggerChannel"])

    class Alone(Channel):
        number: int

    with pytest.raises(UnknownChannelError, match=r"Alone is not a dataclass: write @dataclass"):
        select_channels([Alone.name()])


def test_a_mistake_is_told_when_all_channels_are_wanted() -> None:
    """A channel whose decorator was forgotten must not be left out in silence; a base without fields may be."""

    class Abstract(Channel):
        lock_notifications = True

    class AbstractTrigger(TriggerChannel[T], Generic[T]):
        pass

    assert select_channels(None) == []

    class Forgotten(Channel):
        number: int

    with pytest.raises(ChannelError, match=r"Forgotten is not a dataclass"):
        select_channels(None)


def test_a_base_whose_subclasses_are_used_may_be_incomplete() -> None:
    """A generic one, or one without the decorator but with annotations."""

    class Numbered(Channel):
        number: int

    @dataclasses.dataclass
    class Good(Numbered):
        text: str

    assert select_channels(None) == [Good]
