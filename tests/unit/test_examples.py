"""Python in the README and in docs/ is Python, and imports what is there: examples must not outlive what they show.

Those of guides and of the first pages are also run: tests/integration/test_guides.py, tests/e2e/guides.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fixtures.command_lines import PROGRAMS, parse
from tests.fixtures.pages import PAGES, ROOT, Block, blocks

PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
OF_READERS = {"blog", "library", "mysite", "shop"}
"""Packages that the pages' applications have, or that a page says the reader has."""
NOT_INSTALLED = {"boto3", "google"}
"""What a page shows and no test needs: services of others, with their accounts."""


def test_there_are_examples() -> None:
    """So that a change of how they are found does not make the others pass."""
    assert len(PYTHON) > 30


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_an_example_can_be_compiled(block: Block) -> None:
    """With `await` where a page leaves out the function around it."""
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_what_an_example_imports_is_there(block: Block) -> None:
    """Each module, and each name in it."""
    for module, name in imported(block):
        if module.partition(".")[0] in OF_READERS | NOT_INSTALLED:
            continue
        found = importlib.import_module(module)
        if name is not None and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")


def imported(block: Block) -> Iterator[tuple[str, str | None]]:
    """Yield the modules and names that a block imports."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{block}: a relative import, of which nobody knows where it leads"
            yield from ((node.module, alias.name) for alias in node.names)


COMMAND = re.compile(r"^(?: {4}|\$ |)((?:[A-Z_]+=\S+ )*(?:pgpubsub-bridge|celery) .*)$", re.MULTILINE)


def commands() -> Iterator[Any]:
    """Yield the command lines of the pages: those that stand alone on a line."""
    for page in PAGES:
        for line in COMMAND.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(line, comments=True)
            while "=" in words[0]:
                del words[0]
            words = words[: words.index(">")] if ">" in words else words
            if "[OPTIONS]" not in words:
                yield pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_a_page_can_be_given(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options exist, and take such values."""
    monkeypatch.setenv("PGPUBSUB_DATABASE_URL", "postgresql://blog@localhost/blog")
    parse(PROGRAMS[words[0]], words)
