"""How Sphinx builds the site: `make docs`, into build/docs.

Owns nothing but settings of the build. Pages are Markdown that reads on GitHub, too: relative links between them, no
directive where plain text would do. Nothing is looked up in the network, so that the build is the same everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery.utils.dispatch import Signal
from docutils import nodes

from pgpubsub_celery import __version__

HERE = Path(__file__).parent

project = "pgpubsub_celery"
author = "the authors of pgpubsub_celery"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
html_theme = "furo"
html_title = "pgpubsub_celery"
html_show_copyright = False

myst_heading_anchors = 3  # as GitHub: links to headings work in both places

smartquotes = False  # they make a dash of the two in --state
default_role = "literal"  # docstrings are written with `single` backticks
autodoc_class_signature = "separated"  # nobody makes a NotificationInfo
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # docstrings say what is returned, annotations of which type

nitpicky = True
nitpick_ignore_regex = [
    # Names of others: to link them, the build would have to fetch their inventories.
    (r"py:.*", r"(builtins|celery|click|collections|contextlib|datetime|sqlalchemy|types|typing|uuid)\..*"),
    # Of the standard library, and of SQLAlchemy, where annotations are written without their module.
    (r"py:.*", r"(Any|AssertionError|Exception|ImportError|LookupError|RuntimeError|TypeError|ValueError)"),
    (r"py:.*", r"(Callable|ClassVar|Generic|Iterable|Literal|Mapping|Sequence)"),
    (r"py:.*", r"(Connection|Engine|Mapped|MetaData|Session|Table)"),
    # Type variables, and what is in a signature without being public.
    (r"py:.*", r"(.*\.)?[CMPR]|(.*\.)?(Acknowledging|Columns|_Base|_SuppressNotifications)"),
]


def _only_pages_that_are_there(app: Any, docname: str, source: list[str]) -> None:
    """Drop patterns of the index that match no page, which Sphinx would warn of."""
    if docname == "index":
        lines = source[0].splitlines(keepends=True)
        source[0] = "".join(
            line for line in lines if not line.strip().endswith("*") or any(HERE.glob(f"{line.strip()}.md"))
        )


_attributes: dict[str, list[str]] = {}
"""Docstrings of attributes as they are written. Written and read by the two functions below, in turn."""


def _keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    _attributes[name] = list(lines)


def _restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo what napoleon does to attributes: it takes `Stored: each …` for one of the type `Stored`."""
    if what in ("attribute", "data", "property"):
        lines[:] = _attributes[name]


def _examples(app: Any, ctx: Any, lines: list[str]) -> None:
    """Show examples of commands as they are typed."""
    shown: list[str] = []
    for line in lines:
        if line.startswith("| "):
            if not shown or not shown[-1].startswith("   "):
                shown += [".. code-block:: console", ""]
            shown.append(f"   $ {line[2:].strip()}")
        else:
            shown.append(line)
    lines[:] = shown


def _dashes(app: Any, doctree: nodes.document) -> None:
    """Set the two hyphens that Sphinx puts after a parameter's name, which it leaves to smart quotes otherwise."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


# Its own has the arguments in another order each time.
Signal.__repr__ = lambda self: f"Signal({', '.join(sorted(self.providing_args))})"


def setup(app: Any) -> None:
    """Register what is above."""
    app.connect("source-read", _only_pages_that_are_there)
    app.connect("autodoc-process-docstring", _keep, priority=100)
    app.connect("autodoc-process-docstring", _restore, priority=900)
    app.connect("sphinx-click-process-epilog", _examples)
    app.connect("doctree-read", _dashes)
