"""What a database lacks of this package, as operations for a migration.

Owns the order of the operations, and which of several metadata and applications they are for. Compares as `install` and
`check` do, with `drift`, `trigger_drift` and `subscriptions`. Takes our own tables out of what Alembic itself proposes:
they are ours to make, to change and to remove.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alembic.operations import MigrateOperation
from sqlalchemy import Connection, text

from pgpubsub_celery import drift, models
from pgpubsub_celery.alembic.operations import Nothing, Operation, SqlOperation, operation, pair
from pgpubsub_celery.apps import load_app
from pgpubsub_celery.channels import Channel, TriggerChannel, listen_name_of, registered_channels, table_of
from pgpubsub_celery.emit import EnqueuedTask
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.listeners import MESSAGE, TRIGGER_OPERATIONS
from pgpubsub_celery.schema import VERSION, Names
from pgpubsub_celery.schemas import current_schema
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings
from pgpubsub_celery.subscriptions import (
    ChannelRow,
    Row,
    changes,
    match,
    wanted_channel,
)
from pgpubsub_celery.trigger_drift import (
    Trigger,
    definitions,
    orphans,
    qualified,
    relation_of,
    trigger_steps,
    triggers,
)
from pgpubsub_celery.triggers import Described, TriggerDefinition, definition_of, read_comment

logger = logging.getLogger("alembic.autogenerate.pgpubsub_celery")

OWN_TABLES = frozenset(models.metadata.tables)


def compare(context: Any, upgrade_ops: Any) -> Any:
    """Add what is missing to `upgrade_ops`, and take out what Alembic proposes for our own tables."""
    upgrade_ops.ops[:] = [one for one in upgrade_ops.ops if getattr(one, "table_name", None) not in OWN_TABLES]
    if context.dialect.name == "postgresql":
        schema = context.opts.get("pgpubsub_schema")
        database = context.opts.get("pgpubsub_database", DEFAULT_DATABASE)
        if context.opts.get("pgpubsub_app"):
            load_app(context.opts["pgpubsub_app"])
        names = Names(current_schema(database) if schema is None else Settings(schema=schema).schema)
        found = _Comparison(context, names, database).run()
        upgrade_ops.ops[:] = [*found.first, *upgrade_ops.ops, *found.last]
    return _go_on()


def _go_on() -> Any:
    try:
        from alembic.util import PriorityDispatchResult
    except ImportError:
        return None
    return PriorityDispatchResult.CONTINUE


@dataclasses.dataclass
class _Found:
    first: list[MigrateOperation] = dataclasses.field(default_factory=list)
    """Before the changes of tables: triggers that go, while their tables are there."""
    last: list[MigrateOperation] = dataclasses.field(default_factory=list)
    """After them: triggers need their tables' columns, and subscriptions need our tables."""


class _Comparison:
    """Of one database with what is registered in this process."""

    def __init__(self, context: Any, names: Names, database: str) -> None:
        self._context = context
        self._database = database
        self._connection: Connection = context.connection
        self._names = names
        self._found = _Found()
        channels = registered_channels(database)
        self._knows = any(channel is not EnqueuedTask for channel in channels)
        """Whether the application's modules are imported: without them, nothing can be said to be unwanted."""
        self._everything = drift.select(None, database)
        self._channels = [channel for channel in self._everything if self._is_ours(channel)]

    def run(self) -> _Found:
        is_installed = relation_of(self._connection, self._names.installation) is not None
        if not self._knows and not is_installed:
            return self._found
        self._own(is_installed)
        if self._knows:
            self._channels = drift.with_triggers(self._connection, self._names, self._channels)
            self._rows()
            self._triggers()
        elif len(drift.known_channels(self._connection, self._names)) > 1:
            logger.warning(
                "no channel is imported, so none is compared: pass pgpubsub_app='your.celery_app' to "
                "context.configure() in env.py, or import the modules of channels and listeners there"
            )
        return self._found

    def _is_ours(self, channel: type[Channel]) -> bool:
        """Whether it is for this environment: one of several may have the channel's table in its metadata."""
        if not issubclass(channel, TriggerChannel):
            return True
        table = table_of(channel)
        return str(table.key) in self._context.table_key_to_table

    def _add(self, done: MigrateOperation, what: str) -> None:
        logger.info("Detected %s", what)
        self._found.last.append(done)

    def _may_remove(self, channel: str) -> bool:
        """Ask the environment's `include_name`: another application may have channels in the same database."""
        return bool(self._context.run_name_filters(channel, "pgpubsub_channel", {"schema_name": self._names.schema}))

    # Tables and functions

    def _own(self, is_installed: bool) -> None:
        schema = self._names.schema
        if not is_installed:
            create = operation("create_pgpubsub", version=VERSION, schema=schema)
            self._add(pair(create, operation("drop_pgpubsub", version=VERSION, schema=schema)), "added pgpubsub tables")
            return
        steps = drift.own_objects(self._connection, self._names)
        version = self._connection.execute(text(f"SELECT version FROM {self._names.installation}")).scalar()
        if version is not None and version < VERSION:
            up = operation("upgrade_pgpubsub", from_version=version, to_version=VERSION, schema=schema)
            down = operation("downgrade_pgpubsub", from_version=VERSION, to_version=version, schema=schema)
            self._add(pair(up, down), f"version {version} of pgpubsub tables, this release has {VERSION}")
        elif steps:
            restore = operation("restore_pgpubsub", version=VERSION, schema=schema)
            self._add(restore, f"changed pgpubsub objects: {'; '.join(step.what for step in steps)}")

    # Channels and subscriptions

    def _rows(self) -> None:
        known = {row.name: row for row in drift.known_channels(self._connection, self._names)}
        rows = drift.known_subscriptions(self._connection, self._names)
        for wanted in map(wanted_channel, self._channels):
            self._channel(known.get(wanted.name), wanted)
        listeners = drift.listeners(self._channels)
        for change in changes(rows, listeners, exact=True):
            after = change.result
            if change.was is None:
                self._subscribed(after)
            elif not after.operations:
                self._unsubscribed(change.was)
            else:
                self._altered(change.was, after)
        self._remove(known, rows)

    def _channel(self, before: ChannelRow | None, wanted: ChannelRow) -> None:
        if before is None:
            create = self._operation(
                "create_pgpubsub_channel", wanted.name, **_channel_settings(wanted), **_keys(wanted)
            )
            undo = self._operation("drop_pgpubsub_channel", wanted.name)
            self._add(pair(create, undo), f"added pgpubsub channel {wanted.name}")
        elif before != wanted:
            alter = self._operation(
                "alter_pgpubsub_channel", wanted.name, **_channel_settings(wanted), **_keys(wanted, before)
            )
            undo = self._operation(
                "alter_pgpubsub_channel", wanted.name, **_channel_settings(before), **_keys(before, wanted)
            )
            self._add(pair(alter, undo), f"changed pgpubsub channel {wanted.name}")

    def _subscribed(self, row: Row) -> None:
        create = self._operation("create_pgpubsub_subscription", *_subscription(row), **_subscription_settings(row))
        undo = self._operation("drop_pgpubsub_subscription", row.channel, row.listener)
        self._add(pair(create, undo), f"added pgpubsub listener {row.listener} of {row.channel}")

    def _unsubscribed(self, row: Row) -> None:
        drop = self._operation("drop_pgpubsub_subscription", row.channel, row.listener)
        undo = self._operation("create_pgpubsub_subscription", *_subscription(row), **_subscription_settings(row))
        self._add(pair(drop, undo), f"removed pgpubsub listener {row.listener} of {row.channel}")

    def _altered(self, before: Row, after: Row) -> None:
        renamed = (before.channel, before.listener) != (after.channel, after.listener)
        there = {"was": [before.channel, before.listener]} if renamed else {}
        back = {"was": [after.channel, after.listener]} if renamed else {}
        alter = self._operation(
            "alter_pgpubsub_subscription", *_subscription(after), **_subscription_settings(after), **there
        )
        undo = self._operation(
            "alter_pgpubsub_subscription", *_subscription(before), **_subscription_settings(before), **back
        )
        what = "renamed" if renamed else "changed"
        self._add(pair(alter, undo), f"{what} pgpubsub listener {after.listener} of {after.channel}")

    def _remove(self, known: Mapping[str, ChannelRow], rows: Sequence[Row]) -> None:
        """What no registered channel or listener has: of this application, and not what notifications wait for."""
        channels = {name for channel in self._everything for name in (channel.name(), *channel.aliases)}
        wanted = {row.id for mine in match(rows, drift.listeners(self._everything)).values() for row in mine}
        for row in rows:
            if row.id not in wanted and row.operations and self._may_remove(row.channel):
                self._unsubscribed(row)
        for name, channel in known.items():
            if name not in channels and self._may_remove(name) and not self._is_waited_for(name):
                drop = self._operation("drop_pgpubsub_channel", name)
                undo = self._operation("create_pgpubsub_channel", name, **_channel_settings(channel), **_keys(channel))
                self._add(pair(drop, undo), f"removed pgpubsub channel {name}")

    def _is_waited_for(self, channel: str) -> bool:
        statement = (
            f"SELECT EXISTS (SELECT FROM {self._names.notification} WHERE channel = :c AND subscription IS NULL)"
        )
        return bool(self._connection.execute(text(statement), {"c": channel}).scalar())

    def _operation(self, word: str, *positional: Any, **keywords: Any) -> Operation:
        return operation(word, *positional, schema=self._names.schema, **keywords)

    # Triggers

    def _triggers(self) -> None:
        existing = triggers(self._connection, self._names)
        missing: list[TriggerDefinition] = []
        changed: list[tuple[TriggerDefinition, Trigger]] = []
        for table, wanted in definitions(self._names, self._channels).items():
            relation = relation_of(self._connection, table)
            present = {trigger.name: trigger for trigger in existing if trigger.relation == relation}
            for definition in wanted:
                if definition.name not in present:
                    missing.append(definition)
                elif trigger_steps(self._connection, self._names, table, [definition]):
                    changed.append((definition, present[definition.name]))
        self._drop(existing)
        for group in _alike(missing):
            create = self._trigger("create_pgpubsub_trigger", group)
            self._add(pair(create, self._dropping(group)), f"added pgpubsub trigger of {_shown(group)}")
        self._replace(changed)

    def _replace(self, changed: Sequence[tuple[TriggerDefinition, Trigger]]) -> None:
        for group in _alike([definition for definition, _ in changed]):
            self._add(self._trigger("replace_pgpubsub_trigger", group), f"changed pgpubsub trigger of {_shown(group)}")
        before = [one for _, trigger in changed if (one := self._remade(trigger.described)) is not None]
        for group in _alike(before):
            # Written nowhere; its reverse comes after what undoes the changes of tables.
            self._found.first.insert(0, Nothing(self._trigger("replace_pgpubsub_trigger", group)))

    def _drop(self, existing: Sequence[Trigger]) -> None:
        everything = definitions(self._names, self._everything)
        wanted = {
            (relation_of(self._connection, table), name)
            for table, mine in everything.items()
            for definition in mine
            for name in definition.names
        }
        unwanted = [trigger for trigger in existing if (trigger.relation, trigger.name) not in wanted]
        described = [self._remade(trigger.described) for trigger in unwanted]
        described += [
            self._remade(read_comment(comment)) for _, comment in orphans(self._connection, self._names, self._database)
        ]
        known = {definition.name: definition for definition in described if definition is not None}
        gone = [one for one in known.values() if self._may_remove(one.arguments["channel"])]
        for group in _alike(gone):
            logger.info("Detected removed pgpubsub trigger of %s", _shown(group))
            self._found.first.append(pair(self._dropping(group), self._trigger("create_pgpubsub_trigger", group)))
        parts = {name for definition in known.values() for name in definition.names}
        for trigger in unwanted:
            if trigger.name not in parts and self._may_remove(trigger.name):
                logger.info("Detected unknown pgpubsub trigger %s on %s", trigger.name, trigger.table)
                self._found.first.append(SqlOperation(trigger.drop, self._source(trigger)))

    def _remade(self, described: Described | None) -> TriggerDefinition | None:
        """Return the definition that the database has, if it says what that is made of."""
        if described is None or described.arguments is None:
            return None
        try:
            return definition_of(described.arguments, self._names.schema, described.template)
        except PgPubSubError:
            return None  # a newer release's

    def _source(self, trigger: Trigger) -> list[str]:
        sources = self._connection.execute(
            text(
                "SELECT pg_get_functiondef(t.tgfoid), pg_get_triggerdef(t.oid) FROM pg_trigger t "
                "WHERE t.tgrelid = CAST(:relation AS bigint) AND t.tgname = :name"
            ),
            {"relation": trigger.relation, "name": trigger.name},
        )
        return [str(one) for row in sources for one in row]

    def _trigger(self, word: str, group: Sequence[TriggerDefinition]) -> Operation:
        arguments = {name: value for name, value in group[0].arguments.items() if name not in _POSITIONAL}
        return self._operation(word, *_positional(group), **arguments, template=group[0].template)

    def _dropping(self, group: Sequence[TriggerDefinition]) -> Operation:
        return self._operation("drop_pgpubsub_trigger", *_positional(group))


_POSITIONAL = ("channel", "table", "operation")


def _positional(group: Sequence[TriggerDefinition]) -> tuple[str, str, list[str]]:
    arguments = group[0].arguments
    return arguments["channel"], arguments["table"], _in_order(one.operation for one in group)


def _alike(definitions: Iterable[TriggerDefinition]) -> list[list[TriggerDefinition]]:
    """Return the definitions in groups that differ in their operation alone: one operation of a migration each."""
    groups: dict[str, list[TriggerDefinition]] = {}
    for definition in definitions:
        others = {name: value for name, value in definition.arguments.items() if name != "operation"}
        key = json.dumps([others, definition.template], sort_keys=True)
        groups.setdefault(key, []).append(definition)
    return list(groups.values())


def _shown(group: Sequence[TriggerDefinition]) -> str:
    channel, _, operations = _positional(group)
    return f"{channel} on {qualified(*group[0].table)} ({', '.join(operations)})"


def _in_order(operations: Iterable[str]) -> list[str]:
    wanted = set(operations)
    return [one for one in (MESSAGE, *TRIGGER_OPERATIONS) if one in wanted]


def _channel_settings(row: ChannelRow) -> dict[str, Any]:
    settings: dict[str, Any] = {"table": row.table_name} if row.table_name is not None else {}
    settings |= {} if row.stored else {"stored": False}
    settings |= {"aliases": sorted(row.aliases)} if row.aliases else {}
    return settings | ({} if row.listen_name == listen_name_of(row.name) else {"listen_name": row.listen_name})


def _keys(row: ChannelRow, other: ChannelRow | None = None) -> dict[str, Any]:
    """Return the keys, where there are any, or where the `other` row, which it takes the place of, has others."""
    found: dict[str, Any] = {}
    for name in ("ordering_key", "unique_key"):
        fields = getattr(row, name)
        if fields or (other is not None and getattr(other, name) != fields):
            found[name] = list(fields)
    return found


def _subscription(row: Row) -> tuple[str, str, list[str]]:
    return row.channel, row.listener, _in_order(row.operations)


def _subscription_settings(row: Row) -> dict[str, Any]:
    settings: dict[str, Any] = {"channel_aliases": sorted(row.channel_aliases)} if row.channel_aliases else {}
    return settings | ({"aliases": sorted(row.aliases)} if row.aliases else {})
