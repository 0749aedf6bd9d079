"""What is told of, release by release."""

import dataclasses

from library import models
from library.models import RELEASE, Book

from pgpubsub_celery import Channel, TriggerChannel

if RELEASE < 4:

    class BookChanges(TriggerChannel[Book]):
        """The catalogue, by its first name."""

        channel_name = "library.Books"
        lock_notifications = True
        if RELEASE >= 3:
            renamed = {"title": "name"}

else:

    class BookChanges(TriggerChannel[Book]):
        """The catalogue."""

        channel_name = "library.Catalogue"
        aliases = ("library.Books",)
        lock_notifications = True
        renamed = {"title": "name"}
        defaults = {"pages": None}


@dataclasses.dataclass
class Borrowed(Channel):
    """A book was borrowed."""

    channel_name = "library.Borrowed"
    lock_notifications = True
    book: int
    if RELEASE >= 6:
        days: int = 14


if RELEASE >= 6:

    class ReaderChanges(TriggerChannel[models.Reader]):
        """The readers."""

        channel_name = "library.Readers"
        lock_notifications = True
