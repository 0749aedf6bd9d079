"""What holds for a transaction, or a session's: the context of its notifications, and channels that are to be silent.

Owns two settings that the SQL functions and triggers read, `pgpubsub.context` and `pgpubsub.suppress`. Both are
always set for the transaction alone, never for the connection, which goes back to a pool (here or in pgbouncer) and
on to others.
"""

from __future__ import annotations

import contextlib
import json
import math
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction

from pgpubsub_celery.binds import connection_of, run_in, session_or_connection
from pgpubsub_celery.channels import Channel, TriggerChannel, find_channel
from pgpubsub_celery.errors import BindError, ChannelError, PayloadError
from pgpubsub_celery.schema import quote_literal
from pgpubsub_celery.tracing import with_trace

DEEPEST = 200
"""Levels of lists and dicts that are looked into, to say where something is that JSON does not have."""

_SET_CONTEXT = text("SELECT pg_catalog.set_config('pgpubsub.context', :context, true)")
_SET_SUPPRESSED = text("SELECT pg_catalog.set_config('pgpubsub.suppress', :names, true)")
_SUPPRESS = "suppress_notifications"
_SESSION_CONTEXT = "pgpubsub_context"
"""Key of `Session.info`: the context of all its transactions."""


def set_notification_context(
    bind: Any,
    context: Mapping[str, Any],
    *,
    scope: Literal["transaction", "session"] = "transaction",
    bind_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Say who or what makes the changes: every notification of the transaction carries `context`.

    What `notify(context=…)` gives is merged over it. Setting it again replaces it; `{}` removes it. Where the process
    uses OpenTelemetry, a transaction's context carries its trace along, to the changes of tables too.

    Args:
        bind: a Session, scoped_session or Connection.
        context: a JSON-compatible dict.
        scope: "transaction", until it ends (or is rolled back to an earlier savepoint), merged over the session's; or
            "session", all transactions of this `Session` object, the present one included.
        bind_arguments: as for `Session.connection`, where the session has several databases.

    Raises:
        PayloadError: the context is not a JSON-compatible dict.
        BindError: there is no transaction to join, or no Session for scope="session".
    """
    caller = "set_notification_context"
    given = dict(context) if isinstance(context, Mapping) else context
    encode_context(given, caller)
    owner = session_or_connection(bind, caller)
    if scope == "session":
        if not isinstance(owner, Session):
            raise BindError(
                f"{caller}(scope='session') was given a Connection: pass a Session, or set the context in each "
                "transaction."
            )
        if _SESSION_CONTEXT not in owner.info:
            event.listen(owner, "after_begin", _set_session_context)
        owner.info[_SESSION_CONTEXT] = given
        if not owner.in_transaction():
            return  # the next transaction begins with it
        effective = given
    elif scope == "transaction":
        given = dict(with_trace(given) or {}) if given else given
        effective = {**(owner.info.get(_SESSION_CONTEXT, {}) if isinstance(owner, Session) else {}), **given}
    else:
        raise BindError(f"{caller}(scope={scope!r}): expected 'transaction' or 'session'.")
    connection_of(bind, caller, bind_arguments).execute(
        _SET_CONTEXT, {"context": encode_context(effective, caller) or ""}
    )


async def aset_notification_context(
    bind: Any,
    context: Mapping[str, Any],
    *,
    scope: Literal["transaction", "session"] = "transaction",
    bind_arguments: Mapping[str, Any] | None = None,
) -> None:
    """As `set_notification_context`, for an AsyncSession, async_scoped_session or AsyncConnection."""
    await run_in(
        bind,
        "aset_notification_context",
        lambda sync: set_notification_context(sync, context, scope=scope, bind_arguments=bind_arguments),
    )


def encode_context(context: Any, caller: str) -> str | None:
    """Return the context as JSON, None for an empty one.

    Raises:
        PayloadError: it is not a JSON-compatible dict; says where.
    """
    if context is None or context == {}:
        return None
    if not isinstance(context, dict):
        raise PayloadError(f"{caller}(): the context is {context!r}: expected a dict, for example {{'user_id': 1}}.")
    return encode_json(context, f"{caller}(): the context")


def encode_json(value: Any, what: str) -> str:
    """Return `value` as JSON text that Postgres can store as jsonb.

    Raises:
        PayloadError: something in it is not JSON-compatible, or a character that Postgres cannot store; says where.
            Found out by the server, it would have aborted the transaction.
    """
    try:
        encoded = json.dumps(value, allow_nan=False, ensure_ascii=False)
        encoded.encode("utf-8")
        if "\\u0000" not in encoded:
            return encoded
    except (TypeError, ValueError, RecursionError):
        pass
    else:
        if _unstorable(value) is None:
            return encoded  # the six characters \u0000, not the character
    where, why = _unstorable(value) or ("", "is not JSON-compatible")
    raise PayloadError(
        f"{what}{where} {why}: only str, int, float, bool, None, and lists and dicts (with str keys) of them."
    )


def _unstorable(value: Any, where: str = "", depth: int = 0) -> tuple[str, str] | None:
    """Return where in `value` something cannot be stored, and why."""
    if depth > DEEPEST:
        return where[:60] + "…", "is nested too deeply"
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return where, f"has the key {key!r}, a {type(key).__name__}"
        parts = [(f"{where}[{key!r}]", part) for key, item in value.items() for part in (key, item)]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{where}[{position}]", item) for position, item in enumerate(value)]
    else:
        why = _unstorable_scalar(value)
        return None if why is None else (where, why)
    return next((found for place, part in parts if (found := _unstorable(part, place, depth + 1))), None)


def _unstorable_scalar(value: Any) -> str | None:
    if isinstance(value, str):
        if "\x00" in value:
            return "contains the character NUL, which Postgres cannot store"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "contains half a surrogate pair, which is no character"
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"is {value!r}, which JSON does not have"
    if value is None or isinstance(value, int):
        return None
    return f"is a {type(value).__name__}"


def _set_session_context(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    # A savepoint begins with what its transaction has.
    if not transaction.nested and session.info.get(_SESSION_CONTEXT):
        encoded = encode_context(session.info[_SESSION_CONTEXT], "set_notification_context")
        connection.execute(_SET_CONTEXT, {"context": encoded})


class suppress_notifications:  # noqa: N801  # reads as a statement: `with suppress_notifications(session, AuthorChanges):`
    """Keep the triggers of channels silent for what `bind` changes within the block, as for backfills.

    All trigger channels when none is given. Also in transactions that begin within the block. Messages are not
    concerned: who wants none does not call `notify()`. A session is flushed at both ends, so that the block's
    changes, and no others, are made within it. For an AsyncSession or AsyncConnection: `async with`.

    Args:
        bind: a Session, scoped_session or Connection.
        *channels: trigger channels, as classes or module paths.
        bind_arguments: as for `Session.connection`, where the session has several databases.

    Raises:
        BindError: there is no transaction to join.
        ChannelError: a channel is not a trigger channel.
    """

    def __init__(
        self, bind: Any, *channels: type[Channel] | str, bind_arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._bind = bind
        self._bind_arguments = bind_arguments
        self._names = _names_of(channels)

    def __enter__(self) -> None:
        self._begin(self._bind)

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._end(self._bind, failed=kind is not None)

    async def __aenter__(self) -> None:
        await run_in(self._bind, f"async with {_SUPPRESS}", self._begin)

    async def __aexit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        await run_in(self._bind, f"async with {_SUPPRESS}", lambda sync: self._end(sync, failed=kind is not None))

    def _begin(self, bind: Any) -> None:
        owner = session_or_connection(bind, _SUPPRESS)
        connection_of(owner, _SUPPRESS, self._bind_arguments)
        if isinstance(owner, Session):
            owner.flush()
        stack = _suppressed.setdefault(owner, [])
        if not stack:
            _listen(owner)
        stack.append(self._names)
        try:
            self._apply(owner)
        except BaseException:
            self._forget(owner)
            raise

    def _end(self, bind: Any, *, failed: bool) -> None:
        owner = session_or_connection(bind, _SUPPRESS)
        try:
            if isinstance(owner, Session) and not failed:
                owner.flush()
        except BaseException:
            failed = True
            raise
        finally:
            self._forget(owner)
            if owner.in_transaction():
                # In an aborted transaction this fails, as all would until the rollback that undoes the setting.
                with contextlib.suppress(*((DBAPIError, InvalidRequestError) if failed else ())):
                    self._apply(owner)

    def _apply(self, owner: Session | Connection) -> None:
        connection = connection_of(owner, _SUPPRESS, self._bind_arguments)
        connection.execute(_SET_SUPPRESSED, {"names": _setting(owner)})

    def _forget(self, owner: Session | Connection) -> None:
        stack = _suppressed[owner]
        stack.remove(self._names)
        if not stack:
            del _suppressed[owner]
            _listen(owner, stop=True)


_suppressed: weakref.WeakKeyDictionary[Session | Connection, list[tuple[str, ...]]] = weakref.WeakKeyDictionary()
"""The names that open blocks suppress. Written by the thread that uses the session or connection."""


def _names_of(channels: tuple[type[Channel] | str, ...]) -> tuple[str, ...]:
    if not channels:
        return ("*",)
    names: list[str] = []
    for given in channels:
        channel = find_channel(given) if isinstance(given, str) else given
        if not (isinstance(channel, type) and issubclass(channel, TriggerChannel)):
            raise ChannelError(
                f"suppress_notifications() was given {given!r}, which is not a trigger channel: messages are emitted "
                "by notify() alone; do not call it."
            )
        names.extend((channel.name(), *channel.aliases))
    return tuple(names)


def _setting(owner: Session | Connection) -> str:
    return "\n".join(sorted({name for names in _suppressed.get(owner, ()) for name in names}))


def _listen(owner: Session | Connection, *, stop: bool = False) -> None:
    change = event.remove if stop else event.listen
    if isinstance(owner, Session):
        change(owner, "after_begin", _suppress_in_transaction)
    else:
        change(owner, "begin", _suppress_in_begun)


def _suppress_in_transaction(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    if not transaction.nested and session in _suppressed:
        connection.execute(_SET_SUPPRESSED, {"names": _setting(session)})


def _suppress_in_begun(connection: Connection) -> None:
    # SQLAlchemy is about to begin and cannot execute: the driver's own cursor can, in the same transaction.
    cursor: Any = connection.connection.cursor()
    try:
        cursor.execute(
            f"SELECT pg_catalog.set_config('pgpubsub.suppress', {quote_literal(_setting(connection))}, true)"
        )
    finally:
        cursor.close()
