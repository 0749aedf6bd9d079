"""`dev`: a user's application with everything that it needs, for as long as somebody works on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from pgpubsub_celery import migrations, trigger_drift
from pgpubsub_celery.channels import TriggerChannel, registered_channels, table_of
from pgpubsub_celery.cli.context import State, app_option, open_engine
from pgpubsub_celery.cli.demonstration import interruptible
from pgpubsub_celery.cli.exit_codes import EXIT_FAILED
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.schema import Names
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings, sync_url

LOOK_SECONDS = 0.2
STOP_SECONDS = 15.0


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge -A blog.celery_app dev
  pgpubsub-bridge -A blog.celery_app dev --create-tables    # no migrations yet: create_all() of your models
"""
)
@app_option
@click.option(
    "--directory", type=click.Path(path_type=Path), default=".pgpubsub", show_default=True, help="Of the servers' data."
)
@click.option("--concurrency", type=click.IntRange(min=1), default=2, show_default=True, help="Of the worker.")
@click.option("--create-tables", is_flag=True, help="Create the tables of your trigger channels' models, if missing.")
@click.pass_context
def dev(ctx: click.Context, directory: Path, concurrency: int, create_tables: bool) -> None:
    """Run your application: the servers that you lack, tables and triggers, the bridge and a worker; Ctrl-C ends all.

    A database or broker that your configuration names and that answers is used; otherwise one is started from the
    wheels of the [embedded] extra, and keeps its data in --directory. Bridge and worker get the addresses by
    PGPUBSUB_DATABASE_URL and CELERY_BROKER_URL.
    """
    state = ctx.ensure_object(State)
    app = state.require_app()
    path = state.require_app_path()
    code = 0
    with interruptible(), contextlib.ExitStack() as stack:
        database = _database(app, directory, stack)
        broker = _broker(app, directory, stack)
        os.environ["PGPUBSUB_DATABASE_URL"] = database
        for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
            os.environ[name] = broker
        settings = Settings.load(app.conf, database=DEFAULT_DATABASE)
        click.echo(f"database  {sync_url(database).set(drivername='postgresql').render_as_string()}")
        click.echo(f"broker    {maybe_sanitize_url(broker)}")
        _install(settings, create_tables=create_tables)
        commands = {
            "worker": ["celery", "-A", path, "worker", "--loglevel=info", f"--concurrency={concurrency}"],
            "bridge": ["pgpubsub_celery.cli", "-A", path, "listen"],
        }
        processes = {name: stack.enter_context(_running(command)) for name, command in commands.items()}
        click.echo("worker and bridge are starting; Ctrl-C ends everything.")
        ended = _first_to_end(processes)
        click.echo(f"the {ended} has ended with {processes[ended].returncode}: ending everything.", err=True)
        code = EXIT_FAILED
    ctx.exit(code)


def _database(app: Celery, directory: Path, stack: contextlib.ExitStack) -> str:
    configured = Settings.load(app.conf, database=DEFAULT_DATABASE).database_url
    if configured is not None:
        engine = create_engine(sync_url(configured), poolclass=NullPool, connect_args={"connect_timeout": 3})
        try:
            engine.connect().close()
        except DBAPIError as exc:
            click.echo(f"the configured database does not answer ({one_line(exc)}): starting one.", err=True)
        else:
            return configured
    from pgpubsub_celery.embedded import EmbeddedPostgres

    return stack.enter_context(EmbeddedPostgres(directory / "postgres")).url


def _broker(app: Celery, directory: Path, stack: contextlib.ExitStack) -> str:
    # Without a configured one, Celery would look for RabbitMQ on this machine.
    url = str(app.conf.broker_write_url or app.conf.broker_url or "")
    if url and not url.startswith("memory:"):
        try:
            with app.connection_for_write(connect_timeout=3) as connection:
                connection.ensure_connection(max_retries=1, timeout=3)
        except (OperationalError, OSError) as exc:
            click.echo(f"the configured broker does not answer ({one_line(exc)}): starting one.", err=True)
        else:
            return url
    from pgpubsub_celery.embedded import EmbeddedValkey

    return stack.enter_context(EmbeddedValkey(directory / "valkey")).url


def _install(settings: Settings, *, create_tables: bool) -> None:
    """Install; while tables are missing, say which and wait until the user's migrations have made them."""
    engine = open_engine(settings)
    if create_tables:
        for channel in registered_channels(DEFAULT_DATABASE):
            if issubclass(channel, TriggerChannel):
                table_of(channel).metadata.create_all(engine)
    told: list[str] = []
    while missing := _missing_tables(engine, Names(settings.schema)):
        if missing != told:
            told = missing
            click.echo(
                f"missing   {', '.join(missing)}: create them there, with your migrations, and this goes on; or start "
                "it with --create-tables.",
                err=True,
            )
        time.sleep(1)
    for line in migrations.install(engine, schema=settings.schema):
        click.echo(f"install   {line}")


def _missing_tables(engine: Engine, names: Names) -> list[str]:
    with engine.connect() as connection:
        tables = trigger_drift.definitions(names, registered_channels(DEFAULT_DATABASE))
        return [table for table in tables if trigger_drift.relation_of(connection, table) is None]


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    from pgpubsub_celery.embedded import start_process

    process = start_process([sys.executable, "-m", *command], stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_to_end(processes: dict[str, subprocess.Popen[bytes]]) -> str:
    while True:
        for name, process in processes.items():
            if process.poll() is not None:
                return name
        time.sleep(LOOK_SECONDS)
