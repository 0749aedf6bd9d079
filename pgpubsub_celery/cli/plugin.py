"""What `celery` loads from this package: the group `celery pgpubsub`, and the worker's options `--pgpubsub…`.

Owns the adding of these options. Celery has no entry point for options of its worker, and `app.user_options` would need
a line in every application, in the module that `-A` names. But it loads its `celery.commands` when its own worker
command exists and before a word is parsed: there they are added, to a parameter list that Celery itself extends.
"""

from __future__ import annotations

import sys
from typing import Any

import click
from celery.bin.base import CeleryOption
from celery.bin.worker import worker

from pgpubsub_celery.cli import celery_command
from pgpubsub_celery.cli.listening import RECOVER
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.sidecar import Beside, SidecarStep

__all__ = ["celery_command"]

GROUP = "pgpubsub Options"


def _beside(ctx: click.Context, _: click.Parameter, value: bool) -> Beside | None:
    """Turn the flag into what the worker's bootstep needs, and add that step to this application's worker."""
    recover = ctx.params.pop("pgpubsub_recover", None)
    if not (value or recover):
        return None
    app = ctx.find_root().params.get("app")
    path = app if isinstance(app, str) else _path_of(app)
    if path is None:
        raise click.UsageError(
            "--pgpubsub needs the name of your application, because the bridge is a process of its own: "
            "celery -A blog.celery_app worker --pgpubsub."
        )
    celery_app = ctx.obj.app
    try:
        Settings.load(celery_app.conf).require_database_url()
    except PgPubSubError as exc:
        raise click.UsageError(str(exc)) from exc
    celery_app.steps["worker"].add(SidecarStep)
    return Beside(app=path, recover=recover)


def _path_of(app: Any) -> str | None:
    """Return a name for an application that was handed over as an object: by `app.worker_main()`, for example."""
    if app is None:
        return None
    for name, module in list(sys.modules.items()):
        if name.startswith("celery."):
            continue
        path = name
        if name == "__main__":
            # Started with `python -m blog.celery_app`; as a file it has no name to be imported by.
            path = getattr(getattr(module, "__spec__", None), "name", "")
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if path and value is app:
                return f"{path}:{attribute}"
    return None


def _add_options() -> None:
    if any(parameter.name == "pgpubsub" for parameter in worker.params):
        return
    worker.params += [
        CeleryOption(
            ["--pgpubsub-recover"],
            is_flag=False,
            flag_value="all",
            type=click.Choice(RECOVER),
            # Before the flag, whose callback takes it.
            is_eager=True,
            help_group=GROUP,
            help="The same, and take up what was stored before, as `listen --recover` does.",
        ),
        CeleryOption(
            ["--pgpubsub"],
            is_flag=True,
            callback=_beside,
            help_group=GROUP,
            help="Run a bridge beside this worker, for all channels: as `pgpubsub-bridge listen`, in processes of its "
            "own, which end with the worker. For development and small deployments; several workers may have one.",
        ),
    ]


_add_options()
