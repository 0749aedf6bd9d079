"""Waking and sleeping: LISTEN, the door lock, and waiting for whichever comes first.

Owns the bridge's connections to Postgres and the advisory locks that writers, bridges and workers meet at
(presence, keeper, door). Never reads or changes a notification.

The doorbell in short: a commit with a pending NOTIFY takes a lock that serialises all such commits of the server,
so writers ring only when they must. A writer tries the channel's door lock, shared, until its transaction ends. While
the bridge is awake nobody holds it: granted, silent. To fall asleep the bridge takes the door exclusively, which it
gets only when no registered writer is left, looks once more, and holds it while asleep: writers are refused, and ring.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from pgpubsub_celery import drivers, prepared
from pgpubsub_celery.errors import ConnectionLostError, NotInstalledError, ReadOnlyDatabaseError
from pgpubsub_celery.schema import Names, quote_identifier

logger = logging.getLogger(__name__)


APPLICATION = "pgpubsub-bridge"


def bridge_engine(url: URL, *, names_itself: bool = False) -> Engine:
    """Return an engine for the bridge: autocommit always, no pool, dead peers noticed.

    `names_itself`: its connections' name says which process of which host it is, for `status`.
    """
    name = f"{APPLICATION} {os.getpid()}@{socket.gethostname()}" if names_itself else APPLICATION
    return create_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        # Postgres takes 63 bytes, in ASCII.
        connect_args=drivers.connect_arguments(url, name.encode("ascii", "replace").decode()[:63]),
    )


class Stopping(Protocol):
    """What tells the bridge to stop: an event that can be waited for together with sockets."""

    def is_set(self) -> bool:
        """Whether to stop."""

    def fileno(self) -> int:
        """Return what becomes readable when it is set."""


class Link:
    """The two connections of one bridge: one listens, rings and holds all locks, the other claims.

    All that lasts longer than a statement is on the first, so that the other may go through a pooler. They live and die
    together: when either is lost the bridge closes both, reconnects and starts awake, which is always safe.
    """

    def __init__(self, engine: Engine, listen_engine: Engine, schema: str, *, pooled: bool = False) -> None:
        """`pooled`: the first engine's connections may be another session for each transaction."""
        self.names = Names(schema)
        self.claims: Connection = engine.connect()
        try:
            if not pooled:
                prepared.allow(self.claims)
            self._listens: Connection = listen_engine.connect()
        except BaseException:
            self.claims.close()
            raise
        self._bell = drivers.wire(self._listens)
        self._line = drivers.wire(self.claims)
        self._kept: set[str] = set()
        self._closed: set[str] = set()

    def close(self) -> None:
        """Close both connections, whatever state they are in."""
        for connection in (self._listens, self.claims):
            if not connection.closed:
                connection.invalidate()
                connection.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_primary(self) -> None:
        """Raise ReadOnlyDatabaseError on a replica, which cannot LISTEN or claim."""
        if self.claims.execute(text("SELECT pg_is_in_recovery()")).scalar():
            raise ReadOnlyDatabaseError(
                "The database is a read-only replica (pg_is_in_recovery): point database_url at the primary."
            )

    def require_installed(self, version: int) -> Any:
        """Return the installation's id; NotInstalledError names the command to run."""
        return require_installed(self.claims, self.names.schema, version)

    # LISTEN

    def listen(self, listen_names: Sequence[str]) -> None:
        """LISTEN to the channels; autocommit, so it holds from now on."""
        for name in listen_names:
            self._listens.execute(text(f"LISTEN {quote_identifier(name)}"))

    def wait(self, seconds: float, stopping: Stopping) -> None:
        """Return when a NOTIFY has come, a stop is asked for, either connection ends, or after `seconds`.

        Raises:
            ConnectionLostError: a connection is gone. When it goes during the wait, its next use may be what raises.
        """
        with self._noticing_loss():
            if self._bell.has_heard:
                return
            # What ends a connection makes its socket readable. Asleep, nobody would notice it otherwise.
            sockets = {wire.fileno(): wire for wire in (self._bell, self._line)}
            for readable in wait([*sockets, stopping.fileno()], max(0.0, seconds)):
                if readable in sockets:
                    sockets[readable].poll()

    def rung(self) -> list[drivers.Notify]:
        """Return the notifies that have come from others."""
        with self._noticing_loss():
            self._bell.poll()
        return [notify for notify in self._bell.take() if notify.pid != self._bell.pid]

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        """Translate what the driver raises outside of a statement, when a connection is gone."""
        try:
            yield
        except self._bell.errors as exc:
            raise ConnectionLostError(f"The listening connection is lost: {exc}") from exc

    def ring(self, listen_names: Sequence[str]) -> None:
        """Ring other bridges."""
        self._listens.execute(
            text("SELECT pg_notify(name, '') FROM unnest(CAST(:names AS text[])) AS name"),
            {"names": list(listen_names)},
        )

    # Presence: who is alive for a channel

    def first_alive(self, channel: str) -> bool:
        """Whether no other bridge is alive for the channel; if so, others wait until `announce`."""
        return bool(self._locks("pg_try_advisory_lock", "presence", [channel])[channel])

    def announce(self, channel: str, *, first: bool) -> None:
        """Hold the channel's presence, shared, for as long as this link lives."""
        self._locks("pg_advisory_lock_shared", "presence", [channel])
        if first:
            self._locks("pg_advisory_unlock", "presence", [channel])

    # Keeper and door

    def keep(self, channels: Sequence[str]) -> set[str]:
        """Try to become the keeper of the channels that have none; return those that this bridge keeps."""
        wanted = [channel for channel in channels if channel not in self._kept]
        if wanted:
            granted = self._locks("pg_try_advisory_lock", "keeper", wanted)
            self._kept.update(channel for channel, lock in granted.items() if lock)
        return self._kept

    def resign(self) -> None:
        """Open the doors and be keeper of nothing, so that another bridge can be."""
        self.open_doors()
        if self._kept:
            self._locks("pg_advisory_unlock", "keeper", sorted(self._kept))
            self._kept.clear()

    @property
    def asleep(self) -> bool:
        """Whether every door that this bridge keeps is closed, so that writers ring."""
        return self._closed >= self._kept

    def close_doors(self) -> bool:
        """Try to close the doors; whether all are. Never waits: a waiting SELECT would hold a snapshot."""
        wanted = sorted(self._kept - self._closed)
        if wanted:
            granted = self._locks("pg_try_advisory_lock", "door", wanted)
            self._closed.update(channel for channel, lock in granted.items() if lock)
        return self.asleep

    def open_doors(self) -> None:
        """Let writers register silently again."""
        if self._closed:
            self._locks("pg_advisory_unlock", "door", sorted(self._closed))
            self._closed.clear()

    def _locks(self, function: str, purpose: str, channels: Sequence[str]) -> dict[str, Any]:
        rows = self._listens.execute(
            text(
                f"SELECT c AS channel, {function}({self.names.prefix}pgpubsub_lock_key(:purpose, c)) AS granted "
                "FROM unnest(CAST(:channels AS text[])) AS c"
            ),
            {"purpose": purpose, "channels": list(channels)},
        )
        return {row.channel: row.granted for row in rows}


def require_installed(connection: Connection, schema: str, version: int) -> Any:
    """Return the installation's id; NotInstalledError names the command to run."""
    table = Names(schema).installation
    if connection.execute(text("SELECT to_regclass(:table)"), {"table": table}).scalar() is None:
        raise NotInstalledError(f"The database has no table {table}: run `pgpubsub-bridge -A your.app install`.")
    row = connection.execute(text(f"SELECT id, version FROM {table}")).first()
    if row is None or row.version < version:
        raise NotInstalledError(
            f"The database has version {row.version if row else 0} of the schema, this release needs {version}: "
            "run `pgpubsub-bridge -A your.app install`."
        )
    return row.id


class Assembler:
    """Puts the chunks of unstored messages together again."""

    MAXIMUM_AGE = 60.0
    """Seconds that an incomplete message is kept; all its chunks arrive at one commit, so it is never completed."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[float, dict[int, str]]] = {}

    def add(self, payload: str) -> dict[str, Any] | None:
        """Take one NOTIFY payload; return the message when it is whole. None for a malformed one, with a warning."""
        try:
            id, number, count, body = payload.split(" ", 3)
            if int(count) == 1:
                return self._loads(body)
            now = time.monotonic()
            _, parts = self._parts.setdefault(id, (now, {}))
            parts[int(number)] = body
            if len(parts) < int(count):
                self._forget(now)
                return None
            del self._parts[id]
            return self._loads("".join(parts[i] for i in range(1, int(count) + 1)))
        except (ValueError, KeyError, RecursionError):  # any role may NOTIFY, and send what it likes
            logger.warning(
                "A NOTIFY of %s characters on one of our channels is not one of our messages; ignored", len(payload)
            )
            return None

    @staticmethod
    def _loads(body: str) -> dict[str, Any]:
        message = json.loads(body)
        if not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    def _forget(self, now: float) -> None:
        for id in [id for id, (since, _) in self._parts.items() if now - since > self.MAXIMUM_AGE]:
            del self._parts[id]
