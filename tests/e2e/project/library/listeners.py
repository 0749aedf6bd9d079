"""What is done then, release by release."""

from library import channels
from library.channels import BookChanges, Borrowed
from library.models import RELEASE, Book, Done
from sqlalchemy.orm import Session

from pgpubsub_celery import NotificationInfo, channel_task


def note(session: Session, notification: NotificationInfo, what: str) -> None:
    """Say that something was done, in the transaction that acknowledges it."""
    session.add(Done(what=what, db_version=notification.db_version))


if RELEASE < 4:

    @channel_task(BookChanges, on="insert", name="library.shelve")
    def shelve(new: Book, session: Session, notification: NotificationInfo) -> None:
        """By its first name."""
        note(session, notification, f"shelve {new.id} {new.title if RELEASE < 3 else new.name}")

else:

    @channel_task(BookChanges, on="insert", name="library.arrange", aliases=("library.shelve",))
    def arrange(new: Book, session: Session, notification: NotificationInfo) -> None:
        """Put a new book where it belongs."""
        note(session, notification, f"arrange {new.id} {new.name} {new.pages}")


if 2 <= RELEASE < 5:

    @channel_task(BookChanges, on="update", changed=["title" if RELEASE < 3 else "name"], name="library.index")
    def index(new: Book, session: Session, notification: NotificationInfo) -> None:
        """Write a new title."""
        note(session, notification, f"index {new.id}")


if RELEASE >= 5:

    @channel_task(BookChanges, on="delete", name="library.remember")
    def remember(old: Book, session: Session, notification: NotificationInfo) -> None:
        """Remember a lost book."""
        note(session, notification, f"remember {old.id} {old.name}")


if RELEASE < 6:

    @channel_task(Borrowed, name="library.lend")
    def lend(book: int, session: Session, notification: NotificationInfo) -> None:
        """Write it into the list."""
        note(session, notification, f"lend {book}")

else:

    @channel_task(Borrowed, name="library.lend")
    def lend(book: int, days: int, session: Session, notification: NotificationInfo) -> None:
        """Write it into the list, with its time."""
        note(session, notification, f"lend {book} {days}")

    @channel_task(channels.ReaderChanges, on="insert", name="library.greet")
    def greet(session: Session, notification: NotificationInfo) -> None:
        """Say hello."""
        note(session, notification, "greet")
