"""`async def` listeners: each run is one coroutine, on an event loop that the thread keeps.

Owns those loops, one for each thread that runs tasks, which live as long as it does: what a listener binds to its loop
(a client's connection pool) serves the next run, too. A coroutine runs in the thread that its run is in, so that the
request, the notification and context variables are what they are in a function; the loop stands still in between. Owns
what soft time limits and cancellation mean for a coroutine. Never knows what a notification is.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery import _state, signals
from celery.exceptions import SoftTimeLimitExceeded

from pgpubsub_celery.runs import current_run, entered

CoroutineFunction = Callable[..., Coroutine[Any, Any, Any]]


def synchronous(function: CoroutineFunction) -> Callable[..., Any]:
    """Return a function of the same signature that runs the coroutine to its end and returns its result."""

    @functools.wraps(function)
    def run_to_end(*args: Any, **kwargs: Any) -> Any:
        return _run(lambda: function(*args, **kwargs))

    # What checks arguments looks at the wrapper alone.
    run_to_end.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return run_to_end


def _run(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    if _is_in_a_loop():
        # Called from somebody's coroutine (a test's, an eager call in a web server): this thread's loop is taken.
        return _run_apart(make)
    loop = _loop_of_this_thread()
    with _soft_limit(loop) as limit:
        task = limit.task = loop.create_task(make())
        if limit.exceeded:
            task.cancel()
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            if limit.exceeded:
                raise SoftTimeLimitExceeded from None
            # Not an Exception: it would end the worker's process, and not the run.
            raise concurrent.futures.CancelledError("the listener's coroutine was cancelled from inside") from None
        finally:
            if not task.done():  # the worker's process is told to end, at once
                _end(loop, [task])


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_apart(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run it in a thread of its own, on a loop of its own, with what belongs to this thread's run."""
    run, task = current_run(), _state.get_current_task()
    request = None if task is None else task.request_stack.top

    def apart() -> Any:
        with contextlib.ExitStack() as stack:
            if run is not None:
                stack.enter_context(entered(run))
            if task is not None:
                _state._task_stack.push(task)  # noqa: SLF001 - what a tracer does
                task.request_stack.push(request)
            return asyncio.run(make())

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pgpubsub-coroutine") as executor:
        return executor.submit(contextvars.copy_context().run, apart).result()


# Limits


class _Limit:
    """A run's task, and whether its soft time limit was exceeded while it waited; that, the signal's handler writes."""

    task: asyncio.Task[Any] | None = None
    exceeded = False


@contextlib.contextmanager
def _soft_limit(loop: asyncio.AbstractEventLoop) -> Iterator[_Limit]:
    """Have a soft time limit end the limit's task, wherever its signal finds the thread.

    Celery's handler raises where the thread happens to be, and that is mostly the loop, which survives: an error of a
    callback is logged, and the limit would be forgotten. In the coroutine's own code it raises as in any function's.
    """
    limit = _Limit()
    if not _has_soft_limits():
        yield limit
        return

    def exceeded(signum: int, frame: Any) -> None:
        if limit.task is not None and asyncio.current_task(loop) is limit.task:
            soft_timeout_sighandler(signum, frame)
        limit.exceeded = True
        if limit.task is not None:
            loop.call_soon_threadsafe(limit.task.cancel)

    signal.signal(SIG_SOFT_TIMEOUT, exceeded)
    try:
        yield limit
    finally:
        signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)


def _has_soft_limits() -> bool:
    """Whether this thread is a pool's child, in which the signal has Celery's handler."""
    if SIG_SOFT_TIMEOUT is None or threading.current_thread() is not threading.main_thread():
        return False
    handler: object = signal.getsignal(SIG_SOFT_TIMEOUT)
    return handler is soft_timeout_sighandler


# Loops


class _Own:
    """A thread's loop, closed when the thread has ended."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pid = os.getpid()

    def __del__(self) -> None:
        if self.pid == os.getpid() and not self.loop.is_running():
            self.loop.close()


_thread = threading.local()
_abandoned: list[_Own] = []
"""Of the process that this one was forked from: to close them would close them there."""


def _loop_of_this_thread() -> asyncio.AbstractEventLoop:
    own: _Own | None = getattr(_thread, "own", None)
    if own is not None and own.pid != os.getpid():
        _abandoned.append(own)
        own = None
    if own is None or own.loop.is_closed():
        own = _thread.own = _Own()
    return own.loop


def close_loop(**_: Any) -> None:
    """Cancel what is left on this thread's loop, let it clean up, and close the loop; the next run has another."""
    own: _Own | None = getattr(_thread, "own", None)
    if own is None or own.pid != os.getpid() or own.loop.is_closed() or own.loop.is_running():
        return
    loop = own.loop
    _end(loop, asyncio.all_tasks(loop))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, tasks: Any) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
        for task in tasks:
            if not task.cancelled():
                task.exception()  # or it would be complained about that nobody has looked


# In a pool's child, and in every other process.
signals.worker_process_shutdown.connect(close_loop, weak=False)
atexit.register(close_loop)
