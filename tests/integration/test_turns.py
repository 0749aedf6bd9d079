"""Whose turn it is: what is given back is not sent to the end of the line."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from sqlalchemy import Connection

from pgpubsub_celery.store import Store
from tests.fixtures.notifications import Notifications, seconds

ME = uuid.uuid4()
Give = Callable[[Store, Connection, int, float], object]

GIVES: dict[str, Give] = {
    "not published": lambda store, connection, id, delay: store.release_unpublished(connection, [(id, 1)], delay=delay),
    "not run to its end": lambda store, connection, id, delay: store.release(connection, [id], 1, delay=delay),
    "running, not run to its end": lambda store, connection, id, delay: store.release_owned(
        connection, [id], ME, delay=delay
    ),
    "its worker lost": lambda store, connection, id, delay: store.release_lost(connection, [id], 1, delay=delay),
}


@pytest.fixture(params=GIVES)
def give_back(request: pytest.FixtureRequest) -> Give:
    """One of the ways in which a row is given back."""
    give = GIVES[request.param]

    def taken_and_given(store: Store, connection: Connection, id: int, delay: float) -> object:
        if request.param.startswith("running"):
            store.take_owned(connection, [id], 1, ME, 100)
        return give(store, connection, id, delay)

    return taken_and_given


def test_what_is_given_back_keeps_its_place_before_what_was_stored_later(
    notifications: Notifications, give_back: Give
) -> None:
    """An outage of a second must not cost the rows that were in flight a whole backlog's time."""
    first = notifications.add_one(ago=30)
    notifications.add(3, ago=20)
    notifications.execute("UPDATE pgpubsub_notification SET created_at = available_at")
    assert notifications.claimed_ids(batch_size=1) == [first]
    with notifications.autocommit() as connection:
        give_back(notifications.store, connection, first, 0)
    assert notifications.claimed_ids(batch_size=1) == [first]


def test_what_is_given_back_with_a_delay_waits_for_it(notifications: Notifications, give_back: Give) -> None:
    """Its place in the line comes after that."""
    id = notifications.add_one(ago=30)
    assert notifications.claimed_ids() == [id]
    with notifications.autocommit() as connection:
        give_back(notifications.store, connection, id, 50)
    assert notifications.row(id)["seconds"] == seconds(50)
    assert notifications.claimed_ids() == []
