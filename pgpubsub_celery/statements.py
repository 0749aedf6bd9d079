"""The text of every statement that `store` sends.

Owns the SQL of the protocol, and why each statement is as it is. `{n}` and `{s}` are the tables of notifications and
subscriptions. Pure text; what a statement is for, and what the caller's transaction must be, is said in `store`.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import text

# In the order of store.Taken's fields.
TAKEN = (
    "n.id, n.channel, n.subscription, n.operation, n.payload, n.context, n.created_at, n.db_version, n.dispatches, "
    "n.starts, n.retries, n.ordering_key"
)

# What a claim does to the rows that it has `picked`, each under its `quota`; returns what store.Claimed says of them.
# `= ANY (ARRAY(…))` rather than IN: the latter turns to a sequential scan at larger batches.
# `+ 0` keeps the planner, with statistics from before a burst, from finding the rows by their subscription.
PUT_UNDER_LEASE = """
    UPDATE {n} n SET
        state = CASE WHEN n.starts >= CAST(:max_starts AS int) THEN 'failed' ELSE 'dispatched' END,
        owner = NULL,
        dispatches = n.dispatches + 1,
        available_at = CASE WHEN n.starts >= CAST(:max_starts AS int) THEN NULL
            ELSE now() + make_interval(secs => least(q.lease * power(2, least(n.dispatches, 30)), q.lease_max)) END,
        failed_at = CASE WHEN n.starts >= CAST(:max_starts AS int) THEN now() END,
        error = CASE WHEN n.starts >= CAST(:max_starts AS int) THEN
            'started ' || n.starts || ' times and never finished: '
                || 'its worker was lost each time (killed, out of memory, or power)'
        END
    FROM quota q
    WHERE n.id = ANY (ARRAY(SELECT id FROM picked)) AND q.subscription = n.subscription + 0
    RETURNING n.id, n.subscription, n.dispatches, n.retries, n.operation, n.created_at,
        CASE WHEN q.with_payload THEN n.payload END AS payload, CASE WHEN q.with_payload THEN n.context END AS context,
        CASE WHEN q.with_payload THEN n.db_version END AS db_version, n.ordering_key, n.state
"""

# in_flight is counted by the same statement, from the index, at most a quota's worth of entries of each state.
# It need not reach the disk before its messages are published, which is most of the time that a quiet claim takes: if
# Postgres crashes before it does, the rows are waiting again, and of two messages with one count the first takes them.
CLAIM = (
    """
WITH quickly AS MATERIALIZED (
    SELECT pg_catalog.set_config('synchronous_commit', 'off', true)
), quota AS MATERIALIZED (
    SELECT q.*, flying.in_flight, flying.earliest
    FROM quickly CROSS JOIN (
        SELECT subscription, most, lease, lease_max, with_payload,
            coalesce(waiting_at, '-infinity') AS waiting_at, coalesce(waiting_id, 0) AS waiting_id,
            coalesce(flying, '-infinity') AS flying_from, coalesce(expired, '-infinity') AS expired_from
        FROM unnest(
            CAST(:subscriptions AS int[]), CAST(:limits AS int[]), CAST(:leases AS float8[]),
            CAST(:lease_maxima AS float8[]), CAST(:payloads AS boolean[]), CAST(:waiting_at AS timestamptz[]),
            CAST(:waiting_id AS bigint[]), CAST(:flying AS timestamptz[]), CAST(:expired AS timestamptz[])
        ) AS q (subscription, most, lease, lease_max, with_payload, waiting_at, waiting_id, flying, expired)
    ) q CROSS JOIN LATERAL (
        SELECT count(*) AS in_flight, min(f.available_at) AS earliest
        FROM (VALUES ('dispatched'), ('running')) AS states (state) CROSS JOIN LATERAL (
            SELECT c.available_at FROM {n} c
            WHERE c.subscription = q.subscription AND c.state = states.state AND c.available_at >= q.flying_from{filter}
            ORDER BY c.available_at, c.id LIMIT q.most
        ) f
    ) flying
), lost AS MATERIALIZED (
    SELECT l.id FROM quota q CROSS JOIN (VALUES ('dispatched'), ('running')) AS flying (state)
    CROSS JOIN LATERAL (
        SELECT c.id FROM {n} c
        WHERE c.subscription = q.subscription AND c.state = flying.state
            AND c.available_at >= q.expired_from AND c.available_at <= now(){filter}
        ORDER BY c.available_at, c.id LIMIT least(q.most, CAST(:batch_size AS int)) FOR UPDATE SKIP LOCKED
    ) l LIMIT CAST(:batch_size AS int)
), fresh AS MATERIALIZED (
    SELECT q.subscription, w.id, w.available_at FROM quota q CROSS JOIN LATERAL (
        SELECT c.id, c.available_at FROM {n} c
        WHERE c.subscription = q.subscription AND c.state = 'waiting'
            AND (c.available_at, c.id) >= (q.waiting_at, q.waiting_id) AND c.available_at <= now(){filter}
        ORDER BY c.available_at, c.id
        LIMIT greatest(0, least(q.most - q.in_flight, CAST(:batch_size AS int))) FOR UPDATE SKIP LOCKED
    ) w LIMIT greatest(0, CAST(:batch_size AS int) - (SELECT count(*) FROM lost))
), picked AS (
    SELECT id, true AS was_lost FROM lost UNION ALL SELECT id, false FROM fresh
), claimed AS (
"""
    + PUT_UNDER_LEASE
    + """)
SELECT c.id, c.subscription, c.dispatches, c.retries, c.operation, c.created_at, c.payload, c.context, c.db_version,
    NULL AS ordering_key, p.was_lost, c.state, NULL AS in_flight, NULL AS earliest, NULL AS now, NULL AS last_at,
    NULL AS last_id
FROM claimed c JOIN picked p ON p.id = c.id
UNION ALL
SELECT NULL, q.subscription, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, q.in_flight, q.earliest, now(),
    last.available_at, last.id
FROM quota q LEFT JOIN (
    SELECT DISTINCT ON (subscription) subscription, available_at, id FROM fresh
    ORDER BY subscription, available_at DESC, id DESC
) last ON last.subscription = q.subscription
"""
)

NEXT_DUE = """
SELECT extract(epoch FROM min(d.available_at) - clock_timestamp())
FROM unnest(CAST(:subscriptions AS int[])) AS q (subscription)
CROSS JOIN (VALUES ('waiting'), ('dispatched'), ('running')) AS live (state)
CROSS JOIN LATERAL (
    SELECT c.available_at FROM {n} c WHERE c.subscription = q.subscription AND c.state = live.state{filter}
    ORDER BY c.available_at, c.id LIMIT 1
) d
"""

# SKIP LOCKED: two bridges that start at once would otherwise wait for each other's rows.
ADOPT = """
WITH first AS MATERIALIZED (
    SELECT DISTINCT ON (names.name, wanted.operation) names.name, wanted.operation, s.id
    FROM {s} s CROSS JOIN LATERAL unnest(s.channel || s.channel_aliases) AS names (name)
    CROSS JOIN LATERAL unnest(s.operations) AS wanted (operation)
    WHERE s.id = ANY (CAST(:subscriptions AS int[])) ORDER BY names.name, wanted.operation, s.id
), orphan AS MATERIALIZED (
    SELECT c.id, first.id AS subscription
    FROM {n} c JOIN first ON first.name = c.channel AND first.operation = c.operation
    WHERE c.subscription IS NULL FOR UPDATE OF c SKIP LOCKED
)
UPDATE {n} n SET subscription = orphan.subscription FROM orphan WHERE n.id = orphan.id
"""

# What somebody has asked to have run (`retry`, `--recover`) is not held again, though no bridge has come to it yet.
HOLD = """
UPDATE {n} c SET state = 'held'
WHERE c.subscription = ANY (CAST(:subscriptions AS int[])) AND c.state = 'waiting'
    AND c.dispatches = 0 AND c.retries = 0 AND c.available_at <= now() AND c.recovered_at IS NULL{filter}
"""

# A recovered failed row keeps dispatches above zero, so that it travels alone.
RECOVER = """
UPDATE {n} n SET state = 'waiting', available_at = now(), starts = 0, retries = 0, failed_at = NULL, error = NULL,
    traceback = NULL, task_id = NULL, owner = NULL, recovered_at = now(),
    dispatches = CASE WHEN n.state = 'failed' THEN 1 ELSE 0 END
WHERE n.id = ANY (ARRAY(
    SELECT r.id FROM unnest(CAST(:subscriptions AS int[])) AS q (subscription)
    CROSS JOIN unnest(CAST(:states AS text[])) AS wanted (state) CROSS JOIN LATERAL (
        SELECT c.id FROM {n} c WHERE c.subscription = q.subscription AND c.state = wanted.state
            AND (c.failed_at IS NULL OR c.failed_at <= coalesce(CAST(:before AS timestamptz), 'infinity')){filter}
        ORDER BY c.available_at, c.id LIMIT :batch_size FOR UPDATE SKIP LOCKED
    ) r LIMIT :batch_size
))
"""

PRUNE_FAILED = """
DELETE FROM {n} n WHERE n.id = ANY (ARRAY(
    SELECT c.id FROM {n} c
    WHERE c.subscription = ANY (CAST(:subscriptions AS int[])) AND c.state = 'failed'
        AND c.failed_at < now() - make_interval(secs => :seconds)
    LIMIT 1000 FOR UPDATE SKIP LOCKED
))
"""

# Rows that are still a message's, locked or not.
DISPATCHED = """
SELECT p.id FROM {n} p JOIN unnest(CAST(:ids AS bigint[]), CAST(:dispatches AS int[])) AS c (id, dispatches)
    ON p.id = c.id AND p.dispatches = c.dispatches
WHERE p.state = 'dispatched'
"""

# What is given back without a delay keeps its place in the line: at its end, an outage of a second would cost the rows
# that were in flight a whole backlog's time. The transaction may have begun long ago: a delay counts from this moment.
GIVEN_BACK = """CASE WHEN :delay > 0 THEN clock_timestamp() + make_interval(secs => :delay)
        ELSE least(n.created_at, clock_timestamp()) END"""

# A row that is locked has reached a worker after all: waiting for it would hold up everything else.
UNPUBLISHED = """
UPDATE {n} n SET state = 'waiting', dispatches = n.dispatches - 1,
    available_at = {given_back}
WHERE n.id = ANY (ARRAY(
    SELECT p.id FROM {n} p JOIN unnest(CAST(:ids AS bigint[]), CAST(:dispatches AS int[])) AS c (id, dispatches)
        ON p.id = c.id AND p.dispatches = c.dispatches
    WHERE p.state = 'dispatched' FOR UPDATE OF p SKIP LOCKED
))
RETURNING n.id
"""

DELETE_PUBLISHED = """
DELETE FROM {n} n WHERE n.id = ANY (ARRAY(
    SELECT p.id FROM {n} p JOIN unnest(CAST(:ids AS bigint[]), CAST(:dispatches AS int[])) AS c (id, dispatches)
        ON p.id = c.id AND p.dispatches = c.dispatches
    WHERE p.state = 'dispatched' FOR UPDATE OF p SKIP LOCKED
))
RETURNING n.id
"""

COUNT_START = """
UPDATE {n} n SET starts = n.starts + 1
WHERE n.id = ANY (ARRAY(
    SELECT c.id FROM {n} c WHERE c.id = ANY (CAST(:ids AS bigint[])) AND c.state = 'dispatched'
        AND c.dispatches = :dispatches FOR UPDATE SKIP LOCKED
))
RETURNING n.id
"""

TAKE_LOCKED = """
SELECT {taken}, pg_current_xact_id()::text AS transaction FROM {n} n
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state = 'dispatched' AND n.dispatches = :dispatches
ORDER BY n.id FOR UPDATE SKIP LOCKED
"""

ACKNOWLEDGE_LOCKED = """
DELETE FROM {n} n WHERE n.id = ANY (CAST(:ids AS bigint[])) AND pg_current_xact_id()::text = :transaction
"""

# The last result is COMMIT's, so a number of rows that is not the expected one must be an error: 22012.
ACKNOWLEDGE_AND_COMMIT = """
WITH gone AS (
    DELETE FROM {n} n WHERE n.id = ANY (CAST(:ids AS bigint[])) AND pg_current_xact_id()::text = :transaction
    RETURNING n.id
)
SELECT 1 / CASE WHEN count(*) = cardinality(CAST(:ids AS bigint[])) THEN 1 ELSE 0 END FROM gone; COMMIT
"""

ACKNOWLEDGE_COMMITTED = """
DELETE FROM {n} n WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state = 'dispatched' AND n.dispatches = :dispatches
"""

NOW = text("SELECT clock_timestamp()")

HAS_DEFERRABLE = text("SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_constraint WHERE condeferrable)")

IDLE_TIMEOUT = text("SELECT setting FROM pg_catalog.pg_settings WHERE name = 'idle_in_transaction_session_timeout'")

XACT_STATUS = text("SELECT pg_catalog.pg_xact_status(CAST(:transaction AS xid8))")

TAKE_OWNED = """
UPDATE {n} n SET state = 'running', owner = CAST(:owner AS uuid), starts = n.starts + 1,
    available_at = now() + make_interval(secs => :lease)
WHERE n.id = ANY (ARRAY(
    SELECT c.id FROM {n} c WHERE c.id = ANY (CAST(:ids AS bigint[])) AND c.state = 'dispatched'
        AND c.dispatches = :dispatches FOR UPDATE SKIP LOCKED
))
RETURNING {taken}
"""

ACKNOWLEDGE_OWNED = """
DELETE FROM {n} n
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state = 'running' AND n.owner = CAST(:owner AS uuid)
"""

# In one statement, and so in one transaction even in autocommit: a worker that dies between the two would leave the
# next of the key to the sweep.
ACKNOWLEDGE_RINGING = """
WITH gone AS (
    DELETE FROM {n} n
    WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state = 'running' AND n.owner = CAST(:owner AS uuid)
    RETURNING n.id
)
SELECT counted.number, {p}pgpubsub_ring(:channel) FROM (SELECT count(*) AS number FROM gone) counted
"""

IS_OWNED = """
SELECT 1 FROM {n} n WHERE n.id = :id AND n.state = 'running' AND n.owner = CAST(:owner AS uuid)
"""

# Skips rows that an open `acknowledge(session)` has locked: waiting for one would starve the others' leases. Locks none
# but its own: a take that met another's lock would drop its message.
RENEW = """
UPDATE {n} n SET available_at = now() + make_interval(secs => r.lease)
FROM unnest(CAST(:ids AS bigint[]), CAST(:leases AS float8[])) AS r (id, lease)
WHERE n.id = r.id AND n.id = ANY (ARRAY(
    SELECT c.id FROM {n} c JOIN unnest(CAST(:ids AS bigint[]), CAST(:owners AS uuid[])) AS o (id, owner)
        ON c.id = o.id AND c.owner = o.owner
    WHERE c.state = 'running' FOR UPDATE OF c SKIP LOCKED
))
RETURNING n.id
"""

# What a worker may change is what it took: under its owner token, or dispatched under its message's count.
_MINE = """(
    (CAST(:owner AS uuid) IS NOT NULL AND n.state = 'running' AND n.owner = CAST(:owner AS uuid))
    OR (CAST(:owner AS uuid) IS NULL AND n.state = 'dispatched' AND n.dispatches = :dispatches)
)"""

RETRY = (
    """
UPDATE {n} n SET state = 'waiting', owner = NULL, retries = :retries, dispatches = 0, starts = 0,
    available_at = coalesce(CAST(:eta AS timestamptz), clock_timestamp() + make_interval(secs => :countdown))
WHERE n.id = :id AND """
    + _MINE
)

RETRY_ALL = (
    """
UPDATE {n} n SET state = 'waiting', owner = NULL, retries = n.retries + 1, dispatches = 0, starts = 0,
    available_at = coalesce(CAST(:eta AS timestamptz), clock_timestamp() + make_interval(secs => :countdown))
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND """
    + _MINE
)

FAIL = (
    """
UPDATE {n} n SET state = 'failed', owner = NULL, available_at = NULL, failed_at = clock_timestamp(), error = :error,
    traceback = :traceback, task_id = :task_id
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND """
    + _MINE
    + " RETURNING n.id"
)

RELEASE = """
UPDATE {n} n SET state = 'waiting',
    available_at = {given_back},
    starts = greatest(0, n.starts - :started)
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state = 'dispatched' AND n.dispatches = :dispatches
RETURNING n.id
"""

RELEASE_OWNED = """
UPDATE {n} n SET state = 'waiting', owner = NULL,
    available_at = {given_back},
    starts = greatest(0, n.starts - :started)
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state = 'running' AND n.owner = CAST(:owner AS uuid)
RETURNING n.id
"""

# Written late, by whoever outlived the run. A retry begins to count dispatches anew: the number of retries tells a row
# that has been retried and published again since from the one that the message was of.
RELEASE_LOST = """
UPDATE {n} n SET state = 'waiting', owner = NULL,
    available_at = {given_back}
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state IN ('dispatched', 'running') AND n.dispatches = :dispatches
    AND (CAST(:retries AS int[]) IS NULL OR EXISTS (
        SELECT FROM unnest(CAST(:ids AS bigint[]), CAST(:retries AS int[])) AS m (id, retries)
        WHERE m.id = n.id AND m.retries = n.retries
    ))
RETURNING n.id
"""

FAIL_LOST = """
UPDATE {n} n SET state = 'failed', owner = NULL, available_at = NULL, failed_at = clock_timestamp(), error = :error,
    traceback = NULL, task_id = :task_id
WHERE n.id = ANY (CAST(:ids AS bigint[])) AND n.state IN ('dispatched', 'running') AND n.dispatches = :dispatches
    AND (CAST(:retries AS int[]) IS NULL OR EXISTS (
        SELECT FROM unnest(CAST(:ids AS bigint[]), CAST(:retries AS int[])) AS m (id, retries)
        WHERE m.id = n.id AND m.retries = n.retries
    ))
RETURNING n.id
"""

# Each process has its row: nobody waits for anybody.
REPORT_RUN_TIME = """
INSERT INTO {t} AS t (subscription, process, mean_seconds, runs, per_second, measured_at)
VALUES (:subscription, CAST(:process AS uuid), :mean_seconds, :runs, CAST(:per_second AS float8), now())
ON CONFLICT (subscription, process) DO UPDATE
    SET mean_seconds = excluded.mean_seconds, runs = excluded.runs, per_second = excluded.per_second,
        measured_at = excluded.measured_at
"""

RUN_TIMES = """
SELECT t.subscription, sum(t.mean_seconds * t.runs) / sum(t.runs) AS mean_seconds, count(*) AS processes
FROM {t} t
WHERE t.subscription = ANY (CAST(:subscriptions AS int[])) AND t.measured_at > now() - make_interval(secs => :seconds)
GROUP BY t.subscription
"""

FORGET_RUN_TIMES = """
DELETE FROM {t} t WHERE t.measured_at < now() - make_interval(secs => :seconds)
"""


def filter_condition(filters: Mapping[int, str]) -> str:
    """Return what a row `c` must meet besides, by its subscription; nothing where there are no filters.

    Each filter sees the row as a table of its own name, so that it may name columns with or without it. What is neither
    true nor false is not met.
    """
    if not filters:
        return ""
    cases = "".join(
        f"\n        WHEN {int(id)} THEN (SELECT coalesce(({condition}), false) "
        "FROM (SELECT c.*) AS pgpubsub_notification)"
        for id, condition in sorted(filters.items())
    )
    return f"\n    AND CASE c.subscription{cases}\n        ELSE true END"
