"""What a test can say of what was emitted: once for each emission, typed, and with the near misses where it fails."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import Channel, TriggerChannel, channel_task, install, notify, notify_many
from pgpubsub_celery.errors import ChannelError
from pgpubsub_celery.testing import assert_emitted, drain, emitted, refute_emitted

DATE = datetime.date(2026, 1, 1)


class Base(DeclarativeBase):
    """Of the model."""


class Author(Base):
    """A table whose changes are listened to."""

    __tablename__ = "emission_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret: Mapped[str | None]


@dataclasses.dataclass
class Reads(Channel):
    """Stored, with two listeners."""

    channel_name = "emissions.Reads"
    lock_notifications = True
    model_id: int
    date: datetime.date = DATE


@dataclasses.dataclass
class Ping(Channel):
    """Not stored."""

    channel_name = "emissions.Ping"
    number: int


class Authors(TriggerChannel[Author]):
    """The changes of a table, without a column."""

    channel_name = "emissions.Authors"
    lock_notifications = True
    exclude = ("secret",)


@pytest.fixture
def session(installed_engine: Engine, registry: None) -> Iterator[Session]:
    """A session in a transaction that is never committed; each channel has two listeners."""
    app = Celery("emissions", broker="memory://", set_as_current=True)

    @channel_task(Reads, app=app, name="emissions.first")
    def first(model_id: int) -> None:
        pass

    @channel_task(Reads, app=app, name="emissions.second")
    def second(model_id: int) -> None:
        raise ValueError("second")

    @channel_task(Authors, on=("insert", "update", "delete"), app=app, name="emissions.follow")
    def follow(new: Author | None) -> None:
        pass

    @channel_task(Authors, on="insert", app=app, name="emissions.welcome")
    def welcome(new: Author) -> None:
        pass

    Base.metadata.create_all(installed_engine)
    install(installed_engine, channels=[Reads, Authors])
    with Session(installed_engine) as session:
        yield session
    app.close()


def test_each_emission_is_there_once(session: Session) -> None:
    """However many listeners there are, and however equal the emissions; in their order."""
    notify_many(session, [Reads(1), Reads(2), Reads(1)])
    assert session.execute(text("SELECT count(*) FROM pgpubsub_notification")).scalar() == 6
    assert emitted(session, Reads) == [Reads(1), Reads(2), Reads(1)]


def test_what_all_listeners_have_done_is_there_no_more(session: Session) -> None:
    """What one of them has not is."""
    notify(session, Reads(1))
    assert len(drain(session, raise_errors=False).failed) == 1
    assert emitted(session, Reads) == [Reads(1)]
    session.execute(text("DELETE FROM pgpubsub_notification"))
    assert emitted(session, Reads) == []


def test_changes_have_both_rows(session: Session) -> None:
    """Those that are only pending are flushed; what is excluded was not stored."""
    author = Author(id=1, name="Ann", secret="x")
    session.add(author)
    (change,) = emitted(session, Authors)
    assert isinstance(change, Authors)
    assert (change.old, change.new.name if change.new else None) == (None, "Ann")
    author.name = "Anna"
    assert_emitted(session, Authors, operation="update", old={"name": "Ann"}, new={"name": "Anna"}, times=1)
    assert_emitted(session, Authors, operation=("insert", "update"), times=2)
    session.delete(author)
    assert_emitted(session, Authors, new=None)
    with pytest.raises(AssertionError, match=r"new\.secret was not stored"):
        assert_emitted(session, Authors, new={"secret": "x"})


def test_assert_emitted_returns_what_is_as_asked_for(session: Session) -> None:
    """Fields, context, and how often."""
    notify(session, Reads(1), context={"user": 3, "more": 1})
    notify(session, Reads(2))
    assert assert_emitted(session, Reads, model_id=1, context={"user": 3}) == [Reads(1)]
    assert assert_emitted(session, Reads, date=DATE, times=2) == [Reads(1), Reads(2)]
    assert assert_emitted(session, Reads, model_id=3, times=0) == []
    refute_emitted(session, Reads, model_id=3)
    refute_emitted(session, Reads, model_id=2, context={"user": 3})


def test_a_failed_assertion_shows_the_near_misses_nearest_first(session: Session) -> None:
    """And what is different about each."""
    notify(session, Reads(7, datetime.date(2025, 5, 5)))
    notify(session, Reads(8), context={"user": 4})
    with pytest.raises(AssertionError) as caught:
        assert_emitted(session, Reads, model_id=9, date=DATE, context={})
    assert str(caught.value).splitlines() == [
        "at least one Reads with model_id=9, date=datetime.date(2026, 1, 1) expected, 0 emitted. There is:",
        "  Reads(model_id=8, date=datetime.date(2026, 1, 1)) with the context {'user': 4}",
        "    model_id is 8, not 9",
        "  Reads(model_id=7, date=datetime.date(2025, 5, 5))",
        "    model_id is 7, not 9",
        "    date is datetime.date(2025, 5, 5), not datetime.date(2026, 1, 1)",
    ]
    with pytest.raises(AssertionError, match="3 Reads with model_id=8 expected, 1 emitted"):
        assert_emitted(session, Reads, model_id=8, times=3)
    with pytest.raises(AssertionError, match=r"no Reads with model_id=8 expected, 1 emitted. There is:\n  Reads\(mod"):
        refute_emitted(session, Reads, model_id=8)
    with pytest.raises(AssertionError, match=r"Nothing of this channel was emitted\."):
        assert_emitted(session, Authors)


def test_changes_are_shown_with_their_columns(session: Session) -> None:
    """A model's own representation says nothing."""
    session.add(Author(id=1, name="Ann"))
    with pytest.raises(AssertionError) as caught:
        assert_emitted(session, Authors, operation="delete", new={"name": "Bea"})
    assert str(caught.value).splitlines()[1:] == [
        "  Authors(insert, old=None, new=Author(id=1, name='Ann'))",
        "    operation is 'insert', not 'delete'",
        "    new.name is 'Ann', not 'Bea'",
    ]


def test_many_near_misses_are_cut(session: Session) -> None:
    """The nearest ones are enough."""
    notify_many(session, [Reads(n) for n in range(30)])
    with pytest.raises(AssertionError, match="… and 20 more"):
        assert_emitted(session, Reads, model_id=99)


def test_a_misspelt_field_is_an_error_and_no_refutation(session: Session) -> None:
    """Or a wrong test would pass."""
    with pytest.raises(ChannelError, match=r"no field 'modelid'.*Did you mean 'model_id'"):
        refute_emitted(session, Reads, modelid=1)
    with pytest.raises(ChannelError, match="no field 'name': expected some of old, new"):
        assert_emitted(session, Authors, name="Ann")


@pytest.mark.parametrize("check", [emitted, assert_emitted, refute_emitted])
def test_a_channel_that_is_not_stored_leaves_nothing_to_look_at(session: Session, check: Any) -> None:
    """Which is said, instead of nothing being found."""
    notify(session, Ping(1))
    with pytest.raises(ChannelError, match="does not store its messages"):
        check(session, Ping)


def test_an_engine_sees_what_is_committed(session: Session, installed_engine: Engine) -> None:
    """And a connection what its transaction sees."""
    notify(session, Reads(1))
    refute_emitted(installed_engine, Reads)
    assert_emitted(session.connection(), Reads, model_id=1)
    session.commit()
    assert_emitted(installed_engine, Reads, model_id=1)
