"""Runs of a bundle that nobody watches, without what Celery's tracer would tell nobody.

Owns the question whether anything would notice (a signal's receiver, a hook of the task's class, a log record, a kept
result), and the little that a run needs where nothing would: its request on the task's stack. A run that raises is
handed to Celery's tracer after all, with what it raised, so every end but a quiet success is Celery's own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from celery import signals
from celery._state import _task_stack
from celery.app.task import Context
from celery.app.trace import logger as trace_logger
from celery.app.trace import task_has_custom
from celery.loaders.base import BaseLoader

from pgpubsub_celery import runs

if TYPE_CHECKING:
    from pgpubsub_celery.runs import Run
    from pgpubsub_celery.tasks import ListenerTask

_TRACER_MODULE = "celery.app.trace"
_HOOKS = ("before_start", "on_success", "after_return")


class Shortcut:
    """The runs of one message, with a request each."""

    def __init__(self, task: ListenerTask, request: Mapping[str, Any]) -> None:
        """`request` is what all runs' requests have in common."""
        self._task = task
        self._common = Context(request, args=(), called_directly=False).__dict__
        self._requests: list[Any] = []

    @classmethod
    def of(cls, task: ListenerTask, tracer: Callable[..., Any], request: Mapping[str, Any]) -> Shortcut | None:
        """Return the shortcut for a message, or None when its runs are watched.

        A `tracer` that is not Celery's own, or is wrapped (as monitors wrap it), watches each run, too.
        """
        watched = (
            signals.task_prerun.receivers
            or signals.task_postrun.receivers
            or signals.task_success.receivers
            or trace_logger.isEnabledFor(logging.INFO)
            or getattr(tracer, "__module__", None) != _TRACER_MODULE
            or hasattr(tracer, "__wrapped__")
            or not task.ignore_result
            or request.get("ignore_result") is False
            or any(task_has_custom(task, hook) for hook in _HOOKS)
            or type(task.app.loader).on_task_init is not BaseLoader.on_task_init
            or type(task.app.loader).on_process_cleanup is not BaseLoader.on_process_cleanup
        )
        return None if watched else cls(task, request)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the task the current one, with the message's own request below those of its runs."""
        stack = self._task.request_stack
        _task_stack.push(self._task)
        stack.push(self._context({}))
        # This thread's: found once, instead of by every push and pop.
        self._requests = stack.stack
        try:
            yield
        finally:
            self._requests = []
            stack.pop()
            _task_stack.pop()
            self._task.backend.process_cleanup()

    def run(self, run: Run, arguments: dict[str, Any], request: Mapping[str, Any]) -> bool:
        """Run one notification; False when it raised, and Celery's tracer is to say what that means."""
        self._requests.append(self._context({**request, "kwargs": arguments}))
        try:
            with runs.entered(run):
                self._task(**arguments)
        except Exception as exc:  # noqa: BLE001 - raised again in the tracer
            run.replay = exc
            return False
        finally:
            self._requests.pop()
        return True

    def _context(self, values: Mapping[str, Any]) -> Context:
        context = Context.__new__(Context)
        context.__dict__.update(self._common)
        context.__dict__.update(values)
        return context
