"""The SQL functions of this package, and names qualified for one schema.

Owns the text of every function that lives in the database except the triggers': the installation's
identity, the doorbell, the transport of unstored messages, and the emit that `notify()`, psql and
services in other languages share. Never executes anything; `migrations` does.

All functions fix their `search_path` or qualify every name, run with the rights of the installing role, and
are revoked from PUBLIC, so that a role without grants can neither forge a notification nor read one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid

VERSION = 2
"""Version of the tables and functions; `install` upgrades older ones and refuses to downgrade newer ones."""

EMIT_FUNCTIONS = (
    "pgpubsub_notify(text, jsonb, timestamptz, jsonb)",
    "pgpubsub_emit(text, jsonb, timestamptz, jsonb, boolean, text)",
)
"""What a role needs EXECUTE on in order to emit (`install --grant-emit ROLE`)."""


NO_KEY = "concat('none:', gen_random_uuid())"
"""SQL for the ordering key of a notification whose fields or columns for it are null: equal to no other.

Not NULL: then a claim could find it only by looking through all that is due."""


def quote_identifier(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(value: str) -> str:
    """Return `value` as an SQL string literal, for DDL, where values cannot be bound."""
    literal = "'" + value.replace("'", "''") + "'"
    return " E" + literal.replace("\\", "\\\\") if "\\" in value else literal


@dataclasses.dataclass(frozen=True)
class Names:
    """The tables and the function prefix, qualified and quoted for one schema."""

    schema: str

    @property
    def prefix(self) -> str:
        """The quoted schema with its dot, to put before a function's name."""
        return quote_identifier(self.schema) + "."

    @property
    def notification(self) -> str:
        """The qualified table of stored notifications."""
        return self.prefix + "pgpubsub_notification"

    @property
    def subscription(self) -> str:
        """The qualified table of subscriptions: which listeners a channel has."""
        return self.prefix + "pgpubsub_subscription"

    @property
    def channel(self) -> str:
        """The qualified table of installed channels."""
        return self.prefix + "pgpubsub_channel"

    @property
    def run_time(self) -> str:
        """The qualified table of how long listeners' runs take."""
        return self.prefix + "pgpubsub_run_time"

    @property
    def installation(self) -> str:
        """The qualified table of this installation's one row."""
        return self.prefix + "pgpubsub_installation"


@dataclasses.dataclass(frozen=True)
class Function:
    """One function: its signature, and the statements that create it."""

    signature: str
    """Name and argument types, without the schema."""
    create: str
    hash: str
    """A digest of its text, whatever the installation, kept in its COMMENT: tells `install` what is out of date."""
    public: bool
    """Whether everybody may execute it: only what neither reads nor writes anything."""

    @property
    def source(self) -> str | None:
        """What Postgres keeps as its source; None of a body that it keeps in another form."""
        parts = self.create.split("$function$")
        return parts[1] if len(parts) == 3 else None


def digest_of(create: str) -> str:
    """Return the digest of the statement that creates a function."""
    return hashlib.sha256(create.strip().encode()).hexdigest()[:16]


def functions(schema: str, installation: uuid.UUID) -> list[Function]:
    """Return the functions in the order to create them."""
    s = quote_identifier(schema) + "."
    values = {"s": s, "none": NO_KEY, "version_table": quote_literal(s + "alembic_version")}

    def function(signature: str, template: str, public: bool) -> Function:
        anonymous = template.format(installation=uuid.UUID(int=0), **values)
        return Function(
            signature=signature,
            create=template.format(installation=installation, **values).strip(),
            hash=digest_of(anonymous),
            public=public,
        )

    return [
        function(signature, template, public)
        for signature, template, public in (
            ("pgpubsub_installation()", _INSTALLATION, True),
            ("pgpubsub_lock_key(text, text)", _LOCK_KEY, True),
            ("pgpubsub_suppressed(text)", _SUPPRESSED, True),
            ("pgpubsub_context(jsonb)", _CONTEXT, False),
            ("pgpubsub_db_version()", _DB_VERSION, False),
            ("pgpubsub_ring(text)", _RING, False),
            ("pgpubsub_key(text[])", _KEY, True),
            ("pgpubsub_key(jsonb, text[])", _KEY_OF_MESSAGE, True),
            ("pgpubsub_send(text, jsonb)", _SEND, False),
            (EMIT_FUNCTIONS[1], _EMIT, False),
            (EMIT_FUNCTIONS[0], _NOTIFY, False),
        )
    ]


# A constant rather than a look-up: the planner folds it into the lock keys.
# SQL-standard bodies (here and below) are resolved once, when created: no caller's search_path can change them.
_INSTALLATION = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_installation() RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN '{installation}'::pg_catalog.uuid
"""

# Advisory lock keys: one bigint for each purpose (presence, keeper, door), channel and installation.
_LOCK_KEY = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_lock_key(purpose text, channel text) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN pg_catalog.hashtextextended(
    purpose OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) channel,
    pg_catalog.hashtextextended('{installation}', 0)
)
"""

# Whether this transaction wants a channel's triggers silent (suppress_notifications): names, one a line, or * for all.
_SUPPRESSED = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_suppressed(channel text) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE RETURN coalesce(
    ARRAY['*', channel] OPERATOR(pg_catalog.&&)
        pg_catalog.string_to_array(pg_catalog.current_setting('pgpubsub.suppress', true), E'\\n'),
    false
)
"""

# The transaction's context (set_notification_context) under what the call itself gave. A malformed setting never
# aborts the writer: it is dropped. The block's subtransaction writes nothing, so it takes no transaction id.
_CONTEXT = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_context(given jsonb DEFAULT NULL) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    setting text := current_setting('pgpubsub.context', true);
BEGIN
    IF setting IS NULL OR setting = '' THEN
        RETURN given;
    END IF;
    BEGIN
        IF jsonb_typeof(setting::jsonb) = 'object' THEN
            RETURN setting::jsonb || coalesce(given, '{{}}');
        END IF;
    EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
        NULL;
    END;
    RETURN given;
END
$function$
"""

# Alembic's revision(s) at the time of the change; NULL where there is no version table. Beside our tables, else in
# public. Only a table of the installing role's or a superuser's: reading anybody else's would run what they put there
# (a view's functions, row security) with the rights of the installing role. Whether there is one is asked first, alone:
# every writer's statement asks, and without a query that costs next to nothing.
_DB_VERSION = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_db_version() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    beside oid := to_regclass({version_table});
    found oid := coalesce(beside, to_regclass('public.alembic_version'));
    versions text;
BEGIN
    IF found IS NULL THEN
        RETURN NULL;
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner
        WHERE c.oid = found AND c.relkind = 'r' AND (r.rolname = current_user OR r.rolsuper)
    ) THEN
        RETURN NULL;
    END IF;
    BEGIN
        IF beside IS NOT NULL THEN
            SELECT string_agg(version_num, ',' ORDER BY version_num) INTO versions FROM {s}alembic_version;
        ELSE
            SELECT string_agg(version_num, ',' ORDER BY version_num) INTO versions FROM public.alembic_version;
        END IF;
    EXCEPTION WHEN insufficient_privilege OR undefined_table OR undefined_column OR undefined_function THEN
        NULL;
    END;
    RETURN versions;
END
$function$
"""

RING = """PERFORM CASE
            WHEN NOT door.granted AND current_setting('pgpubsub.notify', true) IS DISTINCT FROM 'off'
                AND pg_notification_queue_usage() < 0.9
            THEN pg_notify(door.listen_name, '')
        END
        FROM (
            SELECT c.listen_name,
                pg_try_advisory_xact_lock_shared({s}pgpubsub_lock_key('door', c.name)) AS granted
            FROM {s}pgpubsub_channel c{known} OFFSET 0
        ) door"""
"""The doorbell, a statement of PL/pgSQL; `known` chooses the channels: all names of the one that was emitted to.

Granted: the bridge is awake and this transaction is registered with it until its end, silently. Refused: the bridge
sleeps (or wants to), so NOTIFY. Locks are released after the commit is visible. A renamed channel has a door under each
of its names: bridges of both releases may be asleep. No NOTIFY where it would fail the writer: at its commit, because
the queue is full; or when it prepares a transaction (SET LOCAL pgpubsub.notify = 'off'). The bridge's sweep finds the
rows then. Triggers have it in their own text: a function's call would cost as much again.
"""

_KNOWN = """
            LEFT JOIN {s}pgpubsub_channel mine ON mine.name = emitted
            WHERE c.name = emitted OR emitted = ANY (c.aliases) OR c.name = ANY (mine.aliases)"""

_RING = (
    """
CREATE OR REPLACE FUNCTION {s}pgpubsub_ring(emitted text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    """
    + RING.replace("{known}", _KNOWN)
    + """;
END
$function$
"""
)

# NOTIFY carries at most 7,999 bytes and drops equal payloads of one transaction: longer messages go in numbered
# chunks, and every message has an id. 1,900 characters are at most 7,600 bytes. Chunks are cut from slices of the
# message, because finding a place in a long text with characters of several bytes takes time in proportion to it.
_SEND = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_send(listen_name text, message jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    chunk_size CONSTANT int := 1900;
    slice_chunks CONSTANT int := 32;
    body text := message::text;
    id text := gen_random_uuid()::text;
    chunks int := ceil(length(body)::float8 / chunk_size)::int;
    slice text;
BEGIN
    IF current_setting('pgpubsub.notify', true) = 'off' THEN
        RAISE WARNING 'pgpubsub: a message on % was dropped: its transaction must not NOTIFY', listen_name
            USING HINT = 'PREPARE TRANSACTION refuses that: store the messages (lock_notifications = True).';
        RETURN;
    END IF;
    IF pg_notification_queue_usage() >= 0.9 THEN
        RAISE WARNING 'pgpubsub: a message on % was dropped: the NOTIFY queue of this server is full', listen_name
            USING HINT = 'A session that has executed LISTEN has a transaction open for long: see pg_stat_activity.';
        RETURN;
    END IF;
    IF octet_length(body) <= 7900 THEN
        PERFORM pg_notify(listen_name, id || ' 1 1 ' || body);
        RETURN;
    END IF;
    FOR chunk IN 0 .. chunks - 1 LOOP
        IF chunk % slice_chunks = 0 THEN
            slice := substr(body, chunk * chunk_size + 1, slice_chunks * chunk_size);
        END IF;
        PERFORM pg_notify(
            listen_name,
            id || ' ' || chunk + 1 || ' ' || chunks || ' '
                || substr(slice, (chunk % slice_chunks) * chunk_size + 1, chunk_size)
        );
    END LOOP;
END
$function$
"""

# A notification's key from the texts of its parts: of one part that, of several a JSON array; NULL where there is none.
# An index entry has its limit, and a writer must not fail for it: a long key is its beginning and its digest.
# COST 1: with the default, the planner would rather plan emit's INSERT anew for each call, for those that have no keys
# and so do not call this, which takes as long as all the rest.
_KEY = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_key(parts text[]) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 1 AS $function$
DECLARE
    key text := CASE
        WHEN pg_catalog.cardinality(parts) OPERATOR(pg_catalog.=) 1 THEN parts[1]
        WHEN pg_catalog.array_remove(parts, NULL) OPERATOR(pg_catalog.<>) ARRAY[]::pg_catalog.text[]
            THEN pg_catalog.to_jsonb(parts)::pg_catalog.text
    END;
BEGIN
    IF pg_catalog.octet_length(key) OPERATOR(pg_catalog.>) 500 THEN
        RETURN pg_catalog.concat(pg_catalog.left(key, 60), '...', pg_catalog.encode(
            pg_catalog.sha256(pg_catalog.convert_to(key, pg_catalog.getdatabaseencoding())), 'hex'
        ));
    END IF;
    RETURN key;
END
$function$
"""

# The same of a message, whose fields have the texts that JSON gives them.
_KEY_OF_MESSAGE = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_key(payload jsonb, fields text[]) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE COST 1 AS $function$
BEGIN
    IF pg_catalog.cardinality(fields) OPERATOR(pg_catalog.=) 1 THEN
        RETURN {s}pgpubsub_key(ARRAY[payload OPERATOR(pg_catalog.->>) fields[1]]);
    END IF;
    RETURN {s}pgpubsub_key(ARRAY(
        SELECT payload OPERATOR(pg_catalog.->>) f.name
        FROM pg_catalog.unnest(fields) WITH ORDINALITY AS f (name, position) ORDER BY f.position
    ));
END
$function$
"""

# Emit: one row for each payload and subscribed listener, or one without listener where there is none yet.
# `is_stored` and `doorbell` come from the caller's release; without them (psql) the installed channel decides.
_EMIT = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_emit(
    emitted text, payloads jsonb, due timestamptz, given_context jsonb, is_stored boolean, doorbell text
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    known record;
    context jsonb := {s}pgpubsub_context(given_context);
    version text := {s}pgpubsub_db_version();
    stored_rows bigint;
BEGIN
    SELECT c.name, c.listen_name, c.stored, c.table_name, c.ordering_key, c.unique_key INTO known
        FROM {s}pgpubsub_channel c
        WHERE c.name = emitted OR emitted = ANY (c.aliases) ORDER BY c.name = emitted DESC LIMIT 1;
    IF known.table_name IS NOT NULL THEN
        RAISE EXCEPTION 'pgpubsub: channel % carries the changes of the table %, whose triggers emit them',
            emitted, known.table_name USING HINT = 'Change the table, or declare a channel of its own for the message.';
    END IF;
    IF NOT coalesce(is_stored, known.stored, true) THEN
        PERFORM {s}pgpubsub_send(coalesce(doorbell, known.listen_name), jsonb_build_object(
            'installation', {s}pgpubsub_installation(), 'channel', emitted, 'operation', 'message', 'payload', p.value,
            'context', context, 'created_at', now(), 'db_version', version
        )) FROM jsonb_array_elements(payloads) p;
        RETURN 0;
    END IF;
    INSERT INTO {s}pgpubsub_notification (
        channel, subscription, operation, payload, context, db_version, available_at, ordering_key, unique_key
    )
        SELECT s.channel, s.id, 'message', p.value, context, version, coalesce(due, now()),
            CASE WHEN known.ordering_key IS NOT NULL
                THEN coalesce({s}pgpubsub_key(p.value, known.ordering_key), {none}) END,
            CASE WHEN known.unique_key IS NOT NULL THEN {s}pgpubsub_key(p.value, known.unique_key) END
        FROM jsonb_array_elements(payloads) WITH ORDINALITY AS p (value, position), {s}pgpubsub_subscription s
        WHERE (s.channel = emitted OR emitted = ANY (s.channel_aliases)) AND 'message' = ANY (s.operations)
        ORDER BY p.position, s.id;
    GET DIAGNOSTICS stored_rows = ROW_COUNT;
    IF stored_rows = 0 THEN
        INSERT INTO {s}pgpubsub_notification (
            channel, operation, payload, context, db_version, available_at, ordering_key, unique_key
        )
            SELECT coalesce(known.name, emitted), 'message', p.value, context, version, coalesce(due, now()),
                CASE WHEN known.ordering_key IS NOT NULL
                THEN coalesce({s}pgpubsub_key(p.value, known.ordering_key), {none}) END,
                CASE WHEN known.unique_key IS NOT NULL THEN {s}pgpubsub_key(p.value, known.unique_key) END
            FROM jsonb_array_elements(payloads) WITH ORDINALITY AS p (value, position) ORDER BY p.position;
        GET DIAGNOSTICS stored_rows = ROW_COUNT;
    END IF;
    IF stored_rows > 0 THEN
        PERFORM {s}pgpubsub_ring(emitted);
    END IF;
    RETURN stored_rows;
END
$function$
"""

# The same for psql and services in other languages:
#   SELECT pgpubsub_notify('blog.channels.PostReads', '{{"model_id": 1, "date": "2026-01-01"}}');
# An unknown channel is stored all the same: its release may come later, and nothing is lost. But it is said.
_NOTIFY = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_notify(
    channel text, payload jsonb, available_at timestamptz DEFAULT NULL, context jsonb DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    stored_rows bigint;
BEGIN
    IF channel IS NULL OR channel = '' THEN
        RAISE EXCEPTION 'pgpubsub_notify: the channel is empty: give its name, for example ''blog.channels.PostReads''';
    END IF;
    IF jsonb_typeof(payload) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'pgpubsub_notify: the payload of % is %: expected a JSON object of the channel''s fields',
            channel, coalesce(jsonb_typeof(payload), 'NULL');
    END IF;
    IF context IS NOT NULL AND jsonb_typeof(context) <> 'object' THEN
        RAISE EXCEPTION 'pgpubsub_notify: the context is a JSON %: expected an object', jsonb_typeof(context);
    END IF;
    IF NOT EXISTS (
        SELECT FROM {s}pgpubsub_channel c
        WHERE c.name = pgpubsub_notify.channel OR pgpubsub_notify.channel = ANY (c.aliases)
    ) THEN
        RAISE WARNING 'pgpubsub_notify: no channel named % is installed: stored until one is', channel;
    END IF;
    RETURN {s}pgpubsub_emit(channel, jsonb_build_array(payload), available_at, context, NULL, NULL);
END
$function$
"""
