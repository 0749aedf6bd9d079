"""django-pgpubsub's listener."""

from __future__ import annotations

from dataclasses import dataclass

import pgpubsub
from pgpubsub.channel import TriggerChannel

from bench.applications.given import KIND, noted
from bench.applications.shop.models import Effect, Item


@dataclass
class ItemChannel(TriggerChannel):
    """Whole rows, stored: each is acted on by one listener process, and can be recovered."""

    model = Item
    lock_notifications = True


@pgpubsub.post_insert_listener(ItemChannel)
def on_item(old: Item | None, new: Item) -> None:
    """Do what the kind of measurement asks for."""
    if not noted(new.a) and KIND == "insert":
        Effect.objects.create(number=new.a)
