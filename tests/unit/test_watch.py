"""When an awake bridge looks again, and when it asks writers to ring."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from pgpubsub_celery import watch
from pgpubsub_celery.watch import BUSY_MOMENT, MOMENT, QUOTA_MOMENT, RINGS_UNDER_LOAD, Looked, Watch

NOTHING = Looked(
    claimed=0, full=False, unfinished=False, limited=False, soon=float("inf"), outage=None, in_flight={1: 0}
)
USED_UP = dataclasses.replace(NOTHING, limited=True, in_flight={1: 100})
"""A look that finds a quota used up, by what workers have not finished yet."""


class Doors:
    """A link's, of one channel."""

    def __init__(self) -> None:
        self.closed = False

    @property
    def asleep(self) -> bool:
        return self.closed

    def keep(self, stored: Any) -> set[str]:
        return set(stored)

    def open_doors(self) -> None:
        self.closed = False

    def close_doors(self) -> bool:
        self.closed = True
        return True


class Watching:
    """A watch on a clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.doors = Doors()
        self.now = 1000.0
        self.told: list[float] = []
        """When other bridges were told that there is more than this one can take."""
        bridge: Any = SimpleNamespace(
            stored=["a.Channel"],
            settings=SimpleNamespace(poll_interval=30.0),
            something_happened=lambda: None,
            next_due=lambda link, listeners: None,
            ring_others=lambda link: self.told.append(self.now),
        )
        link: Any = self.doors
        dispatcher: Any = None
        self.watch = Watch(bridge, link, dispatcher, {})

    def monotonic(self) -> float:
        return self.now

    def look(self, looked: Looked) -> float:
        """Return how long it waits after this look."""
        seconds = self.watch._patience(looked)
        self.now += seconds
        return seconds

    def rung(self, times: int) -> None:
        self.watch._rings += [self.now] * times

    def fall_asleep(self, looked: Looked) -> None:
        for _ in range(watch.EMPTY_CLAIMS_BEFORE_SLEEP):
            self.look(looked)
        assert self.doors.closed


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Watching:
    """Awake, as a bridge starts."""
    watching = Watching()
    monkeypatch.setattr("pgpubsub_celery.watch.time", SimpleNamespace(monotonic=watching.monotonic))
    watching.watch._sweep_at = watching.now + 30.0
    return watching


def test_after_a_few_empty_looks_writers_are_to_ring(watching: Watching) -> None:
    """And nothing is done until the sweep."""
    watching.fall_asleep(NOTHING)
    assert watching.look(NOTHING) > 29


def test_while_a_quota_is_used_up_what_workers_finish_is_looked_for(watching: Watching) -> None:
    """When a good part of it should be free, and soon at any rate."""
    assert watching.look(dataclasses.replace(USED_UP, claimed=300, soon=0.012)) == 0.012
    assert watching.look(dataclasses.replace(USED_UP, claimed=300, soon=60.0)) == QUOTA_MOMENT
    assert watching.look(dataclasses.replace(USED_UP, claimed=300, soon=0.0001)) == MOMENT


def test_writers_do_not_ring_for_what_cannot_be_had_yet(watching: Watching) -> None:
    """Their commits would wait for each other, and each would make a bridge look in vain."""
    watching.fall_asleep(USED_UP)
    watching.rung(RINGS_UNDER_LOAD + 1)
    watching.look(USED_UP)
    assert not watching.doors.closed
    began = watching.now
    while watching.now < began + 0.9 * watch.AWAKE_SECONDS:
        assert watching.look(USED_UP) <= BUSY_MOMENT
        assert not watching.doors.asleep
    for _ in range(10):
        watching.look(USED_UP)
    assert watching.doors.asleep


def test_other_bridges_are_told_of_a_backlog_a_few_times_a_second(watching: Watching) -> None:
    """Not with each batch: each time is a commit."""
    for _ in range(100):
        watching.watch._ring_others()
        watching.now += 0.01
    assert 4 <= len(watching.told) <= 6


def test_a_few_rings_do_not_keep_a_bridge_awake(watching: Watching) -> None:
    """An idle system makes no transactions, and its first notification is rung for."""
    watching.fall_asleep(USED_UP)
    watching.rung(2)
    watching.look(USED_UP)
    assert watching.doors.closed
