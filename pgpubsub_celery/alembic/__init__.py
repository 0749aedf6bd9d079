"""The plugin for Alembic: `op.create_pgpubsub_trigger(…)` and its like, and what autogenerate writes of them.

Alembic 1.18 and later find it by its entry point. For earlier ones, `import pgpubsub_celery.alembic` in `env.py`. What
migrations do is `operations`' and `statements`', how they are written `rendering`'s, what is missing `comparison`'s.
"""

from __future__ import annotations

from typing import Any

NAME = "alembic.autogenerate.pgpubsub_celery"
"""Of the plugin: by default Alembic uses all whose names begin with `alembic.autogenerate`. With a tilde before it in
`autogenerate_plugins`, this one is left out."""

_is_plugin = False
"""Whether Alembic has found the plugin by itself. Written by `setup`, at the import of Alembic."""


def setup(plugin: Any) -> None:
    """Register the comparison. Alembic calls it while it is being imported itself."""
    global _is_plugin
    from alembic.util import DispatchPriority

    _is_plugin = True
    plugin.add_autogenerate_comparator(_compare, "schema", "pgpubsub_celery", priority=DispatchPriority.LAST)


def _compare(context: Any, upgrade_ops: Any, schemas: Any) -> Any:
    if not _is_plugin and f"~{NAME}" in context.opts.get("autogenerate_plugins", ()):
        return None
    from pgpubsub_celery.alembic.comparison import compare

    return compare(context, upgrade_ops)


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """Return whether Alembic may compare an object: not our own tables. For `env.py` where the plugin is left out."""
    from pgpubsub_celery.models import metadata

    table = object if type_ == "table" else getattr(object, "table", None)
    return getattr(table, "name", None) not in metadata.tables


def _register() -> None:
    """Register the comparison where Alembic has not found it: it has no plugins, or this package is not installed."""
    import alembic.autogenerate.compare as compare

    # While Alembic is being imported there are none: it is about to call `setup`.
    comparators = getattr(compare, "comparators", None)
    if comparators is None or _is_plugin:
        return
    try:
        from alembic.util import DispatchPriority
    except ImportError:
        comparators.dispatch_for("schema")(_compare)  # comes after Alembic's own
    else:
        comparators.dispatch_for("schema", priority=DispatchPriority.LAST)(_compare)


# Below `setup`, which Alembic's own import may call. Operations first: what is rendered are these.
from pgpubsub_celery.alembic import operations, rendering  # noqa: E402

_register()

__all__ = ["NAME", "include_object", "operations", "rendering", "setup"]
