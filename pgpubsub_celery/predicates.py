"""From what a channel and its listeners declare to what a trigger's function depends on.

Owns the reading of `changed` and `condition`, and of the rows that a subclass of a shared table has for itself. What
becomes of them is `capture`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Table, inspect
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql import ClauseElement, literal, visitors
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.util import ClauseAdapter

from pgpubsub_celery.capture import Capture, Predicate
from pgpubsub_celery.channels import TriggerChannel, captured_columns, keys_of
from pgpubsub_celery.errors import ListenerError, did_you_mean

if TYPE_CHECKING:
    from pgpubsub_celery.listeners import Listener

# Without percent signs doubled for a driver's parameters: there are none.
_DIALECT = PGDialect(paramstyle="named")  # type: ignore[no-untyped-call]


def read_capture(
    channel: type[TriggerChannel[Any]], table: Table, operation: str, listeners: Sequence[Listener], schema: str
) -> Capture:
    """Return what the functions of a channel's triggers for one operation depend on.

    Raises:
        ListenerError: a listener's `changed` or `condition` cannot be read.
    """
    # In an order of their own: that of the declarations depends on which module was imported first.
    predicates = sorted(
        (one for listener in listeners if (one := _predicate(channel, table, operation, listener)) is not None),
        key=lambda predicate: predicate.names,
    )
    keys = keys_of(channel)
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
        ordering_key=keys.ordering,
        unique_key=keys.unique,
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
