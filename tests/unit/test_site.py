"""The site can be built without a warning, says what the code says, and its links lead somewhere on GitHub, too."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import pgpubsub_celery
from pgpubsub_celery.cli import main
from tests.fixtures.pages import DOCS, PAGES, ROOT

_CODE = re.compile(r"^(```|~~~|:::).*?^\1 *$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, "-d", target / "doctrees", DOCS, target / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target / "html"


def test_the_site_has_every_page_and_no_warning(site: Path) -> None:
    """A page that no table of contents has, a broken link, a docstring that is no markup: each is a warning."""
    built = {page.relative_to(site).with_suffix("") for page in site.rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix("") for page in DOCS.rglob("*.md")} <= built


def test_the_reference_has_every_public_name(site: Path) -> None:
    """What can be imported from the package is described."""
    page = (site / "reference" / "python.html").read_text()
    described = set(re.findall(r'id="pgpubsub_celery\.(\w+)"', page))
    errors = {"PgPubSubError"}  # on a page of their own
    missing = set(pgpubsub_celery.__all__) - described - errors - {"__version__"}
    assert not missing, "say what they are in docs/reference/python.md"


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    """As `--help` has."""
    page = (site / "reference" / "commands.html").read_text()
    for name, command in main.commands.items():
        assert f'id="pgpubsub-bridge-{name}"' in page
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and not getattr(parameter, "hidden", False):
                    assert f"cmdoption-pgpubsub-bridge-{name}{option[1:]}" in page, f"{name} {option}"


def test_the_page_of_settings_is_what_the_code_says() -> None:
    """`make docs` writes it."""
    script = runpy.run_path(str(DOCS / "settings_table.py"))
    assert script["page"]() == (DOCS / "settings.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere_on_github(page: Path) -> None:
    """To files and headings that there are; the site's build looks at its own links, not at the README's."""
    for target in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links."""
    headings = re.findall(r"^#+ +(.*)$", _fences_removed(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _fences_removed(text: str) -> str:
    return re.sub(r"^(```|~~~|:::).*?^\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
