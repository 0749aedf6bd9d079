"""Python in the README and in docs/ is Python, and imports what is there: examples must not outlive what they show.

Those of guides and of the first pages are also run: tests/integration/test_guides.py, tests/e2e/guides.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

import pytest

from tests.fixtures.pages import PAGES, Block, blocks

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
