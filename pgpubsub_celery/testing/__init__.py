"""For the tests of applications: run what is stored, see what was emitted, have a database for each test.

    def test_a_new_author_is_welcomed(pgpubsub_session, pgpubsub_drain):
        pgpubsub_session.add(Author(name="Ann"))
        pgpubsub_drain()
        assert pgpubsub_session.scalars(select(Post.title)).all() == ["Welcome!"]

In reading order: `draining` is the bridge and the worker in one function, `nested` lets it happen inside a test's own
transaction, `emissions` says what was emitted, `databases` makes databases, and `plugin` has the fixtures, which pytest
finds by itself. Nothing here is imported before it is used, and nothing of it is for production.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgpubsub_celery.testing.draining import Drained, DrainedRun, DrainError, drain
    from pgpubsub_celery.testing.emissions import assert_emitted, emitted, refute_emitted

__all__ = [
    "DrainError",
    "Drained",
    "DrainedRun",
    "assert_emitted",
    "drain",
    "emitted",
    "refute_emitted",
]

_HOMES = {
    "draining": ("DrainError", "Drained", "DrainedRun", "drain"),
    "emissions": ("assert_emitted", "emitted", "refute_emitted"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
