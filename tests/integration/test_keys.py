"""Keys as they are stored: what triggers and emit make of rows and messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, Table, Text, text

from pgpubsub_celery import Channel, install, notify, notify_many
from pgpubsub_celery.drift import key_differences
from pgpubsub_celery.migrations import check
from pgpubsub_celery.schema import Names
from tests.fixtures.changes import channel_of, create, listener_of

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def connection(shared_engine: Engine) -> Iterator[Connection]:
    """A transaction, which is rolled back."""
    with shared_engine.connect() as connection:
        yield connection


def keys(connection: Connection) -> list[tuple[str, str | None, str | None]]:
    """Return operation, ordering and unique key of what is stored; the UUID of a key of its own as a star."""
    rows = connection.execute(
        text("SELECT operation, ordering_key, unique_key FROM pgpubsub_notification ORDER BY id")
    ).all()
    own = [row.ordering_key for row in rows if (row.ordering_key or "").startswith("none:")]
    assert len(set(own)) == len(own)
    return [(row.operation, "none:*" if row.ordering_key in own else row.ordering_key, row.unique_key) for row in rows]


def seats(name: str = "seat") -> Table:
    """A table with a key of two columns."""
    return Table(
        name,
        MetaData(),
        Column("row", Text, primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("holder", Text),
    )


CREATE_SEATS = 'CREATE TABLE seat ("row" text, number int, holder text, PRIMARY KEY ("row", number))'


# Triggers


def test_changes_of_a_row_have_its_primary_key(connection: Connection) -> None:
    """Several columns as a JSON array; an update has the row's new values, a delete its old ones."""
    connection.execute(text(CREATE_SEATS))
    create(connection, listener_of(channel_of(seats(), ordering_key="row", unique_key="holder", include="key")))
    connection.execute(text("INSERT INTO seat VALUES ('a \"1\"', 7, 'Ann'), ('b', 1, NULL)"))
    connection.execute(text("UPDATE seat SET number = 8, holder = 'Bob' WHERE number = 7"))
    connection.execute(text("DELETE FROM seat WHERE number = 8"))
    connection.execute(text("TRUNCATE seat"))
    assert keys(connection) == [
        ("insert", '["a \\"1\\"", "7"]', "Ann"),
        ("insert", '["b", "1"]', None),
        ("update", '["a \\"1\\"", "8"]', "Bob"),
        ("delete", '["a \\"1\\"", "8"]', "Bob"),
        ("truncate", "none:*", None),
    ]


def test_a_null_is_no_key(connection: Connection) -> None:
    """What has no value to be ordered by gets a key that no other has; of several parts, one that is there is a key."""
    connection.execute(text(CREATE_SEATS))
    create(connection, listener_of(channel_of(seats(), ordering_key="holder", unique_key=("holder", "number"))))
    connection.execute(text("INSERT INTO seat VALUES ('a', 1, NULL), ('a', 2, NULL), ('a', 3, '')"))
    assert keys(connection) == [
        ("insert", "none:*", '[null, "1"]'),
        ("insert", "none:*", '[null, "2"]'),
        ("insert", "", '["", "3"]'),
    ]


def test_each_subscription_of_a_change_has_its_key(connection: Connection) -> None:
    """Each listener is ordered by itself."""
    connection.execute(text(CREATE_SEATS))
    channel = channel_of(seats(), ordering_key="number")
    create(connection, listener_of(channel, name="one"), listener_of(channel, name="two"))
    connection.execute(text("INSERT INTO seat VALUES ('a', 5)"))
    assert keys(connection) == [("insert", "5", None)] * 2


def test_rows_of_partitions_have_keys_however_they_are_written(connection: Connection) -> None:
    """By way of the table, of a partition, and when they move to another."""
    connection.execute(
        text(
            "CREATE TABLE item (id int, region text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);"
            "CREATE TABLE item_a PARTITION OF item FOR VALUES IN ('a');"
            "CREATE TABLE item_b PARTITION OF item FOR VALUES IN ('b')"
        )
    )
    table = Table("item", MetaData(), Column("id", Integer, primary_key=True), Column("region", Text, primary_key=True))
    create(connection, listener_of(channel_of(table, ordering_key="id")))
    connection.execute(text("INSERT INTO item VALUES (1, 'a'), (2, 'b')"))
    connection.execute(text("INSERT INTO item_a VALUES (3, 'a')"))
    connection.execute(text("UPDATE item SET region = 'b' WHERE id = 1"))
    connection.execute(text("DELETE FROM item_b WHERE id = 2"))
    found = [(operation, ordering) for operation, ordering, _ in keys(connection)]
    assert found == [("insert", "1"), ("insert", "2"), ("insert", "3"), ("update", "1"), ("delete", "2")]


def test_a_column_that_is_dropped_costs_the_writer_nothing(connection: Connection) -> None:
    """As with what is stored of it: null, so no key."""
    connection.execute(text(CREATE_SEATS))
    create(connection, listener_of(channel_of(seats(), ordering_key="holder"), "insert"))
    connection.execute(text("ALTER TABLE seat DROP COLUMN holder"))
    connection.execute(text("INSERT INTO seat VALUES ('a', 1)"))
    assert keys(connection) == [("insert", "none:*", None)]


def test_a_long_value_is_a_key_and_not_the_writers_failure(connection: Connection) -> None:
    """An index entry has its limit: a long key is its beginning and a digest, equal only where the values are."""
    connection.execute(text(CREATE_SEATS))
    create(connection, listener_of(channel_of(seats(), ordering_key="holder"), "insert"))
    noise = "SELECT string_agg(md5(n::text), '') FROM generate_series(1, 1000) n"
    for row, value in (("a", "'é' ||"), ("b", "'é' ||"), ("c", "'x' || 'é' ||")):
        connection.execute(text(f"INSERT INTO seat VALUES ('{row}', 1, {value} ({noise}))"))
    first, second, third = (ordering for _, ordering, _ in keys(connection))
    assert first == second != third
    assert first is not None
    assert first.startswith("éc4ca4238a0b9")
    assert len(first) < 200


def test_a_trigger_whose_key_has_changed_is_out_of_date(installed_engine: Engine) -> None:
    """`install` makes it anew, and says what differs."""
    with installed_engine.begin() as connection:
        connection.execute(text(CREATE_SEATS))
        create(connection, listener_of(channel_of(seats()), "insert"))
    from pgpubsub_celery import channels, listeners

    channels._registry.clear()
    channel = channel_of(seats(), ordering_key="number")
    listeners.register_listener(listener_of(channel, "insert"))
    with installed_engine.connect() as connection:
        (told,) = [one for one in check(connection, channels=[channel]) if "trigger" in one]
    assert told.endswith("is out of date (ordering_key)")
    install(installed_engine, channels=[channel])
    with installed_engine.begin() as connection:
        assert check(connection, channels=[channel]) == []
        connection.execute(text("INSERT INTO seat VALUES ('a', 5)"))
        assert keys(connection) == [("insert", "5", None)]


# Messages


def declare(**attributes: Any) -> type[Channel]:
    """Declare a channel of bookings."""
    namespace = {
        "__annotations__": {"account": "str | None", "number": "int"},
        "__module__": __name__,
        "channel_name": "keys.Booked",
        "lock_notifications": True,
        **attributes,
    }
    return dataclasses.dataclass(type("Booked", (Channel,), namespace))


def test_messages_have_the_keys_of_their_fields(installed_engine: Engine) -> None:
    """From Python and from psql, as the channel is installed; before it has a listener, too."""
    booked: Any = declare(ordering_key="account", unique_key=("account", "number"))
    install(installed_engine, channels=[booked])
    with installed_engine.begin() as connection:
        notify(connection, booked(account="a", number=1))
        notify_many(connection, [booked(account=None, number=2), booked(account="b", number=3)])
        connection.execute(text('SELECT pgpubsub_notify(\'keys.Booked\', \'{"number": 4, "account": "c"}\')'))
        assert keys(connection) == [
            ("message", "a", '["a", "1"]'),
            ("message", "none:*", '[null, "2"]'),
            ("message", "b", '["b", "3"]'),
            ("message", "c", '["c", "4"]'),
        ]


def test_install_changes_a_channels_keys_and_removes_them(installed_engine: Engine) -> None:
    """What is stored keeps the keys that it was stored with; a bridge is told when install has not been run."""
    from pgpubsub_celery import channels

    declared: list[dict[str, Any]] = [{}, {"ordering_key": "account"}, {"unique_key": ("number",)}, {}]
    for number, attributes in enumerate(declared):
        channels._registry.clear()
        booked: Any = declare(**attributes)
        with installed_engine.connect() as connection:
            found = key_differences(connection, Names("public"), [booked])
        assert found == ([] if number == 0 else ["the keys of the channel keys.Booked are out of date"])
        install(installed_engine, channels=[booked])
        with installed_engine.begin() as connection:
            assert key_differences(connection, Names("public"), [booked]) == []
            notify(connection, booked(account="a", number=number))
    with installed_engine.connect() as connection:
        assert keys(connection) == [
            ("message", None, None),
            ("message", "a", None),
            ("message", None, "2"),
            ("message", None, None),
        ]


def test_a_message_of_a_channel_without_keys_has_none(installed_engine: Engine) -> None:
    """And is in neither of the keys' indexes."""
    booked: Any = declare()
    install(installed_engine, channels=[booked])
    with installed_engine.begin() as connection:
        notify_many(connection, [booked(account="a", number=n) for n in range(100)])
        assert set(keys(connection)) == {("message", None, None)}
        for index in ("ordering", "unique"):
            size = text(f"SELECT pg_relation_size('pgpubsub_notification_{index}_idx')")
            assert connection.execute(size).scalar_one() == 8192, "one page, which says that it is empty"
