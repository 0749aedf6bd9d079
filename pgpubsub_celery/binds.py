"""Whose transaction is joined: from what a user calls a bind to the connection that is in it.

Owns the reading of Session, scoped_session, Connection and their asynchronous kinds, and the refusal of what has no
transaction of the caller's: engines, and connections in autocommit. Never begins more than SQLAlchemy would at the next
statement, never flushes and never commits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine, update
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from pgpubsub_celery.drivers import sqlstate
from pgpubsub_celery.errors import BindError, NotInstalledError, PgPubSubError
from pgpubsub_celery.models import Notification

Bind: TypeAlias = "Session | scoped_session[Any] | Connection"
R = TypeVar("R")


def connection_of(bind: Any, caller: str, bind_arguments: Mapping[str, Any] | None = None) -> Connection:
    """Return the connection of the caller's transaction, which begins with its next statement if it has not yet.

    Does not flush: what is pending in a session is not needed for what is emitted, and is committed with it.

    Raises:
        BindError: `bind` has no transaction to join; says what it is and what to pass instead.
    """
    owner = session_or_connection(bind, caller)
    connection = _connection_of_session(owner, caller, bind_arguments) if isinstance(owner, Session) else owner
    if is_autocommit(connection):
        raise BindError(
            f"{caller}() was given a {_kind(bind)} in AUTOCOMMIT: each statement would be a transaction of its own, "
            "and what is emitted would not depend on your commit. Use a connection with a transaction, for example "
            "engine.begin()."
        )
    return connection


def session_or_connection(bind: Any, caller: str) -> Session | Connection:
    """Return `bind` as what holds the transaction; BindError for everything that does not."""
    if isinstance(bind, scoped_session):
        bind = bind()
    if isinstance(bind, (Session, Connection)):
        return bind
    if isinstance(bind, _async_kinds()):
        raise BindError(f"{caller}() was given an {_kind(bind)}: use `await a{caller}(…)`.")
    if isinstance(bind, Engine):
        raise BindError(
            f"{caller}() was given an Engine, which has no transaction: pass the Session or Connection in whose "
            "transaction the change is made, for example `with engine.begin() as connection`."
        )
    raise BindError(f"{caller}() was given a {_kind(bind)}: expected a Session, scoped_session or Connection.")


async def run_in(bind: Any, caller: str, function: Callable[[Any], R]) -> R:
    """Call `function` with the synchronous side of an asynchronous bind, where SQLAlchemy can await.

    Raises:
        BindError: `bind` is not an AsyncSession, async_scoped_session or AsyncConnection.
    """
    kinds = _async_kinds()
    if isinstance(bind, kinds):
        from sqlalchemy.ext.asyncio import async_scoped_session

        session: Any = bind() if isinstance(bind, async_scoped_session) else bind
        result: R = await session.run_sync(function)
        return result
    if isinstance(bind, (Session, scoped_session, Connection)):
        raise BindError(
            f"{caller}() was given a {_kind(bind)}, which is synchronous: use {caller.removeprefix('a')}(…)."
        )
    raise BindError(
        f"{caller}() was given a {_kind(bind)}: expected an AsyncSession, async_scoped_session or AsyncConnection."
    )


def is_autocommit(connection: Connection) -> bool:
    """Whether each statement of the connection is a transaction of its own; asks the driver, not the server."""
    if connection.closed:
        return False  # SQLAlchemy says it better
    return getattr(connection.connection.dbapi_connection, "autocommit", False) is True


def explain(exc: DBAPIError, caller: str, schema: str) -> PgPubSubError | None:
    """Return the error to raise from `exc` where it means that something is not installed or granted, else None.

    The statement has failed by then, and the caller's transaction with it: there is nothing to be asked any more.
    """
    state = sqlstate(exc)
    said = str(exc.orig).strip().splitlines()[0] if str(exc.orig).strip() else ""
    # undefined function, schema, table
    if state in ("42883", "3F000", "42P01"):
        return NotInstalledError(
            f"{caller}(): this package is not installed in the schema {schema!r} of this database ({said}): run "
            "`pgpubsub-bridge -A your.app install`, or name the right schema in PGPUBSUB_SCHEMA or pgpubsub_schema."
        )
    if state == "42501":
        return PgPubSubError(
            f"{caller}(): this database role may not emit ({said}): run "
            "`pgpubsub-bridge -A your.app install --grant-emit ROLE`."
        )
    return None


def _connection_of_session(session: Session, caller: str, bind_arguments: Mapping[str, Any] | None) -> Connection:
    if bind_arguments is not None:
        return session.connection(bind_arguments=dict(bind_arguments))
    try:
        # A statement that writes: sessions that send reads to a replica choose by it.
        arguments = {"mapper": Notification.__mapper__, "clause": update(Notification)}
        return session.connection(bind_arguments=arguments)
    except UnboundExecutionError as exc:
        raise BindError(
            f"{caller}() was given a Session with a database for some of its models, and none for this package's: pass "
            "bind_arguments={'mapper': YourModel}, or bind pgpubsub_celery.Notification to the database that has it."
        ) from exc


def _async_kinds() -> tuple[type, ...]:
    # Whoever has one has imported it; it needs greenlet, which not everybody has.
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return () if module is None else (module.AsyncSession, module.async_scoped_session, module.AsyncConnection)


def _kind(bind: Any) -> str:
    return bind.__name__ if isinstance(bind, type) else type(bind).__name__
