"""What the demo commits, and what must come of it.

Owns the steps of `demo --once`, the expected effects, and the account of each notification. Never prints: it tells a
`Teller`, and returns what is missing.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from pgpubsub_celery import enqueue, notify
from pgpubsub_celery.demo import account
from pgpubsub_celery.demo.channels import Misprint, Newsletter, PostReads
from pgpubsub_celery.demo.listeners import send_mail
from pgpubsub_celery.demo.models import Author, Effect
from pgpubsub_celery.demo.running import Blog

BULK = 1_000
FEW = 5
"""Up to so many are told of one by one."""
DEADLINE_SECONDS = 60.0
"""For all of the scenario."""

Effects = Counter[tuple[str, int]]


@dataclasses.dataclass
class Journey:
    """One notification on its way. Times are seconds since the epoch."""

    id: int
    what: str
    task: str
    task_id: str | None
    """Of an ordinary task, which `enqueue` has sent; a listener's is not known before."""
    committed: float
    """When the commit was begun."""
    claimed: float | None = None
    """First."""
    published: float | None = None
    started: float | None = None
    ended: float | None = None
    """Last."""
    runs: int = 0
    state: str = ""
    """Of its last run, as Celery has it."""

    @property
    def arrived(self) -> bool:
        """Whether no further run is to come."""
        return self.state in ("SUCCESS", "FAILURE")

    def take(self, line: account.Line) -> None:
        """Take a line of the account in."""
        step, _, state = line.step.partition(" ")
        if step == "claimed":
            self.claimed = self.claimed or line.at
        elif step == "published":
            self.published = self.published or line.at
        elif step == "started":
            self.started = self.started or line.at
            self.runs += 1
        else:
            self.ended, self.state = line.at, state


class Teller(Protocol):
    """Tells a person what happens."""

    def step(self, title: str) -> None:
        """A transaction is about to be committed."""

    def journey(self, journey: Journey) -> None:
        """A notification has arrived."""

    def bulk(self, journeys: list[Journey]) -> None:
        """Many of one statement have."""

    def nothing(self) -> None:
        """The transaction has left none."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One transaction, and what must come of it."""

    title: str
    act: Callable[[Session], None]
    effects: Effects = dataclasses.field(default_factory=Counter)
    failed: int = 0
    commits: bool = True


def steps() -> Iterator[Step]:
    """Return the scenario's transactions, in order."""
    yield Step(
        "an author is inserted, by the ORM",
        lambda session: session.add(Author(id=1, name="Ann", password_hash="x" * 20)),
        Counter({("first post", 1): 1}),
    )
    yield Step(
        "renamed, by plain SQL",
        lambda session: _execute(session, "UPDATE author SET name = 'Anna' WHERE id = 1"),
        Counter({("Ann is now Anna", 1): 1}),
    )
    yield Step(
        "deleted",
        lambda session: _execute(session, "DELETE FROM author WHERE id = 1"),
        Counter({("goodbye", 1): 1}),
    )
    yield Step("a message: notify()", _read_post, Counter({("read", 7): 1}))
    yield Step(
        "an ordinary Celery task: enqueue()",
        lambda session: _enqueue(session, 8),
        Counter({("mail", 8): 1}),
    )
    yield Step(
        "a listener that is retried twice, and then succeeds",
        lambda session: _notify(session, Newsletter(issue=9)),
        Counter({("newsletter", 9): 1}),
    )
    yield Step(
        "a listener that fails for good",
        lambda session: _notify(session, Misprint(page=10)),
        failed=1,
    )
    yield Step("all of it, rolled back", _everything, commits=False)
    yield Step(
        f"{BULK:,} authors, by one statement",
        lambda session: _execute(
            session,
            "INSERT INTO author (id, name, password_hash) SELECT n, 'author ' || n, '' "
            f"FROM generate_series(1000, {999 + BULK}) n",
        ),
        Counter({("first post", n): 1 for n in range(1000, 1000 + BULK)}),
    )


def play(blog: Blog, teller: Teller) -> list[str]:
    """Commit each step, wait for what must come of it, and return what is missing or there twice."""
    traveller = Traveller(blog)
    deadline = time.monotonic() + DEADLINE_SECONDS
    expected: Effects = Counter()
    failed = 0
    for step in steps():
        teller.step(step.title)
        journeys = traveller.commit(step)
        expected += step.effects
        failed += step.failed
        arrived = traveller.wait(journeys, failed, expected, deadline)
        if not journeys:
            teller.nothing()
        elif len(journeys) > FEW:
            teller.bulk(journeys)
        else:
            for journey in journeys:
                teller.journey(journey)
        if not arrived:
            break
    return blog.ended() + _differences(blog, expected, failed)


class Traveller:
    """Follows notifications by the account that bridge and worker keep."""

    def __init__(self, blog: Blog) -> None:
        """Begin where the account begins."""
        self._blog = blog
        self._position = 0
        self._journeys: dict[int | str, Journey] = {}
        """By the notification's id, or an ordinary task's."""

    def commit(self, step: Step) -> list[Journey]:
        """Commit (or roll back) a step's transaction; return the notifications that it has stored."""
        with Session(self._blog.engine) as session:
            step.act(session)
            session.flush()
            rows = session.execute(_OF_THIS_TRANSACTION).all()
            if not step.commits:
                session.rollback()
                return []
            begun = time.time()
            session.commit()
        journeys = [
            Journey(
                id=row.id,
                what=f"{row.channel.rpartition('.')[2]} {row.operation}",
                task=(row.task or row.listener).rpartition(".")[2],
                task_id=row.task_id,
                committed=begun,
            )
            for row in rows
        ]
        self._journeys = {journey.task_id or journey.id: journey for journey in journeys}
        return journeys

    def listen(self) -> None:
        """Take in what bridge and worker have written since."""
        lines, self._position = account.read(self._blog.account, self._position)
        for line in lines:
            keys: Sequence[int | str] = line.ids or [line.task_id]
            for key in keys:
                if key in self._journeys:
                    self._journeys[key].take(line)

    def wait(self, journeys: list[Journey], failed: int, expected: Effects, deadline: float) -> bool:
        """Wait until all have arrived and all effects are there; False at the deadline, or when a process has ended."""
        look_at = 0.0
        while time.monotonic() < deadline and not self._blog.ended():
            self.listen()
            # Looking is work for the database, which has better to do.
            if all(journey.arrived for journey in journeys) or time.monotonic() > look_at:
                if self._is_settled(failed, expected):
                    self.listen()
                    return True
                look_at = time.monotonic() + 0.5
            time.sleep(0.01)
        return False

    def _is_settled(self, failed: int, expected: Effects) -> bool:
        """Whether nothing is stored any more but what has failed, and as many effects as expected are there."""
        with Session(self._blog.engine) as session:
            left = session.execute(_LEFT).one()
            if left.busy or left.failed < failed:
                return False
            effects = session.execute(select(func.count()).select_from(Effect)).scalar_one()
            return effects >= sum(expected.values())


def _differences(blog: Blog, expected: Effects, failed: int) -> list[str]:
    with Session(blog.engine) as session:
        found = _effects(session)
        left = session.execute(_LEFT).one()
    missing, surplus = expected - found, found - expected
    told = [f"missing: {kind} of {value}" for kind, value in list(missing)[:FEW]]
    told += [
        f"there {found[one]} times instead of {expected[one]}: {one[0]} of {one[1]}" for one in list(surplus)[:FEW]
    ]
    if left.busy:
        told.append(f"{left.busy} notification(s) are still waiting or in flight")
    if (left.failed, left.with_traceback) != (failed, failed):
        told.append(
            f"{left.failed} notification(s) have failed, {left.with_traceback} of them with a traceback, "
            f"instead of {failed}"
        )
    return told


def author(name: str) -> Callable[[Session], None]:
    """Return what inserts an author."""
    return lambda session: session.add(Author(name=name))


def _effects(session: Session) -> Effects:
    return Counter((kind, value) for kind, value in session.execute(select(Effect.kind, Effect.value)))


def _execute(session: Session, statement: str) -> None:
    session.execute(text(statement))


def _notify(session: Session, message: PostReads | Newsletter | Misprint) -> None:
    notify(session, message)


def _read_post(session: Session) -> None:
    notify(session, PostReads(model_id=7, date=datetime.date(2026, 1, 1)))


def _enqueue(session: Session, author: int) -> None:
    enqueue(session, send_mail.s(author))


def _everything(session: Session) -> None:
    session.add(Author(id=2, name="Nobody"))
    _read_post(session)
    _enqueue(session, 2)


_OF_THIS_TRANSACTION = text(
    "SELECT n.id, n.channel, n.operation, s.listener, "
    "CASE WHEN n.channel = 'pgpubsub.enqueue' THEN n.payload->>'id' END AS task_id, "
    "CASE WHEN n.channel = 'pgpubsub.enqueue' THEN n.payload->>'task' END AS task "
    "FROM pgpubsub_notification n JOIN pgpubsub_subscription s ON s.id = n.subscription "
    "WHERE n.xmin = pg_current_xact_id()::xid ORDER BY n.id"
)
_LEFT = text(
    "SELECT count(*) FILTER (WHERE state <> 'failed') AS busy, count(*) FILTER (WHERE state = 'failed') AS failed, "
    "count(*) FILTER (WHERE state = 'failed' AND traceback LIKE '%ValueError%') AS with_traceback "
    "FROM pgpubsub_notification"
)
