"""`async def` listeners: what a function can be and do, a coroutine can, on a loop that its thread keeps."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from billiard.pool import soft_timeout_sighandler
from celery import Celery, signals
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, NotificationInfo, channel_task, notify_many
from pgpubsub_celery.coroutines import close_loop
from pgpubsub_celery.errors import BindError, ListenerError
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.testing import drain
from tests.fixtures.coroutines import forever, moment
from tests.fixtures.deliveries import Deliveries


@pytest.fixture
def app(installed_url: str, registry: None) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("coroutines", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    yield app
    Runtime.of(app).engine.dispose()
    app.close()
    close_loop()


class Errands:
    """A channel, and a listener whose coroutine each test chooses."""

    def __init__(self, app: Celery, engine: Engine, **options: Any) -> None:
        @dataclasses.dataclass
        class Errand(Channel):
            channel_name = "coroutines.Errand"
            lock_notifications = True
            number: int

        self.channel = Errand
        self.app = app
        self.engine = engine
        self.seen: list[Any] = []
        self.do: Callable[[Any, int, NotificationInfo], Coroutine[Any, Any, Any]] = self.note

        @channel_task(Errand, app=app, bind=True, name="coroutines.run", **options)
        async def run(task: Any, number: int, context: dict[str, Any], notification: NotificationInfo) -> int:
            await moment()
            await self.do(task, number, notification)
            return number

        self.task: Any = run
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE effect (value int)"))
        self.deliveries = Deliveries(app, engine)

    async def note(self, task: Any, number: int, notification: NotificationInfo) -> None:
        self.seen.append(number)

    def emit(self, *numbers: int) -> None:
        with Session(self.engine) as session, session.begin():
            notify_many(session, [self.channel(number=number) for number in numbers])

    @property
    def errors(self) -> list[str]:
        return [f"{row['state']} {row['error']}" for row in self.deliveries.rows()]


@pytest.fixture
def errands(app: Celery, installed_engine: Engine) -> Errands:
    """A listener, one notification in a message."""
    return Errands(app, installed_engine)


# In a worker


def test_a_coroutine_is_run_and_acknowledged(errands: Errands) -> None:
    """With its fields, and what is injected; the task knows its request and its notification."""

    async def look(task: Any, number: int, notification: NotificationInfo) -> None:
        errands.seen.append((number, notification.id, task.notification.id, task.request.retries))

    errands.do = look
    errands.emit(7)
    (result,) = errands.deliveries.run()
    assert result.info is None
    ((number, id, own, retries),) = errands.seen
    assert (number, own, retries) == (7, id, 0)
    assert errands.deliveries.rows() == []


def test_runs_of_one_thread_share_a_loop_and_what_is_bound_to_it(errands: Errands) -> None:
    """A client's connections live on; what a run has left to be done goes on with the next one."""
    tasks: list[asyncio.Task[Any]] = []

    async def background() -> None:
        for _ in range(3):
            await moment()
        errands.seen.append("done")

    async def look(task: Any, number: int, notification: NotificationInfo) -> None:
        errands.seen.append(asyncio.get_running_loop())
        if number == 1:
            tasks.append(asyncio.ensure_future(background()))
        else:
            await tasks[0]

    errands.do = look
    errands.emit(1, 2)
    errands.deliveries.run()
    first, second, done = errands.seen
    assert first is second
    assert done == "done"


def test_context_variables_are_those_of_the_run(errands: Errands) -> None:
    """Of tracing, for example; and what a coroutine sets is its own."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    def before(**_: Any) -> None:
        variable.set("set before")

    async def look(task: Any, number: int, notification: NotificationInfo) -> None:
        errands.seen.append(variable.get())
        variable.set("set inside")

    errands.do = look
    signals.task_prerun.connect(before)
    try:
        errands.emit(1, 2)
        contextvars.copy_context().run(errands.deliveries.run)
    finally:
        signals.task_prerun.disconnect(before)
    assert errands.seen == ["set before", "set before"]


def test_retries_are_those_of_a_function(app: Celery, installed_engine: Engine) -> None:
    """By retry(), and by autoretry_for; in the row."""
    errands = Errands(app, installed_engine, autoretry_for=(OSError,), max_retries=1, default_retry_delay=60)

    async def retry(task: Any, number: int, notification: NotificationInfo) -> None:
        errands.seen.append((number, notification.retries))
        if number == 1:
            raise task.retry(countdown=60)
        raise OSError("down")

    errands.do = retry
    errands.emit(1, 2)
    errands.deliveries.run()
    assert errands.deliveries.states() == ["waiting", "waiting"]
    errands.deliveries.make_due()
    errands.deliveries.run()
    assert errands.seen == [(1, 0), (2, 0), (1, 1), (2, 1)]
    first, second = errands.errors
    assert first.startswith("failed MaxRetriesExceededError")
    assert second == "failed OSError: down"


def test_an_exception_fails_the_notification_with_its_traceback(errands: Errands) -> None:
    """Down to the coroutine's line."""

    async def fail(*_: Any) -> None:
        raise ValueError("no")

    errands.do = fail
    errands.emit(1)
    errands.deliveries.run()
    (row,) = errands.deliveries.rows()
    assert row["error"] == "ValueError: no"
    assert ", in fail\n" in row["traceback"]


def test_a_coroutine_cancelled_from_inside_fails_its_notification_alone(errands: Errands) -> None:
    """An error that no `except Exception` catches would end the worker's process."""

    async def cancel(task: Any, number: int, notification: NotificationInfo) -> None:
        if number == 1:
            own = asyncio.current_task()
            assert own is not None
            own.cancel()
        await moment()
        errands.seen.append(number)

    errands.do = cancel
    errands.emit(1, 2)
    errands.deliveries.run()
    assert errands.seen == [2]
    assert errands.errors == ["failed CancelledError: the listener's coroutine was cancelled from inside"]


def test_lists_are_given_to_coroutines_too(app: Celery, errands: Errands) -> None:
    """And split where they fail."""

    @channel_task(errands.channel, app=app, name="coroutines.listed", batch=10)
    async def listed(messages: list[Any], notifications: list[NotificationInfo]) -> None:
        await moment()
        numbers = [message.number for message in messages]
        assert len(notifications) == len(numbers)
        errands.seen.append(numbers)
        if 2 in numbers:
            raise ValueError("two")

    errands.deliveries = Deliveries(app, errands.engine)
    errands.emit(1, 2)
    errands.deliveries.run_until_idle()
    assert [seen for seen in errands.seen if isinstance(seen, list)] == [[1, 2], [1], [2]]
    assert errands.errors == ["failed ValueError: two"]


# Acknowledging with the result


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
def test_effect_and_acknowledgement_commit_together(errands: Errands, driver: str) -> None:
    """In an AsyncSession of the listener's; whoever forgets the commit, or brings something else, is told."""

    async def acknowledge(task: Any, number: int, notification: NotificationInfo) -> None:
        engine = create_async_engine(errands.engine.url.set(drivername=driver))
        try:
            async with AsyncSession(engine) as session:
                await notification.aacknowledge(session if number < 3 else await session.connection())
                await session.execute(text("INSERT INTO effect VALUES (:n)"), {"n": number})
                if number == 1:
                    await session.commit()
                    errands.seen += errands.deliveries.rows()
        finally:
            await engine.dispose()

    errands.do = acknowledge
    for number in (1, 2, 3):
        errands.emit(number)
        errands.deliveries.run()
    assert errands.seen == []
    assert errands.deliveries.scalars("SELECT value FROM effect") == [1]
    not_committed, wrong = errands.errors
    assert "was not committed" in not_committed
    assert BindError.__name__ in wrong


def test_aacknowledge_is_told_of_a_synchronous_session(errands: Errands) -> None:
    """It says which method is for that."""

    async def acknowledge(task: Any, number: int, notification: NotificationInfo) -> None:
        with Session(errands.engine) as session:
            await notification.aacknowledge(session)

    errands.do = acknowledge
    errands.emit(1)
    errands.deliveries.run()
    (error,) = errands.errors
    assert "use acknowledge(" in error


# Time limits


@pytest.fixture
def limit() -> Iterator[Callable[[], None]]:
    """What a soft time limit does to a pool's child: its signal, whose handler raises."""
    before = signal.signal(signal.SIGUSR1, soft_timeout_sighandler)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is soft_timeout_sighandler
    signal.signal(signal.SIGUSR1, before)


def test_a_soft_time_limit_cancels_what_a_coroutine_waits_for(errands: Errands, limit: Callable[[], None]) -> None:
    """It may clean up; the run ends with the limit's error, and the loop goes on."""

    async def wait(task: Any, number: int, notification: NotificationInfo) -> None:
        if number == 1:
            threading.Timer(0.05, limit).start()
            try:
                await forever()
            finally:
                await moment()
                errands.seen.append("cleaned up")
        errands.seen.append(number)

    errands.do = wait
    errands.emit(1, 2)
    errands.deliveries.run()
    assert errands.seen == ["cleaned up", 2]
    assert errands.errors == ["failed SoftTimeLimitExceeded: SoftTimeLimitExceeded()"]


def test_a_soft_time_limit_reaches_a_coroutines_own_code_as_in_a_function(
    errands: Errands, limit: Callable[[], None]
) -> None:
    """Where it can be caught by its name."""

    async def compute(task: Any, number: int, notification: NotificationInfo) -> None:
        try:
            limit()
        except SoftTimeLimitExceeded:
            errands.seen.append("caught")

    errands.do = compute
    errands.emit(1)
    errands.deliveries.run()
    assert (errands.seen, errands.errors) == (["caught"], [])


def test_a_soft_time_limit_is_not_lost_in_a_callback_of_the_loop(errands: Errands, limit: Callable[[], None]) -> None:
    """Where an error would only be logged."""

    async def wait(task: Any, number: int, notification: NotificationInfo) -> None:
        asyncio.get_running_loop().call_soon(limit)
        await forever()

    errands.do = wait
    errands.emit(1)
    errands.deliveries.run()
    assert errands.errors == ["failed SoftTimeLimitExceeded: SoftTimeLimitExceeded()"]


def test_a_process_that_is_told_to_end_lets_the_coroutine_clean_up(errands: Errands) -> None:
    """As SystemExit does in a function; nothing is left on the loop."""

    async def leave(task: Any, number: int, notification: NotificationInfo) -> None:
        asyncio.get_running_loop().call_soon(sys.exit, 3)
        try:
            await forever()
        finally:
            errands.seen.append("cleaned up")

    errands.do = leave
    errands.emit(1)
    with pytest.raises(SystemExit):
        errands.deliveries.run()
    assert errands.seen == ["cleaned up"]


# The loop's life


def test_closing_the_loop_ends_what_is_left_on_it(errands: Errands) -> None:
    """Tasks, and generators that nobody has finished; a later run has another loop."""

    async def lasting() -> None:
        try:
            await forever()
        finally:
            errands.seen.append("cancelled")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            errands.seen.append("generator closed")

    kept: list[Any] = []

    async def leave(task: Any, number: int, notification: NotificationInfo) -> None:
        generator = numbers()
        await generator.__anext__()
        kept.extend((generator, asyncio.ensure_future(lasting()), asyncio.get_running_loop()))
        await moment()

    errands.do = leave
    errands.emit(1)
    errands.deliveries.run()
    close_loop()
    assert errands.seen == ["cancelled", "generator closed"]
    assert kept[2].is_closed()
    errands.do = errands.note
    errands.emit(2)
    errands.deliveries.run()
    assert errands.seen[2:] == [2]


def test_a_process_with_a_loop_ends_without_a_warning(errands: Errands) -> None:
    """Whether it is the main thread's loop or that of a thread that has ended; a forked child has its own."""
    program = """
        import asyncio, os, threading
        from pgpubsub_celery.coroutines import synchronous

        async def loop():
            return id(asyncio.get_running_loop())

        run = synchronous(loop)
        first = run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        pid = os.fork()
        if not pid:
            os._exit(0 if run() != first else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert run() == first
    """
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# In tests and elsewhere


def test_a_direct_call_is_a_coroutine_as_the_functions_own(errands: Errands) -> None:
    """With what was left out filled in, in the loop that awaits it."""
    loops: list[Any] = []

    async def look(task: Any, number: int, notification: NotificationInfo | None) -> None:
        loops.append(asyncio.get_running_loop())
        errands.seen.append((number, notification))

    async def body() -> int:
        loops.append(asyncio.get_running_loop())
        value: int = await errands.task(number=5)
        return value

    errands.do = look
    assert asyncio.run(body()) == 5
    assert errands.seen == [(5, None)]
    assert loops[0] is loops[1]


def test_a_coroutine_that_calls_its_own_listener_awaits_a_coroutine(errands: Errands) -> None:
    """In a notification's run, where the first call is the worker's, and the others are its own."""

    async def again(task: Any, number: int, notification: NotificationInfo | None) -> None:
        errands.seen.append(number)
        if number > 1:
            assert await errands.task(number=number - 1) == number - 1

    errands.do = again
    errands.emit(3)
    errands.deliveries.run()
    assert (errands.seen, errands.errors) == ([3, 2, 1], [])


@pytest.mark.parametrize("inside", [False, True], ids=["in a function", "in a coroutine"])
def test_a_task_called_as_one_is_run_to_its_end(errands: Errands, inside: bool) -> None:
    """By apply(), and by delay() where that is eager; with retries that are counted."""

    async def stubborn(task: Any, number: int, notification: NotificationInfo) -> None:
        errands.seen.append(task.request.retries)
        if not task.request.retries:
            raise task.retry(countdown=0)

    async def in_a_loop() -> Any:
        return errands.task.delay(number=5).get()

    errands.do = stubborn
    errands.app.conf.task_always_eager = True
    result = asyncio.run(in_a_loop()) if inside else errands.task.apply(kwargs={"number": 5}).get()
    assert (result, errands.seen) == (5, [0, 1])


def test_a_functions_listener_called_as_a_task_retries_as_any_other(app: Celery, errands: Errands) -> None:
    """Its request is the task's, not that of a direct call."""

    @channel_task(errands.channel, app=app, bind=True, name="coroutines.plain", max_retries=2)
    def plain(task: Any, number: int, session: Any) -> int:
        errands.seen.append(task.request.retries)
        if task.request.retries < number:
            raise task.retry(countdown=0)
        return number

    task: Any = plain
    assert task.apply(args=(2,)).get() == 2
    assert errands.seen == [0, 1, 2]


def test_drain_runs_coroutines_in_tests_of_both_kinds(errands: Errands) -> None:
    """In the thread of a test that is a coroutine itself, the loop is taken: another one runs them."""

    async def look(task: Any, number: int, notification: NotificationInfo) -> None:
        errands.seen.append((number, task.notification.id == notification.id))
        if number == 3:
            raise ValueError("three")

    async def test() -> None:
        with Session(errands.engine) as session:
            notify_many(session, [errands.channel(number=2), errands.channel(number=3)])
            with pytest.raises(ValueError, match="three"):
                drain(session)

    errands.do = look
    with Session(errands.engine) as session:
        notify_many(session, [errands.channel(number=1)])
        drain(session)
    asyncio.run(test())
    assert errands.seen == [(1, True), (2, True), (3, True)]


def test_threads_have_a_loop_each(errands: Errands) -> None:
    """As Celery's pool of threads runs tasks at the same time."""
    together = threading.Barrier(2, timeout=30)

    async def meet(task: Any, number: int, notification: NotificationInfo) -> None:
        together.wait()
        errands.seen.append(number)

    errands.do = meet
    errands.emit(1, 2)
    messages = errands.deliveries.claim()
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        list(executor.map(errands.deliveries.deliver, messages))
    assert sorted(errands.seen) == [1, 2]


# Mistakes


def test_a_coroutine_cannot_have_a_session(errands: Errands) -> None:
    """At import, with what to do instead."""
    with pytest.raises(ListenerError, match=r"is async and declares `session`.*notification\.aacknowledge"):

        @channel_task(errands.channel)
        async def wrong(session: Session) -> None:
            pass

    with pytest.raises(ListenerError, match="is async and declares `session`"):

        @channel_task(errands.channel, batch=5)
        async def wrong_list(messages: list[Any], session: Session) -> None:
            pass


def test_a_generator_is_no_listener(errands: Errands) -> None:
    """It would never begin."""
    with pytest.raises(ListenerError, match="is an async generator"):

        @channel_task(errands.channel)
        async def wrong() -> AsyncIterator[int]:
            yield 1
