"""What no linter checks: tests say what they claim, wait for something instead of sleeping, and never skip."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
SKIPPING = {"skip", "skipif", "xfail", "importorskip", "SkipTest", "skipTest"}


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for file in FILES:
        yield file.relative_to(TESTS), ast.parse(file.read_text(encoding="utf-8"))


def name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_every_test_has_a_docstring() -> None:
    """One sentence that adds to its name."""
    silent = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if node.name.startswith("test_") and file.name.startswith("test_")
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_test_sleeps() -> None:
    """It waits for an event, or looks again and again until a deadline: only such a loop has reason to sleep."""
    asleep = []
    for file, tree in parsed():
        if not file.name.startswith(("test_", "conftest")):  # a listener or a writer may take its time
            continue
        looking = {
            id(call)
            for loop in ast.walk(tree)
            if isinstance(loop, ast.While)
            for call in ast.walk(loop)
            if call is not loop
        }
        asleep += [
            f"{file}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and name_of(node.func) == "sleep" and id(node) not in looking
        ]
    assert asleep == []


def test_no_test_skips() -> None:
    """What is missing fails, or nobody will notice."""
    skipping = [
        f"{file}:{node.lineno} {name_of(node)}"
        for file, tree in parsed()
        for node in ast.walk(tree)
        if name_of(node) in SKIPPING and isinstance(node, ast.Attribute)
    ]
    assert skipping == []


def test_every_folder_of_tests_is_a_package() -> None:
    """Two files of one name are then two modules."""
    folders = {file.parent for file in FILES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_make_test_runs_every_folder_of_tests_but_those_with_a_target_of_their_own() -> None:
    """A new folder is not forgotten: plain `pytest` runs what pyproject.toml lists."""
    project = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = next(line for line in project.splitlines() if line.startswith("testpaths"))
    folders = {f"tests/{file.relative_to(TESTS).parts[0]}" for file in FILES if file.name.startswith("test_")}
    assert {folder for folder in folders if f'"{folder}"' not in listed} == {"tests/rabbitmq"}
    assert "tests/rabbitmq" in (TESTS.parent / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [file for file in FILES if file.name.startswith("test_")], ids=lambda file: file.stem)
def test_every_file_of_tests_says_what_it_is_about(file: Path) -> None:
    """In one line that a reader looking for a promise can find."""
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
