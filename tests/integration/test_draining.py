"""`drain`: what is stored is run as bridge and worker would, inside a test's transaction and outside of one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, signals
from celery._state import task_join_will_block
from celery.exceptions import Reject
from celery.result import denied_join_result
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from pgpubsub_celery import (
    Channel,
    NotificationInfo,
    TriggerChannel,
    anotify,
    channel_task,
    enqueue,
    install,
    notify,
    notify_many,
    set_notification_context,
)
from pgpubsub_celery.errors import BindError, DecodeError, TransactionEndedError
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.testing import DrainError, drain


class Base(DeclarativeBase):
    """Of the models."""


class Author(Base):
    """A table whose changes are listened to."""

    __tablename__ = "drain_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Post(Base):
    """What listeners write."""

    __tablename__ = "drain_post"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


@pytest.fixture
def app(nothing_declared: None) -> Iterator[Celery]:
    """An application without a database of its own, and without a broker."""
    app = Celery("draining", broker="memory://", set_as_current=True)
    yield app
    app.close()


class Blog:
    """A message channel, a trigger channel, and listeners that each test decides about."""

    def __init__(self, app: Celery, engine: Engine) -> None:
        @dataclasses.dataclass
        class Work(Channel):
            channel_name = "draining.Work"
            lock_notifications = True
            number: int

        class Authors(TriggerChannel[Author]):
            channel_name = "draining.Authors"
            lock_notifications = True

        self.app = app
        self.engine = engine
        self.work = Work
        self.authors = Authors
        self.ran: list[Any] = []
        self.do: Callable[[Any, int, Session], object] = lambda task, number, session: None
        self.do_owned: Callable[[Any, int, NotificationInfo], object] = lambda task, number, notification: None
        self.batches: list[list[int]] = []

        @channel_task(Work, app=app, bind=True, name="draining.locked", max_retries=2)
        def locked(task: Any, number: int, session: Session, context: dict[str, Any]) -> None:
            self.ran.append(("locked", number, context))
            self.do(task, number, session)

        @channel_task(Work, app=app, bind=True, name="draining.owned", max_retries=2)
        def owned(task: Any, number: int, notification: NotificationInfo) -> None:
            self.ran.append(("owned", number, notification.retries))
            self.do_owned(task, number, notification)

        @channel_task(Authors, on=("insert", "update"), app=app, name="draining.welcome")
        def welcome(old: Author | None, new: Author, session: Session) -> None:
            session.add(Post(title=f"{'Welcome' if old is None else 'Now'} {new.name}"))

        Base.metadata.create_all(engine)
        install(engine)

    def states(self, connection: Connection) -> list[str]:
        return list(connection.execute(text("SELECT state FROM pgpubsub_notification ORDER BY id")).scalars())

    @property
    def numbers(self) -> list[tuple[str, int]]:
        return [(kind, number) for kind, number, _ in self.ran]


@pytest.fixture
def blog(app: Celery, installed_engine: Engine) -> Blog:
    """Tables, triggers and listeners."""
    return Blog(app, installed_engine)


@pytest.fixture
def connection(blog: Blog) -> Iterator[Connection]:
    """A test's transaction, rolled back at its end; then nothing is left."""
    with blog.engine.connect() as connection:
        transaction = connection.begin()
        yield connection
        transaction.rollback()
    with blog.engine.connect() as after:
        assert blog.states(after) == []
        assert after.execute(text("SELECT count(*) FROM drain_post")).scalar() == 0


@pytest.fixture
def session(connection: Connection) -> Iterator[Session]:
    """A session in that transaction, as tests have it: its commits end at a savepoint."""
    with Session(connection, join_transaction_mode="create_savepoint") as session:
        yield session


# Inside a transaction


def test_changes_and_messages_of_the_open_transaction_are_run(blog: Blog, session: Session) -> None:
    """What is pending is flushed first, what listeners did is seen after; each row goes when its listener returns."""
    session.add(Author(id=1, name="Ann"))
    set_notification_context(session, {"user": 3})
    notify(session, blog.work(number=7))
    result = drain(session)
    assert sorted(run.listener for run in result.acknowledged) == [
        "draining.locked",
        "draining.owned",
        "draining.welcome",
    ]
    assert result.counts == {"acknowledged": 3}
    assert ("locked", 7, {"user": 3}) in blog.ran
    assert [post.title for post in session.query(Post)] == ["Welcome Ann"]
    assert blog.states(session.connection()) == []


def test_objects_that_a_session_has_are_loaded_anew(blog: Blog, session: Session) -> None:
    """A listener has changed the row behind its back."""
    post = Post(id=1, title="before")
    session.add(post)
    blog.do = lambda task, number, inner: inner.execute(text("UPDATE drain_post SET title = 'after'"))
    notify(session, blog.work(number=1))
    drain(session)
    assert post.title == "after"


def test_the_test_may_commit_its_session_meanwhile(blog: Blog, session: Session) -> None:
    """As the code under test does; its commits end at savepoints of the test's transaction."""
    session.add(Author(id=1, name="Ann"))
    session.commit()
    drain(session)
    session.get_one(Author, 1).name = "Anna"
    session.commit()
    drain(session)
    session.commit()
    assert [post.title for post in session.query(Post).order_by(Post.id)] == ["Welcome Ann", "Now Anna"]


def test_a_connection_will_do(blog: Blog, connection: Connection) -> None:
    """For code that has no session."""
    connection.execute(text("INSERT INTO drain_author VALUES (1, 'Ann')"))
    assert len(drain(connection)) == 1
    assert connection.execute(text("SELECT title FROM drain_post")).scalar() == "Welcome Ann"


def test_what_a_listener_emits_is_run_too(blog: Blog, session: Session) -> None:
    """Until nothing is due."""

    def chain(task: Any, number: int, inner: Session) -> None:
        if number < 3:
            notify(inner, blog.work(number=number + 1))

    blog.do = chain
    notify(session, blog.work(number=1))
    drain(session)
    assert sorted(blog.numbers) == [(kind, n) for kind in ("locked", "owned") for n in (1, 2, 3)]


def test_an_endless_chain_is_an_error(blog: Blog, session: Session) -> None:
    """Which says who it was."""
    blog.do = lambda task, number, inner: notify(inner, blog.work(number=number))
    notify(session, blog.work(number=1))
    with pytest.raises(DrainError, match=r"20 runs, and more is due \(draining\.\w+ 1\d times"):
        drain(session, limit=20)


def test_what_a_failed_listener_did_is_undone_and_its_error_raised(blog: Blog, session: Session) -> None:
    """The listener's own exception, with the traceback to its line; its notification is failed, the rest waits."""

    def fail(task: Any, number: int, inner: Session) -> None:
        inner.add(Post(title="never"))
        inner.flush()
        raise ValueError(f"number {number}")

    blog.do = fail
    session.add(Post(title="the test's own"))
    notify_many(session, [blog.work(number=1), blog.work(number=2)])
    with pytest.raises(ValueError, match="number 1") as caught:
        drain(session)
    assert caught.traceback[-1].name == "fail"
    assert blog.states(session.connection()) == ["failed", "waiting", "waiting", "waiting"]
    assert [post.title for post in session.query(Post)] == ["the test's own"]


def test_errors_can_be_told_instead(blog: Blog, session: Session) -> None:
    """Then everything runs."""

    def fail(task: Any, number: int, *_: Any) -> None:
        raise ValueError(f"number {number}")

    blog.do = blog.do_owned = fail
    notify_many(session, [blog.work(number=1), blog.work(number=2)])
    result = drain(session, raise_errors=False)
    assert result.counts == {"failed": 4}
    assert sorted(str(run.error) for run in result.failed) == ["number 1"] * 2 + ["number 2"] * 2


def test_a_database_error_leaves_the_transaction_usable(blog: Blog, session: Session) -> None:
    """It is rolled back to the listener's savepoint; in production it would fail alike."""
    blog.do = lambda task, number, inner: inner.execute(text("SELECT 1/0"))
    notify(session, blog.work(number=1))
    with pytest.raises(Exception, match="division by zero"):
        drain(session)
    drain(session)
    assert blog.states(session.connection()) == ["failed"]


def test_a_retry_waits_unless_what_is_scheduled_is_run_too(blog: Blog, session: Session) -> None:
    """By the listener's own rules; when its retries are used up, its error is raised."""

    def fail(task: Any, number: int, inner: Session) -> None:
        raise task.retry(countdown=3600, exc=ValueError("still"))

    blog.do = fail
    notify(session, blog.work(number=1))
    result = drain(session)
    assert result.counts == {"retried": 1, "acknowledged": 1}
    assert result.retried[0].retries == 0
    assert drain(session).counts == {}
    with pytest.raises(ValueError, match="still"):
        drain(session, with_scheduled=True)
    assert blog.numbers.count(("locked", 1)) == 3
    assert blog.states(session.connection()) == ["failed"]


def test_an_immediate_retry_is_due_within_the_transaction(blog: Blog, session: Session) -> None:
    """Though the transaction's time stands still."""

    def once(task: Any, number: int, notification: NotificationInfo) -> None:
        if not notification.retries:
            raise task.retry(countdown=0)

    blog.do_owned = once
    notify(session, blog.work(number=1))
    assert drain(session).counts == {"retried": 1, "acknowledged": 2}
    assert ("owned", 1, 1) in blog.ran


def test_what_is_scheduled_runs_in_the_order_of_its_times(blog: Blog, session: Session) -> None:
    """Not in that of its emission; and nothing of it without being asked for."""
    notify(session, blog.work(number=2), countdown=7200)
    notify(session, blog.work(number=1), countdown=3600)
    assert drain(session).counts == {}
    drain(session, with_scheduled=True)
    assert [number for kind, number in blog.numbers if kind == "locked"] == [1, 2]


def test_a_listener_may_commit_its_session_but_not_the_transaction(blog: Blog, session: Session) -> None:
    """As in a worker: the one ends at a savepoint, the other is refused, and what was done is undone."""

    def commit(task: Any, number: int, inner: Session) -> None:
        inner.add(Post(title="kept"))
        inner.commit()
        inner.add(Post(title="too"))

    blog.do = commit
    notify(session, blog.work(number=1))
    drain(session)

    def end(task: Any, number: int, inner: Session) -> None:
        inner.add(Post(title="never"))
        inner.flush()
        inner.connection().commit()

    blog.do = end
    notify(session, blog.work(number=2))
    with pytest.raises(TransactionEndedError):
        drain(session)
    assert sorted(post.title for post in session.query(Post)) == ["kept", "too"]


def test_a_failure_after_the_listeners_commit_takes_all_of_it_back(blog: Blog, session: Session) -> None:
    """And leaves what was before."""

    def fail(task: Any, number: int, inner: Session) -> None:
        inner.add(Post(title="never"))
        inner.commit()
        raise ValueError("after")

    blog.do = fail
    session.add(Post(title="before"))
    notify(session, blog.work(number=1))
    with pytest.raises(ValueError, match="after"):
        drain(session)
    assert [post.title for post in session.query(Post)] == ["before"]
    assert blog.states(session.connection())[0] == "failed"


def test_a_listener_acknowledges_in_a_session_on_the_tests_connection(blog: Blog, session: Session) -> None:
    """And is told when it forgets to commit that."""
    factory = sessionmaker(session.connection(), join_transaction_mode="create_savepoint")

    def acknowledge(task: Any, number: int, notification: NotificationInfo) -> None:
        with factory() as own:
            own.add(Post(title="slow work"))
            notification.acknowledge(own)
            if number == 1:
                own.commit()

    blog.do_owned = acknowledge
    notify(session, blog.work(number=1))
    drain(session)
    assert [post.title for post in session.query(Post)] == ["slow work"]
    notify(session, blog.work(number=2))
    with pytest.raises(TransactionEndedError, match="not committed"):
        drain(session)


def test_a_requeued_notification_is_told_and_waits(blog: Blog, session: Session) -> None:
    """It is given back, a little later each time."""

    def reject(task: Any, number: int, inner: Session) -> None:
        raise Reject("not now", requeue=True)

    blog.do = reject
    notify(session, blog.work(number=1))
    result = drain(session)
    assert result.released
    assert blog.states(session.connection()) == ["waiting"]


def test_what_cannot_be_read_is_raised(blog: Blog, session: Session) -> None:
    """As it fails in a worker."""
    notify(session, blog.work(number=1))
    session.execute(text("UPDATE pgpubsub_notification SET payload = '{}'"))
    with pytest.raises(DecodeError, match="number"):
        drain(session)


def test_lists_are_given_as_lists_and_split_where_they_fail(app: Celery, blog: Blog, session: Session) -> None:
    """One run for all of a list; what is poisonous in it stands alone in the end."""
    lists: list[list[int]] = []

    @channel_task(blog.work, app=app, name="draining.listed", batch=10)
    def listed(messages: list[Any], session: Session) -> None:
        lists.append([message.number for message in messages])
        if 2 in lists[-1]:
            raise ValueError("two")

    drain(session)  # which subscribes it
    notify_many(session, [blog.work(number=n) for n in (1, 2, 3)])
    result = drain(session, raise_errors=False)
    assert lists[0] == [1, 2, 3]
    assert [(run.listener, run.outcome) for run in result if run.listener == "draining.listed"].count(
        ("draining.listed", "acknowledged")
    ) == 2
    assert [str(run.error) for run in result.failed] == ["two"]


def test_only_the_channels_asked_for_are_run(blog: Blog, session: Session) -> None:
    """As classes or by their names."""
    session.add(Author(id=1, name="Ann"))
    notify(session, blog.work(number=1))
    assert {run.channel for run in drain(session, channels=[blog.authors])} == {blog.authors}
    assert {run.channel for run in drain(session, channels="draining.Work")} == {blog.work}


def test_enqueued_tasks_run_at_once(app: Celery, blog: Blog, session: Session) -> None:
    """Whatever the signature; a task of another application is told, and not run."""
    done: list[int] = []

    @app.task(name="draining.add")
    def add(one: int, other: int = 0) -> int:
        done.append(one + other)
        return one + other

    @app.task(name="draining.fail")
    def fail() -> None:
        raise ValueError("enqueued")

    enqueue(session, add.s(1))
    enqueue(session, add.s(1) | add.s(5))
    enqueue(session, app.signature("elsewhere.task"))
    result = drain(session)
    assert done == [1, 1, 6]
    assert [(run.listener, run.outcome) for run in result] == [
        ("draining.add", "acknowledged"),
        ("celery.chain", "acknowledged"),
        ("elsewhere.task", "published"),
    ]
    enqueue(session, fail.s())
    with pytest.raises(ValueError, match="enqueued"):
        drain(session)
    assert blog.states(session.connection()) == []


def test_a_chain_runs_where_a_worker_forbids_to_wait_for_results(app: Celery, blog: Blog, session: Session) -> None:
    """A worker forbids it for the whole process, and one that has run in this process may leave it so."""
    done: list[int] = []

    @app.task(name="draining.link")
    def link(*numbers: int) -> int:
        done.append(sum(numbers))
        return sum(numbers)

    enqueue(session, link.s(1) | link.s(5))
    with denied_join_result():
        drain(session)
        assert task_join_will_block()
    assert done == [1, 6]


def test_tasks_that_listeners_start_run_where_the_application_is_eager(
    app: Celery, blog: Blog, session: Session
) -> None:
    """`task_always_eager` is about `.delay()`; it changes nothing about listeners' retries."""
    app.conf.task_always_eager = True
    done: list[int] = []

    @app.task(name="draining.other")
    def other(number: int) -> None:
        done.append(number)

    def start(task: Any, number: int, inner: Session) -> None:
        other.delay(number)
        if number == 2:
            raise task.retry(countdown=60)

    blog.do = start
    notify_many(session, [blog.work(number=1), blog.work(number=2)])
    assert len(drain(session).retried) == 1
    assert sorted(done) == [1, 2]


def test_celerys_signals_are_sent_as_in_a_worker(blog: Blog, session: Session) -> None:
    """Each run has a request of its own."""
    told: list[str] = []

    def receiver(sender: Any, task_id: str, **_: Any) -> None:
        told.append(f"{sender.name} {sender.request.retries} {sender.request.is_eager}")

    signals.task_prerun.connect(receiver)
    try:
        notify(session, blog.work(number=1))
        drain(session)
    finally:
        signals.task_prerun.disconnect(receiver)
    assert sorted(told) == ["draining.locked 0 False", "draining.owned 0 False"]


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
def test_an_async_session_drains_by_run_sync(blog: Blog, driver: str) -> None:
    """In its own transaction, on its own driver; listeners are given synchronous sessions."""

    async def body() -> list[str]:
        engine = create_async_engine(blog.engine.url.set(drivername=driver))
        async with engine.connect() as connection, AsyncSession(connection) as session:
            session.add(Author(id=1, name="Ann"))
            await anotify(session, blog.work(number=1))
            assert len(await session.run_sync(drain)) == 3
            titles = (await session.scalars(text("SELECT title FROM drain_post"))).all()
            await session.rollback()
        await engine.dispose()
        return [str(title) for title in titles]

    assert asyncio.run(body()) == ["Welcome Ann"]
    with blog.engine.connect() as after:
        assert blog.states(after) == []


class Tenants(Session):
    """As an application has one."""


TenantSession = sessionmaker(create_engine("postgresql+psycopg2://postgres@127.0.0.1:1/none"), class_=Tenants)


def test_listeners_sessions_are_of_the_applications_factory(app: Celery, blog: Blog, session: Session) -> None:
    """On the test's connection, whatever engine the factory is bound to."""
    app.conf.pgpubsub_session_factory = f"{__name__}.TenantSession"
    seen: list[type[Session]] = []

    def look(task: Any, number: int, inner: Session) -> None:
        inner.add(Post(title="here"))
        seen.append(type(inner))

    blog.do = look
    notify(session, blog.work(number=1))
    drain(session)
    assert [issubclass(kind, Tenants) for kind in seen] == [True]
    assert [post.title for post in session.query(Post)] == ["here"]


# Outside of one


def test_what_is_committed_is_run_and_committed(blog: Blog) -> None:
    """With an engine everything is as in a worker; open transactions are not seen."""
    with Session(blog.engine) as session, session.begin():
        session.add(Author(id=1, name="Ann"))
        notify(session, blog.work(number=1))
    with Session(blog.engine) as open_session:
        notify(open_session, blog.work(number=2))
        assert drain(blog.engine).counts == {"acknowledged": 3}
    with blog.engine.connect() as connection:
        assert blog.states(connection) == []
        assert connection.execute(text("SELECT title FROM drain_post")).scalars().all() == ["Welcome Ann"]


def test_a_failure_outside_of_a_transaction_is_stored_with_its_traceback(blog: Blog) -> None:
    """For whoever looks at it."""

    def fail(*_: Any) -> None:
        raise ValueError("committed")

    blog.do = fail
    with Session(blog.engine) as session, session.begin():
        notify(session, blog.work(number=1))
    with pytest.raises(ValueError, match="committed"):
        drain(blog.engine)
    with blog.engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM pgpubsub_notification WHERE state = 'failed'")).one()
    assert row.error == "ValueError: committed"
    assert "in fail" in row.traceback


# Mistakes


def test_an_autocommit_connection_is_refused(blog: Blog) -> None:
    """There is no transaction to be in."""
    with (
        blog.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(BindError, match="AUTOCOMMIT"),
    ):
        drain(connection)


def test_another_applications_listeners_are_named(blog: Blog, session: Session) -> None:
    """Instead of nothing happening."""
    other = Celery("other", broker="memory://", set_as_current=False)
    notify(session, blog.work(number=1))
    with pytest.raises(DrainError, match=r"wait for draining\.locked, which is no task of the application 'other'"):
        drain(session, app=other)
    other.close()


def test_the_workers_runtime_is_as_before_afterwards(app: Celery, blog: Blog, session: Session) -> None:
    """A test's connection is nobody's but the test's."""
    app.conf.pgpubsub_database_url = blog.engine.url.render_as_string(hide_password=False)
    before = Runtime.of(app)
    drain(session)
    assert Runtime.of(app) is before


# Keys


@pytest.mark.parametrize("inside", [True, False])
def test_order_and_coalescing_are_what_they_are_in_a_worker(
    app: Celery, installed_engine: Engine, inside: bool
) -> None:
    """One of an ordering key at a time, in its order, also when it is retried; of a unique key the newest."""
    ran: list[str] = []

    @dataclasses.dataclass
    class Step(Channel):
        channel_name = "draining.Step"
        lock_notifications = True
        ordering_key = "of"
        of: str
        number: int

    @dataclasses.dataclass
    class Draft(Channel):
        channel_name = "draining.Draft"
        lock_notifications = True
        unique_key = "of"
        of: str
        number: int

    @channel_task(Step, app=app, bind=True, name="draining.step", max_retries=2)
    def step(task: Any, of: str, number: int, session: Session) -> None:
        if (of, number) == ("a", 1) and not task.request.retries:
            raise task.retry(countdown=0)
        ran.append(f"{of}{number}")

    @channel_task(Draft, app=app, name="draining.draft")
    def draft(of: str, number: int) -> None:
        ran.append(f"{of}{number}")

    install(installed_engine, channels=[Step, Draft])
    with installed_engine.connect() as connection:
        notify_many(connection, [Step(of=of, number=number) for number in (1, 2, 3) for of in "ab"])
        notify_many(connection, [Draft(of="draft", number=number) for number in (1, 2, 3)])
        if not inside:
            connection.commit()
        drained = drain(connection if inside else installed_engine, app=app)
        connection.rollback()
    assert [one for one in ran if one[0] == "a"] == ["a1", "a2", "a3"]
    assert [one for one in ran if one[0] == "b"] == ["b1", "b2", "b3"]
    assert [one for one in ran if one.startswith("draft")] == ["draft3"]
    assert drained.counts == {"acknowledged": 7, "retried": 1}
