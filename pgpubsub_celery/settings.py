"""Settings: one frozen, validated value that is passed explicitly to every part.

Owns the names, defaults, units and checks of all settings and where they come from: command options
first, then `PGPUBSUB_…` environment variables, then Celery's configuration (`pgpubsub_…`). Never
read at import; `Settings.load()` reads the environment when it is called, and nothing else does.

Where an application has several databases (`databases`), these are the settings of one of them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from pgpubsub_celery.drivers import choose
from pgpubsub_celery.errors import SettingsError, did_you_mean

ENVIRONMENT_PREFIX = "PGPUBSUB_"
CELERY_PREFIX = "pgpubsub_"

DEFAULT_DATABASE = "default"
"""The alias of the database that the settings without an alias are about."""
OF_DATABASE = ("database_url", "listen_url", "schema", "session_factory")
"""Settings that each of several databases has for itself."""


def sync_url(url: str | URL, *, setting: str = "database_url") -> URL:
    """Return `url` as an SQLAlchemy URL for the driver that this package uses, whatever it was written with.

    Understands `postgres://`, `postgresql://`, and the `+psycopg`, `+asyncpg`, `+pg8000` drivers. `+psycopg` is
    psycopg 3 where that is installed; everything else is psycopg2. asyncpg's `ssl=` becomes libpq's `sslmode=`;
    SQLAlchemy's own asyncpg cache options are dropped.
    """
    try:
        if isinstance(url, str) and url.startswith("postgres://"):
            url = "postgresql://" + url.removeprefix("postgres://")
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise SettingsError(
            f"{setting} is not a database URL: expected something like 'postgresql://user:password@host:5432/name'."
        ) from None
    if parsed.get_backend_name() != "postgresql":
        raise SettingsError(
            f"{setting} names the database kind {parsed.get_backend_name()!r}: this package needs PostgreSQL, "
            "for example 'postgresql://user:password@host:5432/name'."
        )
    query = dict(parsed.query)
    ssl = query.pop("ssl", None)
    if ssl is not None and "sslmode" not in query:
        query["sslmode"] = ssl
    for asyncpg_only in ("prepared_statement_cache_size", "prepared_statement_name_func", "async_fallback"):
        query.pop(asyncpg_only, None)
    return parsed.set(drivername=choose(parsed.drivername), query=query)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, validated. Durations are seconds.

    Raises:
        SettingsError: a value is out of range or of the wrong kind; names the setting, the value, the fix.
    """

    database_url: str | None = dataclasses.field(default=None, repr=False)
    """Where the tables are. Understands `postgres://` and async drivers."""
    listen_url: str | None = dataclasses.field(default=None, repr=False)
    """A direct connection for LISTEN where `database_url` goes through pgbouncer. Default: `database_url`."""
    session_factory: str | None = None
    """Dotted path (`pkg.module:name`) of the `sessionmaker` that listeners' `session` comes from."""
    schema: str = "public"
    """The schema that holds this package's tables and functions."""
    database: str = DEFAULT_DATABASE
    """The alias of the database that this is about, where there are several."""
    databases: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Several databases by alias: a URL, or a dict of database_url, listen_url, schema, session_factory."""
    poll_interval: float = 30.0
    """Seconds between sweeps, which find whatever a doorbell missed."""
    batch_size: int = 500
    """Notifications claimed by one statement."""
    max_in_flight: int = 1000
    """Notifications of one listener published and not yet acknowledged, at most."""
    lease: float = 120.0
    """Seconds a published notification waits for its worker before it is published again."""
    lease_max: float = 3600.0
    """Seconds a lease may grow to; it doubles with each dispatch."""
    heartbeat_interval: float = 20.0
    """Seconds between lease renewals by a worker that runs a listener without `session`."""
    max_starts: int = 3
    """Runs begun and never ended (the worker died) before a notification is failed."""
    bundle_target: float = 0.1
    """Seconds of work that a bundle should carry."""
    bundle_max: int = 200
    """Notifications in one message, at most."""
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Celery task options that every listener starts from."""
    listener_filter: str | None = None
    """A condition that stored notifications must meet to be this bridge's: SQL over their columns, for example
    `context->>'tenant' = 'a'`, or the path (`pkg.module:name`) of a function of a channel that returns one, or None."""
    failed_retention: float | None = None
    """Seconds that failed notifications are kept; None keeps them until they are discarded."""
    drain_timeout: float = 30.0
    """Seconds that a stopping bridge may take to finish its batch."""
    publish_timeout: float = 10.0
    """Seconds to wait for the broker to confirm a message; after that it counts as not published."""
    health_port: int | None = None
    """Port of `listen` for `/livez`, `/readyz` and `/metrics`; 0 is any that is free. None serves nothing."""
    health_host: str = ""
    """Address of that port, and of a worker's metrics; empty for all, which Kubernetes' probes need."""
    health_file: str | None = None
    """File that `listen` renews every few seconds while its processes live, for probes without a port."""
    health_timeout: float = 60.0
    """Seconds that a bridge may be late with its next look before it counts as one that hangs."""
    worker_metrics_port: int | None = None
    """Port of a worker for `/metrics`, served by its main process for all its children."""
    worker_logformat: str | None = None
    """What a worker's log lines look like: a `%` format, or `json`; None leaves that to Celery."""

    def __post_init__(self) -> None:
        for name in ("database_url", "listen_url"):
            value = getattr(self, name)
            if value is not None:
                sync_url(value, setting=name)
        for name in ("poll_interval", "lease", "lease_max", "heartbeat_interval", "bundle_target", "publish_timeout"):
            self._number(name, above=0)
        self._number("health_timeout", above=0)
        for name in ("health_port", "worker_metrics_port"):
            if getattr(self, name) is not None:
                self._number(name, least=0, whole=True)
        self._number("drain_timeout", least=0)
        for name in ("batch_size", "max_in_flight", "max_starts", "bundle_max"):
            self._number(name, least=1, whole=True)
        if self.failed_retention is not None:
            self._number("failed_retention", above=0)
        self._check_leases()
        if not isinstance(self.schema, str) or not self.schema or len(self.schema.encode()) > 63:
            raise SettingsError(f"schema is {self.schema!r}: expected a schema name of 1 to 63 bytes.")
        if not isinstance(self.task_options, Mapping):
            raise SettingsError(f"task_options is {self.task_options!r}: expected a dict of Celery task options.")
        _check_databases(self.databases)
        if self.database != DEFAULT_DATABASE and self.database not in self.databases:
            raise _unknown_database(self.database, self.databases)

    def _check_leases(self) -> None:
        if self.lease_max < self.lease:
            raise SettingsError(
                f"lease_max is {self.lease_max:g} s, less than lease ({self.lease:g} s): raise lease_max."
            )
        if self.heartbeat_interval * 2 > self.lease:
            raise SettingsError(
                f"heartbeat_interval is {self.heartbeat_interval:g} s: with a lease of {self.lease:g} s it must be "
                f"at most {self.lease / 2:g} s, so that one missed beat does not lose the lease."
            )

    def _number(
        self, name: str, *, above: float | None = None, least: float | None = None, whole: bool = False
    ) -> None:
        value = getattr(self, name)
        kind = int if whole else (int, float)
        fits = (
            isinstance(value, kind)
            and not isinstance(value, bool)
            and not (isinstance(value, float) and not math.isfinite(value))
            and (above is None or value > above)
            and (least is None or value >= least)
        )
        if not fits:
            bound = f"above {above:g}" if above is not None else f"of at least {least:g}"
            raise SettingsError(f"{name} is {value!r}: expected a {'whole ' if whole else ''}number {bound}.")

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def load(
        cls, celery_conf: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, **options: Any
    ) -> Settings:
        """Collect the settings: `options` that are not None, then the environment, then Celery's configuration.

        Raises:
            SettingsError: a value cannot be used, or a name is not a setting; except in the environment, where others
                put names of this prefix too (Kubernetes does for a service called pgpubsub).
        """
        environ = os.environ if environ is None else environ
        names = cls.names()
        values: dict[str, Any] = {}
        texts = {name: environ.get(ENVIRONMENT_PREFIX + name.upper()) or None for name in names}
        for key, value in _celery_items(celery_conf):
            name = key[len(CELERY_PREFIX) :].lower()
            if name not in names:
                raise SettingsError(f"Celery setting {key!r} is not known.{did_you_mean(name, names)}")
            if value is not None:
                values[name] = value
        if texts["databases"] is not None:
            values["databases"] = _from_text(cls, "databases", texts["databases"])
        alias = options.get("database") or texts["database"] or values.get("database", DEFAULT_DATABASE)
        values |= _of_database(values, alias)
        if alias != DEFAULT_DATABASE:
            texts |= {name: environ.get(variable(name, alias)) or None for name in OF_DATABASE}
        for name, text in texts.items():
            # Of a service that is called pgpubsub-health, Kubernetes says PGPUBSUB_HEALTH_PORT=tcp://…
            of_service = name.endswith("_port") and (text or "").startswith(("tcp://", "udp://"))
            if text is not None and not of_service:
                values[name] = _from_text(cls, name, text)
        for name, value in options.items():
            if name not in names:
                raise SettingsError(f"{name!r} is not a setting.{did_you_mean(name, names)}")
            if value is not None:
                values[name] = value
        return cls(**values)

    def require_database_url(self) -> URL:
        """Return `database_url` by `sync_url`; SettingsError with the three places to set it when there is none."""
        if self.database_url is None and (self.database != DEFAULT_DATABASE or self.databases):
            raise SettingsError(
                f"The database {self.database!r} has no URL: set {variable('database_url', self.database)}, or name it "
                f"in Celery's pgpubsub_databases[{self.database!r}]; or choose another of "
                f"{_listed(self.databases)} with --database or PGPUBSUB_DATABASE."
            )
        if self.database_url is None:
            raise SettingsError(
                "No database is configured: set PGPUBSUB_DATABASE_URL, Celery's pgpubsub_database_url, "
                "or pass --database-url."
            )
        return sync_url(self.database_url)

    @property
    def aliases(self) -> tuple[str, ...]:
        """All databases that are configured, with this one first."""
        return tuple(dict.fromkeys((self.database, DEFAULT_DATABASE, *self.databases)))


def variable(name: str, database: str) -> str:
    """Return the environment variable of a setting that each database has for itself."""
    suffix = "" if database == DEFAULT_DATABASE else f"_{database.upper()}"
    return f"{ENVIRONMENT_PREFIX}{name.upper()}{suffix}"


def _of_database(values: Mapping[str, Any], alias: Any) -> dict[str, Any]:
    """Return what is different for one of several databases: its own settings, and nothing of the default one's.

    But for the schema, which says nothing of where the database is.
    """
    databases = values.get("databases") or {}
    _check_databases(databases)
    given = databases.get(alias, {})
    own = dict(given) if isinstance(given, Mapping) else {"database_url": given}
    if alias != DEFAULT_DATABASE:
        return {**dict.fromkeys(("database_url", "listen_url", "session_factory")), **own}
    for name in own.keys() & values.keys() - {"schema"}:
        raise SettingsError(
            f"{CELERY_PREFIX}{name} and databases[{alias!r}] both have the {name} of the database {alias!r}: leave one "
            "of them out."
        )
    return own


def _check_databases(databases: Any) -> None:
    if not isinstance(databases, Mapping):
        raise SettingsError(
            f"databases is a {type(databases).__name__}: expected a dict of URLs, or of dicts, by alias, for example "
            "{'billing': 'postgresql://user:password@host:5432/billing'}."
        )
    for alias, given in databases.items():
        where = f"databases[{alias!r}]"
        if not isinstance(alias, str) or re.fullmatch("[a-z][a-z0-9_]*", alias) is None:
            raise SettingsError(
                f"databases has the alias {alias!r}: expected a-z, 0-9 and _, beginning with a letter, for example "
                "'billing'."
            )
        if isinstance(given, (str, URL)):
            sync_url(given, setting=where)
            continue
        if not isinstance(given, Mapping):
            raise SettingsError(f"{where} is a {type(given).__name__}: expected a URL, or a dict of settings.")
        for name, value in given.items():
            if name not in OF_DATABASE:
                raise SettingsError(
                    f"{where} has {name!r}, which is not a database's own setting: expected "
                    f"{', '.join(OF_DATABASE)}.{did_you_mean(str(name), OF_DATABASE)}"
                )
            if name.endswith("_url") and value is not None:
                sync_url(value, setting=f"{where}[{name!r}]")


def _unknown_database(alias: Any, databases: Mapping[str, Any]) -> SettingsError:
    return SettingsError(
        f"There is no database {alias!r}: {_listed(databases)} is configured. Add it to pgpubsub_databases, or choose "
        f"another with --database or PGPUBSUB_DATABASE.{did_you_mean(str(alias), databases)}"
    )


def _listed(databases: Mapping[str, Any]) -> str:
    return ", ".join(repr(alias) for alias in dict.fromkeys((DEFAULT_DATABASE, *databases)))


def _celery_items(conf: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if conf is None:
        return []
    # A Celery Settings object is a chain of mappings; keys may be spelled in upper case, and in Django they usually
    # have a namespace's prefix, which `get` knows and iteration does not.
    found: list[tuple[str, Any]] = []
    for key in list(conf):
        namespace, prefix, name = key.lower().partition(CELERY_PREFIX) if isinstance(key, str) else ("", "", "")
        if prefix and not namespace:
            found.append((key, conf[key]))
        elif prefix and namespace.endswith("_") and conf.get(prefix + name) is not None:
            found.append((prefix + name, conf.get(prefix + name)))
    return found


def _from_text(cls: type[Settings], name: str, text: str) -> Any:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    kind = str(field.type)
    variable = ENVIRONMENT_PREFIX + name.upper()
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
        if kind.startswith("Mapping"):
            import json

            return json.loads(text)
    except ValueError:
        expected = {"i": "a whole number", "f": "a number", "M": "a JSON object"}[kind[0]]
        raise SettingsError(f"{variable} is {text!r}: expected {expected}.") from None
    return text
