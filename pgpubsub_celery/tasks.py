"""`@channel_task`: a function becomes the listener of a channel, and a normal Celery task.

Owns the decorator, the reference's decorator names, and the task class. What happens when a bridge's message
reaches a worker is `delivery`'s; a task called directly, by `.delay()` or eagerly is Celery's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar, cast

from celery import Celery, Task, _state, signals
from celery.local import Proxy

from pgpubsub_celery import coroutines, workers
from pgpubsub_celery.channels import EVERY_DATABASE, Channel, TriggerChannel, check_declared, databases_of
from pgpubsub_celery.delivery import deliver, own_session
from pgpubsub_celery.errors import ListenerError
from pgpubsub_celery.listeners import (
    Listener,
    read_batch_parameters,
    read_operations,
    read_parameters,
    register_listener,
)
from pgpubsub_celery.messages import KEYWORD
from pgpubsub_celery.runs import NotificationInfo, current_run
from pgpubsub_celery.runtime import Runtime

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class ListenerTask(Task):  # type: ignore[misc]  # celery has no types
    """The Celery task of a listener. Mixed in before the application's own task class."""

    abstract = True
    listener: Listener
    parameters: tuple[str, ...] = ()
    """The function's parameters in order, without the task itself."""
    coroutine_function: Callable[..., Any] | None = None
    """What makes the coroutine of an `async def` listener."""

    # The lease is the redelivery, and it beats a broker's visibility timeout: nothing is gained by late acks.
    acks_late = False
    reject_on_worker_lost = False
    retry_on_worker_lost = False
    ignore_result = True
    Request = "pgpubsub_celery.requests:ListenerRequest"

    _tracer: Callable[..., Any] | None = None

    @property
    def __trace__(self) -> Callable[..., Any] | None:
        """What a worker calls for a message. Celery assigns its tracer; ours stands before it."""
        return None if self._tracer is None else self._trace

    @__trace__.setter
    def __trace__(self, tracer: Callable[..., Any] | None) -> None:
        self._tracer = tracer

    def _trace(self, uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        assert self._tracer is not None
        if isinstance(kwargs, dict) and KEYWORD in kwargs:
            return deliver(self, self._tracer, uuid, kwargs, request or {})
        return self._tracer(uuid, args, kwargs, request)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the listener: for a notification inside its run, else as any task, with what is missing filled in."""
        run = current_run()
        if run is not None and run.starting(self):
            if self.coroutine_function is not None:
                self._is_traced()  # what its coroutine calls is not
            return run.run(self._run_user, kwargs)
        traced = self._is_traced()
        if self.coroutine_function is not None and not traced:
            return self._call_coroutine(args, kwargs)
        with _filled_in(self, args, kwargs) as filled:
            return self._run_user(*args, **filled) if traced else super().__call__(*args, **filled)

    def _is_traced(self) -> bool:
        """Whether this is the call that a tracer makes: one for each request, and the first."""
        request = self.request_stack.top
        if request is None or request.called_directly or getattr(request, "pgpubsub_called", False):
            return False
        request.pgpubsub_called = True
        return True

    async def _call_coroutine(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a direct call of an `async def` listener returns, as that of the function would."""
        assert self.coroutine_function is not None
        with _filled_in(self, args, kwargs) as filled:
            return await self.coroutine_function(*args, **filled)

    def _run_user(self, *args: Any, **kwargs: Any) -> Any:
        cls: Any = type(self)
        wrapper = _wrapper_of(cls)
        return self.run(*args, **kwargs) if wrapper is None else wrapper(self, *args, **kwargs)

    @property
    def notification(self) -> NotificationInfo | None:
        """The notification that is being handled, or None outside of one."""
        run = current_run()
        return None if run is None else run.notification

    def signature_from_request(self, request: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return what `retry()` sends: for a notification a record of the wait, which becomes its row's."""
        request = self.request if request is None else request
        run = current_run()
        if run is None or request.id != run.task_id:
            return super().signature_from_request(request, *args, **kwargs)
        return run.retry_signature(request, *args, **kwargs)

    def message_from_request(self, request: Any, kwargs: dict[str, Any], **options: Any) -> Any:
        """Return the message of a retry that Celery sends, with `kwargs` as its arguments."""
        return super().signature_from_request(request, (), kwargs, **options)

    def replace(self, sig: Any) -> Any:
        """Refused for notifications: the row could not follow the other task. `enqueue` it instead."""
        if current_run() is not None:
            raise ListenerError(
                f"{self.name} called replace(): a notification cannot become another task; "
                "call enqueue(session, signature) in the listener's transaction instead."
            )
        return super().replace(sig)


@functools.cache
def _wrapper_of(task: Any) -> Callable[..., Any] | None:
    """Return what the application's task class wraps every call in (Flask's application context), if it does.

    Celery's own `__call__` would only push a second, empty request.
    """
    classes = task.__mro__[task.__mro__.index(ListenerTask) + 1 :]
    cls = next((cls for cls in classes if "__call__" in cls.__dict__), Task)
    return None if cls is Task else cls.__call__


def _on_unknown(sender: Any = None, message: Any = None, **_: Any) -> None:
    # Imported late: it brings Celery's worker, which writers have no use for.
    from pgpubsub_celery.requests import give_back_unknown

    give_back_unknown(sender, message)


signals.task_unknown.connect(_on_unknown, weak=False)
workers.prepare()


@contextlib.contextmanager
def _filled_in(task: ListenerTask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Add what a listener called as an ordinary task was not given: a session of its own, an empty context."""
    # What was given by position is not missing.
    given = kwargs.keys() | set(task.parameters[: len(args)])
    missing = task.listener.injected - given
    filled = dict(kwargs)
    if "context" in missing:
        filled["context"] = {}
    if "notification" in missing:
        filled["notification"] = None
    if "notifications" in missing:
        filled["notifications"] = []
    with contextlib.ExitStack() as stack:
        if "session" in missing:
            alias = databases_of(task.listener.channel)[0]
            runtime = Runtime.of(task.app, None if alias == EVERY_DATABASE else alias)
            filled["session"] = stack.enter_context(own_session(runtime))
        yield filled


def channel_task(
    channel: type[Channel],
    *,
    on: str | Iterable[str] | None = None,
    changed: Iterable[str] | str = (),
    condition: Any = None,
    filter: Any = None,
    batch: int | None = None,
    bundle: int | Literal["auto"] | None = None,
    aliases: Iterable[str] = (),
    app: Celery | None = None,
    **celery_task_options: Any,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the decorated function a listener of `channel` and a Celery task.

    The function declares any of the channel's fields, and `session`, `context`, `notification`, by name. With
    `session` it runs inside the transaction that acknowledges its notification; without, no transaction is open. An
    `async def` function runs on an event loop that its worker keeps; it cannot have `session`.

    Args:
        channel: a `Channel` or `TriggerChannel` class.
        on: for trigger channels: "insert", "update", "delete", "truncate", "save", or several.
        changed: for updates: only when one of these columns really changed.
        condition: SQL over `old` and `new` (text or an SQLAlchemy expression) that a change must meet.
        filter: a condition that a stored notification must meet to be claimed for this listener.
        batch: the function is given a list of up to so many channel instances at once, and `notifications` instead of
            `notification`; they are acknowledged together. Where they fail together, the halves are run, and theirs,
            until the one that fails stands alone. A retry is all of theirs.
        bundle: notifications in one message, at most; "auto" for as many as are done within `bundle_target`, by what
            workers have measured. Default: "auto" for listeners with `session`, 1 for others, because one crash is
            not to repeat a hundred calls of somebody else's service.
        aliases: names that the task had in earlier releases.
        app: the application to bind the task to; default: shared by all, as `shared_task`.
        **celery_task_options: as for `app.task`: bind, name, queue, autoretry_for, max_retries, time_limit, …

    Raises:
        ListenerError: at import, when the declaration cannot work.
    """
    _check_channel(channel)
    _check_options(celery_task_options)
    if isinstance(changed, str):
        changed = (changed,)
    if isinstance(aliases, str):
        aliases = (aliases,)
    if bundle not in (None, "auto") and (isinstance(bundle, bool) or not isinstance(bundle, int) or bundle < 1):
        raise ListenerError(f'bundle={bundle!r}: expected a whole number of at least 1, "auto" or None.')
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ListenerError(f"batch={batch!r}: expected a whole number of at least 1, or None.")
    if batch is not None and bundle is not None:
        raise ListenerError(f"batch={batch!r} and bundle={bundle!r}: a batch is what a message carries; leave one out.")
    operations = read_operations(channel, on)
    if (tuple(changed) or condition is not None) and not issubclass(channel, TriggerChannel):
        raise ListenerError(f"changed= and condition= are for trigger channels; {channel.name()} is not one.")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, (Proxy, Task)):
            raise ListenerError(
                f"{function.name} is a Celery task already: apply @channel_task to the plain function, once; "
                "for a second channel, write a second function that calls the first."
            )
        bound = bool(celery_task_options.get("bind"))
        fields: tuple[str, ...]
        if batch is None:
            fields, injected = read_parameters(function, channel, bound=bound)
        else:
            fields, injected = read_batch_parameters(function, bound=bound)
        _check_coroutine(function, injected)
        options = dict(celery_task_options)
        options["name"] = options.get("name") or _task_name(function, app)
        listener = Listener(
            name=options["name"],
            channel=channel,
            operations=operations,
            fields=fields,
            injected=injected,
            changed=tuple(changed),
            condition=condition,
            filter=filter,
            aliases=tuple(aliases),
            batch=batch,
            bundle=bundle,
        )
        register_listener(listener)
        return cast("Callable[P, R]", _make_task(function, listener, app, options))

    return decorate


def _task_name(function: Callable[..., Any], app: Celery | None) -> str:
    # Celery names the tasks of a __main__ module after the application.
    application = app or _state.get_current_app()
    return str(application.gen_task_name(function.__name__, function.__module__))


def _make_task(function: Callable[..., Any], listener: Listener, app: Celery | None, options: dict[str, Any]) -> Any:
    def create(application: Celery) -> Any:
        base = options.get("base") or application.Task
        defaults = dict(application.conf.get("pgpubsub_task_options") or {})
        is_coroutine = inspect.iscoroutinefunction(function)
        task = application._task_from_fun(  # noqa: SLF001 - what app.task and shared_task do
            coroutines.synchronous(function) if is_coroutine else function,
            **{**defaults, **options, "base": type(base.__name__, (ListenerTask, base), {"abstract": True})},
        )
        task.listener = listener
        if is_coroutine:
            task.coroutine_function = function.__get__(task) if options.get("bind") else function
        names = tuple(inspect.signature(function).parameters)
        task.parameters = names[1:] if options.get("bind") else names
        task.__header__ = _optional_injected(task.__header__, listener)
        for alias in listener.aliases:
            application.tasks.setdefault(alias, task)
        return task

    if app is not None:
        return create(app)
    # As celery.shared_task: every application, finalized already or later, gets a copy of its own.
    _state.connect_on_app_finalize(create)
    for application in list(_state._get_active_apps()):  # noqa: SLF001 - as shared_task does
        if application.finalized:
            create(application)
    return Proxy(lambda: _state.get_current_app().tasks[listener.name])


def _optional_injected(header: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    """Let `.delay()` leave out what the worker fills in, and accept a bridge's message."""

    def check(*args: Any, **kwargs: Any) -> Any:
        if KEYWORD in kwargs:
            return None
        return header(*args, **{**dict.fromkeys(listener.injected - kwargs.keys()), **kwargs})

    return check


def _check_channel(channel: Any) -> None:
    if not (isinstance(channel, type) and issubclass(channel, Channel)):
        raise ListenerError(f"@channel_task needs a channel class, got {channel!r}: write @channel_task(YourChannel).")
    check_declared(channel)


def _check_coroutine(function: Callable[..., Any], injected: frozenset[str]) -> None:
    if inspect.isasyncgenfunction(function):
        raise ListenerError(f"{function.__qualname__} is an async generator: a listener returns, and yields nothing.")
    if inspect.iscoroutinefunction(function) and "session" in injected:
        raise ListenerError(
            f"{function.__qualname__} is async and declares `session`, whose every statement would block its event "
            "loop: declare `notification`, and `await notification.aacknowledge(async_session)` in a transaction of an "
            "AsyncSession of yours, which commits effect and acknowledgement together; or write `def`."
        )


def _check_options(options: dict[str, Any]) -> None:
    for name in ("acks_late", "reject_on_worker_lost", "retry_on_worker_lost"):
        if options.get(name):
            raise ListenerError(
                f"{name}=True has no use on a listener: its notification's lease redelivers it; leave it out."
            )
    if options.get("pydantic"):
        raise ListenerError("pydantic=True has no use on a listener: its channel's fields are typed; leave it out.")


def listener(channel: type[Channel], **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """django-pgpubsub's name for the listener of a message channel: reads as `channel_task(channel)`."""
    return channel_task(channel, **options)


def _reading(on: str, when: str) -> Callable[..., Callable[[Callable[P, R]], Callable[P, R]]]:
    def decorator(channel: type[Channel], **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
        return channel_task(channel, on=on, **options)

    decorator.__name__ = decorator.__qualname__ = f"{when}_{on}_listener"
    decorator.__doc__ = (
        f"""django-pgpubsub's name for `channel_task(channel, on={on!r})`. Listeners run after the commit."""
    )
    return decorator


post_save_listener = _reading("save", "post")
post_insert_listener = _reading("insert", "post")
post_update_listener = _reading("update", "post")
post_delete_listener = _reading("delete", "post")
pre_save_listener = _reading("save", "pre")
pre_insert_listener = _reading("insert", "pre")
pre_update_listener = _reading("update", "pre")
pre_delete_listener = _reading("delete", "pre")
