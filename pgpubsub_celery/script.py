"""`install` as a script, for those whose databases only others may change.

Owns the text. It does what `install` does on an empty or older database, and nothing where all is in place: what
`install` finds out by looking is conditions here. Executes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgpubsub_celery.channels import Channel
from pgpubsub_celery.drift import function_statements, listeners, table_statements, tables
from pgpubsub_celery.listeners import Listener
from pgpubsub_celery.schema import VERSION, Names, functions, quote_identifier, quote_literal
from pgpubsub_celery.subscriptions import changes, channel_statement, text_array, wanted_channel
from pgpubsub_celery.trigger_drift import definitions, qualified
from pgpubsub_celery.triggers import TriggerDefinition
from pgpubsub_celery.upgrades import NO_INSTALLATION, Upgrade, pending


def install_script(names: Names, channels: Sequence[type[Channel]]) -> str:
    """Return the script: one transaction."""
    statements: list[str] = []
    if names.schema != "public":
        statements.append(f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(names.schema)}")
    statements += [upgrade_block(names, one) for one in pending(0)]
    for table in tables(names.schema):
        statements += table_statements(table)
    statements.append(
        f"INSERT INTO {names.installation} (id, version) SELECT gen_random_uuid(), {VERSION}\n"
        f"    WHERE NOT EXISTS (SELECT FROM {names.installation})"
    )
    statements.append(f"UPDATE {names.installation} SET version = {VERSION} WHERE version < {VERSION}")
    statements.append(_functions(names))
    statements += [channel_statement(wanted_channel(channel), names) for channel in channels]
    statements += [_subscription(names, listener) for listener in listeners(channels)]
    statements += [trigger_block(one) for mine in definitions(names, channels).values() for one in mine]
    return "BEGIN;\n\n" + "".join(f"{statement};\n\n" for statement in statements) + "COMMIT;\n"


def upgrade_block(names: Names, upgrade: Upgrade) -> str:
    """Return what the tables of an older version lack: for before the rest, which may be about that."""
    executed = "\n".join(f"            EXECUTE {quoted(statement)};" for statement in upgrade.up(names))
    return do_block(
        f"BEGIN\n    IF to_regclass({quote_literal(names.installation)}) IS NOT NULL THEN\n"
        f"        IF (SELECT version FROM {names.installation}) < {upgrade.to} THEN\n{executed}\n        END IF;\n"
        "    END IF;\nEND"
    )


def _functions(names: Names) -> str:
    """The functions, with the id that the installation has or is given by the script."""
    executed = "\n".join(
        f"    EXECUTE replace({quoted(statement)}, '{NO_INSTALLATION}', installation);"
        for function in functions(names.schema, NO_INSTALLATION)
        for statement in function_statements(names, function)
    )
    version = f"(SELECT version FROM {names.installation})"
    return do_block(
        f"DECLARE\n    installation text := (SELECT id FROM {names.installation});\nBEGIN\n"
        f"    IF {version} > {VERSION} THEN\n"
        f"        RAISE EXCEPTION 'The database has version % of the schema, this script {VERSION}', {version};\n"
        f"    END IF;\n{executed}\nEND"
    )


def _subscription(names: Names, listener: Listener) -> str:
    """A subscription. One that has an earlier name is left to the first bridge of the release, which renames it."""
    (addition,) = changes([], [listener], exact=True)
    known = text_array({*listener.names})
    channels = text_array({listener.channel.name(), *listener.channel.aliases})
    operations = text_array(listener.operations)
    return do_block(
        f"BEGIN\n    IF NOT EXISTS (SELECT FROM {names.subscription} s\n"
        f"        WHERE (s.channel || s.channel_aliases) && {channels} AND (s.listener || s.aliases) && {known}) THEN\n"
        f"        {addition.statement(names)};\n    END IF;\n"
        f"    UPDATE {names.subscription} SET operations = {operations}\n"
        f"        WHERE channel = {quote_literal(listener.channel.name())} "
        f"AND listener = {quote_literal(listener.name)}\n"
        f"        AND NOT (operations @> {operations} AND operations <@ {operations});\nEND"
    )


def trigger_block(definition: TriggerDefinition) -> str:
    """Return what makes a trigger where it is missing or out of date: making one locks its table."""
    table = quote_literal(qualified(*definition.table))
    comment = quote_literal(definition.comment)
    executed = "\n".join(f"        EXECUTE {quoted(statement)};" for statement in definition.create)
    return do_block(
        f"BEGIN\n    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = {table}::regclass\n"
        f"        AND t.tgname = {quote_literal(definition.name)}\n"
        f"        AND obj_description(t.oid, 'pg_trigger') = {comment}) THEN\n{executed}\n    END IF;\nEND"
    )


def do_block(block: str) -> str:
    """Return a PL/pgSQL block as a statement."""
    return f"DO {quoted(block)}"


def quoted(body: str) -> str:
    """Return text as a literal that reads as it is: in dollar quotes that it does not contain."""
    tag = "$pgpubsub$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"{tag}\n{body}\n{tag}"
