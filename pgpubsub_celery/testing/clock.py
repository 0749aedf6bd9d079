"""Time, for `drain`: what is waited for becomes due without waiting.

Owns the statements that change when a stored notification is due. Never runs anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from pgpubsub_celery.schema import Names

# The claim goes by now(), which is the beginning of the transaction: in one that a test keeps open, what was emitted
# with a countdown of nothing, or is retried at once, would never be due.
_MAKE_DUE = """
UPDATE {n} n SET available_at = now()
WHERE n.subscription = ANY (CAST(:subscriptions AS int[])) AND n.state = 'waiting'
    AND n.available_at > now() AND n.available_at <= clock_timestamp()
"""

_MAKE_NEXT_DUE = """
UPDATE {n} n SET available_at = now()
WHERE n.subscription = ANY (CAST(:subscriptions AS int[])) AND n.state = 'waiting' AND n.available_at = (
    SELECT min(o.available_at) FROM {n} o
    WHERE o.subscription = ANY (CAST(:subscriptions AS int[])) AND o.state = 'waiting'
)
"""

_WAITING = """
SELECT DISTINCT n.subscription FROM {n} n
WHERE n.subscription = ANY (CAST(:subscriptions AS int[])) AND n.state = 'waiting' AND n.available_at <= now()
"""


def make_due(connection: Connection, names: Names, subscriptions: Sequence[int]) -> int:
    """Let the transaction see as due what is due by the clock; return how many notifications."""
    return _execute(connection, _MAKE_DUE, names, subscriptions)


def make_next_due(connection: Connection, names: Names, subscriptions: Sequence[int]) -> int:
    """Make due what is due next, however far ahead; return how many notifications."""
    return _execute(connection, _MAKE_NEXT_DUE, names, subscriptions)


def waiting(connection: Connection, names: Names, subscriptions: Sequence[int]) -> list[int]:
    """Return those subscriptions that have something due."""
    statement = text(_WAITING.format(n=names.notification))
    return list(connection.execute(statement, {"subscriptions": list(subscriptions)}).scalars())


def _execute(connection: Connection, statement: str, names: Names, subscriptions: Sequence[int]) -> int:
    return connection.execute(
        text(statement.format(n=names.notification)), {"subscriptions": list(subscriptions)}
    ).rowcount
