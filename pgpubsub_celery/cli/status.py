"""`status`: what waits, runs and fails, who is there for it, and what needs somebody."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from typing import Any

import click
from rich.console import Group as Lines
from rich.live import Live
from rich.text import Text
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import drift, insights
from pgpubsub_celery.channels import registered_channels
from pgpubsub_celery.cli.attention import Caller, Report, Trouble, troubles
from pgpubsub_celery.cli.context import (
    Duration,
    State,
    app_option,
    connected,
    console,
    database_option,
    new_table,
    told_age,
    told_time,
)
from pgpubsub_celery.cli.exit_codes import EXIT_ATTENTION
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.listeners import registered_listeners
from pgpubsub_celery.queues import read_queues
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.schema import VERSION, Names
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.wakeups import require_installed

WINDOW_SECONDS = 10.0
"""What a rate is measured over. Postgres's sessions tell their numbers with a delay of a second or more."""

SELDOM_SECONDS = 5.0
"""How often --watch asks the broker, and looks at triggers."""


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge -A blog.celery_app status
  pgpubsub-bridge status --database-url postgresql://… --json
  pgpubsub-bridge -A blog.celery_app status --watch
  pgpubsub-bridge status --max-age 5m --max-failed 0      # exit code 4 when exceeded, for monitoring

With -A, triggers are compared with what listeners need, and the broker is asked for the lengths of their queues.
"""
)
@app_option
@database_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch, one in each line.")
@click.option("--watch", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option(
    "--max-age", type=Duration(), metavar="DURATION", help="Exit code 4 when something has been due for longer."
)
@click.option("--max-failed", type=int, metavar="N", help="Exit code 4 when a listener has more failed ones.")
@click.option("--min-bridges", type=int, metavar="N", help="Exit code 4 when fewer bridges are connected.")
@click.pass_context
def status(
    ctx: click.Context,
    database_url: str | None,
    as_json: bool,
    watch: bool,
    max_age: float | None,
    max_failed: int | None,
    min_bridges: int | None,
) -> None:
    """Show for each listener what waits, runs and fails, which bridges are connected, and what needs somebody."""
    state = ctx.ensure_object(State)
    settings = state.settings(database_url=database_url)
    with connected(settings, autocommit=True) as connection:
        require_installed(connection, settings.schema, VERSION)
        looks = _Looks(connection, settings, state)
        if watch:
            _watch(looks, as_json)
            return
        report = looks.look()
    if as_json:
        click.echo(looks.as_json(report))
    else:
        console().print(_tables(report, looks.troubles(report)))
    exceeded = list(_exceeded(report, max_age, max_failed, min_bridges))
    for line in exceeded:
        click.echo(line, err=True)
    if exceeded:
        ctx.exit(EXIT_ATTENTION)


def _exceeded(report: Report, max_age: float | None, max_failed: int | None, min_bridges: int | None) -> list[str]:
    late = [one for one in report.listeners if max_age is not None and (one.oldest_seconds or 0) > max_age]
    failed = [one for one in report.listeners if max_failed is not None and one.failed > max_failed]
    few = min_bridges is not None and len(report.bridges) < min_bridges
    return [
        *(f"{one.listener or one.channel}: due for {told_age(one.oldest_seconds)}" for one in late),
        *(f"{one.listener}: {one.failed} failed" for one in failed),
        *([f"{len(report.bridges)} bridge(s) connected"] if few else []),
    ]


class _Looks:
    """Reads everything, once or again and again."""

    def __init__(self, connection: Connection, settings: Settings, state: State) -> None:
        self._connection = connection
        self._settings = settings
        self._app = state.require_app() if state.app_path else None
        self._caller = Caller(state.app_path, state.database)
        self._deleted: collections.deque[tuple[float, int]] = collections.deque()
        self._seldom_at = float("-inf")
        self._seldom: dict[str, Any] = {}

    def look(self) -> Report:
        """Read all of it."""
        connection, schema = self._connection, self._settings.schema
        return Report(
            listeners=insights.read_listeners(connection, schema),
            bridges=insights.read_bridges(connection, schema),
            long_transactions=insights.read_long_transactions(connection, self._settings.lease),
            queue_usage=insights.read_queue_usage(connection),
            finished_per_second=self._rate(),
            **self._of_application(),
        )

    def troubles(self, report: Report) -> list[Trouble]:
        """Return what needs somebody."""
        return troubles(report, lease=self._settings.lease, caller=self._caller)

    def as_json(self, report: Report) -> str:
        """Return one JSON object."""
        listeners = [
            {**dataclasses.asdict(one), "in_flight": one.in_flight, "doorbell_seconds": one.doorbell_seconds}
            for one in report.listeners
        ]
        told = {
            "listeners": listeners,
            "bridges": [dataclasses.asdict(one) for one in report.bridges],
            "queues": report.queues,
            "triggers": report.triggers,
            "long_transactions": [dataclasses.asdict(one) for one in report.long_transactions],
            "notification_queue_usage": report.queue_usage,
            "finished_per_second": report.finished_per_second,
            "attention": [dataclasses.asdict(one) for one in self.troubles(report)],
        }
        return json.dumps(told, default=str)

    def _rate(self) -> float | None:
        """Return how many notifications went in a second, by Postgres's own statistics; None at the first look."""
        now = time.monotonic()
        self._deleted.append((now, insights.read_deleted(self._connection, self._settings.schema)))
        while now - self._deleted[0][0] > WINDOW_SECONDS:
            self._deleted.popleft()
        (then, before), (_, after) = self._deleted[0], self._deleted[-1]
        return max(0.0, (after - before) / (now - then)) if now > then else None

    def _of_application(self) -> dict[str, Any]:
        if self._app is None or time.monotonic() - self._seldom_at < SELDOM_SECONDS:
            return self._seldom
        self._seldom_at = time.monotonic()
        self._seldom = {"unread": []}
        # Those of other databases are looked at there.
        channels = registered_channels(self._settings.database)
        try:
            listeners = [one for one in registered_listeners() if one.channel in channels]
            self._seldom["queues"] = read_queues(self._app, listeners)
        except PgPubSubError as exc:
            self._seldom["unread"].append(str(exc))
        try:
            found = drift.trigger_differences(self._connection, Names(self._settings.schema), channels)
            self._seldom["triggers"] = [str(one) for one in found]
        except (PgPubSubError, DBAPIError) as exc:
            self._seldom["unread"].append(f"Triggers are not looked at: {one_line(exc)}")
        return self._seldom


def _watch(looks: _Looks, as_json: bool) -> None:
    try:
        if as_json:
            while True:
                click.echo(looks.as_json(looks.look()))
                time.sleep(1)
        with Live(console=console(), auto_refresh=False) as live:
            while True:
                report = looks.look()
                live.update(_tables(report, looks.troubles(report)), refresh=True)
                time.sleep(1)
    except KeyboardInterrupt:
        return


def _count(number: int, style: str = "") -> Text:
    return Text(f"{number}+" if number >= insights.COUNT_LIMIT else str(number), style if number else "dim")


def _tables(report: Report, found: list[Trouble]) -> Lines:
    parts: list[Any] = [_notifications(report)]
    if report.finished_per_second is not None:
        parts.append(f"{report.finished_per_second:.1f} finished a second, of all listeners, lately")
    if report.bridges:
        parts += ["", _bridges(report)]
    if report.queues:
        queues = new_table("queue", title="Broker")
        queues.add_column("messages", justify="right", no_wrap=True)
        for name, length in report.queues.items():
            queues.add_row(Text(name), str(length))
        parts += ["", queues]
    parts += [Text(line, "yellow") for line in report.unread]
    if found:
        parts += ["", Text("Needs somebody", "bold")]
        for trouble in found:
            parts.append(Text(f"  {trouble.what}", "yellow"))
            if trouble.command:
                parts.append(Text(f"    {trouble.command}", "bold"))
    return Lines(*parts)


def _notifications(report: Report) -> Any:
    rows: list[dict[str, Any]] = [
        {
            "waiting": _count(one.waiting),
            "oldest": told_age(one.oldest_seconds),
            "delayed": _count(one.delayed),
            "in flight": _count(one.in_flight),
            "held": _count(one.held, "yellow"),
            "failed": _count(one.failed, "red"),
            "a second": "" if one.per_second is None else f"{one.per_second:,.1f}",
            "mean run": "" if one.run_seconds is None else _short(one.run_seconds),
            "doorbell lag": _bell(one),
            "versions": Text(", ".join(one.versions)),
        }
        for one in report.listeners
    ]
    # What nobody has anything to say of would only take the others' room.
    silent = {
        name for name in ("a second", "mean run", "doorbell lag", "versions") if not any(row[name] for row in rows)
    }
    names = [name for name in (rows[0] if rows else ()) if name not in silent]
    table = new_table("channel", "listener", title="Notifications")
    for name in names:
        # A number that is cut is another number.
        table.add_column(name, justify="left" if name == "versions" else "right", no_wrap=name != "versions")
    for one, row in zip(report.listeners, rows, strict=True):
        listener = Text("none yet", "yellow") if one.listener is None else Text(one.listener)
        table.add_row(Text(one.channel), listener, *(row[name] for name in names))
    return table


def _bell(one: insights.ListenerStatus) -> str:
    if not one.bridges:
        return ""
    return "awake" if one.doorbell_seconds is None else told_age(one.doorbell_seconds)


def _bridges(report: Report) -> Any:
    table = new_table("backend", "process", "host", "since", "channels", title="Bridges")
    for one in report.bridges:
        channels = str(len(one.channels)) if one.channels else "unstored only"
        table.add_row(str(one.pid), Text(one.process or ""), one.host, told_time(one.since), channels)
    return table


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
