"""What `status` says needs somebody: each trouble once, with the command that mends it; nothing where all is well."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from pgpubsub_celery.cli.attention import Caller, Report, troubles
from pgpubsub_celery.insights import BridgeStatus, ListenerStatus, LongTransaction

BRIDGE = BridgeStatus(
    pid=1, host="here", process="7@here", since=datetime.datetime.now(datetime.timezone.utc), channels=("blog.News",)
)


def listener(**changed: Any) -> ListenerStatus:
    return ListenerStatus(
        **{
            "channel": "blog.News",
            "listener": "blog.read",
            **dict.fromkeys(("waiting", "delayed", "dispatched", "running", "held", "failed", "overdue"), 0),
            **dict.fromkeys(("oldest_seconds", "run_seconds", "per_second", "running_seconds", "last_error")),
            "bridges": 1,
            "asleep": True,
            **changed,
        }
    )


def found(*listeners: ListenerStatus, bridges: tuple[BridgeStatus, ...] = (BRIDGE,), **more: Any) -> list[str]:
    """Return each trouble and its command, in one line."""
    report = Report(listeners=listeners, bridges=bridges, **more)
    return [f"{one.what} > {one.command}" for one in troubles(report, lease=120.0, caller=Caller("blog.app"))]


@pytest.mark.parametrize(
    "well",
    [
        listener(),
        listener(waiting=100, oldest_seconds=1.0, running=3, running_seconds=60.0),
        # Old, because it waited in the backlog before it ran.
        listener(running=1, running_seconds=150.0, waiting=1, oldest_seconds=40.0),
        listener(delayed=5),
        # Nobody needs to listen to what nothing is stored for.
        listener(channel="blog.Other", bridges=0),
    ],
)
def test_what_works_needs_nobody(well: ListenerStatus) -> None:
    """A false alarm is worse than none."""
    assert found(well) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            listener(failed=3, last_error="OSError: no route\nmore"),
            (
                "blog.read: 3 failed; the last one: OSError: no route > "
                "pgpubsub-bridge -A blog.app retry --listener blog.read --state failed"
            ),
        ),
        (
            listener(held=2),
            (
                "blog.read: 2 held: stored before a `listen` without --recover. > "
                "pgpubsub-bridge -A blog.app retry --listener blog.read --state held"
            ),
        ),
        (
            listener(channel="blog.Other", bridges=0, waiting=1),
            "blog.Other: no bridge is connected for it, and something is due. > pgpubsub-bridge -A blog.app listen",
        ),
        (
            listener(waiting=9, oldest_seconds=90.0, dispatched=4),
            (
                "blog.read: due for 90 s, with 4 in flight: workers do not keep up, or there are none. > "
                "celery -A blog.app worker"
            ),
        ),
        (listener(waiting=9, oldest_seconds=90.0), "blog.read: due for 90 s, and its bridge does not take them"),
        (
            listener(running=1, running_seconds=7200.0),
            "blog.read: 1 running, the oldest stored 7200 s ago: a run that takes long, or hangs.",
        ),
        (listener(dispatched=1, overdue=1), "blog.read: 1 run(s) hang, inside a transaction, for longer"),
        (
            listener(listener=None, waiting=1, bridges=0),
            "blog.News: stored, and the channel has no listener. > pgpubsub-bridge -A blog.app install",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_is_told_with_its_remedy(wrong: ListenerStatus, told: str) -> None:
    """One line, one command."""
    (line,) = found(listener(channel="blog.Well", listener="blog.well"), wrong)
    assert line.startswith(told)


def test_without_any_bridge_that_is_the_first_thing_told() -> None:
    """One of channels that are not stored publishes nothing of what is."""
    unstored = BridgeStatus(pid=1, host="here", process="7@here", since=BRIDGE.since, channels=())
    for bridges in ((), (unstored,)):
        line, *_ = found(listener(bridges=0, failed=1), bridges=bridges)
        assert line == (
            "No bridge is connected for a stored channel: nothing is published. > pgpubsub-bridge -A blog.app listen"
        )


def test_triggers_the_server_s_queue_and_hanging_backends_are_told() -> None:
    """What is not of one listener; and who holds what is overdue."""
    assert found(triggers=["public.author: trigger x is disabled"]) == [
        "public.author: trigger x is disabled. > pgpubsub-bridge -A blog.app install"
    ]
    (line,) = found(queue_usage=0.75)
    assert line.startswith("Postgres's queue of notifications is 75% full")
    held = LongTransaction(pid=4711, host="10.0.0.7", seconds=600.0)
    (line,) = found(listener(dispatched=1, overdue=1), long_transactions=[held])
    assert "(backends 4711 from 10.0.0.7)" in line


def test_commands_are_for_the_database_and_the_application_that_were_asked_about() -> None:
    """Where there are several; without an application its place is shown."""
    report = Report(listeners=[listener(held=1)], bridges=[])
    listen, retry = [one.command for one in troubles(report, lease=120.0, caller=Caller(None, "second"))]
    assert listen == "pgpubsub-bridge -A your.app listen --database second"
    assert retry == "pgpubsub-bridge retry --listener blog.read --state held --database second"


def test_the_doorbell_lags_only_while_a_sleeping_bridge_lets_something_wait() -> None:
    """Awake it looks by itself; what is in flight, and what is due because of that, rings nobody."""
    assert listener(asleep=False, waiting=1, oldest_seconds=3.0).doorbell_seconds is None
    assert listener(waiting=1, oldest_seconds=3.0).doorbell_seconds == 3.0
    assert listener(waiting=1, oldest_seconds=3.0, dispatched=1).doorbell_seconds == 0.0
    assert listener().doorbell_seconds == 0.0
