"""What meets a bridge's filter is its own; the rest waits for another bridge, untouched."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pgpubsub_celery import Channel, Notification
from pgpubsub_celery.errors import ListenerError, SettingsError
from pgpubsub_celery.filters import check, conditions
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.store import Quota, Store
from tests.fixtures.notifications import Notifications, seconds


@pytest.fixture
def order(registry: None) -> type[Channel]:
    """A channel."""

    @dataclasses.dataclass
    class Order(Channel):
        number: int

    return Order


def listener(channel: type[Channel], filter: Any = None) -> Listener:
    return Listener(
        name="a.listener", channel=channel, operations=("message",), fields=(), injected=frozenset(), filter=filter
    )


def stored(notifications: Notifications) -> tuple[int, int, int]:
    """One of each tenant, and one of none."""
    return (
        notifications.add_one(context='{"tenant": "a"}'),
        notifications.add_one(context='{"tenant": "b"}'),
        notifications.add_one(),
    )


def store_of(notifications: Notifications, *filters: str) -> Store:
    return Store("public", {1: " AND ".join(filters)})


def claimed(notifications: Notifications, store: Store, *, subscriptions: tuple[int, ...] = (1,)) -> list[int]:
    quotas = [Quota(subscription=id, limit=10, lease=60.0, lease_max=600.0) for id in subscriptions]
    with notifications.autocommit() as connection:
        return [row.id for row in store.claim(connection, quotas, batch_size=10, max_starts=3).rows]


@pytest.mark.parametrize(
    "condition",
    [
        "context->>'tenant' = 'a'",
        "pgpubsub_notification.context->>'tenant' = 'a'",
        "(SELECT context->>'tenant' = 'a')",
        'context @> \'{"tenant": "a"}\'',
    ],
)
def test_a_claim_takes_what_meets_the_filter_and_leaves_the_rest(notifications: Notifications, condition: str) -> None:
    """A condition that is neither true nor false is not met."""
    mine, other, nobody_s = stored(notifications)
    assert claimed(notifications, store_of(notifications, condition)) == [mine]
    assert claimed(notifications, store_of(notifications, condition)) == []
    assert notifications.ids("waiting") == [other, nobody_s]
    assert claimed(notifications, Store("public")) == [other, nobody_s]


def test_a_filter_is_of_its_own_subscription(notifications: Notifications) -> None:
    """Other listeners of the same bridge are not filtered."""
    mine, _, _ = stored(notifications)
    free = notifications.add_one(subscription=2)
    store = store_of(notifications, "context->>'tenant' = 'a'")
    assert claimed(notifications, store, subscriptions=(1, 2)) == [mine, free]


def test_leases_that_ran_out_are_another_bridges_too(notifications: Notifications) -> None:
    """Publishing again is for the bridge whose they are; nor do they count against this one's quota."""
    (other,) = notifications.dispatch(context='{"tenant": "b"}')
    notifications.move([other], ago=5)
    mine = notifications.add_one(context='{"tenant": "a"}')
    store = store_of(notifications, "context->>'tenant' = 'a'")
    with notifications.autocommit() as connection:
        quota = Quota(subscription=1, limit=1, lease=60.0, lease_max=600.0)
        assert [row.id for row in store.claim(connection, [quota], batch_size=10, max_starts=3).rows] == [mine]


def test_what_is_another_bridges_is_neither_held_nor_recovered_nor_waited_for(notifications: Notifications) -> None:
    """A start holds what this bridge would claim; the next due time is of its own."""
    mine, other, nobody_s = stored(notifications)
    later = notifications.add_one(context='{"tenant": "a"}', ago=-100)
    store = store_of(notifications, "context->>'tenant' = 'a'")
    with notifications.autocommit() as connection:
        assert store.hold(connection, [1]) == 1
        assert notifications.ids("held") == [mine]
        assert notifications.ids("waiting") == [other, nobody_s, later]
        assert store.next_due(connection, [1]) == seconds(100)
        notifications.execute("UPDATE pgpubsub_notification SET state = 'held' WHERE id = :id", id=other)
        assert store.recover(connection, [1], failed=True) == 1
    assert notifications.ids("held") == [other]


def test_setting_and_listener_are_met_both(order: type[Channel], notifications: Notifications) -> None:
    """Text, an expression, a function of the channel by its path; quotes, colons and percent signs stay as they are."""
    setting = "tests.fixtures.tenants:of_channel"
    both = {1: listener(order, Notification.payload["size"].as_integer() > 3), 2: listener(order)}
    found = conditions(both, setting)
    assert found[2] in found[1]
    small = notifications.add_one(context='{"tenant": "a: 100%"}', payload='{"size": 3}')
    large = notifications.add_one(context='{"tenant": "a: 100%"}', payload='{"size": 4}')
    notifications.add_one(context='{"tenant": "a"}', payload='{"size": 4}')
    assert claimed(notifications, Store("public", {1: found[1]})) == [large]
    assert claimed(notifications, Store("public", {1: found[2]})) == [small]

    @dataclasses.dataclass
    class Other(Channel):
        pass

    assert conditions({1: listener(Other)}, setting) == {}
    assert conditions({1: listener(Other, "a = 'x:y'")}, None) == {1: "(a = 'x\\:y')"}
    assert conditions({1: listener(order)}, None) == {}
    assert "'north'" in conditions({1: listener(Other)}, "tests.fixtures.tenants:north")[1]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("tests.fixtures.tenants:missing", "cannot be imported .*has no attribute 'missing'"),
        ("no_such_module:thing", "cannot be imported .*No module named"),
        ("tests.fixtures.tenants:not_a_condition", "listener_filter is 5: expected SQL"),
        ("  ", "expected SQL"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(order: type[Channel], setting: str, told: str) -> None:
    """With what was expected instead."""
    with pytest.raises(SettingsError, match=told):
        conditions({1: listener(order)}, setting)


def test_a_filter_that_cannot_be_read_or_evaluated_is_refused(
    order: type[Channel], notifications: Notifications
) -> None:
    """Named by its listener, with Postgres's reason, before anything is claimed."""
    with pytest.raises(ListenerError, match=r"filter= of a\.listener is 7: expected SQL"):
        conditions({1: listener(order, 7)}, None)
    wrong = {1: listener(order, "tenant = 'a'")}
    with (
        notifications.autocommit() as connection,
        pytest.raises(ListenerError, match=r"filter of a\.listener .*column \"tenant\" does not exist"),
    ):
        check(connection, notifications.store.names, conditions(wrong, None), wrong)
