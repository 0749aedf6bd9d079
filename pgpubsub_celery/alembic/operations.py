"""The operations of migrations: `op.create_pgpubsub(…)`, `op.create_pgpubsub_trigger(…)` and their like.

Owns how Alembic knows them, and what each one's reverse is; what they execute is in the functions of the same names in
`statements`. A migration holds all that it needs: the version of tables and functions or the number of a trigger's
text, both of which never change once released, and the arguments. What models and listeners have become since does not
matter to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import OpContainer

DEFAULT_SCHEMA = "public"
"""Of our tables and functions, in migrations that do not name it; whatever the setting is."""

WORDS = (
    "create_pgpubsub",
    "drop_pgpubsub",
    "restore_pgpubsub",
    "upgrade_pgpubsub",
    "downgrade_pgpubsub",
    "create_pgpubsub_channel",
    "alter_pgpubsub_channel",
    "drop_pgpubsub_channel",
    "create_pgpubsub_subscription",
    "alter_pgpubsub_subscription",
    "drop_pgpubsub_subscription",
    "create_pgpubsub_trigger",
    "replace_pgpubsub_trigger",
    "drop_pgpubsub_trigger",
)


class Operation(MigrateOperation):
    """One of ours, with what it is called with."""

    word: ClassVar[str]
    """Its name in `op`, and of the function that says what it executes."""

    def __init__(self, *positional: Any, schema: str = DEFAULT_SCHEMA, **keywords: Any) -> None:
        self.positional = positional
        self.keywords = keywords
        self.schema = schema
        """Of our tables and functions."""
        self.undo: MigrateOperation | None = None

    @classmethod
    def perform(cls, operations: Operations, *positional: Any, **keywords: Any) -> None:
        """Execute it, or write it into a script."""
        operations.invoke(cls(*positional, **keywords))

    def reverse(self) -> MigrateOperation:
        """Return what undoes it."""
        return self.undo or Nothing()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what it is in a list of differences, as `alembic check` prints it."""
        return (self.word, *self.positional, self.keywords)

    def statements(self) -> list[str]:
        """Return what it executes."""
        from pgpubsub_celery.alembic import statements
        from pgpubsub_celery.schema import Names

        found: list[str] = getattr(statements, self.word)(Names(self.schema), *self.positional, **self.keywords)
        return found


CLASSES: dict[str, type[Operation]] = {
    word: Operations.register_operation(word, "perform")(type(word, (Operation,), {"word": word})) for word in WORDS
}


def operation(word: str, *positional: Any, **keywords: Any) -> Operation:
    """Return one of ours."""
    return CLASSES[word](*positional, **keywords)


class SqlOperation(MigrateOperation):
    """`op.execute(…)`, for a trigger of which nobody knows what it is made of."""

    def __init__(self, statements: Sequence[str], undo: Sequence[str]) -> None:
        self.statements = list(statements)
        self._undo = list(undo)

    def reverse(self) -> MigrateOperation:
        """Return what undoes it."""
        return SqlOperation(self._undo, self.statements)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what it is in a list of differences."""
        return ("execute", *self.statements)


class Nothing(OpContainer):
    """Does nothing; in the other direction it may be something.

    So a trigger that changes is replaced after the changes of tables in both directions: each definition is for the
    columns that the table has then.
    """

    def __init__(self, undo: MigrateOperation | None = None) -> None:
        super().__init__()
        self._undo = undo

    def reverse(self) -> MigrateOperation:
        """Return what it is in the other direction."""
        return self._undo or Nothing()


def pair(done: Operation, undo: Operation) -> Operation:
    """Return an operation, of which another is the reverse."""
    done.undo, undo.undo = undo, done
    return done


@Operations.implementation_for(Operation)
def _execute(operations: Operations, operation: Operation) -> None:
    from pgpubsub_celery.subscriptions import execute_literally

    implementation = operations.get_context().impl
    for statement in operation.statements():
        if implementation.as_sql:
            # As they are: Alembic would double percent signs, which its own way of executing takes out again.
            implementation.static_output(statement + implementation.command_terminator)
        else:
            execute_literally(operations.get_bind(), statement)
