"""The blog's channels."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from pgpubsub_celery import Channel, TriggerChannel
from pgpubsub_celery.demo.models import Author


class AuthorChanges(TriggerChannel[Author]):
    """The changes of the authors' table."""

    lock_notifications = True
    exclude = ("password_hash",)


@dataclass
class PostReads(Channel):
    """Somebody has read a post."""

    lock_notifications = True
    model_id: int
    date: datetime.date


@dataclass
class Newsletter(Channel):
    """To be sent by a server that is not always there."""

    lock_notifications = True
    issue: int


@dataclass
class Misprint(Channel):
    """Nobody can do anything about it."""

    lock_notifications = True
    page: int


CHANNELS = (AuthorChanges, PostReads, Newsletter, Misprint)
