"""Emit: what a writer calls to have a notification stored, or sent, if and only if its transaction commits.

Owns `notify`, `notify_many`, `enqueue` and their asynchronous twins: from a message or a Celery signature to one
statement on the caller's connection. Everything else is the database function's (`schema`), which psql and other
languages share. Never commits, never flushes, never touches a broker.

The statement that emits is an INSERT like the writer's own: it waits for nobody. If it fails, because the package is
not installed, say, Postgres has aborted the transaction, as with any failed statement.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import BindParameter, Boolean, Connection, DateTime, Float, Text, TextClause, bindparam, text
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import announcements
from pgpubsub_celery.binds import connection_of, explain, run_in, session_or_connection
from pgpubsub_celery.channels import (
    EVERY_DATABASE,
    Channel,
    TriggerChannel,
    check_declared,
    find_channel,
)
from pgpubsub_celery.errors import ChannelError, PayloadError
from pgpubsub_celery.listeners import MESSAGE, Listener, register_listener
from pgpubsub_celery.payload import build_message, encode_message
from pgpubsub_celery.schema import Names
from pgpubsub_celery.schemas import current_schema, schema_for
from pgpubsub_celery.scopes import (
    aset_notification_context,
    encode_context,
    encode_json,
    set_notification_context,
    suppress_notifications,
)
from pgpubsub_celery.signatures import Prepared, load_signature, publish_signature
from pgpubsub_celery.tracing import emitting, with_trace

__all__ = [
    "ENQUEUE_LISTENER",
    "EnqueuedTask",
    "aenqueue",
    "anotify",
    "anotify_many",
    "aset_notification_context",
    "current_schema",
    "enqueue",
    "load_signature",
    "notify",
    "notify_many",
    "publish_signature",
    "set_notification_context",
    "suppress_notifications",
]

BATCH = 2_000
"""Payloads in one statement of `notify_many`, at most."""
BATCH_CHARACTERS = 4_000_000
BATCH_CHANNELS = 32
LONGEST_COUNTDOWN = 100 * 366 * 86_400.0


@dataclasses.dataclass
class EnqueuedTask(Channel):
    """The built-in channel of `enqueue`: its payload is a Celery signature, its listener the bridge itself."""

    channel_name = "pgpubsub.enqueue"
    database = EVERY_DATABASE
    lock_notifications = True
    acknowledge = "published"


ENQUEUE_LISTENER = Listener(
    name="pgpubsub.enqueue", channel=EnqueuedTask, operations=(MESSAGE,), fields=(), injected=frozenset()
)
"""Not a task: the bridge publishes the payload."""
register_listener(ENQUEUE_LISTENER)


def notify(
    bind: Any,
    message_or_channel: Channel | type[Channel] | str,
    /,
    *,
    eta: datetime.datetime | None = None,
    countdown: float | datetime.timedelta | None = None,
    context: Mapping[str, Any] | None = None,
    bind_arguments: Mapping[str, Any] | None = None,
    **fields: Any,
) -> int:
    """Emit one message in the caller's transaction; uses it as it is, never flushes and never commits.

    Args:
        bind: a Session, scoped_session or Connection. A session that has no transaction yet begins one.
        message_or_channel: a message, or its channel (class or module path) with the fields as keyword arguments.
        eta: for stored channels: not before this time (time zone aware).
        countdown: for stored channels: not before so many seconds from now, by the database's clock.
        context: a JSON-compatible dict that listeners can see; merged over `set_notification_context`'s.
        bind_arguments: as for `Session.connection`, where a session has several databases.
        **fields: of the message, where its channel was given.

    Returns:
        The number of notifications stored: one for each listener of the channel (one in all while it has none); 0 for
        channels without `lock_notifications`, whose messages are sent and not stored.

    Raises:
        PayloadError: a field, `eta`, `countdown` or `context` does not fit; nothing has been sent to the database.
        ChannelError: a trigger channel (its table emits), or `eta` for an unstored one.
        BindError: `bind` has no transaction to join.
        NotInstalledError: the database lacks this package's functions; the transaction is aborted.
    """
    message = _as_message(message_or_channel, fields)
    return _emit(bind, "notify", [message], eta, countdown, context, bind_arguments)


def notify_many(
    bind: Any,
    messages: Iterable[Channel],
    /,
    *,
    eta: datetime.datetime | None = None,
    countdown: float | datetime.timedelta | None = None,
    context: Mapping[str, Any] | None = None,
    bind_arguments: Mapping[str, Any] | None = None,
) -> int:
    """Emit messages, of one or several channels, in one round trip for each two thousand.

    All are checked before the first is sent. The messages of one channel keep their order. Arguments, result and errors
    are those of `notify`.
    """
    return _emit(
        bind, "notify_many", [_as_message(message, {}) for message in messages], eta, countdown, context, bind_arguments
    )


def enqueue(
    bind: Any,
    signature: Any,
    /,
    *,
    eta: datetime.datetime | None = None,
    countdown: float | datetime.timedelta | None = None,
    context: Mapping[str, Any] | None = None,
    bind_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Send a Celery task when the caller's transaction commits, and only then: `apply_async()` for transactions.

    Any signature: a task's, chain, group, chord, with all their options and links. The bridge publishes it as the
    signature's own `apply_async()` would have. What fires it later, `eta` or `countdown` (here, or the signature's
    own), is waited for in the table, not in a worker.

    Returns:
        What `apply_async()` returns: the `AsyncResult` (of a group its `GroupResult`), with the ids that the tasks
        will have.

    Raises:
        PayloadError: not a signature, or arguments that do not fit the task or its serializer.
        BindError, NotInstalledError: as `notify`.
    """
    session_or_connection(bind, "enqueue")
    prepared = Prepared(signature)
    due = _due("enqueue", eta, countdown)
    if due == (None, None):
        own = prepared.due
        due = (own, None) if isinstance(own, datetime.datetime) else _due("enqueue", None, own)
    with emitting("enqueue", lambda: (EnqueuedTask.name(),), 1):
        _send(
            connection_of(bind, "enqueue", bind_arguments),
            "enqueue",
            [_Group(EnqueuedTask, [encode_json(prepared.payload(), "enqueue(): the signature")])],
            due,
            encode_context(_plain(context), "enqueue"),
        )
    announcements.emitted((EnqueuedTask,))
    return prepared.result


async def anotify(
    bind: Any,
    message_or_channel: Channel | type[Channel] | str,
    /,
    *,
    eta: datetime.datetime | None = None,
    countdown: float | datetime.timedelta | None = None,
    context: Mapping[str, Any] | None = None,
    bind_arguments: Mapping[str, Any] | None = None,
    **fields: Any,
) -> int:
    """As `notify`, for an AsyncSession, async_scoped_session or AsyncConnection."""
    message = _as_message(message_or_channel, fields)
    return await run_in(
        bind,
        "anotify",
        lambda sync: _emit(sync, "anotify", [message], eta, countdown, context, bind_arguments),
    )


async def anotify_many(
    bind: Any,
    messages: Iterable[Channel],
    /,
    *,
    eta: datetime.datetime | None = None,
    countdown: float | datetime.timedelta | None = None,
    context: Mapping[str, Any] | None = None,
    bind_arguments: Mapping[str, Any] | None = None,
) -> int:
    """As `notify_many`, for an AsyncSession, async_scoped_session or AsyncConnection."""
    checked = [_as_message(message, {}) for message in messages]
    return await run_in(
        bind,
        "anotify_many",
        lambda sync: _emit(sync, "anotify_many", checked, eta, countdown, context, bind_arguments),
    )


async def aenqueue(
    bind: Any,
    signature: Any,
    /,
    *,
    eta: datetime.datetime | None = None,
    countdown: float | datetime.timedelta | None = None,
    context: Mapping[str, Any] | None = None,
    bind_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """As `enqueue`, for an AsyncSession, async_scoped_session or AsyncConnection."""
    return await run_in(
        bind,
        "aenqueue",
        lambda sync: enqueue(
            sync, signature, eta=eta, countdown=countdown, context=context, bind_arguments=bind_arguments
        ),
    )


@dataclasses.dataclass
class _Group:
    """Payloads of one channel, as JSON texts, that go in one call of the database's function."""

    channel: type[Channel]
    payloads: list[str]


def _emit(bind: Any, caller: str, messages: list[Channel], *options: Any) -> int:
    with emitting(caller, lambda: {type(message).name() for message in messages}, len(messages)):
        return _emit_all(bind, caller, messages, *options)


def _emit_all(
    bind: Any,
    caller: str,
    messages: list[Channel],
    eta: datetime.datetime | None,
    countdown: float | datetime.timedelta | None,
    context: Mapping[str, Any] | None,
    bind_arguments: Mapping[str, Any] | None,
) -> int:
    session_or_connection(bind, caller)
    due = _due(caller, eta, countdown)
    encoded_context = encode_context(_plain(context), caller)
    payloads: list[tuple[type[Channel], str]] = []
    for message in messages:
        channel = type(message)
        if due != (None, None) and not channel.lock_notifications:
            raise ChannelError(
                f"{caller}(): {channel.name()} was given {'countdown' if eta is None else 'eta'}, but its messages are "
                "not stored, so that nothing can wait: set lock_notifications = True on it, or leave that out."
            )
        payloads.append((channel, encode_json(encode_message(message), f"{caller}(): {channel.name()}")))
    if not payloads:
        return 0
    connection = connection_of(bind, caller, bind_arguments)
    stored = sum(_send(connection, caller, groups, due, encoded_context) for groups in _batches(payloads))
    announcements.emitted(channel for channel, _ in payloads)
    return stored


def _batches(payloads: list[tuple[type[Channel], str]]) -> Iterator[list[_Group]]:
    """What goes in each statement: bounded in payloads, characters and channels."""
    groups: dict[type[Channel], _Group] = {}
    count = characters = 0
    for channel, payload in payloads:
        full = count >= BATCH or characters + len(payload) > BATCH_CHARACTERS
        if groups and (full or (channel not in groups and len(groups) >= BATCH_CHANNELS)):
            yield list(groups.values())
            groups, count, characters = {}, 0, 0
        groups.setdefault(channel, _Group(channel, [])).payloads.append(payload)
        count += 1
        characters += len(payload)
    yield list(groups.values())


def _send(
    connection: Connection,
    caller: str,
    groups: list[_Group],
    due: tuple[datetime.datetime | None, float | None],
    context: str | None,
) -> int:
    schema = schema_for([group.channel for group in groups], connection, caller)
    values: dict[str, Any] = {"eta": due[0], "countdown": due[1], "context": context}
    for position, group in enumerate(groups):
        values[f"channel_{position}"] = group.channel.name()
        values[f"payloads_{position}"] = f"[{','.join(group.payloads)}]"
        values[f"stored_{position}"] = group.channel.lock_notifications
        values[f"doorbell_{position}"] = group.channel.listen_safe_name()
    statement = _statement(schema, len(groups), isinstance(connection.get_transaction(), TwoPhaseTransaction))
    try:
        return int(connection.execute(statement, values).scalar_one())
    except DBAPIError as exc:
        explained = explain(exc, caller, schema)
        if explained is None:
            raise
        raise explained from exc


@functools.lru_cache(maxsize=64)
def _statement(schema: str, groups: int, prepared: bool) -> TextClause:
    """Stores, and rings or sends, for each group; INSERTs only, no lock that others wait for.

    `prepared`: the transaction is going to be prepared, which Postgres refuses once it has notified.
    """
    # A countdown is from now, not from the beginning of a transaction that may have been open for long.
    due = (
        "coalesce(CAST(:eta AS timestamptz), "
        "pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => CAST(:countdown AS float8)))"
    )
    calls: list[str] = []
    parameters: list[BindParameter[Any]] = [
        bindparam("eta", type_=DateTime(timezone=True)),
        bindparam("countdown", type_=Float()),
    ]
    parameters.append(bindparam("context", type_=Text()))
    for n in range(groups):
        calls.append(
            f"{Names(schema).prefix}pgpubsub_emit(CAST(:channel_{n} AS text), CAST(:payloads_{n} AS jsonb), {due}, "
            f"CAST(:context AS jsonb), CAST(:stored_{n} AS boolean), CAST(:doorbell_{n} AS text))"
        )
        parameters += [bindparam(f"{name}_{n}", type_=Text()) for name in ("channel", "payloads", "doorbell")]
        parameters.append(bindparam(f"stored_{n}", type_=Boolean()))
    first = " FROM (SELECT pg_catalog.set_config('pgpubsub.notify', 'off', true) OFFSET 0) quiet" if prepared else ""
    return text(f"SELECT {' + '.join(calls)}{first}").bindparams(*parameters)


def _as_message(given: Any, fields: Mapping[str, Any]) -> Channel:
    channel = find_channel(given) if isinstance(given, str) else given if isinstance(given, type) else type(given)
    if not issubclass(channel, Channel):
        raise ChannelError(
            f"notify() was given {given!r}: expected a message, or its channel as a class or module path with the "
            "fields."
        )
    if issubclass(channel, TriggerChannel):
        raise ChannelError(
            f"notify() was given {channel.name()}, a trigger channel: its table emits when it is changed. Change the "
            "table, or declare a Channel for the message."
        )
    if channel is EnqueuedTask:
        raise ChannelError("notify() was given the channel of enqueue(): call enqueue(bind, signature).")
    check_declared(channel)
    if isinstance(given, Channel):
        if fields:
            raise PayloadError(
                f"notify() was given a message of {channel.name()} and fields ({', '.join(fields)}): pass the message "
                "alone, or its class with the fields."
            )
        return given
    return build_message(channel, fields)


def _due(
    caller: str, eta: datetime.datetime | None, countdown: float | datetime.timedelta | None
) -> tuple[datetime.datetime | None, float | None]:
    """Return when, as a time or as seconds from now; both None for at once."""
    if eta is not None and countdown is not None:
        raise PayloadError(f"{caller}(): eta and countdown were both given: pass one.")
    if eta is not None:
        if not isinstance(eta, datetime.datetime):
            raise PayloadError(f"{caller}(): eta is {eta!r}: expected a datetime.")
        if eta.utcoffset() is None:
            raise PayloadError(
                f"{caller}(): eta is {eta!r}, which has no time zone: pass an aware datetime, for example "
                "datetime.now(timezone.utc) + timedelta(hours=1)."
            )
        return eta, None
    if countdown is None:
        return None, None
    seconds = countdown.total_seconds() if isinstance(countdown, datetime.timedelta) else countdown
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        raise PayloadError(f"{caller}(): countdown is {countdown!r}: expected seconds as a number, or a timedelta.")
    if not 0 <= seconds <= LONGEST_COUNTDOWN:
        raise PayloadError(f"{caller}(): countdown is {seconds:g} s: expected 0 to {LONGEST_COUNTDOWN:g} s.")
    return None, float(seconds)


def _plain(context: Any) -> Any:
    if context is not None and not isinstance(context, Mapping):
        return context  # refused by whoever encodes it
    traced = with_trace(context)
    return None if traced is None else dict(traced)
