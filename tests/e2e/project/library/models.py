"""The tables, release by release."""

import os

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

RELEASE = int(os.environ.get("RELEASE", "6"))


class Base(DeclarativeBase):
    """Of all tables."""


class Book(Base):
    """What the library has."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    if RELEASE < 3:
        title: Mapped[str]
    else:
        name: Mapped[str]
    if 2 <= RELEASE < 5:
        author: Mapped[str | None]
    if 4 <= RELEASE < 6:
        pages: Mapped[str | None]
    elif RELEASE >= 6:
        pages: Mapped[int | None]


class Done(Base):
    """What listeners have done."""

    __tablename__ = "done"

    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    db_version: Mapped[str | None]
    release: Mapped[int] = mapped_column(default=RELEASE)


if RELEASE >= 6:

    class Reader(Base):
        """Who comes."""

        __tablename__ = "reader"

        id: Mapped[int] = mapped_column(primary_key=True)
