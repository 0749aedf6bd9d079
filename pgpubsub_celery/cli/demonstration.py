"""`demo`: everything at once, on a machine that has nothing; and what a person sees of it."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click
from rich.console import Console

from pgpubsub_celery.cli.context import console, new_table
from pgpubsub_celery.cli.exit_codes import EXIT_FAILED, EXIT_INCOMPLETE

if TYPE_CHECKING:
    from pgpubsub_celery.demo.running import Blog
    from pgpubsub_celery.demo.scenario import Journey

PAUSE_SECONDS = 2.0
"""Between two authors."""
STEPS = ("claimed", "published", "started")


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge demo            # goes on until Ctrl-C
  pgpubsub-bridge demo --once     # a fixed scenario; exit code 0 when every effect is there exactly once
"""
)
@click.option("--once", is_flag=True, help="Run a fixed scenario, check every effect, and end.")
@click.pass_context
def demo(ctx: click.Context, once: bool) -> None:
    """Watch committed rows become finished Celery tasks; needs nothing but this package's [embedded] extra.

    Postgres and Valkey from wheels, a blog application, the bridge and a Celery worker as real processes.
    """
    from pgpubsub_celery.demo.running import running

    shown = console()
    code = EXIT_FAILED if once else 0
    with interruptible():
        began = time.monotonic()
        shown.print("Starting Postgres, Valkey, a Celery worker and the bridge …")
        with running() as blog:
            shown.print(f"Ready after {time.monotonic() - began:.1f} s: {blog.database_url}")
            if once:
                code = _play(blog, shown)
            else:
                _go_on(blog, shown)
    ctx.exit(code)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the block at Ctrl-C or SIGTERM, in order: what it has started is taken down, and further ones are ignored."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _play(blog: Blog, shown: Console) -> int:
    """Play the scenario; return the exit code."""
    from pgpubsub_celery.demo.scenario import play

    told = _Told(shown)
    differences = play(blog, told)
    told.summary()
    if not differences:
        shown.print("[green]✓[/green] Every effect is in the database exactly once; what was rolled back left nothing.")
        return 0
    for line in differences:
        shown.print(f"[red]✗[/red] {line}")
    for name in ("bridge", "worker"):
        shown.print(f"\nThe {name}'s log ends:\n{blog.log_tail(name)}", markup=False)
    return EXIT_INCOMPLETE


def _go_on(blog: Blog, shown: Console) -> None:
    """Add an author every few seconds, until Ctrl-C, or until a process has ended by itself."""
    from pgpubsub_celery.demo.scenario import Step, Traveller, author

    shown.print(f"Look on with: pgpubsub-bridge status --watch --database-url {blog.database_url}", soft_wrap=True)
    told, traveller = _Told(shown), Traveller(blog)
    number = 0
    while not blog.ended():
        number += 1
        told.step(f"author {number} is inserted (Ctrl-C ends this)")
        pending = traveller.commit(Step("", author(f"author {number}")))
        deadline = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < deadline:
            traveller.listen()
            for journey in [journey for journey in pending if journey.arrived]:
                pending.remove(journey)
                told.journey(journey)
            time.sleep(0.02)
    for ended in blog.ended():
        shown.print(f"[red]✗[/red] {ended}")


@dataclasses.dataclass
class _Count:
    """What became of one listener's notifications."""

    notifications: int = 0
    runs: int = 0
    succeeded: int = 0
    failed: int = 0


class _Told:
    """Shows each notification as it arrives, and what they were in the end."""

    def __init__(self, shown: Console) -> None:
        self._shown = shown
        self._counts: dict[str, _Count] = {}

    def step(self, title: str) -> None:
        """Show a transaction."""
        self._shown.print(f"\n[bold]{title}[/bold]")

    def journey(self, journey: Journey) -> None:
        """Show one notification."""
        self._count(journey)
        times = [(name, getattr(journey, name)) for name in STEPS]
        times.append(("finished" if journey.state == "SUCCESS" else journey.state.lower(), journey.ended))
        steps = ", ".join(f"{name} {(at - journey.committed) * 1000:.1f} ms" for name, at in times if at is not None)
        mark = "[green]✓[/green]" if journey.state == "SUCCESS" else "[red]✗[/red]"
        kind = "ordinary task" if journey.task_id else "listener"
        self._shown.print(f"  {mark} #{journey.id} {journey.what} → {kind} {journey.task}{_runs(journey)}")
        self._shown.print(f"    {steps} after its commit" if steps else "    nothing has come of it")
        if journey.state == "FAILURE":
            self._shown.print("    its row stays, with the traceback, until it is retried or discarded")

    def bulk(self, journeys: list[Journey]) -> None:
        """Show many in one line."""
        for journey in journeys:
            self._count(journey)
        ended = [journey.ended for journey in journeys if journey.ended is not None and journey.state == "SUCCESS"]
        if not ended:
            self._shown.print(f"  [red]✗[/red] {len(journeys):,} notifications: none finished")
            return
        seconds = max(ended) - journeys[0].committed
        mark = "[green]✓[/green]" if len(ended) == len(journeys) else "[red]✗[/red]"
        self._shown.print(
            f"  {mark} {len(ended):,} of {len(journeys):,} notifications finished, the last {seconds:.1f} s after "
            f"the commit ({len(ended) / seconds:,.0f}/s)"
        )

    def nothing(self) -> None:
        """Show that there is none."""
        self._shown.print("  [green]✓[/green] no notification")

    def summary(self) -> None:
        """Show a table of what each listener did."""
        table = new_table("task", title="\nSummary")
        for name in ("notifications", "runs", "succeeded", "failed"):
            table.add_column(name, justify="right")
        for task, count in self._counts.items():
            table.add_row(task, *(f"{number:,}" for number in dataclasses.astuple(count)))
        self._shown.print(table)

    def _count(self, journey: Journey) -> None:
        count = self._counts.setdefault(journey.task, _Count())
        count.notifications += 1
        count.runs += journey.runs
        count.succeeded += journey.state == "SUCCESS"
        count.failed += journey.state == "FAILURE"


def _runs(journey: Journey) -> str:
    return f" ({journey.runs} runs)" if journey.runs > 1 else ""
