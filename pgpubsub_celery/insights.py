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
from pgpubsub_celery.wakeups import APPLICATION

COUNT_LIMIT = 10_000
"""Counts stop here: more than this is shown as this and a plus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListenerCounts:
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
    run_seconds: float | None
    """Mean seconds of a run, as worker processes have measured it within the last hour; None where none has."""
    per_second: float | None
    """Runs in a second, as workers have counted them lately; None where they have told nothing for 15 s."""

    @property
    def in_flight(self) -> int:
        """Published and not yet acknowledged."""
        return self.dispatched + self.running


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListenerStatus(ListenerCounts):
    """The same, and why it is so."""

    overdue: int
    """Dispatched, and their lease ran out some time ago: with a bridge connected, a run holds them that does not end.
    (Else the bridge would have published them again.)"""
    running_seconds: float | None
    """How long ago the oldest of those running was stored, retried ones left out. Of up to `COUNT_LIMIT` of them."""
    last_error: str | None
    """Of the failed one that was stored last, in one line."""
    bridges: int
    """How many are alive for its channel."""
    asleep: bool
    """The channel's door is closed: a bridge sleeps until somebody rings."""
    versions: tuple[str, ...] = ()
    """Database versions (Alembic revisions) that stored ones were made under, among the first `COUNT_LIMIT`."""

    @property
    def doorbell_seconds(self) -> float | None:
        """How long the doorbell has gone unheard: something is due, none is in flight, and the bridge sleeps.

        None while no bridge sleeps, for then nobody has to ring.
        """
        if not self.asleep:
            return None
        return (self.oldest_seconds or 0.0) if self.waiting and not self.in_flight else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeStatus:
    """A connected bridge."""

    pid: int
    """Of its backend in Postgres."""
    host: str
    """As Postgres sees it."""
    process: str | None
    """As it calls itself: its process's id, @, its host's name."""
    since: datetime.datetime
    channels: tuple[str, ...]
    """The stored ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTransaction:
    """A transaction of a worker that has been open for long."""

    pid: int
    host: str
    seconds: float


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


def read_counts(connection: Connection, schema: str) -> list[ListenerCounts]:
    """Return what is counted of every subscription, then of channels whose notifications have no listener yet."""
    rows = connection.execute(text(counts_sql(schema)), {"limit": COUNT_LIMIT}).mappings()
    return [ListenerCounts(**row) for row in rows]


def counts_sql(schema: str) -> str:
    """Return the statement of `read_counts`, with its parameter `limit`. Uses pgpubsub_notification_claim_idx."""
    names = Names(schema)
    return _COUNTS.format(n=names.notification, s=names.subscription, t=names.run_time)


def read_listeners(connection: Connection, schema: str) -> list[ListenerStatus]:
    """Return the status of every subscription, then of channels whose notifications have no listener yet."""
    rows = connection.execute(text(listeners_sql(schema)), {"limit": COUNT_LIMIT}).mappings().all()
    doors = _read_doors(connection, schema)
    nobody = (0, False)
    return [
        ListenerStatus(
            **{**row, "versions": tuple(row["versions"] or ())},
            bridges=doors.get(row["channel"], nobody)[0],
            asleep=doors.get(row["channel"], nobody)[1],
        )
        for row in rows
    ]


def listeners_sql(schema: str) -> str:
    """Return the statement of `read_listeners`, with its parameter `limit`. Uses pgpubsub_notification_claim_idx."""
    names = Names(schema)
    return _LISTENERS.format(n=names.notification, s=names.subscription, t=names.run_time)


def _read_doors(connection: Connection, schema: str) -> dict[str, tuple[int, bool]]:
    """Return by channel how many bridges are alive for it, and whether its door is closed."""
    names = Names(schema)
    rows = connection.execute(text(_DOORS.format(c=names.channel, p=names.prefix)))
    return {row.name: (row.bridges, row.asleep) for row in rows}


def read_bridges(connection: Connection, schema: str) -> list[BridgeStatus]:
    """Return the bridges that are connected: by the presence that they hold, or by what their connection is called.

    The latter are those of channels that are not stored, of any installation in this database.
    """
    names = Names(schema)
    statement = text(_BRIDGES.format(c=names.channel, p=names.prefix))
    rows = connection.execute(statement, {"application": APPLICATION})
    return [
        BridgeStatus(pid=r.pid, host=r.host, process=r.process, since=r.since, channels=tuple(r.channels)) for r in rows
    ]


def read_long_transactions(connection: Connection, seconds: float) -> list[LongTransaction]:
    """Return the workers' transactions that have been open for longer; of workers whose engine is ours."""
    rows = connection.execute(_LONG_TRANSACTIONS, {"seconds": seconds})
    return [LongTransaction(pid=r.pid, host=r.host, seconds=r.seconds) for r in rows]


def read_queue_usage(connection: Connection) -> float:
    """Return how full Postgres's queue of notifications is, from 0 to 1: it fills while a listener does not read."""
    return float(connection.execute(text("SELECT pg_notification_queue_usage()")).scalar_one())


def read_deleted(connection: Connection, schema: str) -> int:
    """Return how many notifications have been deleted since the server's statistics began: acknowledged, mostly."""
    names = Names(schema)
    statement = text("SELECT pg_stat_get_tuples_deleted(to_regclass(:table))")
    return int(connection.execute(statement, {"table": names.notification}).scalar_one() or 0)


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
    connection: Connection,
    schema: str,
    condition: str,
    parameters: dict[str, Any],
    *,
    limit: int,
    after: int | None = None,
    newest: bool = False,
) -> Sequence[Any]:
    """Return stored notifications with their listener's name; the condition is `upkeep.Selection`'s.

    In the order of their ids, or against it with `newest`; beginning after the one with the id `after` in that order.
    """
    names = Names(schema)
    order, beyond = ("DESC", "<") if newest else ("ASC", ">")
    page = f"AND n.id {beyond} :after " if after is not None else ""
    statement = text(
        f"SELECT n.*, s.listener FROM {names.notification} n LEFT JOIN {names.subscription} s ON s.id = n.subscription "
        f"WHERE {condition} {page}ORDER BY n.id {order} LIMIT :limit"
    )
    more = {"limit": limit} if after is None else {"limit": limit, "after": after}
    return connection.execute(statement, {**parameters, **more}).mappings().all()


# The order is the claim index's: without it, the planner would rather look through the table for what there is little
# of. A count is of at most `limit` index entries.
_COUNT = """(SELECT count(*) FROM (
        SELECT 1 FROM {n} n WHERE n.subscription = s.id AND {condition} ORDER BY n.available_at, n.id LIMIT :limit
    ) counted)"""
_COUNTED = (
    "s.channel, s.listener, "
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
    (SELECT sum(t.mean_seconds * t.runs) / sum(t.runs) FROM {t} t
        WHERE t.subscription = s.id AND t.measured_at > now() - interval '1 hour')::float8 AS run_seconds,
    (SELECT sum(t.per_second) FROM {t} t
        WHERE t.subscription = s.id AND t.measured_at > now() - interval '15 s')::float8 AS per_second"""
)
_REASONS = (
    ", "
    + _COUNT.replace("{condition}", "n.state = 'dispatched' AND n.available_at < now() - interval '10 s'")
    + """ AS overdue,
    (SELECT max(extract(epoch FROM now() - greatest(r.created_at, r.recovered_at)))::float8 FROM (
        SELECT n.created_at, n.recovered_at, n.retries FROM {n} n WHERE n.subscription = s.id AND n.state = 'running'
        ORDER BY n.available_at, n.id LIMIT :limit
    ) r WHERE r.retries = 0) AS running_seconds,
    (SELECT n.error FROM {n} n WHERE n.subscription = s.id AND n.state = 'failed'
        ORDER BY n.available_at DESC, n.id DESC LIMIT 1) AS last_error,
    (SELECT array_agg(DISTINCT v.db_version) FILTER (WHERE v.db_version IS NOT NULL) FROM (
        SELECT n.db_version FROM {n} n WHERE n.subscription = s.id
        ORDER BY n.subscription, n.state, n.available_at, n.id LIMIT :limit
    ) v) AS versions"""
)
_ORPHANS = """
FROM {s} s
UNION ALL
SELECT n.channel, NULL, count(*) FILTER (WHERE n.available_at <= now()),
    count(*) FILTER (WHERE n.available_at > now()), 0, 0, 0, 0,
    extract(epoch FROM now() - min(n.available_at) FILTER (WHERE n.available_at <= now()))::float8, NULL, NULL{more}
FROM (
    SELECT * FROM {n} n WHERE n.subscription IS NULL
    ORDER BY n.subscription, n.state, n.available_at, n.id LIMIT :limit
) n GROUP BY n.channel
ORDER BY 1, 2
"""
_COUNTS = "SELECT " + _COUNTED + _ORPHANS.replace("{more}", "")
_LISTENERS = (
    "SELECT "
    + _COUNTED
    + _REASONS
    + _ORPHANS.replace(
        "{more}", ", 0, NULL, NULL, array_agg(DISTINCT n.db_version) FILTER (WHERE n.db_version IS NOT NULL)"
    )
)

# Locks of bridges on channels: presence is shared among them, the door is its keeper's alone while it sleeps.
_HELD = """
    SELECT c.name, l.pid FROM {c} c
    JOIN pg_catalog.pg_locks l ON l.locktype = 'advisory' AND l.objsubid = 1 AND l.mode = '{mode}' AND l.granted
        AND ((l.classid::bigint << 32) | l.objid::bigint) = {p}pgpubsub_lock_key('{purpose}', c.name)
        AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
"""
_PRESENCE = _HELD.replace("{mode}", "ShareLock").replace("{purpose}", "presence")
_CLOSED = _HELD.replace("{mode}", "ExclusiveLock").replace("{purpose}", "door")

_DOORS = f"""
WITH present AS MATERIALIZED ({_PRESENCE}), closed AS MATERIALIZED ({_CLOSED})
SELECT p.name, count(*) AS bridges, EXISTS (SELECT 1 FROM closed WHERE closed.name = p.name) AS asleep
FROM present p GROUP BY p.name
"""

_BRIDGES = f"""
WITH present AS MATERIALIZED ({_PRESENCE})
SELECT a.pid, coalesce(host(a.client_addr), 'local') AS host, a.backend_start AS since,
    nullif(split_part(a.application_name, ' ', 2), '') AS process,
    coalesce(array_agg(p.name ORDER BY p.name) FILTER (WHERE p.name IS NOT NULL), ARRAY[]::text[]) AS channels
FROM pg_catalog.pg_stat_activity a LEFT JOIN present p ON p.pid = a.pid
WHERE a.datname = current_database() AND (p.pid IS NOT NULL OR starts_with(a.application_name, :application || ' '))
GROUP BY a.pid, a.client_addr, a.backend_start, a.application_name ORDER BY a.backend_start, a.pid
"""

_LONG_TRANSACTIONS = text("""
SELECT a.pid, coalesce(host(a.client_addr), 'local') AS host,
    extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS seconds
FROM pg_catalog.pg_stat_activity a
WHERE a.datname = current_database() AND a.application_name = 'pgpubsub-worker'
    AND a.xact_start < clock_timestamp() - make_interval(secs => :seconds)
ORDER BY a.xact_start
""")

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
