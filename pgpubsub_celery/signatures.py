"""Celery signatures as payloads: what `enqueue` stores and the bridge publishes.

Owns the form of a stored signature, and the publishing of one as its `apply_async()` would have. Never touches the
database.

A payload is `{"format": 1, "task": name, "id": task id, "content_type": …, "content_encoding": …, "body": …}`. The
body is the signature and all its parts as plain dicts, in the task's or the application's own serializer, as text; of
a serializer that gives bytes (pickle, msgpack) in base64, with `"base64": true`. Task ids are fixed when it is
stored: the caller has them, and a second publication has the same.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from celery import Celery, Task, uuid
from celery.canvas import Signature, chunks, maybe_signature, xmap, xstarmap
from celery.result import GroupResult
from celery.utils.functional import maybe_list
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Producer
from kombu.exceptions import ContentDisallowed, KombuError
from kombu.serialization import dumps, loads, prepare_accept_content

from pgpubsub_celery.errors import DecodeError, PayloadError

FORMAT = 1
_LINKS = ("link", "link_error", "chain")
_MEMBERS = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header",)}


class Prepared:
    """A signature made ready to be stored: with ids of its own, apart from the one that the caller has."""

    def __init__(self, signature: Any) -> None:
        """Copy and freeze it.

        Raises:
            PayloadError: it is not a signature, or its arguments do not fit its task.
        """
        original = _as_signature(signature)
        self._app: Celery = original.app
        self._signature = _rebuild(_copy(original), self._app)
        now = self._app.now()
        self.due = self._take_due()
        for part in _published_at_once(self._signature):
            _check_arguments(part)
            _fix_expiry(part, now)
        self._inherit()
        self.result = _freeze(self._signature)

    def payload(self) -> dict[str, Any]:
        """Return what is stored.

        Raises:
            PayloadError: an argument cannot be serialized; says by which serializer.
        """
        plain = _copy(self._signature)
        serializer = _serializer(self._signature, self._app)
        try:
            content_type, content_encoding, body = dumps(plain, serializer)
        except (KombuError, TypeError, ValueError, AttributeError) as exc:
            raise PayloadError(
                f"enqueue(): the arguments of {_name(self._signature)} cannot be serialized as {serializer!r} ({exc}): "
                "pass what that serializer knows, for example ids instead of objects."
            ) from exc
        payload: dict[str, Any] = {
            "format": FORMAT,
            "task": _name(self._signature),
            "id": self.result.id,
            "content_type": content_type,
            "content_encoding": content_encoding,
        }
        if isinstance(body, bytes) and content_encoding != "utf-8":
            return payload | {"body": base64.b64encode(body).decode("ascii"), "base64": True}
        return payload | {"body": body.decode("utf-8") if isinstance(body, bytes) else body}

    def _take_due(self) -> datetime.datetime | float | None:
        """Take `eta` or `countdown` out of the options: the row waits, not a worker. Celery prefers the countdown."""
        options = self._signature.options
        eta, countdown = options.pop("eta", None), options.pop("countdown", None)
        if countdown:
            return float(countdown)
        # Celery reads a naive eta as UTC.
        return maybe_make_aware(maybe_iso8601(eta), self._app.timezone) if eta else None

    def _inherit(self) -> None:
        """As `apply_async` within a task: the parent's ids, and its priority where that is configured."""
        parent = self._app.current_worker_task
        if parent is None or self._signature.subtask_type is not None:
            return
        options = self._signature.options
        options.setdefault("root_id", parent.request.root_id or parent.request.id)
        options.setdefault("parent_id", parent.request.id)
        priority = (parent.request.delivery_info or {}).get("priority")
        if self._app.conf.task_inherit_parent_priority and priority is not None:
            options.setdefault("priority", priority)


def load_signature(payload: Any, app: Celery) -> Signature:
    """Return the signature of a stored payload, for `app`.

    Raises:
        DecodeError: malformed, of a newer release, or of a serializer that `accept_content` does not allow.
    """
    try:
        if int(payload["format"]) > FORMAT:
            raise DecodeError(
                f"The stored task has format {payload['format']}; this release reads up to {FORMAT}: upgrade the "
                "bridge."
            )
        body = payload["body"]
        if payload.get("base64"):
            body = base64.b64decode(body)
        accept = prepare_accept_content(app.conf.accept_content)
        plain = loads(body, payload["content_type"], payload["content_encoding"], accept=accept)
        signature = _rebuild(plain, app)
        for part in _published_at_once(signature):
            part.args = tuple(part.args)  # a list in JSON; shows in the message's argsrepr
        return signature
    except ContentDisallowed as exc:
        raise DecodeError(
            f"The stored task {payload.get('task')!r} is serialized as {payload['content_type']!r}, which "
            "accept_content does not allow: add it to Celery's accept_content, as its workers need it, too."
        ) from exc
    except (KombuError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DecodeError(f"The stored task cannot be read ({type(exc).__name__}: {exc}).") from exc


def publish_signature(payload: Any, app: Celery, producer: Producer, headers: Mapping[str, str] | None = None) -> None:
    """Publish a stored signature with `producer`, without retrying: a failure is for the caller to settle.

    `headers` are added to each message's. Chains and chords look for a producer of their own, in the application's
    pool; for this call they find `producer`. Not for several threads that share `app`.

    Raises:
        DecodeError: as `load_signature`; and whatever publishing raises.
    """
    signature = load_signature(payload, app)
    with _publishing_through(app, producer, headers or {}):
        signature.apply_async(producer=producer)


@contextlib.contextmanager
def _publishing_through(app: Celery, producer: Producer, headers: Mapping[str, str]) -> Iterator[None]:
    send = app.amqp.send_task_message

    def choose(given: Producer | None = None) -> contextlib.AbstractContextManager[Producer]:
        return contextlib.nullcontext(producer if given is None else given)

    @functools.wraps(send)
    def send_once(via: Producer, name: str, message: Any, *args: Any, **kwargs: Any) -> Any:
        for header, value in headers.items():
            message.headers.setdefault(header, value)
        return send(via, name, message, *args, **{**kwargs, "retry": False})

    # Instance attributes: the options that say the same would become part of the messages of a chord's body.
    app.producer_or_acquire = choose
    app.amqp.send_task_message = send_once
    try:
        yield
    finally:
        del app.producer_or_acquire
        app.amqp.send_task_message = send


def _as_signature(given: Any) -> Signature:
    if isinstance(given, chunks):
        # What its apply_async does: a group, routed as the task.
        return given.group().set(route_name=_route_name(given))
    if isinstance(given, Signature):
        return given
    if isinstance(given, Mapping) and "task" in given:
        return Signature.from_dict(dict(given))
    if isinstance(given, Task) or hasattr(given, "apply_async"):
        raise PayloadError(f"enqueue() was given the task {given.name}: pass a signature of it, {given.name}.s(…).")
    raise PayloadError(f"enqueue() was given {given!r}: expected a Celery signature, for example send_email.s(1).")


def _freeze(signature: Any) -> Any:
    """Give all tasks their ids; return the result.

    A group's own `freeze` would also flatten it, in another order than its `apply_async` does.
    """
    if signature.subtask_type != "group":
        return signature.freeze()
    results: list[Any] = []
    for part in signature.tasks:
        if part.subtask_type == "chain" and not part.tasks:
            continue
        result = _freeze(part)
        results.extend(result.results if part.subtask_type == "group" else [result])
    if len(results) == 1 and isinstance(results[0], GroupResult):
        return results[0]
    return signature.app.GroupResult(signature.options.setdefault("task_id", uuid()), results)


def _rebuild(plain: dict[str, Any], app: Celery) -> Any:
    """Return a signature from plain dicts, each part of it of `app`: Celery would leave some to the current one."""
    signature = Signature.from_dict(plain, app=app)
    parts = [signature]
    while parts:
        part = parts.pop()
        part._app = app  # noqa: SLF001 - as maybe_signature() does
        if part.subtask_type in ("chain", "group", "chord"):
            members = part.tasks
            if not isinstance(members, list):
                raise TypeError(f"the members of a {part.subtask_type} are a {type(members).__name__}")
            members[:] = [maybe_signature(member, app=app) for member in members]
            parts.extend(members)
        if part.subtask_type == "chord" and part.body is not None:
            part.body = maybe_signature(part.body, app=app)
            parts.append(part.body)
    return signature


def _copy(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return a signature as plain dicts, down to its last part; arguments are the same objects.

    The copy shares nothing that freezing changes. Lazy members are evaluated.
    """
    plain = {"args": (), "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False, **signature}
    options = plain["options"] = dict(plain["options"])
    kwargs = plain["kwargs"] = dict(plain["kwargs"])
    for name in _LINKS:
        if options.get(name) is not None:
            options[name] = [_copy_if(part) for part in maybe_list(options[name]) or ()]
    if options.get("chord") is not None:
        options["chord"] = _copy_if(options["chord"])
    for name in _MEMBERS.get(plain["subtask_type"], ()):
        kwargs[name] = [_copy_if(part) for part in _members(kwargs[name])]
    if plain["subtask_type"] == "chord":
        for part in kwargs["header"]:
            # Freezing gives each a copy of the body; publishing does so again.
            part["options"].pop("chord", None)
        kwargs["body"] = _copy_if(kwargs.get("body"))
    if isinstance(signature, (xmap, xstarmap)):
        options.setdefault("route_name", _route_name(signature))
        kwargs["task"] = _copy_if(kwargs["task"])
        kwargs["it"] = list(kwargs["it"])
    return plain


def _copy_if(part: Any) -> Any:
    return _copy(part) if isinstance(part, Mapping) else part


def _members(of: Any) -> Iterable[Any]:
    """Return the tasks of a chain, group or chord: a list, or, of a chord that was frozen, a group."""
    tasks: Iterable[Any] = of["kwargs"]["tasks"] if isinstance(of, Mapping) else of
    return tasks


def _route_name(signature: Signature) -> str | None:
    task = signature.kwargs["task"]
    return task.get("task") if isinstance(task, Mapping) else getattr(task, "name", None)


def _published_at_once(signature: Any) -> Iterator[Signature]:
    """The tasks whose messages `apply_async` sends itself; those after them are sent by workers."""
    if signature.subtask_type == "chain":
        if signature.tasks:
            yield from _published_at_once(signature.tasks[0])
    elif signature.subtask_type in ("group", "chord"):
        for part in _members(signature.tasks):
            yield from _published_at_once(part)
    else:
        yield signature


def _check_arguments(signature: Signature) -> None:
    """Refuse in the writer what `apply_async` would refuse, and make of pydantic models what it would."""
    task = _task_of(signature)
    if task is None:
        return
    if task.typing and hasattr(task, "__header__"):
        try:
            task.__header__(*signature.args, **signature.kwargs)
        except TypeError as exc:
            raise PayloadError(f"enqueue(): the arguments do not fit the task {task.name}: {exc}.") from exc
    dump = getattr(task, "_dump_pydantic_arguments", None)
    if dump is not None and signature.options.get("serializer", task.serializer) != "pickle":
        signature.args, signature.kwargs = dump(signature.args, signature.kwargs)


def _fix_expiry(signature: Signature, now: datetime.datetime) -> None:
    """Make a relative `expires` count from now, as it would have, not from when the bridge publishes."""
    expires = signature.options.get("expires")
    if expires is None:
        task = _task_of(signature)
        expires = None if task is None else task.expires
    if isinstance(expires, (int, float)):
        signature.options["expires"] = now + datetime.timedelta(seconds=expires)


def _task_of(signature: Signature) -> Any:
    """The task, or None where this process does not have it: it is sent by name then."""
    return signature.app.tasks.get(signature.task)


def _serializer(signature: Any, app: Celery) -> str:
    """The serializer that the messages will have. Different ones in one signature: pickle takes what the others do."""
    found = {
        str(part.options.get("serializer") or getattr(_task_of(part), "serializer", None) or app.conf.task_serializer)
        for part in _published_at_once(signature)
    }
    if len(found) == 1:
        return found.pop()
    return "pickle" if "pickle" in found else str(app.conf.task_serializer)


def _name(signature: Signature) -> str:
    return str(signature.task)
