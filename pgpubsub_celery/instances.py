"""Rows with given values: instances of mapped classes as if they had been loaded and expunged, or rows of Core tables.

Owns how such an object is built. Knows nothing of where the values come from: `rows` converts them. Never adds anything
to a session, never calls `__init__`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Dialect, Table
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.orm import Mapper, class_mapper
from sqlalchemy.orm.attributes import instance_state

from pgpubsub_celery.channels import TriggerChannel, declared_defaults, renamed_columns, table_of
from pgpubsub_celery.errors import DecodeError

Processor = Callable[[Any], Any]


class Builder:
    """Builds the rows of one channel's model."""

    def __init__(self, table: Table, model_name: str) -> None:
        self.table = table
        self.model_name = model_name
        self.columns: dict[str, Column[Any]] = {str(column.name): column for column in table.columns}
        self.expressions = {
            name
            for name, column in self.columns.items()
            if column.type._has_column_expression  # noqa: SLF001 - SQLAlchemy's own test
        }
        """Columns that SQLAlchemy selects through a function of their type."""
        self.renamed: Mapping[str, str] = {}
        """Columns by the names that they had earlier."""
        self.defaults: Mapping[str, Any] = {}
        """What columns have in rows stored before they were there: values, or functions that return one."""
        self._processors: weakref.WeakKeyDictionary[Dialect, dict[tuple[str, int], Processor | None]] = (
            weakref.WeakKeyDictionary()
        )

    def processor(self, name: str, dialect: Dialect, oid: int) -> Processor | None:
        """Return what SQLAlchemy makes of the driver's values of a column, None when it takes them as they are."""
        known = self._processors.setdefault(dialect, {})
        if (name, oid) not in known:
            known[name, oid] = self.columns[name].type.dialect_impl(dialect).result_processor(dialect, oid)
        return known[name, oid]

    def build(self, values: Mapping[str, Any]) -> Any:
        """Return the row with these values by column."""
        raise NotImplementedError


class _RowBuilder(Builder):
    """Of a Core table: rows as a SELECT of its stored columns would return them."""

    def __init__(self, table: Table, model_name: str) -> None:
        super().__init__(table, model_name)
        self._metadata: dict[tuple[str, ...], SimpleResultMetaData] = {}

    def build(self, values: Mapping[str, Any]) -> Any:
        names = tuple(name for name in self.columns if name in values)
        metadata = self._metadata.get(names)
        if metadata is None:
            columns = [self.columns[name] for name in names]
            metadata = SimpleResultMetaData([column.key for column in columns], extra=[(column,) for column in columns])
            self._metadata[names] = metadata
        return IteratorResult(metadata, iter([tuple(values[name] for name in names)])).one()


class _InstanceBuilder(Builder):
    """Of a mapped class: loaded, detached instances of it, or of the subclass that the row says it is."""

    def __init__(self, table: Table, mapper: Mapper[Any]) -> None:
        super().__init__(table, mapper.class_.__name__)
        self._mapper = mapper
        on = mapper.polymorphic_on
        self._discriminator = str(on.name) if isinstance(on, Column) and on.table is table else None
        self._plans: dict[Mapper[Any], _Plan] = {}

    def build(self, values: Mapping[str, Any]) -> Any:
        mapper = self._mapper
        if self._discriminator is not None:
            identity = values.get(self._discriminator)
            if identity is not None and identity not in mapper.polymorphic_map:
                raise DecodeError(f"no class has the polymorphic identity {identity!r}")
            if identity is not None:
                mapper = mapper.polymorphic_map[identity]
        plan = self._plans.get(mapper)
        if plan is None:
            plan = self._plans[mapper] = _plan(mapper, self.table)
        instance = mapper.class_manager.new_instance()
        state = instance_state(instance)
        loaded = state.dict
        for key, name in plan.attributes:
            if name in values:
                loaded[key] = values[name]
        if all(key in loaded for key in plan.primary_key):
            state.key = mapper.identity_key_from_primary_key(tuple(loaded[key] for key in plan.primary_key))
        state.expired_attributes.update(plan.columns - loaded.keys())
        # As after each load: mutable values and composites are tied to the instance, @reconstructor runs.
        state.manager.dispatch.load(state, None)
        return instance


@dataclasses.dataclass(frozen=True)
class _Plan:
    attributes: Sequence[tuple[str, str]]
    """Attributes and the columns of the table that they map."""
    columns: frozenset[str]
    """All attributes that are loaded from columns, of other tables and expressions too."""
    primary_key: Sequence[str]


def _plan(mapper: Mapper[Any], table: Table) -> _Plan:
    attributes = [
        (attribute.key, str(column.name))
        for attribute in mapper.column_attrs
        for column in attribute.columns
        if isinstance(column, Column) and column.table is table
    ]
    return _Plan(
        attributes=attributes,
        columns=frozenset(attribute.key for attribute in mapper.column_attrs),
        primary_key=[mapper.get_property_by_column(column).key for column in mapper.primary_key],
    )


_builders: weakref.WeakKeyDictionary[type[TriggerChannel[Any]], Builder] = weakref.WeakKeyDictionary()
"""Written by whichever thread comes first; a second one writes the same."""


def builder_of(channel: type[TriggerChannel[Any]]) -> Builder:
    """Return what builds the rows of a channel's model."""
    builder = _builders.get(channel)
    if builder is None:
        table = table_of(channel)
        model = channel.model
        builder = (
            _RowBuilder(table, "a row") if isinstance(model, Table) else _InstanceBuilder(table, class_mapper(model))
        )
        builder.renamed, builder.defaults = renamed_columns(channel), declared_defaults(channel)
        _builders[channel] = builder
    return builder
