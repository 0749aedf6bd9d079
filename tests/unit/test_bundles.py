"""How many notifications share a message, and what is measured for it."""

from __future__ import annotations

from typing import Any

import pytest

from pgpubsub_celery.bundles import LANES, Bundling
from pgpubsub_celery.measuring import CHANGED_SECONDS, REPORT_SECONDS, Means, Report

AUTOMATIC = Bundling(most=200, automatic=True, target=0.1)


def size(bundling: Bundling, rows: int = 500, **standing: Any) -> int:
    return bundling.size(rows, **{"mean_seconds": 0.001, "processes": 1, "in_flight": 0, "more": True, **standing})


def test_a_deep_backlog_travels_in_bundles_of_the_target() -> None:
    """A hundred runs of a millisecond are a tenth of a second."""
    assert size(AUTOMATIC) == 100


def test_short_runs_are_bundled_up_to_the_most() -> None:
    """However short they are."""
    assert size(AUTOMATIC, mean_seconds=0.00001) == 200


@pytest.mark.parametrize("mean_seconds", [None, 0.0, 0.06, 5.0])
def test_unknown_and_long_runs_travel_alone(mean_seconds: float | None) -> None:
    """Nothing is known of a new listener; two long runs would not fit."""
    assert size(AUTOMATIC, mean_seconds=mean_seconds) == 1


def test_expected_work_stays_under_a_tenth_of_the_time_limit() -> None:
    """A limit that is meant for one run must not cut a bundle short."""
    limited = Bundling(most=200, automatic=True, target=0.1, time_limit=0.5)
    assert size(limited) == 50
    assert size(Bundling(most=200, automatic=True, target=0.1, time_limit=60)) == 100


def test_a_short_backlog_is_spread_over_the_workers() -> None:
    """What idle workers can do at once is not packed into one message."""
    assert size(AUTOMATIC, LANES, more=False) == 1
    assert size(AUTOMATIC, 2 * LANES, more=False) == 2
    assert size(AUTOMATIC, 100, processes=50, more=False) == 1


def test_with_all_workers_busy_what_comes_is_bundled() -> None:
    """It would only wait in more messages, each of which costs a task."""
    assert size(AUTOMATIC, 10, in_flight=LANES, more=False) == 10
    assert size(AUTOMATIC, 10, in_flight=LANES - 2, more=False) == 5


def test_a_number_is_taken_as_it_is() -> None:
    """Whoever asks for a number knows why."""
    assert size(Bundling(most=7), 3, mean_seconds=None, more=False) == 7


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that measuring sees."""
    now = [100.0]
    monkeypatch.setattr("pgpubsub_celery.measuring.time.monotonic", lambda: now[0])
    return now


def test_the_first_mean_is_reported_at_once_and_then_now_and_then(clock: list[float]) -> None:
    """Bundles are wanted early; a statement for each message is not."""
    means = Means()
    assert means.add(1, 0.25, 10) == Report(0.025, 10, None)
    clock[0] += REPORT_SECONDS / 2
    assert means.add(1, 0.25, 10) is None
    clock[0] += REPORT_SECONDS
    assert means.add(1, 0.25, 10) == Report(0.025, 30, per_second=20 / (1.5 * REPORT_SECONDS))


def test_a_mean_that_has_changed_is_reported_sooner(clock: list[float]) -> None:
    """Runs that become slow must not go on in large bundles."""
    means = Means()
    means.add(1, 0.01, 10)
    clock[0] += CHANGED_SECONDS
    report = means.add(1, 1.0, 10)
    assert report is not None
    assert report[0] == pytest.approx(1.01 / 20)


def test_old_runs_fade_from_the_mean(clock: list[float]) -> None:
    """Yesterday's speed is not today's."""
    means = Means()
    means.add(1, 10.0, 10_000)
    for _ in range(20):
        clock[0] += REPORT_SECONDS
        report = means.add(1, 10.0, 100)
    assert report is not None
    assert report[0] == pytest.approx(0.1, rel=0.1)
