"""The SQL functions of this package, and names qualified for one schema.

Owns the text of every function that lives in the database except the triggers': the installation's
identity, the doorbell, the transport of unstored messages, and the emit that `notify()`, psql and
services in other languages share. Never executes anything; `migrations` does.

All functions fix their `search_path` or qualify every name, run with the rights of the installing role, and
are revoked from PUBLIC, so that a role without grants can neither forge a notification nor read one.
"""

from __future__ import annotations

import dataclasses
import uuid

VERSION = 1
"""Version of the tables and functions; `install` upgrades older ones and refuses to downgrade newer ones."""

EMIT_FUNCTIONS = (
    "pgpubsub_notify(text, jsonb, timestamptz, jsonb)",
    "pgpubsub_emit(text, jsonb, timestamptz, jsonb, boolean, text)",
)
"""What a role needs EXECUTE on in order to emit (`install --grant-emit ROLE`)."""


def quote_identifier(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


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
        return self.prefix + "pgpubsub_notification"

    @property
    def subscription(self) -> str:
        return self.prefix + "pgpubsub_subscription"

    @property
    def channel(self) -> str:
        return self.prefix + "pgpubsub_channel"

    @property
    def installation(self) -> str:
        return self.prefix + "pgpubsub_installation"


def function_statements(schema: str, installation: uuid.UUID) -> list[str]:
    """Return the CREATE OR REPLACE FUNCTION statements, in the order to run them."""
    names = Names(schema)
    return [
        template.format(s=names.prefix, installation=installation)
        for template in (_INSTALLATION, _LOCK_KEY, _CONTEXT, _DB_VERSION, _RING, _SEND, _EMIT, _NOTIFY)
    ] + [
        f"REVOKE ALL ON FUNCTION {names.prefix}{signature} FROM PUBLIC"
        for signature in (
            "pgpubsub_ring(text)",
            "pgpubsub_send(text, jsonb)",
            "pgpubsub_context(jsonb)",
            "pgpubsub_db_version()",
            *EMIT_FUNCTIONS,
        )
    ]


# A constant rather than a look-up: the planner folds it into the lock keys.
_INSTALLATION = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_installation() RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $function$ SELECT '{installation}'::uuid $function$
"""

# Advisory lock keys: one bigint for each purpose (presence, keeper, door), channel and installation.
_LOCK_KEY = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_lock_key(purpose text, channel text) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $function$
    SELECT pg_catalog.hashtextextended(purpose || ' ' || channel, pg_catalog.hashtextextended('{installation}', 0))
$function$
"""

# The transaction's context (set_notification_context) under what the call itself gave. A malformed setting never
# aborts the writer: it is dropped. The block's subtransaction writes nothing, so it takes no transaction id.
_CONTEXT = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_context(given jsonb DEFAULT NULL) RETURNS jsonb
LANGUAGE plpgsql STABLE AS $function$
DECLARE
    setting text := pg_catalog.current_setting('pgpubsub.context', true);
BEGIN
    IF setting IS NULL OR setting = '' THEN
        RETURN given;
    END IF;
    BEGIN
        IF pg_catalog.jsonb_typeof(setting::pg_catalog.jsonb) = 'object' THEN
            RETURN setting::pg_catalog.jsonb || coalesce(given, '{{}}');
        END IF;
    EXCEPTION WHEN data_exception THEN
        NULL;
    END;
    RETURN given;
END
$function$
"""

# Alembic's revision(s) at the time of the change; NULL where there is no version table or no right to read it.
_DB_VERSION = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_db_version() RETURNS text
LANGUAGE plpgsql STABLE AS $function$
DECLARE
    versions text;
BEGIN
    IF pg_catalog.to_regclass('public.alembic_version') IS NULL THEN
        RETURN NULL;
    END IF;
    BEGIN
        SELECT pg_catalog.string_agg(version_num, ',' ORDER BY version_num) INTO versions FROM public.alembic_version;
    EXCEPTION WHEN insufficient_privilege OR undefined_table OR undefined_column THEN
        NULL;
    END;
    RETURN versions;
END
$function$
"""

# The doorbell. Granted: the bridge is awake and this transaction is registered with it until its end, silently.
# Refused: the bridge sleeps (or wants to), so NOTIFY. Locks are released after the commit is visible.
_RING = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_ring(emitted text) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    known record;
BEGIN
    FOR known IN SELECT c.name, c.listen_name FROM {s}pgpubsub_channel c WHERE c.name = emitted OR emitted = ANY (c.aliases)
    LOOP
        IF NOT pg_catalog.pg_try_advisory_xact_lock_shared({s}pgpubsub_lock_key('door', known.name)) THEN
            PERFORM pg_catalog.pg_notify(known.listen_name, '');
        END IF;
    END LOOP;
END
$function$
"""

# NOTIFY carries at most 7,999 bytes and drops equal payloads of one transaction: longer messages go in numbered
# chunks, and every message has an id. 1,900 characters are at most 7,600 bytes of UTF-8.
_SEND = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_send(listen_name text, message jsonb) RETURNS void
LANGUAGE plpgsql AS $function$
DECLARE
    body text := message::text;
    id text := pg_catalog.gen_random_uuid()::text;
    chunks int := pg_catalog.ceil(pg_catalog.length(body) / 1900.0)::int;
BEGIN
    IF pg_catalog.octet_length(body) <= 7900 THEN
        PERFORM pg_catalog.pg_notify(listen_name, id || ' 1 1 ' || body);
        RETURN;
    END IF;
    FOR chunk IN 1 .. chunks LOOP
        PERFORM pg_catalog.pg_notify(
            listen_name, id || ' ' || chunk || ' ' || chunks || ' ' || pg_catalog.substr(body, (chunk - 1) * 1900 + 1, 1900)
        );
    END LOOP;
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
    SELECT c.name, c.listen_name, c.stored INTO known FROM {s}pgpubsub_channel c
        WHERE c.name = emitted OR emitted = ANY (c.aliases) ORDER BY c.name = emitted DESC LIMIT 1;
    IF NOT coalesce(is_stored, known.stored, true) THEN
        PERFORM {s}pgpubsub_send(coalesce(doorbell, known.listen_name), jsonb_build_object(
            'installation', {s}pgpubsub_installation(), 'channel', emitted, 'operation', 'message', 'payload', p.value,
            'context', context, 'created_at', now(), 'db_version', version
        )) FROM jsonb_array_elements(payloads) p;
        RETURN 0;
    END IF;
    INSERT INTO {s}pgpubsub_notification (channel, subscription, operation, payload, context, db_version, available_at)
        SELECT s.channel, s.id, 'message', p.value, context, version, coalesce(due, now())
        FROM jsonb_array_elements(payloads) WITH ORDINALITY AS p (value, position), {s}pgpubsub_subscription s
        WHERE (s.channel = emitted OR emitted = ANY (s.channel_aliases)) AND 'message' = ANY (s.operations)
        ORDER BY p.position, s.id;
    GET DIAGNOSTICS stored_rows = ROW_COUNT;
    IF stored_rows = 0 THEN
        INSERT INTO {s}pgpubsub_notification (channel, operation, payload, context, db_version, available_at)
            SELECT coalesce(known.name, emitted), 'message', p.value, context, version, coalesce(due, now())
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
_NOTIFY = """
CREATE OR REPLACE FUNCTION {s}pgpubsub_notify(
    channel text, payload jsonb, available_at timestamptz DEFAULT NULL, context jsonb DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF channel IS NULL OR channel = '' THEN
        RAISE EXCEPTION 'pgpubsub_notify: the channel is empty: give its name, for example ''blog.channels.PostReads''';
    END IF;
    IF jsonb_typeof(payload) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION 'pgpubsub_notify: the payload of % is %: expected a JSON object of the channel''s fields',
            channel, coalesce(jsonb_typeof(payload), 'NULL');
    END IF;
    RETURN {s}pgpubsub_emit(channel, jsonb_build_array(payload), available_at, context, NULL, NULL);
END
$function$
"""
