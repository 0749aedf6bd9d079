"""What one worker process needs to reach Postgres: settings, statements, connections, the heartbeat.

Owns the worker's engine, the making of the `session` that listeners are given, and the thread that renews the leases of
running notifications. One for each database of an application and process; a forked child never uses its parent's
connections.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from celery import Celery
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.orm import Session

from pgpubsub_celery.drivers import connect_arguments
from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.measuring import Means
from pgpubsub_celery.roundtrips import autocommitting
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings
from pgpubsub_celery.store import Store
from pgpubsub_celery.transactions import guarding

if TYPE_CHECKING:
    from pgpubsub_celery.runs import Run

logger = logging.getLogger(__name__)

DEFERRABLE_SECONDS = 60.0

# By process, because a forked child inherits its parent's; an application that is gone leaves nothing behind.
_runtimes: weakref.WeakKeyDictionary[Celery, tuple[int, dict[str, Runtime]]] = weakref.WeakKeyDictionary()
_creating = threading.Lock()


class Runtime:
    """The connections and statements of one application in one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.schema)
        self._factory = _load_factory(settings.session_factory)
        self._engine: Engine | None = None
        self._guard: Engine | None = None
        self._autocommit: Engine | None = None
        self._installation: uuid.UUID | None = None
        self._deferrable = False
        self._deferrable_at = float("-inf")
        self._lock = threading.Lock()
        self.process = uuid.uuid4()
        """Names this process in what it measures."""
        self.means = Means()
        self.savepoints_each: dict[str, float] = {}
        """By listener: savepoints that a run needed lately. Written by whichever thread has run some."""
        self.heartbeat = Heartbeat(self)
        self.observer: Callable[[Run], object] | None = None
        """Told of each run that has ended, before it is settled: for tests."""

    @classmethod
    def of(cls, app: Celery, database: str | None = None) -> Runtime:
        """Return this process's runtime for one of the application's databases, made at first use.

        Raises:
            SettingsError: no database has this alias.
        """
        alias = database or DEFAULT_DATABASE
        pid = os.getpid()
        found = _runtimes.get(app)
        runtime = None if found is None or found[0] != pid else found[1].get(alias)
        if runtime is not None:
            return runtime
        with _creating:
            found = _runtimes.get(app)
            if found is None or found[0] != pid:
                found = _runtimes[app] = (pid, {})
            if alias not in found[1]:
                found[1][alias] = cls(Settings.load(app.conf, database=alias))
            return found[1][alias]

    def other_with(self, app: Celery, installation: uuid.UUID) -> Runtime | None:
        """Return the runtime of another of the application's databases that has this installation, or None.

        Raises:
            DBAPIError: none that can be reached has it.
        """
        unreachable: DBAPIError | None = None
        for alias in self.settings.aliases[1:]:
            try:
                other = Runtime.of(app, alias)
                if other.installation() == installation:
                    return other
            except SettingsError as exc:
                logger.debug("The database %r is left out: %s", alias, exc)
            except DBAPIError as exc:
                unreachable = exc
        if unreachable is not None:
            raise unreachable
        return None

    @property
    def engine(self) -> Engine:
        """The engine that listeners' sessions run on: the session factory's own, else one for `database_url`."""
        with self._lock:
            if self._engine is None:
                self._engine = self._make_engine()
                self._guard = guarding(self._engine)
                self._autocommit = autocommitting(self._engine)
            return self._engine

    def _make_engine(self) -> Engine:
        bound = getattr(self._factory, "kw", {}).get("bind")
        if isinstance(bound, Engine):
            # A pool opened before the fork is the parent's; this process starts with an empty one.
            bound.dispose(close=False)
            return bound
        url = self.settings.require_database_url()
        engine = create_engine(
            url,
            connect_args=connect_arguments(url, "pgpubsub-worker"),
            max_overflow=100,
        )
        event.listen(engine, "connect", _notice_dead_clients)
        event.listen(engine, "checkin", _note_idle)
        event.listen(engine, "checkout", _Awake(engine))
        return engine

    @classmethod
    @contextlib.contextmanager
    def replaced(cls, app: Celery, runtime: Runtime) -> Iterator[None]:
        """Let `of` return another runtime for `app` within the block, in all threads, whatever the database."""
        before = _runtimes.get(app)
        _runtimes[app] = (os.getpid(), dict.fromkeys(runtime.settings.aliases, runtime))
        try:
            yield
        finally:
            if before is None:
                del _runtimes[app]
            else:
                _runtimes[app] = before

    def connect(self) -> Connection:
        """Return a connection for a listener's transaction (READ COMMITTED, which the row locks rely on)."""
        return (self._guard or self._guarded()).connect()

    def _guarded(self) -> Engine:
        engine = self.engine
        return self._guard or engine

    def autocommit(self) -> contextlib.AbstractContextManager[Connection]:
        """Return a connection on which each statement is its own transaction."""
        engine = self.engine
        return (self._autocommit or engine).connect()

    def session(self, connection: Connection) -> Session:
        """Return a fresh session on `connection` whose commits and rollbacks end at a savepoint."""
        session = (self._factory or Session)(bind=connection, join_transaction_mode="create_savepoint")
        if not isinstance(session, Session):
            raise SettingsError(
                f"session_factory {self.settings.session_factory!r} made a {type(session).__name__}: "
                "listeners need a (synchronous) sqlalchemy.orm.Session."
            )
        return session

    def installation(self) -> uuid.UUID:
        """Return the id of the installation in this database; read once."""
        if self._installation is None:
            with self.autocommit() as connection:
                self._installation = self.store.installation(connection)
        return self._installation

    def has_deferrable(self, connection: Connection) -> bool:
        """Whether the database has constraints that can be checked at COMMIT only; looked up once a minute."""
        now = time.monotonic()
        if now - self._deferrable_at > DEFERRABLE_SECONDS:
            self._deferrable = self.store.has_deferrable(connection)
            self._deferrable_at = now
        return self._deferrable

    def ring(self, connection: Connection, channels: Iterable[str]) -> None:
        """Ring the doorbell of stored channels for rows made waiting in this transaction."""
        for channel in channels:
            self.store.ring(connection, channel)


class Heartbeat:
    """Renews the leases of this process's running notifications, from one thread.

    `_leases` is written by the threads that run listeners and read by the heartbeat's, under `_lock`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._leases: dict[int, tuple[uuid.UUID, float]] = {}
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, ids: Iterable[int], owner: uuid.UUID, lease: float) -> None:
        """Renew these rows, `lease` seconds at a time, until they are removed."""
        with self._lock:
            self._leases.update((id, (owner, lease)) for id in ids)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="pgpubsub-heartbeat", daemon=True)
                self._thread.start()
        self._wanted.set()

    def remove(self, id: int) -> None:
        """Renew this row no more."""
        with self._lock:
            self._leases.pop(id, None)

    def _beat(self) -> None:
        interval = self._runtime.settings.heartbeat_interval
        pause = threading.Event()
        while True:
            self._wanted.wait()
            pause.wait(interval)
            with self._lock:
                leases = dict(self._leases)
                if not leases:
                    self._wanted.clear()
                    continue
            try:
                with self._runtime.autocommit() as connection:
                    self._runtime.store.renew(connection, leases)
            except DBAPIError as exc:
                logger.warning("Renewing %s lease(s) failed, trying again in %g s: %s", len(leases), interval, exc.orig)
            except Exception:
                logger.exception("Renewing %s lease(s) failed, trying again in %g s", len(leases), interval)


def _load_factory(path: str | None) -> Any:
    if path is None:
        return None
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise SettingsError(
            f"session_factory is {path!r}, which cannot be imported ({exc}): "
            "expected the dotted path of a sessionmaker, for example 'blog.db:Session'."
        ) from exc


IDLE_SECONDS = 1.0
"""Connections that were in the pool for longer are tried before they are used; a round trip each time costs more than
the retry of a first statement on a dead one."""


class _Awake:
    """Of a pool: replaces connections that died while they were idle."""

    def __init__(self, engine: Engine) -> None:
        self._dialect = engine.dialect

    def __call__(self, connection: Any, record: Any, _: object) -> None:
        idle_since = record.info.get("pgpubsub_idle_since")
        if idle_since is None or time.monotonic() - idle_since <= IDLE_SECONDS:
            return
        try:
            alive = self._dialect.do_ping(connection)
        except self._dialect.loaded_dbapi.Error:
            alive = False
        if not alive:
            raise DisconnectionError("the connection died while it was idle")


def _note_idle(_: object, record: Any) -> None:
    record.info["pgpubsub_idle_since"] = time.monotonic()


def _notice_dead_clients(connection: Any, _: object) -> None:
    # A killed worker's query would hold its rows until it ends; the server then looks every 2 s instead. Not every
    # platform's server can: those keep the default.
    cursor = connection.cursor()
    try:
        cursor.execute("SET client_connection_check_interval = '2s'")
        connection.commit()
    except connection.Error:
        connection.rollback()
    finally:
        cursor.close()
