"""The SQL of migrations: texts that need no look at the database, so that they are the same online and as a script.

Owns them, a function for each operation, by its name. Each does nothing where what it makes is there: a database may
have been made by `install` or `create_all`, or be of a later version than the migration knows. Executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pgpubsub_celery.channels import listen_name_of
from pgpubsub_celery.models import metadata
from pgpubsub_celery.schema import Names, quote_identifier, quote_literal
from pgpubsub_celery.script import do_block, quoted, trigger_block, upgrade_block
from pgpubsub_celery.subscriptions import ChannelRow, channel_statement, text_array
from pgpubsub_celery.triggers import TriggerDefinition, definition_of, drop_statements
from pgpubsub_celery.upgrades import NO_INSTALLATION, released, upgrade_to

# Tables and functions


def create_pgpubsub(names: Names, *, version: int) -> list[str]:
    """Make this package's tables and functions as they were in a version of the schema; keep those of a later one."""
    made = released(version, names)
    schema = [] if names.schema == "public" else [f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(names.schema)}"]
    identity = (
        f"INSERT INTO {names.installation} (id, version) SELECT gen_random_uuid(), {version}\n"
        f"    WHERE NOT EXISTS (SELECT FROM {names.installation})"
    )
    return [
        *schema,
        *(upgrade_block(names, upgrade_to(one)) for one in range(2, version + 1)),
        *made.tables,
        identity,
        _when(names, f"<= {version}", _functions(made.functions) + _set_version(names, version)),
    ]


def restore_pgpubsub(names: Names, *, version: int) -> list[str]:
    """Make good what tables and functions lack: something was dropped or edited."""
    return create_pgpubsub(names, version=version)


def upgrade_pgpubsub(names: Names, *, from_version: int, to_version: int) -> list[str]:
    """Bring tables and functions to a later version, with a statement for each between."""
    statements = []
    for version in range(from_version + 1, to_version + 1):
        made = released(version, names)
        body = "".join(_execute(one) for one in (*upgrade_to(version).up(names), *made.tables))
        body += _functions(made.functions) + _set_version(names, version)
        statements.append(_when(names, f"< {version}", body))
    return statements


def downgrade_pgpubsub(names: Names, *, from_version: int, to_version: int) -> list[str]:
    """Bring tables and functions back to an earlier version, with a statement for each between."""
    statements = []
    for version in range(from_version, to_version, -1):
        before, after = released(version, names), released(version - 1, names)
        gone = [one for one in reversed(before.signatures) if one not in after.signatures]
        body = "".join(_execute(f"DROP FUNCTION IF EXISTS {one}") for one in gone)
        body += "".join(_execute(one) for one in upgrade_to(version).down(names))
        body += _functions(after.functions) + _set_version(names, version - 1)
        statements.append(_when(names, f"= {version}", body))
    return statements


def drop_pgpubsub(names: Names, *, version: int) -> list[str]:
    """Remove tables, functions and triggers; fail while notifications are stored. The schema stays."""
    tables = [f"{names.prefix}{table.name}" for table in reversed(metadata.sorted_tables)]
    body = (
        "DECLARE\n    found regprocedure;\n    stored bigint;\nBEGIN\n"
        f"    IF to_regclass({quote_literal(names.notification)}) IS NOT NULL THEN\n"
        f"        LOCK TABLE {names.notification} IN ACCESS EXCLUSIVE MODE;\n"
        f"        SELECT count(*) INTO stored FROM {names.notification};\n"
        "        IF stored > 0 THEN\n"
        "            RAISE EXCEPTION 'pgpubsub: % notification(s) are stored, and would be lost', stored\n"
        "                USING HINT = 'Let a bridge finish them (listen --recover), or discard them.';\n"
        "        END IF;\n    END IF;\n"
        "    FOR found IN SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace\n"
        f"        WHERE n.nspname = {quote_literal(names.schema)} AND p.proname LIKE E'pgpubsub\\\\_%'\n"
        "    LOOP\n        EXECUTE format('DROP FUNCTION IF EXISTS %s CASCADE', found);\n    END LOOP;\nEND"
    )
    return [do_block(body), *(f"DROP TABLE IF EXISTS {table}" for table in tables)]


# Channels and subscriptions


def create_pgpubsub_channel(
    names: Names,
    channel: str,
    *,
    table: str | None = None,
    stored: bool = True,
    aliases: Sequence[str] = (),
    listen_name: str | None = None,
    ordering_key: Sequence[str] | None = None,
    unique_key: Sequence[str] | None = None,
) -> list[str]:
    """Make a channel known to the database: whom to ring, whether its messages are stored, and which fields are keys.

    Keys need version 2 of the schema; without them, those that the channel has stay (`[]` removes them).
    """
    row = ChannelRow(
        name=channel,
        aliases=frozenset(aliases),
        listen_name=listen_name or listen_name_of(channel),
        stored=stored,
        table_name=table,
        ordering_key=None if ordering_key is None else tuple(ordering_key),
        unique_key=None if unique_key is None else tuple(unique_key),
    )
    return [channel_statement(row, names)]


def alter_pgpubsub_channel(names: Names, channel: str, **settings: Any) -> list[str]:
    """Change what the database knows of a channel; arguments as for `create_pgpubsub_channel`."""
    return create_pgpubsub_channel(names, channel, **settings)


def drop_pgpubsub_channel(names: Names, channel: str) -> list[str]:
    """Make a channel unknown, unless notifications wait for a listener of it."""
    name = quote_literal(channel)
    waiting = f"SELECT FROM {names.notification} n WHERE n.channel = {name} AND n.subscription IS NULL"
    return [f"DELETE FROM {names.channel} c WHERE c.name = {name} AND NOT EXISTS (\n    {waiting}\n)"]


def create_pgpubsub_subscription(
    names: Names,
    channel: str,
    listener: str,
    operations: Sequence[str],
    *,
    channel_aliases: Sequence[str] = (),
    aliases: Sequence[str] = (),
    was: Sequence[str] = (),
) -> list[str]:
    """Give a listener its operations, in the row that it has, under an earlier name too, or in a new one.

    A row keeps its id, so that what is stored for it follows. `was`: the channel and listener that it had.
    """
    channels = {channel, *channel_aliases, *was[:1]}
    listeners = {listener, *aliases, *was[1:]}
    wanted = text_array(operations)
    settings = {
        "channel": quote_literal(channel),
        "listener": quote_literal(listener),
        "channel_aliases": _names_without("s.channel_aliases || s.channel", channels, channel),
        "aliases": _names_without("s.aliases || s.listener", listeners, listener),
        "operations": wanted,
    }
    mine = f"s.channel = ANY ({text_array(channels)}) AND s.listener = ANY ({text_array(listeners)})"
    exact = f"s.channel = {settings['channel']} AND s.listener = {settings['listener']}"
    body = (
        "DECLARE\n    kept int := (\n"
        f"        SELECT s.id FROM {names.subscription} s WHERE {mine}\n"
        f"        ORDER BY ({exact}) DESC, s.id LIMIT 1\n    );\nBEGIN\n"
        f"    INSERT INTO {names.subscription} (channel, channel_aliases, listener, aliases, operations)\n"
        f"        SELECT {settings['channel']}, {text_array(channels - {channel})}, {settings['listener']}, "
        f"{text_array(listeners - {listener})}, {wanted}\n        WHERE kept IS NULL ON CONFLICT DO NOTHING;\n"
        f"    UPDATE {names.subscription} s SET {', '.join(f'{name} = {value}' for name, value in settings.items())}\n"
        "        WHERE s.id = kept;\n"
        # Of two rows that were one listener's before anybody said so, the other stores no more.
        f"    UPDATE {names.subscription} s SET operations = '{{}}' WHERE s.id <> kept AND {mine};\nEND"
    )
    return [do_block(body)]


def alter_pgpubsub_subscription(
    names: Names, channel: str, listener: str, operations: Sequence[str], **settings: Any
) -> list[str]:
    """Change a subscription's operations or names; arguments as for `create_pgpubsub_subscription`."""
    return create_pgpubsub_subscription(names, channel, listener, operations, **settings)


def drop_pgpubsub_subscription(names: Names, channel: str, listener: str) -> list[str]:
    """End a subscription: nothing is stored for it any more, and what is stored stays. `install --prune` removes it."""
    condition = f"channel = {quote_literal(channel)} AND listener = {quote_literal(listener)}"
    return [f"UPDATE {names.subscription} SET operations = '{{}}' WHERE {condition}"]


# Triggers


def create_pgpubsub_trigger(
    names: Names, channel: str, table: str, operations: Sequence[str], *, template: int, **arguments: Any
) -> list[str]:
    """Create the triggers that emit a table's changes to a channel, one for each of the operations.

    `template` is the number of the text; what each of them makes never changes. `columns` are those to store; the other
    arguments are described in `arguments`.
    """
    made = _definitions(names, operations, template, {"channel": channel, "table": table, **arguments})
    return [trigger_block(definition) for definition in made]


def replace_pgpubsub_trigger(
    names: Names, channel: str, table: str, operations: Sequence[str], *, template: int, **arguments: Any
) -> list[str]:
    """Give triggers another definition, or the same once more; arguments as for `create_pgpubsub_trigger`."""
    made = _definitions(names, operations, template, {"channel": channel, "table": table, **arguments})
    return [statement for definition in made for statement in definition.create]


def drop_pgpubsub_trigger(names: Names, channel: str, table: str, operations: Sequence[str]) -> list[str]:
    """Remove triggers of a channel, with their functions; `table` is for people."""
    return [one for operation in operations for one in drop_statements(names.schema, channel, operation)]


# What they are made of


def _definitions(
    names: Names, operations: Iterable[str], template: int, arguments: Mapping[str, Any]
) -> list[TriggerDefinition]:
    return [definition_of({**arguments, "operation": one}, names.schema, template) for one in operations]


def _names_without(present: str, known: Iterable[str], name: str) -> str:
    every = f"SELECT DISTINCT v FROM unnest({present} || {text_array(known)}) AS u (v)"
    return f"ARRAY({every} WHERE v <> {quote_literal(name)} ORDER BY v)"


def _when(names: Names, condition: str, body: str) -> str:
    """A block that is executed when the version in the database is such; the body may use `installation`."""
    return do_block(
        f"DECLARE\n    installation text := (SELECT id FROM {names.installation});\nBEGIN\n"
        f"    IF (SELECT version FROM {names.installation}) {condition} THEN\n{body}    END IF;\nEND"
    )


def _functions(statements: Iterable[str]) -> str:
    return "".join(
        f"        EXECUTE replace({quoted(statement)}, '{NO_INSTALLATION}', installation);\n"
        for statement in statements
    )


def _execute(statement: str) -> str:
    return f"        EXECUTE {quoted(statement)};\n"


def _set_version(names: Names, version: int) -> str:
    return f"        UPDATE {names.installation} SET version = {version};\n"
