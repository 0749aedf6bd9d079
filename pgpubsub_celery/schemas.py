"""Which schema this package's functions are in, in the database that a caller's connection is of.

Owns the answer from the settings of the current application, read once for each, and what tells one of several
databases from the others: never the connection's address, which a pooler may hide. Never asks the database.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from celery import _state
from sqlalchemy import Connection

from pgpubsub_celery.channels import EVERY_DATABASE, Channel, databases_of
from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings

DATABASE_OPTION = "pgpubsub_database"
"""An execution option of connections and engines: the alias of their database, where nothing else tells it."""

_schemas: weakref.WeakKeyDictionary[Any, Mapping[str, str]] = weakref.WeakKeyDictionary()
_schemas_without_app: Mapping[str, str] | None = None


def current_schema(database: str = DEFAULT_DATABASE) -> str:
    """Return the schema of the functions: PGPUBSUB_SCHEMA, or what the current Celery application has configured.

    Read once for each application, and for the process without one.
    """
    schemas = _current_schemas()
    return schemas[database if database in schemas else DEFAULT_DATABASE]


def schema_for(channels: Iterable[type[Channel]], connection: Connection, caller: str) -> str:
    """Return the schema of the functions in the database that a connection is of.

    Which of several databases that is, a connection does not say; where their schemas differ, its execution option or
    the channels do.

    Raises:
        SettingsError: they do not, either.
    """
    schemas = _current_schemas()
    if len(set(schemas.values())) == 1:
        return schemas[DEFAULT_DATABASE]
    named = connection.get_execution_options().get(DATABASE_OPTION)
    if named is not None:
        return current_schema(named)
    aliases = {alias for channel in channels for alias in databases_of(channel)}
    found = {current_schema(alias) for alias in aliases}
    if len(found) == 1 and EVERY_DATABASE not in aliases:
        return found.pop()
    told = ", ".join(f"{alias!r}: {schema!r}" for alias, schema in schemas.items())
    raise SettingsError(
        f"{caller}(): the databases have different schemas ({told}), and nothing tells which of them the connection is "
        f"of: pass an engine with create_engine(…, execution_options={{{DATABASE_OPTION!r}: ALIAS}})."
    )


def _current_schemas() -> Mapping[str, str]:
    global _schemas_without_app
    # get_current_app() would make one where there is none: a writer need not have one.
    app = _state._tls.current_app or _state.default_app  # noqa: SLF001
    if app is None:
        if _schemas_without_app is None:
            _schemas_without_app = _read_schemas(None)
        return _schemas_without_app
    found = _schemas.get(app)
    if found is None:
        found = _schemas[app] = _read_schemas(app.conf)
    return found


def _read_schemas(conf: Any) -> Mapping[str, str]:
    aliases = Settings.load(conf, database=DEFAULT_DATABASE).aliases
    return {alias: Settings.load(conf, database=alias).schema for alias in aliases}
