"""Finding a Celery application by its name, with all its channels and listeners imported.

Owns what `-A` means, for the command line and for every process that it starts. The rules are Celery's own: a module, a
package with a `celery` module, or `module:attribute`; the current directory is on the path.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from celery import Celery
from celery.app.utils import find_app
from celery.utils.imports import import_from_cwd

from pgpubsub_celery.errors import AppError


def load_app(path: str) -> Celery:
    """Import the application and every module it names (`include`, `imports`, `autodiscover_tasks`).

    Raises:
        AppError: there is no such application, or its modules do not import; shows the cause and where it is.
    """
    # Also for the modules that the application imports later, and for channels named by their path.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        app = find_app(path, imp=import_from_cwd)
    except AttributeError as exc:
        if _frames(exc):
            raise AppError(f"-A {path!r} does not import: {_cause(exc)}") from exc
        raise AppError(
            f"-A {path!r}: {exc}: name the module that holds your Celery application, for example "
            "'blog.celery_app', or "
            "'blog.celery_app:app'."
        ) from exc
    except ModuleNotFoundError as exc:
        if exc.name is not None and (path == exc.name or path.startswith((exc.name + ".", exc.name + ":"))):
            raise AppError(
                f"-A {path!r}: there is no module {exc.name!r} here ({os.getcwd()}): name the module that holds "
                "your Celery "
                "application, for example 'blog.celery_app', and run this where it can be imported."
            ) from exc
        raise AppError(f"-A {path!r} does not import: {_cause(exc)}") from exc
    except Exception as exc:
        raise AppError(f"-A {path!r} does not import: {_cause(exc)}") from exc
    if not isinstance(app, Celery):
        raise AppError(f"-A {path!r} is a {type(app).__name__}, not a Celery application.")
    try:
        app.loader.import_default_modules()
        app.finalize(auto=True)
    except Exception as exc:
        raise AppError(f"A module of the application {path!r} does not import: {_cause(exc)}") from exc
    app.set_default()
    return app


def _cause(exc: BaseException) -> str:
    """Return the error and the last line of the user's code that it came from."""
    text = f"{type(exc).__name__}: {exc}"
    frames = _frames(exc)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _frames(exc: BaseException) -> list[traceback.FrameSummary]:
    """Return where the error passed through the user's code."""
    libraries = (os.sep + "site-packages" + os.sep, str(Path(os.__file__).parent) + os.sep, str(Path(__file__).parent))
    return [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith("<") and not any(library in frame.filename for library in libraries)
    ]
