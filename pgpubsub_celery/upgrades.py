"""The versions of this package's own tables and functions, and the steps from each to the next.

Owns the history: what each version consists of (`released/v1.sql`, …: recorded, never edited once released) and what
leads from one to the next. `drift` and `script` make a database current with it, migrations of Alembic walk through it.
Never looks at a database and executes nothing.

How to change the schema:

1. Change `models.py` and `schema.py`. If the present `VERSION` has been released, raise it by one.
2. For what existing tables need, add an `Upgrade` of that version to `UPGRADES`, or statements to it: with IF [NOT]
   EXISTS, and quick, because writers wait for them. A column must be nullable or have a default, so that functions,
   triggers, bridges and workers of the version before go on working. New tables and functions need no statement here.
3. `python -m tests.fixtures.schemas` records the version. `tests/integration/test_upgrades.py` checks that the steps
   lead to what the models say, with rows, and that released versions are as they were.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import uuid
from collections.abc import Callable, Sequence

from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.schema import VERSION, Names, digest_of, quote_identifier, quote_literal

SEPARATOR = "\n\n--;\n\n"
"""Between the statements of a recorded version; for Postgres, a comment."""
PLACEHOLDER = "@schema@"
"""The schema in a recorded version."""
NO_INSTALLATION = uuid.UUID(int=0)
"""The installation in it: functions are given the database's own when they are created."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upgrade:
    """The step from the version before to the version `to`."""

    to: int
    what: str
    """For people: what it adds."""
    up: Callable[[Names], Sequence[str]]
    """What makes existing tables those of the version; does nothing where they are."""
    down: Callable[[Names], Sequence[str]]
    """What makes them those of the version before. Never deletes a notification."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """All that one version consists of."""

    version: int
    tables: tuple[str, ...]
    """Statements that create tables and indexes, and do nothing where they exist."""
    functions: tuple[str, ...]
    """Statements that create or replace functions; `NO_INSTALLATION` is in the place of the installation."""

    @property
    def signatures(self) -> tuple[str, ...]:
        """The functions, qualified and quoted, with the types of their arguments."""
        comments = (re.match(r"COMMENT ON FUNCTION (.*\)) IS ", statement) for statement in self.functions)
        return tuple(found[1] for found in comments if found is not None)


def _add_keys(names: Names) -> Sequence[str]:
    of_rows = 'ordering_key text COLLATE "C"', 'unique_key text COLLATE "C"'
    of_channels = "ordering_key text[]", "unique_key text[]"
    indexes = (
        ("ordering", "ordering_key", "ordering_key IS NOT NULL"),
        ("unique", "unique_key", "unique_key IS NOT NULL AND state = 'waiting'"),
    )
    return (
        *(f"ALTER TABLE {names.notification} ADD COLUMN IF NOT EXISTS {column}" for column in of_rows),
        *(f"ALTER TABLE {names.channel} ADD COLUMN IF NOT EXISTS {column}" for column in of_channels),
        # No row has a key yet: these read the table once and write nothing.
        *(
            f"CREATE INDEX IF NOT EXISTS pgpubsub_notification_{name}_idx ON {names.notification} "
            f"(subscription, {column}, id) WHERE {condition}"
            for name, column, condition in indexes
        ),
    )


def _second(names: Names) -> Sequence[str]:
    return (*_add_keys(names), f"ALTER TABLE {names.run_time} ADD COLUMN IF NOT EXISTS per_second double precision")


def _first(names: Names) -> Sequence[str]:
    return (*_remove_keys(names), f"ALTER TABLE {names.run_time} DROP COLUMN IF EXISTS per_second")


def _remove_keys(names: Names) -> Sequence[str]:
    # The indexes go with their columns. What is stored stays, in no order.
    return (
        f"ALTER TABLE {names.notification} DROP COLUMN IF EXISTS ordering_key, DROP COLUMN IF EXISTS unique_key",
        f"ALTER TABLE {names.channel} DROP COLUMN IF EXISTS ordering_key, DROP COLUMN IF EXISTS unique_key",
    )


UPGRADES: tuple[Upgrade, ...] = (
    Upgrade(
        to=2,
        what="the keys that notifications are ordered and made unique by, and how many runs a second there are",
        up=_second,
        down=_first,
    ),
)


def pending(version: int) -> list[Upgrade]:
    """Return the steps from a database's version to this release's, in their order."""
    return [upgrade for upgrade in UPGRADES if upgrade.to > version]


def upgrade_to(version: int) -> Upgrade:
    """Return the step that leads to a version.

    Raises:
        PgPubSubError: this release does not know it.
    """
    for upgrade in UPGRADES:
        if upgrade.to == version:
            return upgrade
    raise _unknown(version)


def released(version: int, names: Names) -> Released:
    """Return what a version consists of, in a schema.

    Raises:
        PgPubSubError: this release does not know it.
    """
    tables, functions = ([_in_schema(one, names.schema) for one in statements] for statements in _recorded(version))
    digest = ""
    for position, statement in enumerate(functions):
        if statement.startswith("CREATE "):
            digest = digest_of(statement)
        elif statement.startswith("COMMENT "):
            functions[position] = re.sub(r"'pgpubsub:\w+'$", f"'pgpubsub:{digest}'", statement)
    return Released(version=version, tables=tuple(tables), functions=tuple(functions))


@functools.cache
def _recorded(version: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a recorded version's statements for tables and for functions."""
    file = importlib.resources.files("pgpubsub_celery") / "released" / f"v{version}.sql"
    if not file.is_file():
        raise _unknown(version)
    statements = [one.strip().removesuffix(";") for one in file.read_text(encoding="utf-8").split(SEPARATOR.strip())]
    first = next(n for n, statement in enumerate(statements) if "FUNCTION" in statement.splitlines()[0])
    return tuple(statements[:first]), tuple(statements[first:])


def recording(statements: Sequence[str]) -> str:
    """Return the text of a recorded version: statements for the schema `PLACEHOLDER`."""
    return SEPARATOR.join(f"{statement.strip()};" for statement in statements) + "\n"


def _in_schema(statement: str, schema: str) -> str:
    placeholder = re.escape(quote_identifier(PLACEHOLDER))
    quoted = quote_identifier(schema)
    # First where it is in a string, such as the name given to to_regclass.
    statement = re.sub(rf"'{placeholder}(\.\w+)'", lambda found: quote_literal(f"{quoted}{found[1]}"), statement)
    return statement.replace(quote_identifier(PLACEHOLDER), quoted)


def _unknown(version: int) -> PgPubSubError:
    return PgPubSubError(
        f"This release knows the versions 1 to {VERSION} of the schema, not {version}: use the release that the "
        "migration was made with, or a newer one."
    )
