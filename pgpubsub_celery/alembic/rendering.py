"""Operations as the lines of a migration, for people to read: an argument a line where they are many.

Owns the form. Numbers, strings and lists only: a migration imports nothing of ours.
"""

from __future__ import annotations

from typing import Any

from alembic.autogenerate.render import renderers

from pgpubsub_celery.alembic.operations import DEFAULT_SCHEMA, Nothing, Operation, SqlOperation

_WIDTH = 84
"""Characters of a line, beside its indentation."""


@renderers.dispatch_for(Operation)
def _render(context: Any, operation: Operation) -> str:
    keywords = operation.keywords
    if operation.schema != DEFAULT_SCHEMA:
        keywords = {**keywords, "schema": operation.schema}
    arguments = [_literal(value) for value in operation.positional]
    arguments += [f"{name}={_literal(value)}" for name, value in keywords.items()]
    call = f"{_prefix(context)}{operation.word}"
    line = f"{call}({', '.join(arguments)})"
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    return f"{call}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


@renderers.dispatch_for(SqlOperation)
def _render_sql(context: Any, operation: SqlOperation) -> list[str]:
    # A colon before a word would be a parameter.
    statements = [statement.replace(":", "\\:") for statement in operation.statements]
    return [f"{_prefix(context)}execute({statement!r})" for statement in statements]


@renderers.dispatch_for(Nothing)
def _render_nothing(context: Any, operation: Nothing) -> list[str]:
    return []


def _literal(value: Any) -> str:
    """Return a value as it is written within a call; a long list has a line for each of its elements."""
    text = repr(value)
    if len(text) <= _WIDTH - 20 or not isinstance(value, list):
        return text
    return "[\n" + "".join(f"        {element!r},\n" for element in value) + "    ]"


def _prefix(context: Any) -> str:
    prefix: str = context.opts["alembic_module_prefix"] or ""
    return prefix
