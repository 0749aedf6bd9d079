"""The tables of this package, as SQLAlchemy models in a metadata of their own.

Owns the shape of what is stored: notifications, subscriptions, channels, the listeners' run times, and the
installation's identity. Never runs a statement; `store` does. Users may query `Notification` like any model, and
give `metadata` to Alembic beside their own.
"""

from __future__ import annotations

import datetime
import uuid
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

metadata = MetaData()

WAITING = "waiting"
DISPATCHED = "dispatched"
RUNNING = "running"
FAILED = "failed"
HELD = "held"
STATES = (WAITING, DISPATCHED, RUNNING, FAILED, HELD)


class _Base(DeclarativeBase):
    metadata = metadata


_EMPTY_ARRAY = text("'{}'")
_NOW = text("now()")
_ZERO = text("0")


class Installation(_Base):
    """One row: which installation this is and which version of the schema it has."""

    __tablename__ = "pgpubsub_installation"

    id: Mapped[uuid.UUID] = mapped_column(UUID(as_uuid=True), primary_key=True)
    version: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True), server_default=_NOW)


class KnownChannel(_Base):
    """A channel that `install` has seen: its doorbell's name and its earlier names.

    A renamed channel has a row under each of its names, because bridges of the older release still listen to that.
    """

    __tablename__ = "pgpubsub_channel"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    aliases: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=_EMPTY_ARRAY)
    listen_name: Mapped[str] = mapped_column(Text)
    stored: Mapped[bool] = mapped_column()
    table_name: Mapped[str | None] = mapped_column(Text)
    """For channels of table changes: the table, qualified and quoted. Only its triggers emit."""
    ordering_key: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    """Fields of its messages that emit makes the notification's key of; triggers know their columns themselves."""
    unique_key: Mapped[list[str] | None] = mapped_column(ARRAY(Text))


class Subscription(_Base):
    """A listener of a channel. Emit stores one notification for each, so the set is exact at commit.

    Renamed channels and listeners keep their row, and its id, with the earlier names in the aliases: an older release
    finds it by the name that it knows.
    """

    __tablename__ = "pgpubsub_subscription"
    __table_args__ = (UniqueConstraint("channel", "listener", name="pgpubsub_subscription_channel_listener_key"),)

    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    channel: Mapped[str] = mapped_column(Text)
    channel_aliases: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=_EMPTY_ARRAY)
    listener: Mapped[str] = mapped_column(Text)
    aliases: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=_EMPTY_ARRAY)
    operations: Mapped[list[str]] = mapped_column(ARRAY(Text))
    created_at: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True), server_default=_NOW)


class RunTime(_Base):
    """How long a listener's runs took lately in one worker process, which reports it now and then.

    A table of its own, because every writer reads the subscriptions: what changes every few seconds must not be there.
    """

    __tablename__ = "pgpubsub_run_time"

    subscription: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    process: Mapped[uuid.UUID] = mapped_column(UUID(as_uuid=True), primary_key=True)
    mean_seconds: Mapped[float] = mapped_column(Double)
    """Of one notification, its share of the bundle's own work included."""
    runs: Mapped[int] = mapped_column(BigInteger)
    """How many the mean is of."""
    per_second: Mapped[float | None] = mapped_column(Double)
    """How many there were in a second, since the report before."""
    measured_at: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True), server_default=_NOW)


class Notification(_Base):
    """One committed change or message, for one listener, until that listener is done with it."""

    __tablename__ = "pgpubsub_notification"
    __table_args__ = (
        CheckConstraint(
            "state IN ('waiting', 'dispatched', 'running', 'failed', 'held')", name="pgpubsub_notification_state_check"
        ),
        # One index for all channels made a claim for B take 355 ms behind a million rows of A; this one 1.8 ms.
        Index("pgpubsub_notification_claim_idx", "subscription", "state", "available_at", "id"),
        # Notifications without keys are not in these, and pay nothing for them.
        Index(
            "pgpubsub_notification_ordering_idx",
            "subscription",
            "ordering_key",
            "id",
            postgresql_where=text("ordering_key IS NOT NULL"),
        ),
        Index(
            "pgpubsub_notification_unique_idx",
            "subscription",
            "unique_key",
            "id",
            postgresql_where=text("unique_key IS NOT NULL AND state = 'waiting'"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    channel: Mapped[str] = mapped_column(Text)
    subscription: Mapped[int | None] = mapped_column(Integer)
    operation: Mapped[str] = mapped_column(Text)
    payload: Mapped[Any] = mapped_column(JSONB)
    context: Mapped[Any | None] = mapped_column(JSONB)
    created_at: Mapped[datetime.datetime] = mapped_column(DateTime(timezone=True), server_default=_NOW)
    db_version: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text, server_default=WAITING)
    available_at: Mapped[datetime.datetime | None] = mapped_column(DateTime(timezone=True), server_default=_NOW)
    dispatches: Mapped[int] = mapped_column(Integer, server_default=_ZERO)
    starts: Mapped[int] = mapped_column(SmallInteger, server_default=_ZERO)
    retries: Mapped[int] = mapped_column(Integer, server_default=_ZERO)
    owner: Mapped[uuid.UUID | None] = mapped_column(UUID(as_uuid=True))
    recovered_at: Mapped[datetime.datetime | None] = mapped_column(DateTime(timezone=True))
    """When somebody last asked to have it run (`retry`, `listen --recover`)."""
    failed_at: Mapped[datetime.datetime | None] = mapped_column(DateTime(timezone=True))
    error: Mapped[str | None] = mapped_column(Text)
    traceback: Mapped[str | None] = mapped_column(Text)
    task_id: Mapped[str | None] = mapped_column(Text)
    # Compared byte by byte: no collation of the operating system has a say in what is equal, or in the index's order.
    ordering_key: Mapped[str | None] = mapped_column(Text(collation="C"))
    """The value of the channel's `ordering_key`; several values as a JSON array; where they are null, `none:…`, which
    no other has."""
    unique_key: Mapped[str | None] = mapped_column(Text(collation="C"))
    """The value of the channel's `unique_key`, likewise."""


# A queue's rows live briefly: vacuum after a fixed number of dead ones, not after a share of the table, and without
# throttling, so that claims do not wade through dead index entries.
STORAGE_PARAMETERS = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "2000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "10000",
    "fillfactor": "85",
}
"""Of the table of `Notification`. `install` sets those that are not set."""
