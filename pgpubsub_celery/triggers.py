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
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Table, inspect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql import ClauseElement, literal, visitors
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.util import ClauseAdapter

from pgpubsub_celery.capture import SIDES, TRANSITION, Capture, Predicate, dollar_quoted, without_virtual
from pgpubsub_celery.channels import TriggerChannel, captured_columns, check_declared, table_of
from pgpubsub_celery.errors import ListenerError, did_you_mean
from pgpubsub_celery.schema import Names, quote_identifier, quote_literal

if TYPE_CHECKING:
    from pgpubsub_celery.listeners import Listener

COMMENT = "pgpubsub_celery:v1:"
"""What the COMMENT of each function and trigger of ours begins with; the definition's hash follows."""

_NAME_LIMIT = 63

# Parts of names, after the operation. Triggers that only partitioned tables have:
_DIRECT, _BEGIN, _END = "_direct", "_begin", "_end"
# Functions: for rows one at a time, and of the triggers before and after a statement on a partitioned table.
_BY_ROW, _THROUGH = "_by_row", "_through"

# Without percent signs doubled for a driver's parameters: there are none.
_DIALECT = PGDialect(paramstyle="named")  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriggerDefinition:
    """The triggers of one channel for one operation."""

    table: tuple[str | None, str]
    """The table's schema (None: found by the search_path of whoever installs) and name."""
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
    return [
        _definition(channel, operation, wanting, schema)
        for operation in SIDES
        if (wanting := [listener for listener in listeners if operation in listener.operations])
    ]


def trigger_name(channel_name: str, part: str) -> str:
    """Return the name of a trigger or function of a channel: readable, at most 63 bytes, never another channel's."""
    digest = hashlib.sha256(channel_name.encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "_", channel_name.lower()).strip("_")
    room = _NAME_LIMIT - len(f"pgpubsub__{part}_{digest}")
    return f"pgpubsub_{readable[-room:].lstrip('_')}_{part}_{digest}"


def _definition(
    channel: type[TriggerChannel[Any]], operation: str, listeners: Sequence[Listener], schema: str
) -> TriggerDefinition:
    table = table_of(channel)
    target = _qualified(table)
    prefix = Names(schema).prefix
    capture = _capture(channel, table, operation, listeners, schema)

    def function(channel_name: str, part: str = "") -> str:
        return prefix + quote_identifier(trigger_name(channel_name, operation + part))

    def drop(channel_name: str) -> list[str]:
        # With the functions go their triggers, wherever the table has been moved to meanwhile.
        return [f"DROP FUNCTION IF EXISTS {function(channel_name, part)}() CASCADE" for part in ("", _BY_ROW, _THROUGH)]

    name = trigger_name(channel.name(), operation)
    statements = [
        *capture.checks(target),
        capture.function(name, by_row=False),
        f"REVOKE ALL ON FUNCTION {function(channel.name())}() FROM PUBLIC",
        *(
            (without_virtual(function(channel.name()), target), _create_triggers(capture, channel.name(), target))
            if SIDES[operation]
            else (_create_truncate(prefix, name, target),)
        ),
        # Of a channel that was renamed, the triggers under its earlier name would tell each change once more.
        *(statement for alias in channel.aliases for statement in drop(alias)),
    ]
    digest = hashlib.sha256("\n".join(statements).encode()).hexdigest()[:16]
    comment = quote_literal(COMMENT + digest)
    statements += [
        f"COMMENT ON FUNCTION {function(channel.name())}() IS {comment}",
        f"COMMENT ON TRIGGER {quote_identifier(name)} ON {target} IS {comment}",
    ]
    return TriggerDefinition(
        table=(None if table.schema is None else str(table.schema), str(table.name)),
        operation=operation,
        name=name,
        names=tuple(trigger_name(channel.name(), operation + part) for part in ("", _DIRECT, _BEGIN, _END)),
        function=name,
        create=statements,
        drop=drop(channel.name()),
        hash=digest,
    )


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

    flag = quote_literal(f"pgpubsub.{named(_THROUGH)}")
    through = dollar_quoted(_THROUGH_BODY.format(flag=flag), "$function$")
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


# What is read of the declaration


def _capture(
    channel: type[TriggerChannel[Any]], table: Table, operation: str, listeners: Sequence[Listener], schema: str
) -> Capture:
    # In an order of their own: that of the declarations depends on which module was imported first.
    predicates = sorted(
        (one for listener in listeners if (one := _predicate(channel, table, operation, listener)) is not None),
        key=lambda predicate: predicate.names,
    )
    return Capture(
        schema=schema,
        operation=operation,
        names=(channel.name(), *channel.aliases),
        listen_name=channel.listen_safe_name(),
        stored=channel.lock_notifications,
        columns=tuple(
            str(column.name)
            for column in captured_columns(channel)
            if column.computed is None or column.computed.persisted is not False
        ),
        everybody_has_predicates=len(predicates) == len(listeners),
        predicates=tuple(predicates),
        kind=_kind(channel, table),
    )


def _predicate(
    channel: type[TriggerChannel[Any]], table: Table, operation: str, listener: Listener
) -> Predicate | None:
    watched: tuple[str, ...] = ()
    if operation == "update":
        watched = tuple(str(_column(channel, table, listener, name).name) for name in listener.changed)
    if operation == "truncate" or (not watched and listener.condition is None):
        return None
    condition = None if listener.condition is None else _condition(table, operation, listener)
    return Predicate(names=listener.names, watched=watched, condition=condition)


def _column(channel: type[TriggerChannel[Any]], table: Table, listener: Listener, name: Any) -> Column[Any]:
    """Return a column that a listener watches, by its name or by the attribute that maps it."""
    found: dict[str, Column[Any]] = {str(column.name): column for column in table.columns}
    if not isinstance(channel.model, Table):
        for attribute in inspect(channel.model).column_attrs:
            for column in attribute.columns:
                if getattr(column, "table", None) is table:
                    found[attribute.key] = column
    key = name if isinstance(name, str) else getattr(name, "key", None)
    if key not in found:
        raise ListenerError(
            f"{listener.name}: changed={listener.changed!r} names {name!r}, not a column of {table.fullname}."
            f"{did_you_mean(str(name), sorted(found))}"
        )
    return found[key]


def _condition(table: Table, operation: str, listener: Listener) -> str:
    """Return a listener's condition as SQL over `old` and `new`.

    In an SQLAlchemy expression `aliased(Model, name="old")` and `name="new"` are the two rows; the model itself is the
    row as it is now, or was when it was deleted.
    """
    given = listener.condition
    if isinstance(given, str):
        return given
    if hasattr(given, "__clause_element__"):
        given = given.__clause_element__()
    if not isinstance(given, ClauseElement):
        raise ListenerError(
            f"{listener.name}: condition={given!r}: expected SQL over old and new, such as \"new.status = 'paid'\", "
            "or an SQLAlchemy expression."
        )
    alias = table.alias("old" if operation == "delete" else "new")
    for part in visitors.iterate(given):
        if isinstance(part, BindParameter) and part.required:
            raise ListenerError(
                f"{listener.name}: the condition {given} has the parameter {part.key!r}, which nobody would give: "
                "write the value itself."
            )
    try:
        return _compile(ClauseAdapter(alias).traverse(given))
    except SQLAlchemyError as exc:
        raise ListenerError(
            f"{listener.name}: the condition {given} cannot be written as SQL with its values: {exc}"
        ) from exc


def _kind(channel: type[TriggerChannel[Any]], table: Table) -> tuple[str, tuple[str, ...]] | None:
    """Single-table inheritance: a channel of a subclass carries the changes of the subclass's rows alone."""
    if isinstance(channel.model, Table):
        return None
    mapper = inspect(channel.model)
    column = mapper.polymorphic_on
    if not mapper.single or not isinstance(column, Column) or column.table is not table:
        return None
    identities = [one.polymorphic_identity for one in mapper.self_and_descendants]
    return str(column.name), tuple(_compile(literal(one, column.type)) for one in identities if one is not None)


def _compile(expression: Any) -> str:
    return str(expression.compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True}))


def _qualified(table: Table) -> str:
    name = quote_identifier(table.name)
    return name if table.schema is None else f"{quote_identifier(table.schema)}.{name}"
