"""What a trigger is made of, as plain data: in the comments of the database, and in the migrations of Alembic.

Owns the form: names and values that JSON and Python write alike, without what is left at its default. So a migration
can be read, and an earlier definition be restored from what the database says of itself. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pgpubsub_celery.capture import Capture, Predicate
from pgpubsub_celery.errors import PgPubSubError

Arguments = dict[str, Any]
"""`channel`, `table`, `operation`, `columns`, and what else there is; strings, lists, dictionaries, true and false."""
Target = tuple[str | None, str]
"""A table's schema (None: found by the search_path of whoever installs) and name."""

_REQUIRED = ("channel", "table", "operation", "columns")
# Of Capture: what has a form of its own here, or is not the trigger's.
_TRANSLATED = ("schema", "names", "listen_name", "operation", "stored", "columns", "predicates")


def arguments_of(capture: Capture, table: Target) -> Arguments:
    """Return what makes this trigger, but for the schema of our own functions, which the database knows."""
    schema, name = table
    found: Arguments = {"channel": capture.names[0], "table": name, "operation": capture.operation}
    found |= {"table_schema": schema} if schema is not None else {}
    found |= {"aliases": list(capture.names[1:])} if len(capture.names) > 1 else {}
    found |= {"columns": list(capture.columns)}
    found |= {} if capture.stored else {"stored": False, "listen_name": capture.listen_name}
    found |= {"predicates": [_of_predicate(one) for one in capture.predicates]} if capture.predicates else {}
    for field in dataclasses.fields(Capture):
        value = getattr(capture, field.name)
        told = field.name not in _TRANSLATED and (field.name != "everybody_has_predicates" or not capture.stored)
        if told and value != field.default:
            found[field.name] = _lists(value)
    return found


def capture_of(arguments: Mapping[str, Any], schema: str) -> tuple[Capture, Target]:
    """Return the trigger that `arguments` make, and its table. `schema` is that of our own functions.

    Raises:
        PgPubSubError: an argument is missing or unknown.
    """
    given = dict(arguments)
    lacking = [name for name in _REQUIRED if name not in given]
    others = {field.name for field in dataclasses.fields(Capture)}.difference(_TRANSLATED)
    known = {*_REQUIRED, "table_schema", "aliases", "stored", "listen_name", "predicates", *others}
    unknown = sorted(given.keys() - known)
    if lacking or unknown:
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(unknown)}, unknown to this release"
        raise PgPubSubError(f"The trigger of {given.get('channel')!r} {what}: {given!r}.")
    capture = Capture(
        schema=schema,
        operation=given["operation"],
        names=(given["channel"], *given.get("aliases", ())),
        listen_name=given.get("listen_name", ""),
        stored=given.get("stored", True),
        columns=tuple(given["columns"]),
        predicates=tuple(_predicate(one) for one in given.get("predicates", ())),
        **{name: _tuples(given[name]) for name in others if name in given},
    )
    return capture, (given.get("table_schema"), given["table"])


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs, in words for people: `columns: +surname`."""
    found: list[str] = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if name in ("columns", "aliases"):
            changed = [f"+{one}" for one in new or () if one not in (old or ())]
            changed += [f"-{one}" for one in old or () if one not in (new or ())]
            found.append(f"{name}: {' '.join(changed) or 'another order'}")
        elif isinstance(old or new, (list, dict)):
            found.append(name)
        else:
            found.append(f"{name}: {old} -> {new}")
    return found


def _of_predicate(predicate: Predicate) -> Arguments:
    found: Arguments = {"listener": predicate.names[0]}
    found |= {"aliases": list(predicate.names[1:])} if len(predicate.names) > 1 else {}
    found |= {"changed": list(predicate.watched)} if predicate.watched else {}
    found |= {"condition": predicate.condition} if predicate.condition is not None else {}
    return found


def _predicate(given: Mapping[str, Any]) -> Predicate:
    return Predicate(
        names=(given["listener"], *given.get("aliases", ())),
        watched=tuple(given.get("changed", ())),
        condition=given.get("condition"),
    )


def _lists(value: Any) -> Any:
    return [_lists(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
