"""What a trigger channel is about: the table, and which of its columns are stored.

Owns the meaning of `model`, `include`, `exclude`, `renamed` and `defaults`. Reads declarations alone, and configures no
mapper: other models may not be imported yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper, class_mapper
from sqlalchemy.orm.exc import UnmappedClassError

from pgpubsub_celery.channels.declaration import TriggerChannel, path_of, shown
from pgpubsub_celery.errors import ChannelError, did_you_mean
from pgpubsub_celery.hints import Scope, UnresolvedNameError


def table_of(cls: type[TriggerChannel[Any]]) -> Table:
    """Return the table whose changes a trigger channel is about.

    Raises:
        ChannelError: `model` is missing, or neither a mapped class nor a Table.
    """
    what = path_of(cls)
    model: Any = getattr(cls, "model", None)
    if model is None:
        raise ChannelError(
            f"{what} has no model: write class {cls.__name__}(TriggerChannel[YourModel]), or model = YourModel in it."
        )
    if not isinstance(model, (type, Table)):
        try:
            model = Scope(cls).resolve(model)
        except UnresolvedNameError as exc:
            raise ChannelError(
                f"{what}: its model {exc.name!r} is not defined in {cls.__module__}: import it there, "
                "not under TYPE_CHECKING only."
            ) from None
        cls.model = model
    if isinstance(model, Table):
        return model
    mapper = _mapper_of(model)
    if mapper is None:
        raise ChannelError(f"{what}: model = {shown(model)}: expected a class mapped by SQLAlchemy, or a Table.")
    if not isinstance(mapper.local_table, Table):
        raise ChannelError(
            f"{what}: {shown(model)} is mapped to a {type(mapper.local_table).__name__}: only tables have triggers."
        )
    return mapper.local_table


def captured_columns(cls: type[TriggerChannel[Any]]) -> tuple[Column[Any], ...]:
    """Return the columns that a trigger channel stores of each row, in the table's order: `include` without `exclude`.

    Raises:
        ChannelError: there is no table, a column is unknown, or the primary key excluded.
    """
    table = table_of(cls)
    include, exclude = cls.include, _columns(cls, table, "exclude")
    keys = tuple(table.primary_key.columns)
    for column in exclude:
        if column in keys:
            raise ChannelError(
                f"{path_of(cls)}: exclude has {column.name!r}, of the primary key of {table.fullname}: without it a "
                "listener could not tell which row was changed. Leave it out of exclude."
            )
    if include == "key":
        if not keys:
            raise ChannelError(
                f'{path_of(cls)}: include = "key", but {table.fullname} has no primary key: name the columns.'
            )
        return keys
    wanted = set(table.columns) if include == "all" else {*keys, *_columns(cls, table, "include")}
    return tuple(column for column in table.columns if column in wanted and column not in exclude)


def renamed_columns(cls: type[TriggerChannel[Any]]) -> dict[str, str]:
    """Return the columns that rows stored earlier have under other names: `renamed`, by the earlier name.

    Raises:
        ChannelError: a column is unknown.
    """
    found = columns_of(cls, table_of(cls), "renamed", cls.renamed.values())
    return {earlier: str(column.name) for earlier, column in zip(cls.renamed, found, strict=True)}


def declared_defaults(cls: type[TriggerChannel[Any]]) -> dict[str, Any]:
    """Return what columns have in rows stored before they were added: `defaults`, by the column's name.

    Raises:
        ChannelError: a column is unknown, or not stored.
    """
    found = columns_of(cls, table_of(cls), "defaults", cls.defaults)
    captured = captured_columns(cls)
    for column in found:
        if column not in captured:
            raise ChannelError(
                f"{path_of(cls)}: defaults has {column.name!r}, which is not stored (include, exclude): no listener "
                "is ever given it. Leave it out of defaults."
            )
    return {str(column.name): value for column, value in zip(found, cls.defaults.values(), strict=True)}


def _columns(cls: type[TriggerChannel[Any]], table: Table, attribute: str) -> list[Column[Any]]:
    """Return the columns that `include` or `exclude` names."""
    return columns_of(cls, table, attribute, getattr(cls, attribute))


def columns_of(cls: type[TriggerChannel[Any]], table: Table, attribute: str, names: Iterable[Any]) -> list[Column[Any]]:
    """Return the columns that an attribute names: by their own name, or by that of the model's attribute.

    Raises:
        ChannelError: a column is unknown.
    """
    mapper = _mapper_of(cls.model)
    by_attribute = {} if mapper is None else {key: c for key, c in mapper.columns.items() if c.table is table}
    by_name = {column.name: column for column in table.columns}
    found: list[Column[Any]] = []
    for given in names:
        if isinstance(given, Column):
            column = given if given.table is table else None
        else:
            key = given if isinstance(given, str) else given.key
            column = by_name.get(key) if key in by_name else by_attribute.get(key)
        if column is None:
            known = list(dict.fromkeys([*by_name, *by_attribute]))
            raise ChannelError(
                f"{path_of(cls)}: {attribute} has {str(given)!r}, which is no column of {table.fullname}: "
                f"expected some of {', '.join(known)}.{did_you_mean(str(given), known)}"
            )
        found.append(column)
    return found


def _mapper_of(model: Any) -> Mapper[Any] | None:
    if not isinstance(model, type):
        return None
    try:
        # Other models may be missing still: relationships are not needed, and not configured.
        return class_mapper(model, configure=False)
    except (UnmappedClassError, InvalidRequestError):
        return None
