"""Released texts of triggers: what they make of the same arguments is the same for ever."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.triggers import TEMPLATE, definition_of

AUTHOR: dict[str, Any] = {"channel": "blog.Authors", "table": "author", "columns": ["id", "name"]}
SAMPLES: list[dict[str, Any]] = [
    *({**AUTHOR, "operation": operation} for operation in ("insert", "update", "delete", "truncate")),
    {**AUTHOR, "operation": "insert", "table_schema": "blog", "aliases": ["blog.Writers"]},
    {**AUTHOR, "operation": "insert", "stored": False, "listen_name": "authors"},
    {
        **AUTHOR,
        "operation": "update",
        "predicates": [
            {"listener": "a", "changed": ["name"]},
            {"listener": "b", "aliases": ["c"], "condition": "new.id > 1"},
        ],
    },
    {
        **AUTHOR,
        "operation": "update",
        "stored": False,
        "listen_name": "authors",
        "everybody_has_predicates": True,
        "predicates": [{"listener": "a", "changed": ["name"], "condition": "old.id > 1"}],
    },
    {**AUTHOR, "operation": "delete", "kind": ["type", ["'manager'"]]},
]
DIGESTS = {1: "cc3a3b6b3ab89e11"}
"""Of what each text makes of the samples."""
KEYED: list[dict[str, Any]] = [
    *({**AUTHOR, "operation": one, "ordering_key": ["id"]} for one in ("insert", "update", "delete", "truncate")),
    {**AUTHOR, "operation": "update", "ordering_key": ["id", "surname"], "unique_key": ["name"]},
]
KEYED_DIGESTS = {1: "4f785a5160a1eee7"}
"""Of what each text makes of those that have keys, which came later and changed nothing for the others."""


@pytest.mark.parametrize(("samples", "digests"), [(SAMPLES, DIGESTS), (KEYED, KEYED_DIGESTS)], ids=["plain", "keyed"])
@pytest.mark.parametrize("template", range(1, TEMPLATE + 1))
def test_what_a_released_text_makes_never_changes(
    template: int, samples: list[dict[str, Any]], digests: dict[int, str]
) -> None:
    """A migration made with it must do the same for ever: when it has been released, add another text instead."""
    made = [definition_of(one, "public", template) for one in samples]
    digest = hashlib.sha256("\n".join(line for one in made for line in one.create + one.drop).encode()).hexdigest()
    assert digest[:16] == digests[template], (
        f"not what text {template} makes: add a text, or, if unreleased, this digest"
    )


def test_a_definition_says_what_it_is_made_of() -> None:
    """So that the same can be made again, in another schema too."""
    for arguments in (*SAMPLES, *KEYED):
        definition = definition_of(arguments, "queue")
        assert definition.arguments == arguments
        assert definition_of(definition.arguments, "queue") == definition


@pytest.mark.parametrize(
    ("arguments", "template", "told"),
    [
        ({**AUTHOR, "operation": "insert"}, 99, "knows the texts 1 to"),
        ({**AUTHOR}, 1, "lacks operation"),
        ({**AUTHOR, "operation": "insert", "colour": "blue"}, 1, "has colour, unknown to this release"),
    ],
)
def test_what_a_newer_release_has_made_is_refused(arguments: dict[str, Any], template: int, told: str) -> None:
    """Rather than made otherwise than it says."""
    with pytest.raises(PgPubSubError, match=told):
        definition_of(arguments, "public", template)
