"""Types: what type checkers know of an application, and which mistakes they find."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).with_name("sample.py")


def check(*files: Path) -> list[str]:
    """Return what mypy, as strict as we are, says of some files."""
    out, err, _ = api.run(
        [*map(str, files), "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary", "--hide-error-context"]
    )
    assert err == ""
    return [line for line in out.splitlines() if ": note:" not in line]


def test_an_application_has_the_types_that_it_asserts() -> None:
    """Without an error, in strict mode."""
    assert check(SAMPLE) == []


MISTAKES = """
    import datetime
    from dataclasses import dataclass
    from typing import Any
    from sqlalchemy.orm import Session
    from pgpubsub_celery import Channel, TriggerChannel, channel_task, notify
    from tests.typing.sample import Author, AuthorChanges, PostReads, welcome

    @dataclass
    class Wrong(Channel):
        lock_notifications = 1  # assignment
        acknowledge = "sent"  # assignment
        lease = "long"  # assignment
        aliases = "one"  # assignment
        number: int

    class Changes(TriggerChannel[Author]):
        include = "keys"  # assignment
        exclude = "secret"  # assignment

    PostReads(model_id="1")  # arg-type
    PostReads(date=datetime.date(2026, 1, 1))  # call-arg
    PostReads(model_id=1, date=datetime.date(2026, 1, 1), lock_notifications=True)  # call-arg
    channel_task(5)  # arg-type
    welcome("x")  # arg-type
    welcome(author=Author())  # call-arg

    def emit(session: Session) -> None:
        notify(session, 5)  # arg-type
        notify(session, message=PostReads(1))  # call-arg
"""


def test_mistakes_are_found_by_type_checkers(tmp_path: Path) -> None:
    """Each where it was made, and no others."""
    source = textwrap.dedent(MISTAKES)
    file = tmp_path / "mistakes.py"
    file.write_text(source, encoding="utf-8")
    expected = [
        (number, line.rpartition("# ")[2]) for number, line in enumerate(source.splitlines(), 1) if "  # " in line
    ]
    found = [(int(line.split(":")[1]), line.rpartition("[")[2].rstrip("]")) for line in check(file)]
    assert found == expected


def test_the_package_says_that_it_is_typed() -> None:
    """Or type checkers would not look."""
    import pgpubsub_celery

    assert Path(pgpubsub_celery.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize("name", ["Channel", "TriggerChannel", "channel_task", "notify", "install"])
def test_public_names_are_known_at_run_time_too(name: str) -> None:
    """They are imported when first asked for."""
    import pgpubsub_celery

    assert name in dir(pgpubsub_celery)
    assert getattr(pgpubsub_celery, name).__name__ == name
