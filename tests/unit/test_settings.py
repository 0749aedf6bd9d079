"""Settings: where they come from, what they refuse and with which words, how URLs may be written."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import pytest
from celery import Celery
from sqlalchemy.engine import make_url

from pgpubsub_celery import drivers
from pgpubsub_celery.errors import PgPubSubError, SettingsError
from pgpubsub_celery.settings import OF_DATABASE, Settings, sync_url

URL = "postgresql://blog:secret@db:5432/blog"


def load(conf: dict[str, Any] | None = None, environ: dict[str, str] | None = None, **options: Any) -> Settings:
    return Settings.load(conf, environ or {}, **options)


# Where they come from


def test_without_any_source_the_documented_defaults_hold() -> None:
    """These are the figures of the documentation."""
    settings = load()
    documented: dict[str, Any] = {
        "database_url": None,
        "listen_url": None,
        "session_factory": None,
        "schema": "public",
        "poll_interval": 30,
        "batch_size": 500,
        "max_in_flight": 1000,
        "lease": 120,
        "lease_max": 3600,
        "heartbeat_interval": 20,
        "max_starts": 3,
        "bundle_target": 0.1,
        "bundle_max": 200,
        "task_options": {},
        "failed_retention": None,
        "health_port": None,
        "health_host": "",
        "health_file": None,
        "health_timeout": 60,
        "worker_metrics_port": None,
        "worker_logformat": None,
    }
    assert {name: getattr(settings, name) for name in documented} == documented


def test_options_win_over_the_environment_which_wins_over_celery() -> None:
    """Each source covers what the one before it leaves open."""
    settings = load(
        {"pgpubsub_lease": 100, "pgpubsub_batch_size": 1, "pgpubsub_max_starts": 7},
        {"PGPUBSUB_LEASE": "200", "PGPUBSUB_BATCH_SIZE": "2"},
        lease=300,
    )
    assert (settings.lease, settings.batch_size, settings.max_starts) == (300, 2, 7)


def test_what_is_none_or_empty_is_left_to_the_next_source() -> None:
    """An option not given, a variable set to nothing, a setting switched off."""
    settings = load(
        {"pgpubsub_schema": "celery", "pgpubsub_lease": None},
        {"PGPUBSUB_SCHEMA": "", "PGPUBSUB_LEASE": ""},
        schema=None,
    )
    assert (settings.schema, settings.lease) == ("celery", 120)


def test_the_environment_is_read_when_loading_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sets a variable after the import means it."""
    monkeypatch.setenv("PGPUBSUB_SCHEMA", "one")
    assert Settings.load().schema == "one"
    monkeypatch.setenv("PGPUBSUB_SCHEMA", "two")
    assert Settings.load().schema == "two"
    assert Settings().schema == "public"


@pytest.mark.parametrize("spelling", ["pgpubsub_schema", "PGPUBSUB_SCHEMA"])
def test_a_celery_application_s_configuration_is_understood(spelling: str) -> None:
    """As configured, in either of Celery's spellings, and next to Celery's own settings."""
    app = Celery("settings", broker="memory://", set_as_current=False)
    app.conf.update({spelling: "celery", "task_ignore_result": True})
    try:
        assert Settings.load(app.conf, {}).schema == "celery"
    finally:
        app.close()


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("PGPUBSUB_DATABASE_URL", URL, URL),
        ("PGPUBSUB_LISTEN_URL", URL, URL),
        ("PGPUBSUB_SESSION_FACTORY", "blog.db:Session", "blog.db:Session"),
        ("PGPUBSUB_POLL_INTERVAL", "2.5", 2.5),
        ("PGPUBSUB_BATCH_SIZE", "20", 20),
        ("PGPUBSUB_TASK_OPTIONS", '{"queue": "slow"}', {"queue": "slow"}),
        ("PGPUBSUB_FAILED_RETENTION", "86400", 86400),
        ("PGPUBSUB_HEALTH_PORT", "8080", 8080),
        ("PGPUBSUB_HEALTH_PORT", "tcp://10.0.0.1:8080", None),  # Kubernetes', of a service called pgpubsub-health
    ],
)
def test_the_environment_is_read_by_the_setting_s_kind(variable: str, text: str, value: Any) -> None:
    """Text, numbers, whole numbers and JSON."""
    assert getattr(load(environ={variable: text}), variable.removeprefix("PGPUBSUB_").lower()) == value


def test_every_setting_can_be_set_by_the_environment() -> None:
    """None is forgotten, and other variables of that prefix are nobody's business here."""
    texts = {"task_options": '{"queue": "slow"}', "database": "billing", "databases": '{"billing": {}}'}
    texts |= {"database_url": URL, "listen_url": URL, "schema": "s"}
    environ = {f"PGPUBSUB_{name.upper()}": texts.get(name, "120") for name in Settings.names()}
    environ |= {f"PGPUBSUB_{name.upper()}_BILLING": texts.get(name, "120") for name in OF_DATABASE}
    settings = load(environ=environ | {"PGPUBSUB_HEARTBEAT_INTERVAL": "60", "PGPUBSUB_SERVICE_HOST": "10.0.0.1"})
    unchanged = [name for name in Settings.names() if getattr(settings, name) == getattr(Settings(), name)]
    assert unchanged == ["lease"]  # its default is 120


# What they refuse


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("PGPUBSUB_BATCH_SIZE", "many", "a whole number"),
        ("PGPUBSUB_BATCH_SIZE", "2.5", "a whole number"),
        ("PGPUBSUB_LEASE", "2m", "a number"),
        ("PGPUBSUB_FAILED_RETENTION", "never", "a number"),
        ("PGPUBSUB_TASK_OPTIONS", "queue=slow", "a JSON object"),
    ],
)
def test_a_variable_of_the_wrong_kind_is_named_with_what_is_expected(variable: str, text: str, expected: str) -> None:
    """By the name that the user wrote."""
    with pytest.raises(SettingsError, match=f"^{variable} is {text!r}: expected {expected}.$"):
        load(environ={variable: text})


def test_task_options_that_are_json_but_no_object_are_refused() -> None:
    """A list has no option names."""
    with pytest.raises(SettingsError, match=r"^task_options is \[1\]: expected a dict of Celery task options\.$"):
        load(environ={"PGPUBSUB_TASK_OPTIONS": "[1]"})


@pytest.mark.parametrize(
    "name", ["poll_interval", "lease", "lease_max", "heartbeat_interval", "bundle_target", "publish_timeout"]
)
@pytest.mark.parametrize("value", [0, -1, "5", True, None, float("nan"), float("inf")])
def test_durations_are_numbers_above_zero(name: str, value: Any) -> None:
    """Text from a configuration file is not quietly taken for a number, nor is what no clock can count."""
    with pytest.raises(SettingsError, match=f"^{name} is {re.escape(repr(value))}: expected a number above 0"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "max_in_flight", "max_starts", "bundle_max"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "5", True, None])
def test_counts_are_whole_numbers_of_at_least_one(name: str, value: Any) -> None:
    """Nothing can be claimed in batches of none."""
    with pytest.raises(
        SettingsError, match=f"^{name} is {re.escape(repr(value))}: expected a whole number of at least 1"
    ):
        Settings(**{name: value})


def test_a_bridge_may_be_told_to_drain_for_no_time_at_all() -> None:
    """Zero is a decision; less is a mistake."""
    assert Settings(drain_timeout=0).drain_timeout == 0
    with pytest.raises(SettingsError, match=r"^drain_timeout is -1: expected a number of at least 0"):
        Settings(drain_timeout=-1)


def test_failed_notifications_are_kept_for_a_while_or_for_good() -> None:
    """None is for good; zero would throw away what was to be looked at."""
    assert Settings(failed_retention=60).failed_retention == 60
    assert Settings(failed_retention=None).failed_retention is None
    with pytest.raises(SettingsError, match=r"^failed_retention is 0: expected a number above 0"):
        Settings(failed_retention=0)


def test_a_lease_cannot_grow_to_less_than_itself() -> None:
    """The message has both figures and the one to change."""
    with pytest.raises(SettingsError, match=r"^lease_max is 60 s, less than lease \(120 s\): raise lease_max\.$"):
        Settings(lease_max=60)
    assert Settings(lease=120, lease_max=120).lease_max == 120


def test_a_missed_heartbeat_must_not_lose_the_lease() -> None:
    """At least two fit into one."""
    with pytest.raises(
        SettingsError, match=r"^heartbeat_interval is 61 s: with a lease of 120 s it must be at most 60 s"
    ):
        Settings(heartbeat_interval=61)
    assert Settings(heartbeat_interval=60).heartbeat_interval == 60


@pytest.mark.parametrize("schema", ["", "x" * 64, "ü" * 32, 5])
def test_a_schema_is_a_name_that_postgres_can_hold(schema: Any) -> None:
    """Postgres counts bytes, and would cut a longer one without a word."""
    with pytest.raises(SettingsError, match=f"^schema is {schema!r}: expected a schema name of 1 to 63 bytes"):
        Settings(schema=schema)
    assert Settings(schema="ü" * 31).schema == "ü" * 31


@pytest.mark.parametrize(("name", "near"), [("pgpubsub_batchsize", "batch_size"), ("pgpubsub_leese", "lease")])
def test_an_unknown_celery_setting_is_refused_with_the_near_name(name: str, near: str) -> None:
    """A misspelt setting would otherwise be no setting."""
    with pytest.raises(SettingsError, match=f"^Celery setting '{name}' is not known. Did you mean '{near}'"):
        load({name: 1})


def test_an_unknown_option_is_refused_with_the_near_name() -> None:
    """As a Celery setting is."""
    with pytest.raises(SettingsError, match=r"^'batchsize' is not a setting\. Did you mean 'batch_size'\?$"):
        load(batchsize=1)


def test_a_missing_database_is_refused_with_the_three_places_to_name_it() -> None:
    """This is the first error that a new user meets."""
    with pytest.raises(SettingsError, match=r"PGPUBSUB_DATABASE_URL.*pgpubsub_database_url.*--database-url"):
        load().require_database_url()
    assert load(database_url=URL).require_database_url() == make_url(URL).set(drivername="postgresql+psycopg2")


def test_settings_cannot_be_changed() -> None:
    """They are handed to every part, in threads and processes."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lease = 5  # type: ignore[misc]


def test_a_password_is_not_shown() -> None:
    """Settings get printed and logged."""
    assert "secret" not in repr(Settings(database_url=URL, listen_url=URL))


def test_refusals_are_errors_of_this_package_and_value_errors() -> None:
    """So they can be caught as either."""
    assert issubclass(SettingsError, PgPubSubError)
    assert issubclass(SettingsError, ValueError)


# URLs


@pytest.mark.parametrize(
    "scheme",
    [
        "postgres",
        "postgresql",
        "postgresql+psycopg2",
        "postgresql+asyncpg",
        "postgresql+pg8000",
    ],
)
def test_a_url_may_name_any_driver(scheme: str) -> None:
    """Applications write the one of their own engine; password and database survive as they are."""
    url = sync_url(f"{scheme}://bl%40g:s%2Fe@db:5433/my-blog?application_name=x")
    assert url.drivername == "postgresql+psycopg2"
    assert (url.username, url.password, url.host, url.port, url.database) == ("bl@g", "s/e", "db", 5433, "my-blog")
    assert dict(url.query) == {"application_name": "x"}


@pytest.mark.parametrize("scheme", ["postgresql+psycopg", "postgresql+psycopg_async"])
def test_a_url_of_psycopg_3_is_for_that_where_it_is_installed(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere psycopg2, which is always there, reaches the same database."""
    assert sync_url(f"{scheme}://db/blog").drivername == "postgresql+psycopg"
    monkeypatch.setitem(sys.modules, "psycopg", None)
    drivers._has_psycopg.cache_clear()
    try:
        assert sync_url(f"{scheme}://db/blog").drivername == "postgresql+psycopg2"
    finally:
        drivers._has_psycopg.cache_clear()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("ssl=require", {"sslmode": "require"}),
        ("ssl=prefer&sslmode=verify-full", {"sslmode": "verify-full"}),
        ("sslmode=require", {"sslmode": "require"}),
        ("prepared_statement_cache_size=0&async_fallback=true", {}),
    ],
)
def test_what_only_asyncpg_understands_is_translated_or_dropped(query: str, expected: dict[str, str]) -> None:
    """The library below psycopg2 refuses options that it does not know."""
    assert dict(sync_url(f"postgresql+asyncpg://db/blog?{query}").query) == expected


def test_a_url_of_a_socket_or_of_several_hosts_stays_as_it_is() -> None:
    """Options that libpq knows are its own business."""
    assert dict(sync_url("postgresql:///blog?host=/run/postgresql").query) == {"host": "/run/postgresql"}
    assert sync_url("postgres://u@/blog?host=a:1&host=b:2").query["host"] == ("a:1", "b:2")


def test_a_url_object_is_understood() -> None:
    """What `engine.url` is."""
    assert sync_url(make_url("postgresql+asyncpg://u:p@db/blog")).password == "p"


@pytest.mark.parametrize("name", ["database_url", "listen_url"])
def test_a_url_of_another_database_kind_is_refused(name: str) -> None:
    """With the setting that has it."""
    with pytest.raises(SettingsError, match=f"^{name} names the database kind 'mysql': this package needs PostgreSQL"):
        load({f"pgpubsub_{name}": "mysql://u:secret@db/blog"})


@pytest.mark.parametrize("text", ["db.example.com", "", "postgresql://u:secret@db:port/blog"])
def test_what_is_no_url_is_refused_without_being_shown(text: str) -> None:
    """It may hold a password."""
    with pytest.raises(SettingsError, match=r"^database_url is not a database URL: expected something like") as raised:
        Settings(database_url=text)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_settings_with_a_namespaces_prefix_are_found() -> None:
    """As Django's projects have them: CELERY_PGPUBSUB_…, wherever Celery finds its own."""
    app = Celery("namespaced", set_as_current=False)
    app.config_from_object({"CELERY_PGPUBSUB_POLL_INTERVAL": 7.0, "OTHER_PGPUBSUB_SCHEMA": "no"}, namespace="CELERY")
    loaded = Settings.load(app.conf, {})
    assert (loaded.poll_interval, loaded.schema) == (7.0, "public")
    app.config_from_object({"CELERY_PGPUBSUB_POL_INTERVAL": 7.0}, namespace="CELERY")
    with pytest.raises(SettingsError, match=r"'pgpubsub_pol_interval' is not known\. Did you mean 'poll_interval'"):
        Settings.load(app.conf, {})
    app.close()
