"""`install`, `uninstall` and `triggers`: what exists in the database."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re

import click
from rich.text import Text
from sqlalchemy import Connection

from pgpubsub_celery import insights, migrations, trigger_drift
from pgpubsub_celery.channels import check_databases, registered_channels
from pgpubsub_celery.cli.context import (
    Group,
    State,
    app_option,
    connected,
    console,
    database_option,
    new_table,
    open_engine,
)
from pgpubsub_celery.cli.exit_codes import EXIT_DIFFERENT
from pgpubsub_celery.schema import Names
from pgpubsub_celery.triggers import TriggerDefinition


@click.command(
    epilog="""
Examples:

\b
  pgpubsub-bridge -A blog.celery_app install
  pgpubsub-bridge -A blog.celery_app install --check        # in a pipeline: exit code 1 when something differs
  pgpubsub-bridge -A blog.celery_app install --sql > install.sql
  pgpubsub-bridge -A blog.celery_app install --grant-emit web
"""
)
@app_option
@database_option
@click.option("--sql", is_flag=True, help="Print a script for somebody else to run, and change nothing.")
@click.option(
    "--check", "check_only", is_flag=True, help="Print what differs, and change nothing; exit code 1 if anything does."
)
@click.option("--prune", is_flag=True, help="Also remove what no registered channel or listener wants any more.")
@click.option("--grant-emit", multiple=True, metavar="ROLE", help="Let a role emit with notify() and enqueue().")
@click.option("--grant-run", multiple=True, metavar="ROLE", help="Let a role run bridges and workers.")
@click.option("--lock-timeout", type=click.FloatRange(min=0.1), default=10.0, show_default=True, metavar="SECONDS")
@click.pass_context
def install(
    ctx: click.Context,
    database_url: str | None,
    sql: bool,
    check_only: bool,
    prune: bool,
    grant_emit: tuple[str, ...],
    grant_run: tuple[str, ...],
    lock_timeout: float,
) -> None:
    """Create or update tables, functions, subscriptions and triggers of all imported channels. Idempotent."""
    state = ctx.ensure_object(State)
    state.require_app()
    settings = state.settings(database_url=database_url)
    check_databases(settings.aliases)
    of = {"schema": settings.schema, "database": settings.database}
    if sql:
        click.echo(migrations.install_sql(**of), nl=False)
        return
    if check_only:
        with connected(settings) as connection:
            _report(ctx, migrations.check(connection, **of))
        return
    done = migrations.install(open_engine(settings), prune=prune, lock_timeout=lock_timeout, **of)
    for line in done:
        click.echo(line)
    click.echo("installed." if done else "everything is in place.")
    with connected(settings) as connection:
        for role in grant_emit:
            migrations.grant_emit(connection, role, settings.schema)
            click.echo(f"{role} may emit.")
        for role in grant_run:
            migrations.grant_run(connection, role, settings.schema)
            click.echo(f"{role} may run bridges and workers.")


@click.command(
    epilog="""
Example:

\b
  pgpubsub-bridge -A blog.celery_app uninstall
"""
)
@app_option
@database_option
@click.option("--discard-stored", is_flag=True, help="Also when notifications are stored, which are lost then.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def uninstall(ctx: click.Context, database_url: str | None, discard_stored: bool, yes: bool) -> None:
    """Remove our triggers, functions and tables; refuses while notifications are stored."""
    settings = ctx.ensure_object(State).settings(database_url=database_url)
    url = settings.require_database_url()
    if not yes:
        click.confirm(
            f"Remove everything of pgpubsub_celery from the database {url.database!r} at {url.host}?", abort=True
        )
    for line in migrations.uninstall(open_engine(settings), discard_stored=discard_stored, schema=settings.schema):
        click.echo(line)
    click.echo("uninstalled.")


@click.group(
    cls=Group,
    epilog="""
Examples:

\b
  pgpubsub-bridge -A blog.celery_app triggers check       # exit code 1 when something differs
  pgpubsub-bridge -A blog.celery_app triggers diff
""",
)
def triggers() -> None:
    """Look at the triggers of trigger channels, and compare them with what the listeners need."""


@triggers.command("list")
@app_option
@database_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_triggers(ctx: click.Context, database_url: str | None, as_json: bool) -> None:
    """List the triggers of ours that the database has."""
    settings = ctx.ensure_object(State).settings(database_url=database_url)
    with connected(settings) as connection:
        found = insights.read_triggers(connection, settings.schema)
    if as_json:
        for trigger in found:
            click.echo(json.dumps(dataclasses.asdict(trigger)))
        return
    table = new_table("table", "trigger", "enabled", "definition")
    for trigger in found:
        table.add_row(Text(trigger.table), Text(trigger.name), trigger.enabled, trigger.hash or "unknown")
    console().print(table if found else "The database has no triggers of ours.")


@triggers.command("check")
@app_option
@database_option
@click.pass_context
def check_triggers(ctx: click.Context, database_url: str | None) -> None:
    """Say how the triggers differ from what the listeners need; exit code 1 if they do."""
    state = ctx.ensure_object(State)
    state.require_app()
    settings = state.settings(database_url=database_url)
    with connected(settings) as connection:
        steps = _trigger_steps(connection, Names(settings.schema), settings.database)
    _report(ctx, [step.what for step in steps])


@triggers.command("sql")
@app_option
@database_option
@click.pass_context
def trigger_sql(ctx: click.Context, database_url: str | None) -> None:
    """Print the statements that create the triggers."""
    state = ctx.ensure_object(State)
    state.require_app()
    settings = state.settings(database_url=database_url)
    channels = registered_channels(settings.database)
    for table, definitions in trigger_drift.definitions(Names(settings.schema), channels).items():
        for definition in definitions:
            click.echo(f"-- {definition.name} on {table}")
            for statement in definition.create:
                click.echo(statement.strip() + ";\n")


@triggers.command("diff")
@app_option
@database_option
@click.pass_context
def diff_triggers(ctx: click.Context, database_url: str | None) -> None:
    """Print what `install` would change of each trigger's function; exit code 1 if it would change anything."""
    state = ctx.ensure_object(State)
    state.require_app()
    settings = state.settings(database_url=database_url)
    names = Names(settings.schema)
    differences: list[str] = []
    with connected(settings) as connection:
        channels = registered_channels(settings.database)
        for table, definitions in trigger_drift.definitions(names, channels).items():
            for definition in definitions:
                for step in trigger_drift.trigger_steps(connection, names, table, [definition]):
                    present = insights.read_source(connection, settings.schema, definition.function)
                    differences += [step.what, *_source_diff(definition, present)]
        differences += [step.what for step in trigger_drift.unwanted_triggers(connection, names, settings.database)]
    _report(ctx, differences)


def _trigger_steps(connection: Connection, names: Names, database: str) -> list[trigger_drift.Step]:
    steps: list[trigger_drift.Step] = []
    for table, definitions in trigger_drift.definitions(names, registered_channels(database)).items():
        steps += trigger_drift.trigger_steps(connection, names, table, definitions)
    return steps + trigger_drift.unwanted_triggers(connection, names, database)


def _source_diff(definition: TriggerDefinition, present: str | None) -> list[str]:
    """Return the lines by which the source of the trigger's function differs."""
    begins = re.compile(rf"CREATE OR REPLACE FUNCTION [^\n]*\b{re.escape(definition.function)}\b")
    wanted = next(statement for statement in definition.create if begins.match(statement))
    body = re.search(r"\bAS (\$\w*\$)(.*)\1", wanted, re.DOTALL)
    assert body is not None
    lines = difflib.unified_diff(
        (present or "").strip("\n").splitlines(),
        body[2].strip("\n").splitlines(),
        f"{definition.function} in the database",
        f"{definition.function} of this release",
        lineterm="",
    )
    return list(lines)


def _report(ctx: click.Context, differences: list[str]) -> None:
    for line in differences:
        click.echo(line)
    if differences:
        ctx.exit(EXIT_DIFFERENT)
    click.echo("everything is in place.")
