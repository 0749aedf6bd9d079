"""An application as users write it: what type checkers know of it is asserted here, and checked by test_typing."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from typing_extensions import assert_type

from pgpubsub_celery import (
    Channel,
    NotificationInfo,
    TriggerChannel,
    anotify,
    channel_task,
    notify,
    notify_many,
    post_insert_listener,
)
from pgpubsub_celery.channels import find_channel, select_channels

T = TypeVar("T")


class Base(DeclarativeBase):
    """Of the models."""


class Author(Base):
    """A model."""

    __tablename__ = "typing_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    secret: Mapped[str]


NOTES = Table("typing_notes", MetaData(), Column("id", Integer, primary_key=True), Column("text", String))


@dataclass
class PostReads(Channel):
    """A message."""

    lock_notifications = True
    acknowledge = "published"
    lease = 5
    channel_name = "typing.reads"
    aliases = ("typing.old_reads",)
    unique_key = "model_id"
    model_id: int
    date: datetime.date = datetime.date(2026, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Small(Channel):
    """A message with all options."""

    aliases = ["typing.other"]  # noqa: RUF012
    number: int


@dataclass
class Box(Channel, Generic[T]):
    """A generic message."""

    content: T


@dataclass
class IntBox(Box[int]):
    """Of ints."""


class AuthorChanges(TriggerChannel[Author]):
    """Of a table."""

    include = "all"
    exclude = ("secret",)


class KeyChanges(TriggerChannel[Author]):
    """Of its primary key."""

    include = "key"


@dataclass
class NoteChanges(TriggerChannel[Any]):
    """Of a table without a model."""

    model = NOTES
    include = ("id",)
    exclude = [NOTES.c.text]  # noqa: RUF012


@channel_task(PostReads)
def count(model_id: int, session: Session, notification: NotificationInfo) -> int:
    """Take some of the fields."""
    assert_type(notification.id, int | None)
    return model_id


@channel_task(AuthorChanges, on=("insert", "update"), changed="secret", max_retries=3)
def follow(old: Author | None, new: Author | None) -> None:
    """Take both rows."""


@post_insert_listener(AuthorChanges)
def welcome(new: Author) -> str:
    """Take one row."""
    return new.secret


@channel_task(PostReads)
async def fetch(model_id: int, notification: NotificationInfo) -> int:
    """Take some of the fields, and wait."""
    await notification.aacknowledge(AsyncSession())
    return model_id


async def call(notification: NotificationInfo) -> None:
    """Call a coroutine's listener."""
    assert_type(await fetch(1, notification=notification), int)


def emit(session: Session, connection: Connection) -> None:
    """Emit in a transaction."""
    message = PostReads(model_id=1)
    assert_type(message.model_id, int)
    assert_type(message.date, datetime.date)
    assert_type(IntBox(1).content, int)
    assert_type(Small(number=1), Small)
    assert_type(notify(session, message), int)
    assert_type(notify(connection, PostReads, model_id=1, countdown=5), int)
    assert_type(notify(session, "typing.reads", model_id=1), int)
    assert_type(notify_many(session, [message, Small(number=1)]), int)


async def emit_async(session: AsyncSession, connection: AsyncConnection) -> None:
    """Emit in an asynchronous one."""
    assert_type(await anotify(session, PostReads(1)), int)
    assert_type(await anotify(connection, PostReads(1)), int)


def look() -> None:
    """Look at what was declared."""
    assert_type(PostReads.name(), str)
    assert_type(PostReads.lock_notifications, bool)
    assert_type(AuthorChanges.listen_safe_name(), str)
    assert_type(find_channel("typing.reads"), type[Channel])
    assert_type(select_channels(None), list[type[Channel]])
    # A listener keeps the signature of its function.
    assert_type(welcome(Author(id=1, secret="x")), str)
    assert_type(follow(None, new=None), None)
