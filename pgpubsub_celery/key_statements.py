"""The text of the statements of `keyed`: claiming what is ordered or made unique by keys.

Owns their SQL, and why each part is as it is. `{n}` is the table of notifications, `{filter}` what a row `c` must meet
besides. Pure text; what the caller's transaction must be is said in `keyed`.
"""

from __future__ import annotations

from pgpubsub_celery.statements import PUT_UNDER_LEASE

# Like any claim's, the commit need not wait for the disk (statements.CLAIM says why).
LOCK = """
SELECT s AS subscription
FROM unnest(CAST(:subscriptions AS int[])) AS s, (
    SELECT pg_catalog.set_config('synchronous_commit', 'off', true) OFFSET 0
) quickly
WHERE pg_try_advisory_xact_lock({p}pgpubsub_lock_key('claim', CAST(s AS text)))
"""

# quota: what the caller allows. flying: all that is in flight, because a key with something in flight is not free; so
# many that it cannot all be looked at, and nothing is claimed but what was lost.
#
# lost: expired leases. Of an ordered key only the head is published again, and only when nothing else of the key is
# still in flight. The others go back behind it, to be published alone; one that was taken had not begun, because the
# head had not ended, so its start is taken back.
#
# seen: the first due rows, whatever their keys' state. Where that is all there is, it tells of every key that can have
# something to claim, and a million keys that wait for later cost nothing. Where there is more, walked goes from key to
# key besides (a loose index scan: one probe for each), so that a million rows of one key cost one probe. Both go on
# where the last claim stopped.
#
# heads: of each key that is free its first row, if that is waiting and due; runs: with those that follow it at once and
# were never published, which may travel together.
#
# newest, older: of a row with a unique key, the newest waiting one, and those that it supersedes, which are deleted. So
# many are deleted at a time; the newest is claimed when all are gone.
#
# Rows are locked last, and what somebody else has locked is left: it takes along those that come after it in its key,
# or that supersede it. `+ 0` and `= ANY (ARRAY(…))` as in statements.CLAIM.
CLAIM = (
    """
WITH quota AS MATERIALIZED (
    SELECT subscription, most, lease, lease_max, with_payload, ordered, passes, is_unique, run, turn,
        coalesce(from_at, '-infinity') AS from_at, coalesce(from_id, 0) AS from_id,
        -- The least text above the key; without one the least of all.
        coalesce(after_key || E'\\x01', '') COLLATE "C" AS from_key
    FROM unnest(
        CAST(:subscriptions AS int[]), CAST(:limits AS int[]), CAST(:leases AS float8[]),
        CAST(:lease_maxima AS float8[]), CAST(:payloads AS boolean[]), CAST(:ordered AS boolean[]),
        CAST(:passes AS boolean[]), CAST(:uniques AS boolean[]), CAST(:runs AS int[]),
        CAST(:from_at AS timestamptz[]), CAST(:from_id AS bigint[]), CAST(:after_keys AS text[])
    ) WITH ORDINALITY AS q (
        subscription, most, lease, lease_max, with_payload, ordered, passes, is_unique, run, from_at, from_id,
        after_key, turn
    )
), flying AS MATERIALIZED (
    SELECT q.subscription, f.* FROM quota q CROSS JOIN (VALUES ('dispatched'), ('running')) AS states (state)
    CROSS JOIN LATERAL (
        SELECT c.id, c.ordering_key, c.available_at, (true{filter}) AS mine FROM {n} c
        WHERE c.subscription = q.subscription AND c.state = states.state
        ORDER BY c.available_at, c.id LIMIT 10 * q.most + 1000
    ) f
), lost AS MATERIALIZED (
    SELECT c.id, c.available_at FROM {n} c
    WHERE c.id = ANY (ARRAY(
            SELECT f.id FROM flying f WHERE f.mine AND f.available_at <= now()
            ORDER BY f.available_at, f.id LIMIT CAST(:batch_size AS int)
        ))
        AND c.state IN ('dispatched', 'running') AND c.available_at <= now()
    FOR UPDATE SKIP LOCKED
), again AS MATERIALIZED (
    SELECT l.id, l.available_at FROM lost l JOIN flying f ON f.id = l.id JOIN quota q ON q.subscription = f.subscription
    WHERE NOT q.ordered OR f.ordering_key IS NULL OR (
        l.id = (
            SELECT c.id FROM {n} c
            WHERE c.subscription = f.subscription AND c.ordering_key = f.ordering_key
                AND NOT (q.passes AND c.state = 'failed')
            ORDER BY c.id LIMIT 1
        )
        AND NOT EXISTS (
            SELECT FROM flying o WHERE o.subscription = f.subscription AND o.ordering_key = f.ordering_key
                AND o.id NOT IN (SELECT id FROM lost)
        )
    )
), room AS MATERIALIZED (
    SELECT q.*, flown.in_flight, flown.earliest,
        CASE WHEN flown.known < 10 * q.most + 1000
            THEN greatest(0, least(q.most - flown.in_flight, CAST(:batch_size AS int))) ELSE 0 END AS allowed
    FROM quota q CROSS JOIN LATERAL (
        SELECT count(*) AS known, count(*) FILTER (WHERE f.mine) AS in_flight, min(f.available_at) AS earliest
        FROM flying f WHERE f.subscription = q.subscription
    ) flown
), seen AS MATERIALIZED (
    SELECT r.subscription, r.ordered, w.*,
        row_number() OVER (PARTITION BY r.subscription ORDER BY w.available_at, w.id) AS place
    FROM room r CROSS JOIN LATERAL (
        SELECT c.id, c.ordering_key, c.unique_key, c.available_at FROM {n} c
        WHERE c.subscription = r.subscription AND c.state = 'waiting'
            AND (c.available_at, c.id) > (r.from_at, r.from_id) AND c.available_at <= now(){filter}
        ORDER BY c.available_at, c.id
        LIMIT CASE WHEN r.allowed = 0 THEN 0 WHEN r.ordered THEN CAST(:window AS int) ELSE r.allowed END
    ) w
), walked AS MATERIALIZED (
    SELECT r.subscription, k.key, k.place FROM room r CROSS JOIN LATERAL (
        WITH RECURSIVE walk (key, place) AS (
            (
                SELECT c.ordering_key, 1 FROM {n} c
                WHERE c.subscription = r.subscription AND c.ordering_key >= r.from_key
                ORDER BY c.ordering_key, c.id LIMIT 1
            )
            UNION ALL
            SELECT next.ordering_key, w.place + 1 FROM walk w CROSS JOIN LATERAL (
                SELECT c.ordering_key FROM {n} c
                WHERE c.subscription = r.subscription AND c.ordering_key > w.key
                ORDER BY c.ordering_key, c.id LIMIT 1
            ) next WHERE w.place < CAST(:window AS int)
        ) SELECT key, place FROM walk
    ) k
    WHERE r.ordered AND (SELECT count(*) FROM seen s WHERE s.subscription = r.subscription) >= CAST(:window AS int)
), heads AS MATERIALIZED (
    SELECT k.subscription, k.key, k.place, h.id, h.dispatches, r.passes, least(r.run, r.allowed) AS most
    FROM (
        SELECT subscription, key, min(place) AS place FROM (
            SELECT subscription, ordering_key AS key, place FROM seen WHERE ordered AND ordering_key IS NOT NULL
            UNION ALL SELECT subscription, key, CAST(:window AS int) + place FROM walked
        ) keys GROUP BY subscription, key
    ) k JOIN room r ON r.subscription = k.subscription CROSS JOIN LATERAL (
        SELECT c.id, c.state, c.available_at, c.dispatches, (true{filter}) AS mine FROM {n} c
        WHERE c.subscription = k.subscription AND c.ordering_key = k.key AND NOT (r.passes AND c.state = 'failed')
        ORDER BY c.id LIMIT 1
    ) h
    WHERE h.state = 'waiting' AND h.available_at <= now() AND h.mine AND NOT EXISTS (
        SELECT FROM flying f WHERE f.subscription = k.subscription AND f.ordering_key = k.key
    )
), runs AS MATERIALIZED (
    SELECT h.subscription, h.key, h.place, together.id, together.unique_key, together.available_at
    FROM heads h CROSS JOIN LATERAL (
        SELECT f.id, f.unique_key, f.available_at, bool_and(
            f.id = h.id
            OR (f.state = 'waiting' AND f.available_at <= now() AND f.mine AND f.dispatches + h.dispatches = 0)
        ) OVER (ORDER BY f.id) AS follows
        FROM (
            SELECT c.id, c.state, c.unique_key, c.available_at, c.dispatches, (true{filter}) AS mine FROM {n} c
            WHERE c.subscription = h.subscription AND c.ordering_key = h.key AND c.id >= h.id
                AND NOT (h.passes AND c.state = 'failed')
            ORDER BY c.id LIMIT h.most
        ) f
    ) together WHERE together.follows
), possible AS MATERIALIZED (
    SELECT p.*, row_number() OVER (PARTITION BY p.subscription ORDER BY p.place, p.id) AS position FROM (
        SELECT subscription, key, place, id, unique_key, available_at FROM runs
        UNION ALL SELECT subscription, NULL, place, id, unique_key, available_at FROM seen
        WHERE NOT ordered OR ordering_key IS NULL
    ) p
), candidate AS MATERIALIZED (
    SELECT p.*, r.is_unique FROM possible p JOIN room r ON r.subscription = p.subscription
    WHERE p.position <= r.allowed
    ORDER BY r.turn, p.position LIMIT greatest(0, CAST(:batch_size AS int) - (SELECT count(*) FROM again))
), newest AS MATERIALIZED (
    SELECT u.subscription, u.unique_key, (
        SELECT c.id FROM {n} c
        WHERE c.subscription = u.subscription AND c.unique_key = u.unique_key AND c.state = 'waiting'
        ORDER BY c.id DESC LIMIT 1
    ) AS id
    FROM (
        SELECT DISTINCT subscription, unique_key FROM candidate WHERE is_unique AND unique_key IS NOT NULL
    ) u
), older AS MATERIALIZED (
    SELECT w.subscription, w.unique_key, o.id FROM newest w CROSS JOIN LATERAL (
        SELECT c.id FROM {n} c
        WHERE c.subscription = w.subscription AND c.unique_key = w.unique_key AND c.state = 'waiting' AND c.id < w.id
        ORDER BY c.id LIMIT CAST(:most_older AS int) / (SELECT count(*) FROM newest) + 1
    ) o
), locked AS MATERIALIZED (
    SELECT c.id FROM {n} c
    WHERE c.id = ANY (ARRAY(SELECT id FROM candidate UNION SELECT id FROM older)) AND c.state = 'waiting'
    FOR UPDATE SKIP LOCKED
), gone AS MATERIALIZED (
    SELECT o.subscription, o.unique_key, count(*) = count(l.id)
        AND count(*) < CAST(:most_older AS int) / (SELECT count(*) FROM newest) + 1 AS all_of_them
    FROM older o LEFT JOIN locked l ON l.id = o.id GROUP BY o.subscription, o.unique_key
), judged AS MATERIALIZED (
    SELECT c.id, c.key, c.available_at, may.be_claimed,
        bool_and(may.be_claimed OR may.be_dropped) OVER (PARTITION BY c.subscription, c.key ORDER BY c.id) AS in_turn
    FROM candidate c
    LEFT JOIN locked l ON l.id = c.id
    LEFT JOIN newest w ON c.is_unique AND w.subscription = c.subscription AND w.unique_key = c.unique_key
    LEFT JOIN gone g ON g.subscription = w.subscription AND g.unique_key = w.unique_key
    LEFT JOIN older o ON o.id = c.id
    CROSS JOIN LATERAL (SELECT
        l.id IS NOT NULL AND (w.id IS NULL OR (w.id = c.id AND coalesce(g.all_of_them, true))) AS be_claimed,
        l.id IS NOT NULL AND o.id IS NOT NULL AS be_dropped
    ) may
), picked AS MATERIALIZED (
    SELECT id, true AS was_lost FROM again
    UNION ALL SELECT id, false FROM judged WHERE be_claimed AND (key IS NULL OR in_turn)
), superseded AS (
    DELETE FROM {n} d WHERE d.id = ANY (ARRAY(SELECT o.id FROM older o JOIN locked l ON l.id = o.id))
    RETURNING d.id, d.subscription + 0 AS subscription
), put_back AS (
    UPDATE {n} b SET state = 'waiting', owner = NULL, available_at = least(b.created_at, now()),
        starts = greatest(0, b.starts - CASE b.state WHEN 'running' THEN 1 ELSE 0 END)
    WHERE b.id = ANY (ARRAY(SELECT id FROM lost EXCEPT SELECT id FROM again))
    RETURNING b.id, b.subscription + 0 AS subscription
), claimed AS (
"""
    + PUT_UNDER_LEASE
    + """)
SELECT c.id, c.subscription, c.dispatches, c.retries, c.operation, c.created_at, c.payload, c.context, c.db_version,
    c.ordering_key, p.was_lost, c.state, NULL AS in_flight, NULL AS now, NULL AS seen, NULL AS seen_at, NULL AS seen_id,
    NULL AS is_all, NULL AS walked, NULL AS last_key, NULL AS superseded, NULL AS put_back
FROM claimed c JOIN picked p ON p.id = c.id
UNION ALL
SELECT NULL, r.subscription, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, r.in_flight, now(),
    seen.count, upto.available_at, upto.id, last.is_all, walked.count,
    CASE WHEN last.is_all THEN walked.last_key ELSE last.walked_key END,
    ARRAY(SELECT s.id FROM superseded s WHERE s.subscription = r.subscription),
    (SELECT count(*) FROM put_back b WHERE b.subscription = r.subscription)
FROM room r
CROSS JOIN LATERAL (SELECT count(*) AS count FROM seen s WHERE s.subscription = r.subscription) seen
CROSS JOIN LATERAL (
    SELECT count(*) AS count, max(k.key COLLATE "C") AS last_key FROM walked k WHERE k.subscription = r.subscription
) walked
-- Up to where this claim has come: to the end of what it saw, or to the last for which there was room.
CROSS JOIN LATERAL (
    SELECT (SELECT count(*) FROM possible p WHERE p.subscription = r.subscription) = count(c.id) AS is_all,
        max(c.place) FILTER (WHERE c.place <= CAST(:window AS int)) AS seen_place,
        max(c.key COLLATE "C") FILTER (WHERE c.place > CAST(:window AS int)) AS walked_key
    FROM candidate c WHERE c.subscription = r.subscription
) last
LEFT JOIN seen upto ON upto.subscription = r.subscription
    AND upto.place = CASE WHEN last.is_all THEN seen.count ELSE last.seen_place END
"""
)

# Of ordered subscriptions: when the next row becomes due that was not at the last claim, or the next lease ends. What
# was due then waits for others of its key, or is locked: whoever ends that rings.
NEXT_DUE = """
SELECT extract(epoch FROM min(d.available_at) - clock_timestamp())
FROM unnest(CAST(:subscriptions AS int[]), CAST(:looked_at AS timestamptz[])) AS q (subscription, looked_at)
CROSS JOIN (VALUES ('waiting'), ('dispatched'), ('running')) AS live (state)
CROSS JOIN LATERAL (
    SELECT c.available_at FROM {n} c WHERE c.subscription = q.subscription AND c.state = live.state
        AND (live.state <> 'waiting' OR c.available_at > q.looked_at){filter}
    ORDER BY c.available_at, c.id LIMIT 1
) d
"""

# Which of the rows that a message has brought have an earlier one of their key that it has not: another message has.
BEHIND = """
SELECT t.id FROM {n} t JOIN LATERAL (
    SELECT c.id FROM {n} c
    WHERE c.subscription = t.subscription AND c.ordering_key = t.ordering_key AND c.id < t.id
        AND NOT (:passes AND c.state = 'failed') AND c.id <> ALL (CAST(:ids AS bigint[]))
    ORDER BY c.id LIMIT 1
) earlier ON true
WHERE t.id = ANY (CAST(:ids AS bigint[])) AND t.ordering_key IS NOT NULL
"""
