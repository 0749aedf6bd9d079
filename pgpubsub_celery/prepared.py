"""Statements that are parsed and planned once for each connection, where a connection is a session of our own.

Owns when a statement may be prepared, and how it then is. The claim is sent with each wake-up, and planning it takes
longer than executing it. Behind a pooler that gives each transaction another session nothing may be prepared: there,
and wherever a session turns out to be another one, a statement is sent as it is. Never opens a connection.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, CursorResult, TextClause, text
from sqlalchemy.exc import DBAPIError

from pgpubsub_celery import drivers

_KEY = "pgpubsub_prepared"

_PLACEHOLDER = re.compile(r"%%|%\((\w+)\)s")

# A prepared statement that does not exist, or exists already: the session is not the one it was.
_ANOTHER_SESSION = ("26000", "42P05")


def allow(connection: Connection) -> None:
    """Let statements be prepared on a connection, in autocommit, that is one session for as long as it is open.

    Their plans are made once, for any parameters: with others each time, nothing would be saved. They are often made
    while the table is empty, when reading all of it costs nothing, and still used when it is full: never without an
    index.
    """
    connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
    connection.exec_driver_sql("SET enable_seqscan = off")
    connection.info[_KEY] = set()


class Prepared:
    """A statement, prepared where that is allowed. Stateless; may be shared by threads and processes."""

    def __init__(self, name: str, statement: TextClause) -> None:
        """`name`: an identifier. The types of all parameters must follow from the text."""
        self.statement = statement
        # Two bridges that share a session behind a pooler, against all advice, share what is the same alone.
        self.name = f"{name}_{hashlib.sha256(statement.text.encode()).hexdigest()[:12]}"
        self._texts: dict[str, tuple[str, TextClause]] = {}
        """By driver; made once, because making them takes as long as executing."""

    def execute(self, connection: Connection, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        """Execute; raises what the statement raises."""
        prepared: set[str] | None = connection.info.get(_KEY)
        if prepared is None:
            return connection.execute(self.statement, parameters)
        try:
            if connection.dialect.driver == "psycopg":
                # It has names and texts of its own for this, and keeps account of them.
                with drivers.preparing(connection):
                    return connection.execute(self.statement, parameters)
            sql, call = self.texts(connection)
            if self.name not in prepared:
                connection.exec_driver_sql(sql)
                prepared.add(self.name)
            return connection.execute(call, parameters)
        except DBAPIError as exc:
            if drivers.sqlstate(exc) not in _ANOTHER_SESSION:
                raise
            del connection.info[_KEY]
            return connection.execute(self.statement, parameters)

    def texts(self, connection: Connection) -> tuple[str, TextClause]:
        """Return what prepares it, and what executes it then."""
        driver = connection.dialect.driver
        if driver not in self._texts:
            self._texts[driver] = self._make_texts(connection)
        return self._texts[driver]

    def _make_texts(self, connection: Connection) -> tuple[str, TextClause]:
        names: list[str] = []

        def numbered(found: re.Match[str]) -> str:
            name = found[1]
            if name is None:
                return found[0]  # which the driver takes for one sign, as in any statement
            if name not in names:
                names.append(name)
            return f"${names.index(name) + 1}"

        body = _PLACEHOLDER.sub(numbered, str(self.statement.compile(dialect=connection.dialect)))
        call = f"EXECUTE {self.name} ({', '.join(f':{name}' for name in names)})"
        return f"PREPARE {self.name} AS {body}", text(call)
