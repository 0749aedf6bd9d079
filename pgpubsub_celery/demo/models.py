"""The blog's tables."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Of the blog's tables."""


class Author(Base):
    """Somebody who writes. A listener never sees the password's hash."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    password_hash: Mapped[str] = mapped_column(String(100), default="")


class Post(Base):
    """Something written."""

    __tablename__ = "post"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id", ondelete="CASCADE"))
    content: Mapped[str] = mapped_column(Text)


class Effect(Base):
    """What a listener did: one row for each time, so that it can be counted."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(50))
    value: Mapped[int] = mapped_column()
