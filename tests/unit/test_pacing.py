"""Quotas follow what workers finish: quick ones are fed, slow ones are not buried; and backing off."""

from __future__ import annotations

import dataclasses
import random

import pytest

from pgpubsub_celery.pacing import FLOOR, LEASE_SHARE, Backoff, Pace

MOST = 1000
LEASE = 120.0


@dataclasses.dataclass
class Workers:
    """A bridge with an endless backlog, and workers that take what it publishes in order."""

    count: int
    seconds: float
    """Of a run."""
    look: float = 1.0
    """Seconds between the bridge's claims."""
    pace: Pace = dataclasses.field(default_factory=lambda: Pace(MOST, LEASE))
    now: float = 1000.0
    longest_wait: float = 0.0
    """From publication to acknowledgement."""
    published: int = 0

    def __post_init__(self) -> None:
        self._in_flight: list[float] = []
        self._free_at = [self.now] * self.count

    def work(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now < until:
            self._in_flight = [ends for ends in self._in_flight if ends > self.now]
            in_flight = len(self._in_flight)
            claimed = max(0, self.pace.quota - in_flight)
            for _ in range(claimed):
                worker = min(range(self.count), key=self._free_at.__getitem__)
                ends = max(self._free_at[worker], self.now) + self.seconds
                self._free_at[worker] = ends
                self._in_flight.append(ends)
                self.longest_wait = max(self.longest_wait, ends - self.now)
            self.published += claimed
            self.pace.observe(in_flight, claimed, self.now)
            self.now += self.look


def test_a_new_listener_gets_the_floor() -> None:
    """Enough to learn from, and not more than the limit."""
    assert Pace(MOST, LEASE).quota == FLOOR
    assert Pace(3, LEASE).quota == 3


@pytest.mark.parametrize("look", [0.005, 0.05, 1.0])
def test_quick_workers_get_the_limit_soon(look: float) -> None:
    """Within a few looks there is no reason left to hold anything back."""
    workers = Workers(count=4, seconds=0.001, look=look)
    workers.work(10 * look + 0.2)
    assert workers.pace.quota == MOST


@pytest.mark.parametrize("count", [1, 4, 16, 100])
@pytest.mark.parametrize("seconds", [0.01, 0.3, 2.0, 7.0])
@pytest.mark.parametrize("look", [0.01, 0.7])
def test_no_lease_runs_out_while_workers_keep_their_pace(count: int, seconds: float, look: float) -> None:
    """What is published is finished long before its lease ends, also when many runs end in the same moment."""
    workers = Workers(count, seconds, look)
    workers.work(300 if look > 0.1 else 30)
    floor = FLOOR * seconds / count
    assert workers.longest_wait <= max(LEASE / 2, floor) + seconds + look


@pytest.mark.parametrize("seconds", [20.0, 60.0, 100.0])
def test_slow_workers_keep_the_floor(seconds: float) -> None:
    """Runs that take long and end together are no sign of speed."""
    workers = Workers(count=16, seconds=seconds)
    workers.work(1000)
    assert workers.pace.quota <= 2 * FLOOR
    assert workers.longest_wait < LEASE


def test_the_quota_is_what_finishes_in_a_part_of_the_lease() -> None:
    """At a steady rate, once it is known."""
    workers = Workers(count=10, seconds=1.0)
    workers.work(200)
    assert workers.pace.rate == pytest.approx(10, rel=0.1)
    assert workers.pace.quota == pytest.approx(10 * LEASE / LEASE_SHARE, rel=0.1)


def test_the_limit_holds_at_any_rate() -> None:
    """However quick the workers are."""
    workers = Workers(count=50, seconds=0.001, pace=Pace(40, LEASE))
    workers.work(60)
    assert workers.pace.quota == 40


def test_nothing_is_learnt_without_acknowledgements() -> None:
    """A listener whose workers are gone gets no more, and in the end the floor."""
    pace = Pace(MOST, LEASE)
    for second in range(100):
        pace.observe(in_flight=16, claimed=0, now=float(second))
        assert pace.quota == FLOOR
    workers = Workers(count=10, seconds=0.1)
    workers.work(60)
    known = workers.pace.quota
    assert known > 100
    for second in range(1, 300):
        workers.pace.observe(in_flight=known, claimed=0, now=workers.now + second)
    assert workers.pace.quota == FLOOR


def test_rows_that_others_publish_are_no_negative_rate() -> None:
    """Another bridge's claims make more of them fly."""
    pace = Pace(MOST, LEASE)
    for second in range(10):
        pace.observe(in_flight=100 * second, claimed=5, now=float(second))
        assert pace.rate == 0.0
        assert pace.quota == FLOOR


def test_workers_that_ran_out_of_work_are_not_called_slow() -> None:
    """A trickle is finished at once: that says nothing of how quick they could be."""
    workers = Workers(count=10, seconds=0.1)
    workers.work(30)
    before, now = workers.pace.rate, workers.now
    for second in range(5):
        workers.pace.observe(in_flight=0, claimed=1, now=now + second)
    assert workers.pace.rate > before / 2


def test_what_was_learnt_long_ago_is_forgotten() -> None:
    """After a quiet hour the next runs may be of another kind."""
    workers = Workers(count=4, seconds=0.001)
    workers.work(30)
    assert workers.pace.quota == MOST
    workers.pace.observe(in_flight=0, claimed=1, now=workers.now + 3600)
    assert workers.pace.quota == FLOOR


def test_a_few_quick_runs_do_not_open_the_gates() -> None:
    """Sixteen that end in a moment: the next claim gets twice as many, not hundreds."""
    pace = Pace(MOST, LEASE)
    pace.observe(in_flight=0, claimed=16, now=1.0)
    pace.observe(in_flight=0, claimed=0, now=1.001)
    assert FLOOR < pace.quota <= 2 * 16


def test_what_was_given_back_was_not_finished() -> None:
    """After an outage of the broker less is in flight, which is no worker's doing."""
    pace = Pace(MOST, LEASE)
    pace.observe(in_flight=0, claimed=16, now=1.0)
    pace.disregard()
    pace.observe(in_flight=0, claimed=16, now=2.0)
    assert pace.rate == 0.0
    pace.observe(in_flight=0, claimed=16, now=3.0)
    assert pace.rate > 0.0


def test_a_clock_that_stands_still_divides_nothing_by_zero() -> None:
    """Two claims in the same tick."""
    pace = Pace(MOST, LEASE)
    pace.observe(in_flight=0, claimed=16, now=1.0)
    pace.observe(in_flight=0, claimed=16, now=1.0)
    assert pace.quota == FLOOR


def test_backing_off_doubles_up_to_a_limit_with_jitter() -> None:
    """Between half of the nominal delay and all of it, so that bridges do not come back together."""
    random.seed(1)
    backoff = Backoff(initial=0.25, most=30.0)
    delays = [backoff.next() for _ in range(1000)]
    for failures, delay in enumerate(delays):
        nominal = min(30.0, 0.25 * 2.0 ** min(failures, 10))
        assert nominal / 2 <= delay <= nominal
    assert len(set(delays)) == 1000


def test_success_begins_anew() -> None:
    """And tells whether there had been a failure."""
    backoff = Backoff()
    assert backoff.reset() is False
    for _ in range(10):
        backoff.next()
    assert backoff.failures == 10
    assert backoff.reset() is True
    assert backoff.failures == 0
    assert backoff.next() <= 0.25
    assert backoff.reset() is True
    assert backoff.reset() is False


def test_how_long_so_many_take_follows_from_the_rate() -> None:
    """A bridge at its quota looks again when a part of it should be free."""
    pace = Pace(1000, 60.0)
    assert pace.seconds_for(10) == float("inf")
    for second in range(20):
        pace.observe(0 if second == 0 else 100, 100, float(second))
    assert pace.seconds_for(50) == pytest.approx(0.5, rel=0.2)
