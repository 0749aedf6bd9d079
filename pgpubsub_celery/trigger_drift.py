"""How the triggers of a database differ from what this release's listeners need, and what makes that go away.

Owns the comparison: missing, out of date, edited, disabled, of the wrong kind, not wanted any more. Reads the catalog,
which locks nothing of the users', and executes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, text

from pgpubsub_celery.arguments import differences
from pgpubsub_celery.capture import source_without_virtual
from pgpubsub_celery.channels import Channel, TriggerChannel, registered_channels
from pgpubsub_celery.listeners import listeners_of
from pgpubsub_celery.schema import Names, quote_identifier, quote_literal
from pgpubsub_celery.settings import DEFAULT_DATABASE
from pgpubsub_celery.triggers import Described, TriggerDefinition, read_comment, trigger_definitions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One difference."""

    what: str
    """What is missing or different, for people."""
    statements: tuple[str, ...] = ()
    """What makes it go away; nothing where somebody has to decide."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trigger:
    """A trigger of ours, as it is."""

    relation: int
    table: str
    """Qualified and quoted."""
    name: str
    comment: str
    function: str
    """Qualified and quoted, without arguments."""
    function_comment: str
    enabled: bool
    """Whether it is called for what applications change."""
    by_row: bool

    @property
    def described(self) -> Described | None:
        """What the database says of it: with what it is made of, if it was this package that made it."""
        mine, of_function = read_comment(self.comment), read_comment(self.function_comment)
        if mine is None or of_function is None or mine.hash != of_function.hash:
            return mine
        return of_function

    @property
    def drop(self) -> tuple[str, ...]:
        """The statements that remove it and, where no other trigger has it, its function."""
        function = quote_literal(self.function)
        return (
            f"DROP TRIGGER IF EXISTS {quote_identifier(self.name)} ON {self.table}",
            (
                f"DO $pgpubsub$ BEGIN IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgfoid = to_regproc({function})) "
                f"THEN DROP FUNCTION IF EXISTS {self.function}(); END IF; END $pgpubsub$"
            ),
        )


def definitions(names: Names, channels: Sequence[type[Channel]]) -> dict[str, list[TriggerDefinition]]:
    """Return the triggers of channels, by the qualified name of their table, in its order."""
    found: dict[str, list[TriggerDefinition]] = {}
    for channel in channels:
        if issubclass(channel, TriggerChannel):
            for definition in trigger_definitions(channel, listeners_of(channel), names.schema):
                found.setdefault(qualified(*definition.table), []).append(definition)
    return dict(sorted(found.items()))


def relation_of(connection: Connection, name: str) -> int | None:
    """Return the oid of a table, or None where there is none."""
    found = connection.execute(text("SELECT to_regclass(:name)::oid::bigint"), {"name": name}).scalar()
    return None if found is None else int(found)


def triggers(connection: Connection, names: Names) -> list[Trigger]:
    """Return all triggers of ours, those whose function is. Not the copies that partitions have of their parent's."""
    rows = connection.execute(
        text(
            "SELECT t.tgrelid::bigint AS relation, format('%I.%I', n.nspname, c.relname) AS table, t.tgname AS name, "
            "format('%I.%I', f.nspname, p.proname) AS function, "
            "coalesce(obj_description(t.oid, 'pg_trigger'), '') AS comment, "
            "coalesce(obj_description(p.oid, 'pg_proc'), '') AS function_comment, "
            "t.tgenabled IN ('O', 'A') AS enabled, t.tgtype & 1 = 1 AS by_row "
            "FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            "JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace f ON f.oid = p.pronamespace "
            "WHERE f.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND t.tgparentid = 0 AND NOT t.tgisinternal "
            "ORDER BY 2, 3"
        ),
        {"schema": names.schema},
    )
    return [Trigger(**row) for row in rows.mappings()]


def trigger_steps(connection: Connection, names: Names, table: str, wanted: Sequence[TriggerDefinition]) -> list[Step]:
    """Return which of the triggers that one table should have are missing, out of date, damaged or disabled."""
    relation = relation_of(connection, table)
    if relation is None:
        return [Step(what=f"the table {table} of a trigger channel does not exist")]
    existing = {trigger.name: trigger for trigger in triggers(connection, names) if trigger.relation == relation}
    steps: list[Step] = []
    inspection: _Inspection | None = None
    for definition in wanted:
        present = existing.get(definition.name)
        what = f"the trigger {definition.name} on {table}"
        if present is None:
            steps.append(Step(what=f"{what} is missing", statements=tuple(definition.create)))
            continue
        described = present.described
        if described is not None and described.template > definition.template:
            continue  # a newer release's, which does what this one needs: not to be undone by whoever installs late
        if present.comment != definition.comment:
            statements = tuple(definition.create)
            steps.append(Step(what=f"{what} is out of date{_outdated(present, definition)}", statements=statements))
            continue
        inspection = inspection or _Inspection(connection, names, relation)
        damage = inspection.damage_of(definition, existing)
        if damage is not None:
            steps.append(Step(what=f"{what} {damage}", statements=tuple(definition.create)))
        for name in definition.names:
            if damage is None and name in existing and not existing[name].enabled:
                enable = f"ALTER TABLE {table} ENABLE TRIGGER {quote_identifier(name)}"
                steps.append(Step(what=f"the trigger {name} on {table} is disabled", statements=(enable,)))
    return steps


def _outdated(present: Trigger, wanted: TriggerDefinition) -> str:
    """What differs, where the database says of what the trigger was made."""
    described = present.described
    if described is None or described.arguments is None:
        return ""
    if described.template != wanted.template:
        return f" (its text is version {described.template}, this release has {wanted.template})"
    found = differences(described.arguments, wanted.arguments)
    return f" ({'; '.join(found)})" if found else ""


class _Inspection:
    """Whether triggers of one table are what their comments say."""

    def __init__(self, connection: Connection, names: Names, relation: int) -> None:
        found = connection.execute(text(_KIND), {"relation": relation}).one()
        self._is_partitioned = found.kind == "p" and not found.by_row
        self._by_row = found.by_row
        self._virtual, self._others = found.virtual or [], found.others or []
        functions = connection.execute(text(_TRIGGER_FUNCTIONS), {"schema": names.schema})
        self._functions = {row.name: (row.source, row.secure) for row in functions}

    def damage_of(self, definition: TriggerDefinition, existing: Mapping[str, Trigger]) -> str | None:
        """Return what is wrong, for people."""
        has_rows = definition.operation != "truncate"
        if has_rows and existing[definition.name].by_row != self._by_row:
            return "is of the wrong kind: the table has become, or is no longer, a partition"
        parts = definition.names if has_rows and self._is_partitioned else definition.names[:1]
        lacking = [name for name in parts if name not in existing]
        if lacking:
            return f"lacks {', '.join(lacking)}, which partitioned tables have"
        for name, source in definition.sources.items():
            if name not in self._functions:
                continue
            virtual = self._virtual if name == definition.function else []
            present, secure = self._functions[name]
            if present != source_without_virtual(source, virtual, self._others):
                return f"has a function that somebody has edited ({name})"
            if not secure:
                return f"has a function whose settings somebody has altered ({name})"
        return None


_KIND = """
SELECT c.relkind AS kind, EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid) OR EXISTS (
    SELECT FROM pg_class f WHERE f.relkind = 'f' AND (
        f.oid = c.oid OR f.oid IN (SELECT t.relid FROM pg_partition_tree(c.oid) t)
    )
) AS by_row,
(SELECT array_agg(concat('"', replace(a.attname, '"', '""'), '"')) FILTER (WHERE a.attgenerated = 'v')
    FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS virtual,
(SELECT array_agg(format('%I', a.attname) ORDER BY a.attnum) FILTER (WHERE a.attgenerated <> 'v')
    FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS others
FROM pg_class c WHERE c.oid = CAST(:relation AS bigint)
"""

_TRIGGER_FUNCTIONS = """
SELECT p.proname AS name, p.prosrc AS source,
    'search_path=pg_catalog, pg_temp' = ANY (p.proconfig)
        AND (p.prosecdef OR p.proname LIKE '%\\_through\\_%') AS secure
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND p.prorettype = 'trigger'::regtype
"""


def unwanted_triggers(connection: Connection, names: Names, database: str = DEFAULT_DATABASE) -> list[Step]:
    """Return the triggers of ours that no registered channel of the database wants."""
    wanted = {
        (relation_of(connection, table), name)
        for table, mine in definitions(names, registered_channels(database)).items()
        for definition in mine
        for name in definition.names
    }
    return [
        Step(what=f"the trigger {trigger.name} on {trigger.table} is not wanted any more", statements=trigger.drop)
        for trigger in triggers(connection, names)
        if (trigger.relation, trigger.name) not in wanted
    ]


def unused_functions(connection: Connection, names: Names, database: str = DEFAULT_DATABASE) -> list[Step]:
    """Return the trigger functions of ours that no trigger calls and no registered channel wants.

    A table may be dropped without us.
    """
    return [
        Step(what=f"the trigger function {function} is not used any more", statements=(f"DROP FUNCTION {function}",))
        for function, _ in orphans(connection, names, database)
    ]


def orphans(connection: Connection, names: Names, database: str = DEFAULT_DATABASE) -> list[tuple[str, str | None]]:
    """Return such functions, qualified and quoted, with their comments."""
    wanted = [one.function for mine in definitions(names, registered_channels(database)).values() for one in mine]
    rows = connection.execute(
        text(
            "SELECT format('%I.%I()', n.nspname, p.proname) AS function, obj_description(p.oid, 'pg_proc') AS comment "
            "FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
            "WHERE n.nspname = :schema AND p.proname LIKE 'pgpubsub\\_%' AND p.prorettype = 'trigger'::regtype "
            "AND p.proname <> ALL (CAST(:wanted AS text[])) "
            "AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgfoid = p.oid) ORDER BY 1"
        ),
        {"schema": names.schema, "wanted": wanted},
    )
    return [(row.function, row.comment) for row in rows]


def qualified(schema: str | None, name: str) -> str:
    """Return a table's name, quoted, with its schema if that is given."""
    return quote_identifier(name) if schema is None else f"{quote_identifier(schema)}.{quote_identifier(name)}"
