"""Writes the table of docs/settings.md from the code: names, defaults, units and meanings are said once, in Settings.

`python docs/settings_table.py` writes it, as `make docs` does; a test looks whether it is up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

from pgpubsub_celery.cli.listening import listen
from pgpubsub_celery.settings import CELERY_PREFIX, ENVIRONMENT_PREFIX, Settings

PAGE = Path(__file__).with_name("settings.md")
BEGIN = "<!-- table: begin (written by `make docs`) -->"
END = "<!-- table: end -->"


def table() -> str:
    """Return the table, as Markdown."""
    options = {parameter.name: parameter.opts[0] for parameter in listen.params if parameter.opts}
    lines = [
        "| setting | Celery, environment, option of `listen` | default | unit | meaning |",
        "|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(Settings):
        places = [CELERY_PREFIX + field.name, ENVIRONMENT_PREFIX + field.name.upper()]
        if field.name in options:
            places.append(options[field.name])
        cells = [
            f"`{field.name}`",
            " ".join(f"`{place}`" for place in places),
            _default(field),
            "s" if str(field.type).startswith("float") else "",
            _MEANINGS[field.name].replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """Return the page with an up-to-date table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def _default(field: dataclasses.Field[object]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return "" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield each setting, and the text below it."""
    (cls,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(cls, ast.ClassDef)
    for field, text in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            yield field.target.id, " ".join(str(text.value.value).split())


_MEANINGS = dict(_docstrings())

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
