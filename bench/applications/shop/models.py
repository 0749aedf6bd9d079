"""The shared tables, for Django."""

from __future__ import annotations

from django.db import models


class Item(models.Model):
    """What writers write."""

    name = models.TextField(null=True)
    email = models.TextField(null=True)
    amount = models.DecimalField(max_digits=12, decimal_places=2, null=True)
    created_at = models.DateTimeField(null=True)
    note = models.TextField(null=True)
    a = models.IntegerField(null=True)
    b = models.IntegerField(null=True)

    class Meta:
        """The table is made for all systems alike."""

        managed = False
        db_table = "item"


class Effect(models.Model):
    """What tasks write."""

    number = models.IntegerField()

    class Meta:
        """The table is made for all systems alike."""

        managed = False
        db_table = "effect"


def create_item(number: int) -> Item:
    """Insert an item."""
    created: Item = Item.objects.create(
        name="name", email="somebody@example.com", amount=12.5, note="a note of ordinary length", a=number, b=0
    )
    return created
