"""Names, hashes and what is read of a declaration: what a trigger does is seen in the integration tests."""

from __future__ import annotations

import datetime
import enum
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, bindparam, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

from pgpubsub_celery import channels
from pgpubsub_celery.errors import ChannelError, ListenerError
from pgpubsub_celery.triggers import TriggerDefinition, trigger_definitions, trigger_name
from tests.fixtures.changes import channel_of, listener_of

pytestmark = pytest.mark.usefixtures("registry")


class Base(DeclarativeBase):
    pass


class State(enum.Enum):
    OPEN = "open"
    PAID = "it's paid"


class Order(Base):
    __tablename__ = "order"

    number: Mapped[int] = mapped_column("no", primary_key=True)
    state: Mapped[State] = mapped_column("State")
    made: Mapped[datetime.date]
    paid: Mapped[bool]


class Unwritable:
    """SQLAlchemy binds it, and has no literal for it."""


def definitions(channel: Any = None, *listeners: Any, schema: str = "public") -> list[TriggerDefinition]:
    channel = channel or channel_of(Order)
    return trigger_definitions(channel, listeners or [listener_of(channel)], schema)


def text_of(found: list[TriggerDefinition]) -> str:
    return "\n".join(statement for definition in found for statement in definition.create)


def again(**attributes: Any) -> Any:
    """The channel once more, declared otherwise."""
    channels._registry.clear()
    return channel_of(Order, **attributes)


def condition_of(condition: Any, operation: str = "update") -> str:
    """What became of a condition, between the words of its own."""
    (definition,) = definitions(channel := again(), listener_of(channel, operation, condition=condition))
    body = next(statement for statement in definition.create if statement.startswith("CREATE OR REPLACE FUNCTION"))
    return body.partition("            WHERE (")[2].partition("\n            )\n        );")[0]


@pytest.mark.parametrize(
    "name",
    [
        "blog.channels.AuthorChanges",
        "a" * 200,
        "ä" * 200,
        "...",
        "Ünï.CÖDÉ",
        "blog.tests.test_it.test_something.<locals>.Changes",
    ],
)
@pytest.mark.parametrize("part", ["insert", "truncate", "update_through"])
def test_names_are_identifiers_that_postgres_keeps_whole(name: str, part: str) -> None:
    """At most 63 bytes, of characters that need no quotes, and telling whose they are."""
    found = trigger_name(name, part)
    assert len(found.encode()) <= 63
    assert found.isascii()
    assert found.replace("_", "").isalnum()
    assert found == found.lower()
    assert found.startswith("pgpubsub_")
    assert f"_{part}_" in found


def test_names_say_which_channel_they_are_of() -> None:
    """For whoever looks at a table in psql."""
    assert trigger_name("blog.channels.AuthorChanges", "insert").startswith(
        "pgpubsub_blog_channels_authorchanges_insert_"
    )


def test_no_two_channels_share_a_name() -> None:
    """However alike their readable parts are."""
    alike = [
        "blog.Changes",
        "blog_Changes",
        "blog.changes",
        "BLOG.CHANGES",
        "x" * 100 + "blog.Changes",
        "y" * 100 + "blog.Changes",
    ]
    names = {trigger_name(name, part) for name in alike for part in ("insert", "insert_direct")}
    assert len(names) == 2 * len(alike)


def test_there_is_a_definition_for_each_wanted_operation() -> None:
    """The union of the listeners' operations, in a fixed order; none without listeners."""
    channel = channel_of(Order)
    found = definitions(
        channel, listener_of(channel, "delete", name="a"), listener_of(channel, "insert", "delete", name="b")
    )
    assert [definition.operation for definition in found] == ["insert", "delete"]
    assert trigger_definitions(channel, [], "public") == []
    assert {definition.table for definition in found} == {(None, "order")}
    assert all(definition.function == definition.name == definition.names[0] for definition in found)


def test_definitions_are_the_same_in_each_process() -> None:
    """Whatever order modules were imported in; a listener without wishes of its own changes nothing that exists."""
    one, two, three = (
        {"name": "one", "changed": ("state",)},
        {"name": "two", "condition": "new.paid"},
        {"name": "three"},
    )
    texts = []
    for order in ((one, two, three), (three, two, one), (two, one)):
        channel = again()
        texts.append(definitions(channel, *(listener_of(channel, "update", **one) for one in order)))
    assert texts[0] == texts[1] == texts[2]


def test_every_name_is_qualified_by_the_packages_schema() -> None:
    """Which may be any."""
    found = text_of(definitions(schema='my "schema"'))
    assert '"my ""schema""".pgpubsub_notification' in found
    assert "public." not in found
    assert found.count("pgpubsub_ring(") == found.count('"my ""schema""".pgpubsub_ring(')


@pytest.mark.parametrize(
    "attributes", [{"lock_notifications": False}, {"include": "key"}, {"exclude": ("paid",)}, {"aliases": ("earlier",)}]
)
def test_a_channel_declared_otherwise_has_another_hash(attributes: dict[str, Any]) -> None:
    """So that `install` sees what is out of date."""
    before = {definition.hash for definition in definitions(again())}
    after = {definition.hash for definition in definitions(again(**attributes))}
    assert len(before) == len(after) == 4
    assert before.isdisjoint(after)


def test_functions_are_taken_from_the_public() -> None:
    """Each that is made, also those that only partitioned tables have."""
    for definition in definitions():
        statements = "\n".join(definition.create)
        made = statements.count("CREATE OR REPLACE FUNCTION ")
        assert made == statements.count("REVOKE ALL ON FUNCTION ")
        assert made == (1 if definition.operation == "truncate" else 3)


@pytest.mark.parametrize(
    ("condition", "sql"),
    [
        ("new.paid AND NOT old.paid", "new.paid AND NOT old.paid"),
        (Order.paid, '"new".paid'),
        (Order.state == State.PAID, '"new"."State" = \'PAID\''),
        (Order.made < datetime.date(2026, 2, 3), "\"new\".made < '2026-02-03'"),
        (Order.number.in_([1, 2]), '"new".no IN (1, 2)'),
        (aliased(Order, name="old").number != aliased(Order, name="new").number, '"old".no != "new".no'),
        (Order.__table__.c.made.is_(None), '"new".made IS NULL'),
        (func.lower("100% é:x") == "it's", "lower('100% é:x') = 'it''s'"),
    ],
)
def test_conditions_become_sql_over_old_and_new(condition: Any, sql: str) -> None:
    """Values are part of it; columns go by their names in the database."""
    assert condition_of(condition) == sql


def test_the_models_own_row_is_the_old_one_of_a_deletion() -> None:
    """There is no other."""
    assert condition_of(Order.paid, "delete") == '"old".paid'
    assert condition_of(Order.paid, "insert") == '"new".paid'


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        (7, "expected SQL over old and new"),
        (lambda old, new: True, "expected SQL over old and new"),
        (func.f(Unwritable()) == Order.number, "cannot be written as SQL with its values"),
        (Order.number == bindparam("later", type_=Integer), "has the parameter 'later'"),
    ],
)
def test_a_condition_that_is_no_sql_is_the_listeners_mistake(condition: Any, why: str) -> None:
    """Said with its name."""
    with pytest.raises(ListenerError, match=f"^listener: .*{why}"):
        condition_of(condition)


@pytest.mark.parametrize("column", ["state", "State", Order.state, Order.__table__.c.State])
def test_changed_names_columns_or_attributes(column: Any) -> None:
    """As strings, or as what they are."""
    found = text_of(definitions(channel := again(), listener_of(channel, "update", changed=(column,))))
    assert 'concat("State") COLLATE "C"' in found


def test_an_unknown_column_in_changed_is_refused_with_what_is_near() -> None:
    """Before anything reaches the database."""
    channel = channel_of(Order)
    with pytest.raises(ListenerError, match=r"names 'stat', not a column of order\. Did you mean 'state'"):
        definitions(channel, listener_of(channel, "update", changed=("stat",)))


def test_a_model_without_a_table_is_refused() -> None:
    """Triggers need one."""

    class Mapped_(Base):  # noqa: N801 - it is mapped to a query
        __table__ = select(Order.__table__.c.no, Order.__table__.c.made).subquery()
        __mapper_args__ = {"primary_key": [__table__.c.no]}  # noqa: RUF012

    channel = channel_of(Mapped_)
    with pytest.raises(ChannelError):
        trigger_definitions(channel, [], "public")


def test_columns_of_any_name_and_number_are_in_one_expression_each() -> None:
    """Sorted as jsonb sorts its keys."""
    table = Table("t", MetaData(), Column("bb", Integer, primary_key=True), Column("c", Text), Column("A", String))
    found = text_of(definitions(channel := channel_of(table), listener_of(channel, "insert")))
    assert "columns CONSTANT text[] := ARRAY['A', 'c', 'bb']::text[];" in found
