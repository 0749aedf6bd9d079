"""Which of a listener's notifications this bridge takes: one tenant's, one region's.

Owns the reading of the `listener_filter` setting and of `channel_task(filter=…)` into SQL conditions over the stored
notification. What does not meet them waits for another bridge, and is neither held, recovered nor counted by this one.
Never executes anything but the check that the conditions can be.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ClauseElement, Connection, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError, CompileError, DBAPIError

from pgpubsub_celery.channels import Channel
from pgpubsub_celery.errors import ListenerError, SettingsError
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.schema import Names
from pgpubsub_celery.statements import filter_condition

_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:\w+")
_DIALECT = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # which leaves % alone


def conditions(listeners: Mapping[int, Listener], setting: str | None) -> dict[int, str]:
    """Return the SQL conditions of those listeners that have any, by subscription.

    Raises:
        SettingsError: `listener_filter` cannot be imported or read.
        ListenerError: a listener's `filter` cannot be read.
    """
    found: dict[int, str] = {}
    for id, listener in listeners.items():
        both = [
            _general(setting, listener.channel),
            _sql(listener.filter, f"filter= of {listener.name}", ListenerError),
        ]
        wanted = [f"({one})" for one in both if one is not None]
        if wanted:
            found[id] = " AND ".join(wanted)
    return found


def check(connection: Connection, names: Names, filters: Mapping[int, str], listeners: Mapping[int, Listener]) -> None:
    """Raise ListenerError, with Postgres's reason, for a condition that cannot be evaluated."""
    for id, condition in filters.items():
        statement = f"SELECT 1 FROM {names.notification} c WHERE false{filter_condition({id: condition})}"
        try:
            connection.execute(text(statement))
        except DBAPIError as exc:
            if exc.connection_invalidated:
                raise
            raise ListenerError(
                f"The filter of {listeners[id].name} is {condition!r}, which Postgres cannot evaluate: "
                f"{one_line(exc)}. It is a condition over the columns of a stored notification, for example "
                "context->>'tenant' = 'a'."
            ) from exc


def _general(setting: str | None, channel: type[Channel]) -> str | None:
    if setting is None:
        return None
    value: Any = setting
    if _PATH.fullmatch(setting):
        module, _, name = setting.partition(":")
        try:
            value = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as exc:
            raise SettingsError(
                f"listener_filter is {setting!r}, which cannot be imported ({exc}): expected the path of a function "
                "of a channel that returns a condition, or SQL, for example \"context->>'tenant' = 'a'\"."
            ) from exc
        if callable(value) and not isinstance(value, ClauseElement):
            value = value(channel)
    return _sql(value, "listener_filter", SettingsError)


def _sql(value: Any, what: str, error: type[ListenerError | SettingsError]) -> str | None:
    """Return a condition as SQL that `text()` takes literally."""
    if value is None:
        return None
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    if isinstance(value, ClauseElement):
        try:
            value = str(value.compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True}))
        except (ArgumentError, CompileError, NotImplementedError) as exc:
            raise error(f"{what} cannot be made into SQL: {exc}") from exc
    if not isinstance(value, str) or not value.strip():
        raise error(f"{what} is {value!r}: expected SQL, an SQLAlchemy expression over Notification, or None.")
    return re.sub(r"(?<!:):(?=\w)", r"\\:", value)
