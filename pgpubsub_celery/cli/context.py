"""What all commands share: the application, the database, where to print, and errors in one line.

Owns the translation of errors into a line on standard error and an exit code; no command shows a traceback for what a
user can mend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from celery import Celery
from rich import box
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from pgpubsub_celery.apps import load_app
from pgpubsub_celery.cli.exit_codes import EXIT_FAILED, EXIT_UNAVAILABLE, EXIT_USAGE
from pgpubsub_celery.drivers import connect_arguments, sqlstate
from pgpubsub_celery.errors import AppError, PgPubSubError, UnknownChannelError
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.settings import Settings

C = TypeVar("C", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

WIDTH_WHEN_PIPED = 400
"""Columns, so that no line of a table is cut or wrapped: whoever reads it is a program."""

_PERMISSION_DENIED = "42501"


class OneLine(click.ClickException):
    """Ends a command with one line on standard error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        # An attribute of the class in click, and read from the instance.
        self.__dict__["exit_code"] = exit_code


@dataclasses.dataclass
class State:
    """What options before the command have said."""

    app_path: str | None = None
    app: Celery | None = None
    database: str | None = None
    """The alias that --database was given; None for PGPUBSUB_DATABASE, or the default one."""

    def require_app(self) -> Celery:
        """Return the application, with all its channels and listeners imported."""
        if self.app is None:
            self.app = load_app(self.require_app_path())
        return self.app

    def require_app_path(self) -> str:
        """Return what -A was given; AppError without one."""
        if not self.app_path:
            raise AppError(
                "No application is named: pass -A with the module of your Celery application, for example "
                "`pgpubsub-bridge -A blog.celery_app listen`, or set PGPUBSUB_APP."
            )
        return self.app_path

    def settings(self, **options: Any) -> Settings:
        """Return the settings of the application, where there is one, else of the environment alone."""
        conf = self.require_app().conf if self.app_path else None
        return Settings.load(conf, database=self.database, **options)


class Group(click.Group):
    """A group whose commands end with one line for every error of ours, for wrong usage, and for a lost database."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the group's own options."""
        with _in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse and run the command."""
        with _in_one_line():
            return super().invoke(ctx)


# Since click 8.2; before, it prints the help itself.
_HELP_WANTED: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except click.UsageError as exc:
        if isinstance(exc, _HELP_WANTED):
            raise
        help_at = f" See `{exc.ctx.command_path} --help`." if exc.ctx is not None else ""
        raise OneLine(" ".join(exc.format_message().split()) + help_at, EXIT_USAGE) from exc
    except (AppError, UnknownChannelError) as exc:
        # What the user's own module raised may have any number of lines.
        raise OneLine(" ".join(str(exc).split()), EXIT_USAGE) from exc
    except PgPubSubError as exc:
        raise OneLine(str(exc), EXIT_USAGE) from exc
    except DBAPIError as exc:
        raise _of_database(exc) from exc


def _of_database(exc: DBAPIError) -> OneLine:
    state = sqlstate(exc)
    if exc.connection_invalidated or state is None:
        return OneLine(f"The database cannot be reached: {one_line(exc)}", EXIT_UNAVAILABLE)
    fix = ""
    if state == _PERMISSION_DENIED:
        fix = ". A role that is to do this needs `pgpubsub-bridge -A your.app install --grant-run ROLE`."
    return OneLine(f"The database refused: {one_line(exc)}{fix}", EXIT_FAILED)


def app_option(command: C) -> C:
    """Accept -A after the command's name, too."""

    def take(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(State).app_path = value

    return click.option(
        "-A",
        "--app",
        expose_value=False,
        callback=take,
        metavar="MODULE",
        help="The Celery application, as for celery -A.",
    )(command)


def database_option(command: C) -> C:
    """Accept --database-url: `None` means the settings' own; and --database, where there are several."""

    def take(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(State).database = value

    with_url = click.option(
        "--database-url",
        metavar="URL",
        help="Where the tables are. Default: PGPUBSUB_DATABASE_URL, pgpubsub_database_url.",
    )(command)
    return click.option(
        "--database",
        expose_value=False,
        callback=take,
        metavar="ALIAS",
        help="Which of several databases (pgpubsub_databases). Default: PGPUBSUB_DATABASE, else 'default'.",
    )(with_url)


def open_engine(settings: Settings) -> Engine:
    """Return an engine for a command: no pool, dead servers noticed."""
    url = settings.require_database_url()
    return create_engine(
        url,
        poolclass=NullPool,
        connect_args=connect_arguments(url, "pgpubsub-command"),
    )


@contextlib.contextmanager
def connected(settings: Settings, *, autocommit: bool = False) -> Iterator[Connection]:
    """A connection for a command, in a transaction that is committed at the end, or none."""
    engine = open_engine(settings)
    if autocommit:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection
        return
    with engine.begin() as connection:
        yield connection


class Duration(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """Seconds, or a number with s, m, h or d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        if match is None:
            self.fail(f"{value!r}: expected a duration such as 90, 30s, 5m, 2h or 1d.", param, ctx)
        return float(match[1]) * _UNITS[match[2] or "s"]


def told_age(seconds: float | None) -> str:
    """Return a duration as people read it."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def told_time(moment: datetime.datetime | None) -> str:
    """Return a moment in local time."""
    return "" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def print_anything() -> None:
    """Let standard output and error take all characters: those that an encoding lacks are written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console() -> Console:
    """Return where to print: colours for people, none when piped or with NO_COLOR."""
    # COLUMNS is the terminal's, which a pipe is not, whoever has exported it.
    return Console(highlight=False, width=None if os.isatty(1) else WIDTH_WHEN_PIPED)


def new_table(*columns: str, title: str | None = None, **options: Any) -> Table:
    """Return an empty table: with lines for people, without when piped."""
    lines = box.ROUNDED if os.isatty(1) else None
    return Table(*columns, title=title, title_justify="left", box=lines, pad_edge=lines is not None, **options)
