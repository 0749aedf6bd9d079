"""What waits, runs and fails, for people and monitors: counts, ages, who is connected.

Read-only, and cheap on a table of millions of rows: counts stop at a limit, ages come from the claim index. Never
decides anything.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from pgpubsub_celery.schema import Names, quote_identifier
from pgpubsub_celery.triggers import read_comment

COUNT_LIMIT = 10_000
"""Counts stop here: more than this is shown as this and a plus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListenerStatus:
    """One listener's notifications, or those of a channel without a listener. Counts are at most `COUNT_LIMIT`."""

    channel: str
    listener: str | None
    waiting: int
    """Due now."""
    delayed: int
    """Due later: a retry's time or an `eta`."""
    dispatched: int
    running: int
    held: int
    failed: int
    oldest_seconds: float | None
    """For how long the oldest due one has been due."""
    versions: tuple[str, ...] = ()
    """Database versions (Alembic revisions) that stored ones were made under, among the first `COUNT_LIMIT`."""

    @property
    def in_flight(self) -> int:
        """Published and not yet acknowledged."""
        return self.dispatched + self.running


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeStatus:
    """A connected bridge."""

    pid: int
    """Of its backend in Postgres."""
    host: str
    since: datetime.datetime
    channels: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriggerStatus:
    """A trigger of ours."""

    table: str
    """Qualified and quoted."""
    name: str
    enabled: str
    """"yes", "no", or "replica" or "always" as in ALTER TABLE … ENABLE."""
    hash: str | None
    """Of its definition; None when its comment is not ours."""


def read_listeners(connection: Connection, schema: str) -> list[ListenerStatus]:
    """Return the status of every subscription, then of channels whose notifications have no listener yet."""
    rows = connection.execute(text(listeners_sql(schema)), {"limit": COUNT_LIMIT}).mappings()
    return [ListenerStatus(**{**row, "versions": tuple(row["versions"] or ())}) for row in rows]


def listeners_sql(schema: str) -> str:
    """Return the statement of `read_listeners`, with its parameter `limit`. Uses pgpubsub_notification_claim_idx."""
    names = Names(schema)
    return _LISTENERS.format(n=names.notification, s=names.subscription)


def read_bridges(connection: Connection, schema: str) -> list[BridgeStatus]:
    """Return the bridges that are alive, by the presence that they hold."""
    names = Names(schema)
    rows = connection.execute(text(_BRIDGES.format(c=names.channel, p=names.prefix)))
    return [BridgeStatus(pid=r.pid, host=r.host, since=r.since, channels=tuple(r.channels)) for r in rows]


def read_triggers(connection: Connection, schema: str) -> list[TriggerStatus]:
    """Return the triggers of this installation, by table and name."""
    rows = connection.execute(text(_TRIGGERS), {"schema": schema})
    described = [(row, read_comment(row.description)) for row in rows]
    return [
        TriggerStatus(table=r.table_name, name=r.name, enabled=r.enabled, hash=None if told is None else told.hash)
        for r, told in described
    ]


def read_source(connection: Connection, schema: str, function: str) -> str | None:
    """Return the body of a function of ours without arguments, or None where there is none."""
    name = f"{Names(schema).prefix}{quote_identifier(function)}()"
    statement = text("SELECT p.prosrc FROM pg_catalog.pg_proc p WHERE p.oid = to_regprocedure(:name)")
    source: str | None = connection.execute(statement, {"name": name}).scalar()
    return source


def read_names(connection: Connection, schema: str) -> tuple[list[str], list[str]]:
    """Return the names of channels and of listeners that the database knows, earlier ones too."""
    names = Names(schema)
    channels = text(
        f"SELECT unnest(c.name || c.aliases) FROM {names.channel} c "
        f"UNION SELECT unnest(s.channel || s.channel_aliases) FROM {names.subscription} s ORDER BY 1"
    )
    listeners = text(f"SELECT DISTINCT unnest(s.listener || s.aliases) FROM {names.subscription} s ORDER BY 1")
    return list(connection.execute(channels).scalars()), list(connection.execute(listeners).scalars())


def read_notifications(
    connection: Connection, schema: str, condition: str, parameters: dict[str, Any], *, limit: int
) -> Sequence[Any]:
    """Return stored notifications with their listener's name, oldest first; the condition is `upkeep.Selection`'s."""
    names = Names(schema)
    statement = text(
        f"SELECT n.*, s.listener FROM {names.notification} n LEFT JOIN {names.subscription} s ON s.id = n.subscription "
        f"WHERE {condition} ORDER BY n.id LIMIT :limit"
    )
    return connection.execute(statement, {**parameters, "limit": limit}).mappings().all()


# The order is the claim index's: without it, the planner would rather look through the table for what there is little
# of. A count is of at most `limit` index entries.
_COUNT = """(SELECT count(*) FROM (
        SELECT 1 FROM {n} n WHERE n.subscription = s.id AND {condition} ORDER BY n.available_at, n.id LIMIT :limit
    ) counted)"""
_LISTENERS = (
    "SELECT s.channel, s.listener, "
    + ", ".join(
        f"{_COUNT.replace('{condition}', condition)} AS {name}"
        for name, condition in (
            ("waiting", "n.state = 'waiting' AND n.available_at <= now()"),
            ("delayed", "n.state = 'waiting' AND n.available_at > now()"),
            ("dispatched", "n.state = 'dispatched'"),
            ("running", "n.state = 'running'"),
            ("held", "n.state = 'held'"),
            ("failed", "n.state = 'failed'"),
        )
    )
    + """,
    (SELECT extract(epoch FROM now() - n.available_at)::float8 FROM {n} n
        WHERE n.subscription = s.id AND n.state = 'waiting' AND n.available_at <= now()
        ORDER BY n.available_at, n.id LIMIT 1) AS oldest_seconds,
    (SELECT array_agg(DISTINCT v.db_version) FILTER (WHERE v.db_version IS NOT NULL) FROM (
        SELECT n.db_version FROM {n} n WHERE n.subscription = s.id
        ORDER BY n.subscription, n.state, n.available_at, n.id LIMIT :limit
    ) v) AS versions
FROM {s} s
UNION ALL
SELECT n.channel, NULL, count(*) FILTER (WHERE n.available_at <= now()),
    count(*) FILTER (WHERE n.available_at > now()), 0, 0, 0, 0,
    extract(epoch FROM now() - min(n.available_at) FILTER (WHERE n.available_at <= now()))::float8,
    array_agg(DISTINCT n.db_version) FILTER (WHERE n.db_version IS NOT NULL)
FROM (
    SELECT * FROM {n} n WHERE n.subscription IS NULL
    ORDER BY n.subscription, n.state, n.available_at, n.id LIMIT :limit
) n GROUP BY n.channel
ORDER BY 1, 2
"""
)

# The presence of a channel is an advisory lock, shared among its bridges.
_BRIDGES = """
SELECT a.pid, coalesce(host(a.client_addr), 'local') AS host, a.backend_start AS since,
    array_agg(c.name ORDER BY c.name) AS channels
FROM {c} c
JOIN pg_catalog.pg_locks l ON l.locktype = 'advisory' AND l.objsubid = 1 AND l.mode = 'ShareLock' AND l.granted
    AND ((l.classid::bigint << 32) | l.objid::bigint) = {p}pgpubsub_lock_key('presence', c.name)
    AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
GROUP BY a.pid, a.client_addr, a.backend_start ORDER BY a.backend_start
"""

_TRIGGERS = """
SELECT format('%I.%I', n.nspname, c.relname) AS table_name, t.tgname AS name,
    CASE t.tgenabled WHEN 'D' THEN 'no' WHEN 'R' THEN 'replica' WHEN 'A' THEN 'always' ELSE 'yes' END AS enabled,
    d.description
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
CROSS JOIN LATERAL (SELECT coalesce(
    pg_catalog.obj_description(t.oid, 'pg_trigger'), pg_catalog.obj_description(p.oid, 'pg_proc')
)) AS d (description)
WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND p.proname LIKE 'pgpubsub\\_%' AND f.nspname = :schema
ORDER BY 1, 2
"""
