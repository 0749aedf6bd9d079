"""What in a status needs somebody: each trouble in one line, with the command that mends it.

Pure: from what was read to lines. Owns what counts as trouble; a monitor's limits are options of `status`.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence

from pgpubsub_celery.insights import BridgeStatus, ListenerStatus, LongTransaction

BACKLOG_SECONDS = 60.0
"""What has been due for longer is a backlog worth a word."""

QUEUE_USAGE = 0.5
"""Of Postgres's queue of notifications: when it is full, writers fail."""


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Something to be mended."""

    what: str
    command: str
    """Mends it, or shows more of it. Empty where there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that `status` has read."""

    listeners: Sequence[ListenerStatus]
    bridges: Sequence[BridgeStatus]
    long_transactions: Sequence[LongTransaction] = ()
    queue_usage: float = 0.0
    queues: Mapping[str, int] | None = None
    """Messages in the broker, by queue; None where nobody could be asked."""
    triggers: Sequence[str] | None = None
    """How triggers differ from what listeners need; None where the application is not known."""
    unread: Sequence[str] = ()
    """What could not be read, and why."""
    finished_per_second: float | None = None
    """Of all listeners, lately; known to whoever looks twice."""


@dataclasses.dataclass(frozen=True)
class Caller:
    """What `status` was called with, for the commands that it names."""

    app: str | None = None
    database: str | None = None

    def command(self, *words: str, needs_app: bool = False) -> str:
        """Return one of our commands, as it is to be typed."""
        app = self.app or ("your.app" if needs_app else None)
        database = ("--database", self.database) if self.database else ()
        return shlex.join(["pgpubsub-bridge", *(("-A", app) if app else ()), *words, *database])


def troubles(report: Report, *, lease: float, caller: Caller) -> list[Trouble]:
    """Return what is wrong, the worst first. `lease` is the default one, in seconds."""
    return [*_of_bridges(report, caller), *_of_triggers(report, caller), *_of_listeners(report, lease, caller)]


def _of_bridges(report: Report, caller: Caller) -> Iterator[Trouble]:
    listen = caller.command("listen", needs_app=True)
    if not any(bridge.channels for bridge in report.bridges):
        yield Trouble("No bridge is connected for a stored channel: nothing is published.", listen)
    else:
        unheard = sorted({one.channel for one in report.listeners if not one.bridges and one.waiting and one.listener})
        for channel in unheard:
            yield Trouble(f"{channel}: no bridge is connected for it, and something is due.", listen)
    if report.queue_usage > QUEUE_USAGE:
        yield Trouble(
            f"Postgres's queue of notifications is {report.queue_usage:.0%} full: somebody listens and does not read. "
            "When it is full, writers fail.",
            "",
        )


def _of_triggers(report: Report, caller: Caller) -> Iterator[Trouble]:
    for difference in report.triggers or ():
        yield Trouble(f"{difference}.", caller.command("install", needs_app=True))


def _of_listeners(report: Report, lease: float, caller: Caller) -> Iterator[Trouble]:
    for one in report.listeners:
        if one.listener is None:
            if one.waiting:
                yield Trouble(
                    f"{one.channel}: stored, and the channel has no listener.",
                    caller.command("install", needs_app=True),
                )
            continue
        yield from _of_runs(one, report, lease, caller)
        late = one.oldest_seconds or 0.0
        if late > BACKLOG_SECONDS and one.bridges:
            yield _backlog(one, late, caller)
        if one.failed:
            told = f"; the last one: {one.last_error.splitlines()[0][:200]}" if one.last_error else ""
            yield Trouble(
                f"{one.listener}: {one.failed} failed{told}",
                caller.command("retry", "--listener", one.listener, "--state", "failed"),
            )
        if one.held:
            yield Trouble(
                f"{one.listener}: {one.held} held: stored before a `listen` without --recover.",
                caller.command("retry", "--listener", one.listener, "--state", "held"),
            )


def _of_runs(one: ListenerStatus, report: Report, lease: float, caller: Caller) -> Iterator[Trouble]:
    assert one.listener is not None
    if one.overdue and one.bridges:
        backends = ", ".join(f"{t.pid} from {t.host}" for t in report.long_transactions)
        yield Trouble(
            f"{one.listener}: {one.overdue} run(s) hang, inside a transaction, for longer than their lease"
            + (f" (backends {backends})" if backends else "")
            + ": restart that worker; they come again by themselves.",
            "",
        )
    # What has waited in a backlog is old before it runs.
    if one.running_seconds is not None and one.running_seconds > lease + (one.oldest_seconds or 0.0):
        yield Trouble(
            f"{one.listener}: {one.running} running, the oldest stored {one.running_seconds:.0f} s ago: a run that "
            "takes long, or hangs. The command has it run again, beside that.",
            caller.command("retry", "--listener", one.listener, "--state", "running", "--force"),
        )


def _backlog(one: ListenerStatus, late: float, caller: Caller) -> Trouble:
    if one.in_flight:
        return Trouble(
            f"{one.listener}: due for {late:.0f} s, with {one.in_flight} in flight: workers do not keep up, or "
            "there are none.",
            shlex.join(["celery", "-A", caller.app or "your.app", "worker"]),
        )
    return Trouble(
        f"{one.listener}: due for {late:.0f} s, and its bridge does not take them: its log says why (the broker may be "
        "out of reach, a listener_filter leave them to another bridge, or a failed one hold their ordering key).",
        "",
    )
