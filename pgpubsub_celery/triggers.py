"""From a trigger channel and its listeners to DDL: the triggers that emit a table's changes, their names, their hash.

Owns which triggers a table needs and everything about their installation as text; what they call is `capture`'s. Never
executes anything; `migrations` does.

A statement's triggers see all that it changes, at once and in order, but only when the statement names their very
table. Rows of a partition or child are also written by way of its parent, and foreign tables have no transition tables:
these get a trigger for each row. A partitioned table has both, the one for rows for what is written to a partition
directly, made before or after the triggers were; what its own statements write to partitions is not told twice.

Not told as it was: a MERGE that moves rows to another partition. Postgres (14 to 18) puts such rows into the transition
tables of INSERT and DELETE if the MERGE has such actions, and else into none. An UPDATE that moves rows is an update.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Table

from pgpubsub_celery.arguments import Arguments, Target, arguments_of, capture_of
from pgpubsub_celery.capture import SIDES, TRANSITION, Capture, dollar_quoted, without_virtual
from pgpubsub_celery.channels import TriggerChannel, check_declared, table_of
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.predicates import read_capture
from pgpubsub_celery.schema import Names, quote_identifier, quote_literal

if TYPE_CHECKING:
    from pgpubsub_celery.listeners import Listener

TEMPLATE = 1
"""Which of the released texts is made for new definitions. What a released one makes is never changed: migrations made
with it must do the same for ever. A better text is one more of `_TEMPLATES`."""

COMMENT = f"pgpubsub_celery:v{TEMPLATE}:"
"""What the COMMENT of each function and trigger of ours begins with, with the number of its text. The definition's hash
follows; of a function also its arguments, as JSON."""
_COMMENT = re.compile(r"pgpubsub_celery:v(\d+):(\w+)(?: (\{.*\}))?", re.DOTALL)

_NAME_LIMIT = 63

# Parts of names, after the operation. Triggers that only partitioned tables have:
_DIRECT, _BEGIN, _END = "_direct", "_begin", "_end"
# Functions: for rows one at a time, and of the triggers before and after a statement on a partitioned table.
_BY_ROW, _THROUGH = "_by_row", "_through"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriggerDefinition:
    """The triggers of one channel for one operation."""

    table: Target
    arguments: Arguments
    """All that it is made of; `definition_of` makes the same again."""
    template: int
    operation: str
    name: str
    """Of the trigger that exists whatever the kind of table."""
    names: tuple[str, ...]
    """Of all triggers that there may be: partitioned tables have more than one."""
    function: str
    """Name of its function, in the package's schema."""
    create: list[str]
    """Statements to execute in this order; repeating them changes nothing."""
    drop: list[str]
    hash: str
    """A digest of its text, kept in the COMMENT of function and trigger: tells what is out of date."""
    sources: Mapping[str, str]
    """The source of each function that it may have, by the function's name."""

    @property
    def comment(self) -> str:
        """What the COMMENT of its trigger is."""
        return f"pgpubsub_celery:v{self.template}:{self.hash}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a COMMENT of ours says."""

    template: int
    hash: str
    arguments: Arguments | None


def read_comment(comment: str | None) -> Described | None:
    """Return what a function's or trigger's COMMENT says, None when it is not ours."""
    found = _COMMENT.fullmatch(comment or "")
    if found is None:
        return None
    try:
        arguments = None if found[3] is None else json.loads(found[3])
    except ValueError:
        arguments = None
    return Described(template=int(found[1]), hash=found[2], arguments=arguments)


def trigger_definitions(
    channel: type[TriggerChannel[Any]], listeners: Sequence[Listener], schema: str
) -> list[TriggerDefinition]:
    """Return the triggers for what these listeners of `channel` want, one definition for each operation.

    Listeners that other releases have subscribed keep getting every change of their operations: `changed` and
    `condition` are applied to the listeners given here alone.

    Raises:
        ChannelError: the channel's model is not mapped to a table.
        ListenerError: a listener's `changed` or `condition` cannot be read.
    """
    check_declared(channel)
    table = table_of(channel)
    return [
        _definition(read_capture(channel, table, operation, wanting, schema), _target(table), TEMPLATE)
        for operation in SIDES
        if (wanting := [listener for listener in listeners if operation in listener.operations])
    ]


def definition_of(arguments: Mapping[str, Any], schema: str, template: int | None = None) -> TriggerDefinition:
    """Return the definition that has been made of these arguments before, with one of the released texts.

    Raises:
        PgPubSubError: an argument is missing or unknown, or the text is a newer release's.
    """
    return _definition(*capture_of(arguments, schema), TEMPLATE if template is None else template)


def trigger_name(channel_name: str, part: str) -> str:
    """Return the name of a trigger or function of a channel: readable, at most 63 bytes, never another channel's."""
    digest = hashlib.sha256(channel_name.encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "_", channel_name.lower()).strip("_")
    room = _NAME_LIMIT - len(f"pgpubsub__{part}_{digest}")
    return f"pgpubsub_{readable[-room:].lstrip('_')}_{part}_{digest}"


def _definition(capture: Capture, table: Target, template: int) -> TriggerDefinition:
    if template not in _TEMPLATES:
        raise PgPubSubError(
            f"This release knows the texts 1 to {TEMPLATE} of triggers, not {template}: use the release that the "
            "migration was made with, or a newer one."
        )
    name = trigger_name(capture.names[0], capture.operation)
    statements = _TEMPLATES[template](capture, _qualified(table))
    arguments = arguments_of(capture, table)
    digest = hashlib.sha256("\n".join(statements).encode()).hexdigest()[:16]
    comment = f"pgpubsub_celery:v{template}:{digest}"
    described = f"{comment} {json.dumps(arguments, ensure_ascii=False)}"
    function = f"{Names(capture.schema).prefix}{quote_identifier(name)}()"
    return TriggerDefinition(
        table=table,
        arguments=arguments,
        template=template,
        operation=capture.operation,
        name=name,
        names=tuple(trigger_name(capture.names[0], capture.operation + part) for part in ("", _DIRECT, _BEGIN, _END)),
        function=name,
        create=[
            *statements,
            f"COMMENT ON FUNCTION {function} IS {quote_literal(described)}",
            f"COMMENT ON TRIGGER {quote_identifier(name)} ON {_qualified(table)} IS {quote_literal(comment)}",
        ],
        drop=drop_statements(capture.schema, capture.names[0], capture.operation),
        hash=digest,
        sources=_sources(capture),
    )


def _first_template(capture: Capture, target: str) -> list[str]:
    channel_name, *aliases = capture.names
    name = trigger_name(channel_name, capture.operation)
    function = Names(capture.schema).prefix + quote_identifier(name)
    return [
        *capture.checks(target),
        capture.function(name, by_row=False),
        f"REVOKE ALL ON FUNCTION {function}() FROM PUBLIC",
        *(
            (without_virtual(function, target), _create_triggers(capture, channel_name, target))
            if SIDES[capture.operation]
            else (_create_truncate(Names(capture.schema).prefix, name, target),)
        ),
        # Of a channel that was renamed, the triggers under its earlier name would tell each change once more.
        *(statement for alias in aliases for statement in drop_statements(capture.schema, alias, capture.operation)),
    ]


_TEMPLATES: Mapping[int, Callable[[Capture, str], list[str]]] = {1: _first_template}
"""Each gives the statements that make a trigger on a (qualified and quoted) table."""


def drop_statements(schema: str, channel_name: str, operation: str) -> list[str]:
    """Return what removes a channel's triggers for an operation, whatever they were made of."""
    # With the functions go their triggers, wherever the table has been moved to meanwhile.
    names = [quote_identifier(trigger_name(channel_name, operation + part)) for part in ("", _BY_ROW, _THROUGH)]
    return [f"DROP FUNCTION IF EXISTS {Names(schema).prefix}{name}() CASCADE" for name in names]


def _sources(capture: Capture) -> Mapping[str, str]:
    def named(part: str) -> str:
        return trigger_name(capture.names[0], capture.operation + part)

    found = {named(""): capture.body(by_row=False)}
    if SIDES[capture.operation]:
        found[named(_BY_ROW)] = capture.body(by_row=True)
        found[named(_THROUGH)] = _through_body(named(_THROUGH))
    return {name: f"\n{body}\n" for name, body in found.items()}


def _create_truncate(prefix: str, name: str, target: str) -> str:
    return (
        f"CREATE OR REPLACE TRIGGER {quote_identifier(name)} AFTER TRUNCATE ON {target}\n"
        f"FOR EACH STATEMENT EXECUTE FUNCTION {prefix}{quote_identifier(name)}()"
    )


def _create_triggers(capture: Capture, channel_name: str, target: str) -> str:
    """One statement, which looks at what kind of table it is."""
    prefix = Names(capture.schema).prefix
    operation = capture.operation

    def named(part: str) -> str:
        return trigger_name(channel_name, operation + part)

    flag = _flag(named(_THROUGH))
    through = dollar_quoted(_through_body(named(_THROUGH)), "$function$")
    body = _TRIGGERS.format(
        regclass=quote_literal(target),
        target=target,
        operation=operation.upper(),
        # An UPDATE that moves a row to another partition deletes and inserts there.
        writes="UPDATE" if operation == "update" else f"{operation.upper()} OR UPDATE",
        tables=" ".join(f"{side.upper()} TABLE AS {TRANSITION[side]}" for side in SIDES[operation]),
        name=quote_identifier(named("")),
        begin=quote_identifier(named(_BEGIN)),
        end=quote_identifier(named(_END)),
        direct=quote_identifier(named(_DIRECT)),
        direct_name=quote_literal(named(_DIRECT)),
        flag=flag,
        function=prefix + quote_identifier(named("")),
        by_row=prefix + quote_identifier(named(_BY_ROW)),
        through=prefix + quote_identifier(named(_THROUGH)),
        create_by_row=quote_literal(capture.function(named(_BY_ROW), by_row=True)),
        create_through=quote_literal(
            f"CREATE OR REPLACE FUNCTION {prefix}{quote_identifier(named(_THROUGH))}() RETURNS trigger\n"
            f"LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS {through}"
        ),
    )
    return f"DO {dollar_quoted(body, '$ddl$')}"


def _flag(through: str) -> str:
    return quote_literal(f"pgpubsub.{through}")


def _through_body(through: str) -> str:
    return _THROUGH_BODY.format(flag=_flag(through))


_TRIGGERS = """DECLARE
    target pg_catalog.oid := {regclass}::pg_catalog.regclass;
    kind "char" := (SELECT c.relkind FROM pg_catalog.pg_class c WHERE c.oid = target);
    by_row bool := EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhrelid = target) OR EXISTS (
        SELECT FROM pg_catalog.pg_class c WHERE c.relkind = 'f' AND (
            c.oid = target OR c.oid IN (SELECT t.relid FROM pg_catalog.pg_partition_tree(target) t)
        )
    );
BEGIN
    IF by_row OR kind = 'p' THEN
        EXECUTE {create_by_row};
        REVOKE ALL ON FUNCTION {by_row}() FROM PUBLIC;
    ELSE
        DROP FUNCTION IF EXISTS {by_row}() CASCADE;
    END IF;
    IF by_row THEN
        CREATE OR REPLACE TRIGGER {name} AFTER {operation} ON {target}
        FOR EACH ROW EXECUTE FUNCTION {by_row}();
    ELSE
        CREATE OR REPLACE TRIGGER {name} AFTER {operation} ON {target}
        REFERENCING {tables}
        FOR EACH STATEMENT EXECUTE FUNCTION {function}();
    END IF;
    IF kind = 'p' AND NOT by_row THEN
        EXECUTE {create_through};
        REVOKE ALL ON FUNCTION {through}() FROM PUBLIC;
        CREATE OR REPLACE TRIGGER {begin} BEFORE {writes} ON {target}
        FOR EACH STATEMENT EXECUTE FUNCTION {through}();
        CREATE OR REPLACE TRIGGER {end} AFTER {writes} ON {target}
        FOR EACH STATEMENT EXECUTE FUNCTION {through}();
        CREATE OR REPLACE TRIGGER {direct} AFTER {operation} ON {target}
        FOR EACH ROW WHEN (pg_catalog.strpos(
            coalesce(pg_catalog.current_setting({flag}, true), ''),
            pg_catalog.concat(',', pg_catalog.pg_trigger_depth(), ',')
        ) OPERATOR(pg_catalog.=) 0) EXECUTE FUNCTION {by_row}();
    ELSE
        DROP FUNCTION IF EXISTS {through}() CASCADE;
        IF EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = target AND t.tgname = {direct_name}) THEN
            DROP TRIGGER {direct} ON {target};
        END IF;
    END IF;
END"""

# Notes at which depths of triggers a statement on the partitioned table itself runs. A row is queued for the trigger of
# directly written ones only when no such statement runs at its depth: conditions of triggers are evaluated as rows are
# written. What a statement's cascades write is one deeper, and written by the time that its own triggers are called.
_THROUGH_BODY = """DECLARE
    depth int := pg_trigger_depth() - 1;
    running text := coalesce(current_setting({flag}, true), '');
BEGIN
    IF TG_WHEN = 'BEFORE' THEN
        running := concat(running, ',', depth, ',');
    ELSE
        running := coalesce((
            SELECT string_agg(concat(',', d, ','), '') FROM string_to_table(running, ',') d
            WHERE d <> '' AND d::int < depth
        ), '');
    END IF;
    PERFORM set_config({flag}, running, true);
    RETURN NULL;
END"""


def _target(table: Table) -> Target:
    return (None if table.schema is None else str(table.schema), str(table.name))


def _qualified(table: Target) -> str:
    schema, name = table
    return quote_identifier(name) if schema is None else f"{quote_identifier(schema)}.{quote_identifier(name)}"
