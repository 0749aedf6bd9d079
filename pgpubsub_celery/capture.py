"""The SQL functions that triggers call: what a statement or a row changed becomes notifications.

Owns their text. Which triggers call them, when and on what kind of table is `triggers`' business; how the stored values
are read back, `rows`'. Pure: strings from strings.

The writer must not suffer for us, whatever happens to its table later: a column that has been dropped is stored as
null, a condition that cannot be evaluated counts as met, a value too large for jsonb is left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

from pgpubsub_celery.schema import NO_KEY, RING, Names, quote_identifier, quote_literal

ROW_LIMIT = 100_000_000
"""Bytes of a row's text up to which all of it is stored; jsonb ends at 256 MB, and old and new must both fit."""
UNSTORED_ROW_LIMIT = 10_000_000
"""The same for channels that are not stored, whose messages pass through the server's NOTIFY queue."""

SIDES: Mapping[str, tuple[str, ...]] = {
    "insert": ("new",),
    "update": ("old", "new"),
    "delete": ("old",),
    "truncate": (),
}
"""Which of a row's two states each operation has."""

TRANSITION: Mapping[str, str] = {"old": "pgpubsub_old", "new": "pgpubsub_new"}
"""The transition tables of a statement's trigger."""
_RECORD: Mapping[str, str] = {"old": "(SELECT old.*)", "new": "(SELECT new.*)"}
"""The same of a row's trigger."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicate:
    """What one listener has asked for beyond its operations."""

    names: tuple[str, ...]
    """The listener's, with its earlier ones."""
    watched: tuple[str, ...] = ()
    """The columns of which one must have changed; none: any may."""
    condition: str | None = None
    """SQL over old and new."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """Everything that the functions of one channel and operation depend on."""

    schema: str
    operation: str
    names: tuple[str, ...]
    """The channel's, with its earlier ones."""
    listen_name: str
    stored: bool
    columns: tuple[str, ...]
    """Whose values are stored."""
    predicates: tuple[Predicate, ...] = ()
    everybody_has_predicates: bool = False
    """Whether each listener that this release has for the operation has one."""
    kind: tuple[str, tuple[str, ...]] | None = None
    """A column, and its values (as SQL) in the rows that are the channel's; None: all are."""
    ordering_key: tuple[str, ...] = ()
    """Columns whose values are the notification's key. Of an update, as they are afterwards."""
    unique_key: tuple[str, ...] = ()

    # Built once for each text

    @functools.cached_property
    def _sql(self) -> Names:
        return Names(self.schema)

    @functools.cached_property
    def _sides(self) -> tuple[str, ...]:
        return SIDES[self.operation]

    @functools.cached_property
    def _keys(self) -> tuple[str, ...]:
        # jsonb sorts its keys by length and then bytes: given in that order they cost nothing to sort.
        return tuple(sorted(self.columns, key=lambda name: (len(name.encode()), name.encode())))

    @property
    def _named_keys(self) -> list[tuple[str, tuple[str, ...]]]:
        """The notification's columns for keys that are filled, with the table's columns that they are made of."""
        both = (("ordering_key", self.ordering_key), ("unique_key", self.unique_key))
        return [(name, columns) for name, columns in both if columns]

    @functools.cached_property
    def _watched(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for predicate in self.predicates for name in predicate.watched))

    @functools.cached_property
    def _conditions(self) -> list[tuple[str, Predicate]]:
        return [(f"wanted_{n}", one) for n, one in enumerate(self.predicates) if one.condition is not None]

    def function(self, name: str, *, by_row: bool) -> str:
        """Return the statement that creates the function `name`, for triggers of statements or of rows."""
        body = dollar_quoted(self.body(by_row=by_row), "$function$")
        prefix = self._sql.prefix
        return f"CREATE OR REPLACE FUNCTION {prefix}{quote_identifier(name)}() RETURNS trigger{_SETTINGS}AS {body}"

    def body(self, *, by_row: bool) -> str:
        """Return what is between the function's dollar quotes."""
        sources = _RECORD if by_row else TRANSITION
        unneeded = [f"{self._sql.prefix}pgpubsub_suppressed({quote_literal(one)})" for one in self.names]
        if self._sides and not by_row:
            unneeded.insert(0, f"NOT EXISTS (SELECT FROM {sources[self._sides[-1]]})")
        variables = [f"\n    {variable} bigint[];" for variable, _ in self._conditions]
        return _BODY.format(
            names=text_array(self.names),
            columns=text_array(self._keys),
            variables="".join(variables),
            unneeded=" OR ".join(unneeded),
            s=self._sql.prefix,
            conditions="".join(self._evaluate(variable, one, sources) for variable, one in self._conditions),
            emit=self._store(sources) if self.stored else self._send(sources),
        )

    def _store(self, sources: Mapping[str, str]) -> str:
        where = ""
        if self.predicates:
            each = [f"(NOT {_is_one_of(one.names)} OR {self._wants(n)})" for n, one in enumerate(self.predicates)]
            where = f"\n    WHERE s.id IS NULL OR ({' AND '.join(each)})"
        return _STORE.format(
            s=self._sql.prefix,
            subscription=self._sql.subscription,
            notification=self._sql.notification,
            is_subscribed=self._is_subscribed,
            operation=quote_literal(self.operation),
            changes=self._changes(sources),
            where=where,
            keys="".join(f", {name}" for name, _ in self._named_keys),
            made="".join(f", c.{name}" for name, _ in self._named_keys),
            ring=RING.format(s=self._sql.prefix, known=_KNOWN),
        )

    def _send(self, sources: Mapping[str, str]) -> str:
        doors = f"VALUES ({quote_literal(self.names[0])}, {quote_literal(self.listen_name)})"
        if len(self.names) > 1:
            # Bridges of the older release listen under the earlier name.
            doors += (
                f" UNION SELECT k.name, k.listen_name FROM {self._sql.channel} k WHERE k.name = ANY (emitted.names)"
            )
        unwanted, where = self._refusals()
        return _SEND.format(
            s=self._sql.prefix,
            operation=quote_literal(self.operation),
            changes=self._changes(sources),
            doors=doors,
            unwanted=unwanted,
            where=where,
        )

    def _refusals(self) -> tuple[str, str]:
        """A message that is not stored says which listeners do not want it, and is not sent when nobody does."""
        if not self.predicates:
            return "", ""
        refused = ", ".join(
            f"CASE WHEN NOT {self._wants(n)} THEN {quote_literal(name)} END"
            for n, predicate in enumerate(self.predicates)
            for name in predicate.names
        )
        unwanted = f", 'unwanted', array_remove(ARRAY[{refused}], NULL)"
        if not self.everybody_has_predicates:
            return unwanted, ""
        known = [name for predicate in self.predicates for name in predicate.names]
        others = f"SELECT FROM {self._sql.subscription} s WHERE {self._is_subscribed} AND NOT {_is_one_of(known)}"
        wanted = " OR ".join(self._wants(n) for n in range(len(self.predicates)))
        return unwanted, f"\n    WHERE {wanted} OR EXISTS ({others})"

    @property
    def _is_subscribed(self) -> str:
        return (
            "(s.channel = ANY (emitted.names) OR s.channel_aliases && emitted.names) "
            f"AND {quote_literal(self.operation)} = ANY (s.operations)"
        )

    def _wants(self, number: int) -> str:
        predicate = self.predicates[number]
        parts: list[str] = []
        if predicate.watched:
            parts.append(f"c.differs_{number}")
        if predicate.condition is not None:
            parts.append(f"(emitted.wanted_{number} IS NULL OR c.ordinal IN (SELECT unnest(emitted.wanted_{number})))")
        return f"({' AND '.join(parts)})"

    # The changed rows

    def _changes(self, sources: Mapping[str, str]) -> str:
        if not self._sides:
            keys = "".join(f", {_key('NULL::text', name)} AS {name}" for name, _ in self._named_keys)
            return f"        SELECT 1 AS ordinal, '{{}}'::jsonb AS payload{keys}"
        named = list(dict.fromkeys([*self.columns, *self._watched, *(self.kind or ())[:1], *self._parts]))
        rows = ("o", "n") if len(self._sides) == 2 else ("r",)
        parts = {
            "missing": ", ".join(f"NULL::text AS {quote_identifier(str(name))}" for name in named),
            "where": " OR ".join(f"{row}.kind" for row in rows) if self.kind is not None else "true",
            **{side: self._side(side, sources[side]) for side in self._sides},
        }
        keys = "".join(f", {rows[-1]}.{name}" for name, _ in self._named_keys)
        if len(self._sides) == 2:
            return _PAIRED.format(differing=self._differing, keys=keys, **parts)
        (side,) = self._sides
        return _SINGLE.format(side=side, rows=parts[side], missing=parts["missing"], where=parts["where"], keys=keys)

    @property
    def _parts(self) -> list[str]:
        return [column for _, columns in self._named_keys for column in columns]

    @property
    def _differing(self) -> str:
        def differ(name: str) -> str:
            position = self._watched.index(name) + 1
            return f"o.watched[{position}] IS DISTINCT FROM n.watched[{position}]"

        return "".join(
            f",\n                ({' OR '.join(map(differ, predicate.watched))}) AS differs_{number}"
            for number, predicate in enumerate(self.predicates)
            if predicate.watched
        )

    def _side(self, side: str, source: str) -> str:
        limit = ROW_LIMIT if self.stored else UNSTORED_ROW_LIMIT
        extra, taken = "", ""
        if self._watched:
            extra += f",\n                        {_texts(self._watched, collate=True)} AS watched"
            taken += ", v.watched"
        if self.kind is not None:
            column, values = self.kind
            texts = ", ".join(f"concat({value})" for value in values)
            extra += f', concat({quote_identifier(column)}) COLLATE "C" = ANY (ARRAY[{texts}]::text[]) AS kind'
            taken += ", v.kind"
        if side == self._sides[-1]:
            for name, columns in self._named_keys:
                made = _key(f"{self._sql.prefix}pgpubsub_key({_texts(columns)})", name)
                extra += f",\n                        {made} AS {name}"
                taken += f", v.{name}"
        # Where nobody asks for it, one plan node less for each statement.
        numbered = len(self._sides) == 2 or bool(self._conditions)
        return _SIDE.format(
            ordinal="row_number() OVER ()" if numbered else "0",
            limit=limit,
            each=limit // len(self.columns),
            texts=_texts(self._keys),
            extra=extra,
            taken=taken,
            source=source,
        )

    # Conditions

    def _evaluate(self, variable: str, predicate: Predicate, sources: Mapping[str, str]) -> str:
        rows = [_NUMBERED.format(source=sources[side], side=side) for side in self._sides]
        if len(rows) == 2:
            rows.insert(1, "FULL JOIN")
            rows.append("ON new.pgpubsub_ordinal = old.pgpubsub_ordinal")
        else:
            # The row that there is not has only nulls.
            other = "old" if self._sides == ("new",) else "new"
            rows.append(f"LEFT JOIN {sources[self._sides[0]]} AS {other} ON false")
        return _EVALUATE.format(
            variable=variable,
            side=self._sides[-1],
            rows="\n            ".join(rows),
            condition=predicate.condition,
            listener=quote_literal(predicate.names[0]),
        )

    def checks(self, table: str) -> list[str]:
        """Return statements that fail where a condition cannot be evaluated on the (quoted) table.

        So that an installation fails, rather than each writer is warned.
        """
        return [
            "DO "
            + dollar_quoted(
                _CHECK.format(
                    table=quote_literal(table),
                    condition=quote_literal(str(predicate.condition)),
                    listener=quote_literal(predicate.names[0]),
                ),
                "$ddl$",
            )
            for _, predicate in self._conditions
        ]


def without_virtual(function: str, table: str) -> str:
    """Return a statement that takes virtual generated columns (Postgres 18) out of a function, if the table has any.

    Transition tables have no values for them, and reading one fails. Both names are quoted.
    """
    body = _WITHOUT_VIRTUAL.format(function=quote_literal(function), table=quote_literal(table))
    return f"DO {dollar_quoted(body, '$ddl$')}"


def source_without_virtual(source: str, virtual: Sequence[str], others: Sequence[str]) -> str:
    """Return what `without_virtual` makes of a function's source. The names of the table's columns are quoted."""
    for name in virtual:
        source = source.replace(
            f"CASE WHEN {name} IS DISTINCT FROM NULL THEN concat({name})", "CASE WHEN false THEN text ''"
        )
    return source.replace("changed.*", ", ".join(f"changed.{name}" for name in others)) if virtual else source


def text_array(values: Iterable[str]) -> str:
    """Return strings as an SQL array, in their order."""
    return f"ARRAY[{', '.join(quote_literal(value).strip() for value in values)}]::text[]"


def dollar_quoted(body: str, tag: str) -> str:
    """Return `body` between `tag`s, which are lengthened until it holds none of them."""
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"{tag}\n{body}\n{tag}"


def _is_one_of(names: Sequence[str]) -> str:
    return f"(s.listener = ANY ({text_array(names)}) OR s.aliases && {text_array(names)})"


def _texts(names: Iterable[str], *, collate: bool = False) -> str:
    """An array of columns' values as the types' output functions write them.

    Not as casts to text, which a type's owner may define and would run with our rights, and which lose a char's blanks.
    IS NULL would be true for a composite value of nulls.
    """
    collation = ' COLLATE "C"' if collate else ""
    values = (_TEXT.format(name=name, collation=collation) for name in map(quote_identifier, names))
    return f"ARRAY[{', '.join(values)}]::text[]"


def _key(made: str, name: str) -> str:
    """A key as it is stored. What has none to be ordered by has one of its own, and waits for nobody."""
    return f"coalesce({made}, {NO_KEY})" if name == "ordering_key" else made


_TEXT = "CASE WHEN {name} IS DISTINCT FROM NULL THEN concat({name}){collation} END"


# Each value's text is the same whatever the writer's session has set, and says all of the value.
_SETTINGS = """
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' SET TimeZone = 'UTC'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET lc_monetary = 'C'
"""

# Columns of the table may have any name: variables are qualified, and everything else has an alias.
_BODY = """#variable_conflict use_column
<<emitted>>
DECLARE
    names CONSTANT text[] := {names};
    columns CONSTANT text[] := {columns};
    context jsonb;
    version text;
    stored_rows bigint;{variables}
BEGIN
    IF {unneeded} THEN
        RETURN NULL;
    END IF;
    emitted.context := {s}pgpubsub_context();
    emitted.version := {s}pgpubsub_db_version();
{conditions}{emit}
    RETURN NULL;
END"""

_KNOWN = """
            WHERE c.name = ANY (emitted.names) OR c.aliases && emitted.names"""

# A row for each change and subscription; one without subscription where there is none yet.
_STORE = """    WITH subscribed AS MATERIALIZED (
        SELECT s.id, s.channel, s.listener, s.aliases FROM {subscription} s
        WHERE {is_subscribed}
    )
    INSERT INTO {notification} (channel, subscription, operation, payload, context, db_version{keys})
    SELECT coalesce(s.channel, emitted.names[1]), s.id, {operation}, c.payload, emitted.context, emitted.version{made}
    FROM (
{changes}
    ) c LEFT JOIN subscribed s ON true{where};
    GET DIAGNOSTICS stored_rows = ROW_COUNT;
    IF emitted.stored_rows > 0 THEN
        {ring};
    END IF;"""

_SEND = """    PERFORM {s}pgpubsub_send(d.listen_name, jsonb_build_object(
        'installation', {s}pgpubsub_installation(), 'channel', d.name, 'operation', {operation}, 'payload', c.payload,
        'context', emitted.context, 'created_at', now(), 'db_version', emitted.version{unwanted}
    ))
    FROM (
{changes}
    ) c CROSS JOIN ({doors}) d (name, listen_name){where};"""

# The changes, in their order. Columns are not qualified: one that the table no longer has is found in `missing`.
_SINGLE = """        SELECT rows.* FROM (SELECT {missing}) missing CROSS JOIN LATERAL (
            SELECT r.ordinal, jsonb_build_object('{side}', r.columns) AS payload{keys}
            FROM (
{rows}
            ) r WHERE {where}
        ) rows"""

# Transition tables hold their rows in the order of change, so the n-th old row and the n-th new row are the same. FULL,
# because that is never done by a nested loop, which a plan made for one row would do to ten thousand. ORDER, because a
# hash join that goes to disk loses it.
_PAIRED = """        SELECT rows.* FROM (SELECT {missing}) missing CROSS JOIN LATERAL (
            SELECT n.ordinal, jsonb_build_object('old', o.columns, 'new', n.columns) AS payload{differing}{keys}
            FROM (
{old}
            ) o FULL JOIN (
{new}
            ) n ON n.ordinal = o.ordinal WHERE {where}
            ORDER BY n.ordinal
        ) rows"""

# jsonb_object takes half of the time that jsonb_build_object takes, and any number of columns.
_SIDE = """                SELECT {ordinal} AS ordinal, CASE WHEN pg_column_size(v.texts) <= {limit}
                    THEN jsonb_object(emitted.columns, v.texts)
                    ELSE (
                        SELECT coalesce(jsonb_object_agg(t.key, t.value), '{{}}')
                        FROM unnest(emitted.columns, v.texts) t (key, value)
                        WHERE t.value IS NULL OR octet_length(t.value) <= {each}
                    )
                END AS columns{taken}
                FROM (
                    SELECT {texts} AS texts{extra}
                    FROM {source} AS changed OFFSET 0
                ) v"""

_NUMBERED = "(SELECT row_number() OVER () AS pgpubsub_ordinal, changed.* FROM {source} AS changed) {side}"

# Conditions are the application's SQL: an error in one is not the writer's. The block writes nothing, so it costs no
# transaction id. NULL: notified of all.
_EVALUATE = """    BEGIN
        emitted.{variable} := ARRAY(
            SELECT {side}.pgpubsub_ordinal FROM
            {rows}
            WHERE ({condition}
            )
        );
    EXCEPTION WHEN OTHERS THEN
        emitted.{variable} := NULL;
        RAISE WARNING 'pgpubsub: the condition of % failed, so it is notified: %', {listener}, SQLERRM;
    END;
"""

_CHECK = """DECLARE
    path text := pg_catalog.current_setting('search_path');
    target text := (
        SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = {table}::pg_catalog.regclass
    );
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    EXECUTE pg_catalog.concat(
        'SELECT FROM ', target, ' old, ', target, ' new WHERE false AND (', {condition}, pg_catalog.chr(10), ')'
    );
    PERFORM pg_catalog.set_config('search_path', path, true);
EXCEPTION WHEN OTHERS THEN
    RAISE EXCEPTION 'pgpubsub: the condition of % on % cannot be evaluated: %', {listener}, target, SQLERRM
        USING HINT = 'It is SQL over old and new, rows of the table. Functions of your own need their schema.';
END"""

_WITHOUT_VIRTUAL = """DECLARE
    target pg_catalog.oid := {table}::pg_catalog.regclass;
    definition text := pg_catalog.pg_get_functiondef({function}::pg_catalog.regproc);
    name text;
BEGIN
    FOR name IN
        SELECT pg_catalog.concat('"', pg_catalog.replace(a.attname, '"', '""'), '"') FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = target AND a.attgenerated = 'v' AND NOT a.attisdropped
    LOOP
        definition := pg_catalog.replace(
            definition, pg_catalog.concat('CASE WHEN ', name, ' IS DISTINCT FROM NULL THEN concat(', name, ')'),
            'CASE WHEN false THEN text '''''
        );
        definition := pg_catalog.replace(definition, 'changed.*', (
            SELECT pg_catalog.string_agg(pg_catalog.format('changed.%I', a.attname), ', ' ORDER BY a.attnum)
            FROM pg_catalog.pg_attribute a
            WHERE a.attrelid = target AND a.attnum > 0 AND a.attgenerated <> 'v' AND NOT a.attisdropped
        ));
    END LOOP;
    IF FOUND THEN
        EXECUTE definition;
    END IF;
END"""
