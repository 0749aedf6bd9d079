"""Several databases on one application: which settings are whose, which channels are where, what is refused."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import pytest

from pgpubsub_celery import Channel
from pgpubsub_celery.channels import check_databases, registered_channels, select_channels
from pgpubsub_celery.emit import EnqueuedTask
from pgpubsub_celery.errors import ChannelError, SettingsError, UnknownChannelError
from pgpubsub_celery.messages import KEYWORD, Envelope
from pgpubsub_celery.settings import Settings

MAIN = "postgresql://blog@db:5432/blog"
BILLING = "postgresql://billing@db:5432/billing"
CRM = "postgresql://crm@crm:5432/crm"


def load(conf: dict[str, Any], environ: dict[str, str] | None = None, **options: Any) -> Settings:
    return Settings.load(conf, environ or {}, **options)


# Settings


def test_a_database_has_its_own_settings_and_nothing_of_the_default_ones() -> None:
    """A listen_url or a session factory of another database would be wrong in silence."""
    conf = {
        "pgpubsub_database_url": MAIN,
        "pgpubsub_listen_url": MAIN,
        "pgpubsub_session_factory": "blog.db:Session",
        "pgpubsub_lease": 300,
        "pgpubsub_databases": {"billing": BILLING, "crm": {"database_url": CRM, "session_factory": "crm.db:Session"}},
    }
    main, billing, crm = load(conf), load(conf, database="billing"), load(conf, database="crm")
    assert (main.database, main.database_url, main.listen_url) == ("default", MAIN, MAIN)
    assert (billing.database, billing.database_url, billing.listen_url) == ("billing", BILLING, None)
    assert (main.session_factory, billing.session_factory) == ("blog.db:Session", None)
    assert (crm.database_url, crm.session_factory) == (CRM, "crm.db:Session")
    assert main.lease == billing.lease == crm.lease == 300
    assert crm.aliases == ("crm", "default", "billing")


def test_a_schema_is_every_databases_that_has_none_of_its_own() -> None:
    """It says nothing of where a database is."""
    conf = {"pgpubsub_schema": "queue", "pgpubsub_databases": {"a": BILLING, "b": {"schema": "own"}}}
    assert [load(conf, database=alias).schema for alias in ("default", "a", "b")] == ["queue", "queue", "own"]


def test_the_environment_has_variables_for_each_database() -> None:
    """The variable without an alias is the default database's alone."""
    conf = {"pgpubsub_databases": {"billing": BILLING}}
    environ = {"PGPUBSUB_DATABASE_URL": MAIN, "PGPUBSUB_DATABASE_URL_BILLING": CRM, "PGPUBSUB_SCHEMA_BILLING": "b"}
    assert load(conf, environ).database_url == MAIN
    billing = load(conf, environ, database="billing")
    assert (billing.database_url, billing.schema) == (CRM, "b")
    assert load(conf, {**environ, "PGPUBSUB_DATABASE": "billing"}).database == "billing"
    assert load(conf, {**environ, "PGPUBSUB_DATABASE": "billing"}, database="default").database_url == MAIN
    assert load({}, {"PGPUBSUB_DATABASES": f'{{"billing": "{BILLING}"}}'}, database="billing").database_url == BILLING


def test_the_default_database_can_stand_among_the_others() -> None:
    """Then no setting of its own is needed."""
    conf = {"pgpubsub_databases": {"default": MAIN, "billing": BILLING}}
    assert load(conf).database_url == MAIN
    assert load(conf, {"PGPUBSUB_DATABASE_URL": CRM}).database_url == CRM


@pytest.mark.parametrize(
    ("databases", "told"),
    [
        ([BILLING], r"databases is a list: expected a dict of URLs"),
        ({"Billing": BILLING}, r"databases has the alias 'Billing': expected a-z, 0-9 and _"),
        ({"billing": 5}, r"databases\['billing'\] is a int: expected a URL, or a dict"),
        ({"billing": "mysql://db/billing"}, r"databases\['billing'\] names the database kind 'mysql'"),
        ({"billing": {"listen_url": "nowhere"}}, r"databases\['billing'\]\['listen_url'\] is not a database URL"),
        (
            {"billing": {"databse_url": BILLING}},
            r"databases\['billing'\] has 'databse_url'.*Did you mean 'database_url'",
        ),
        ({"default": MAIN}, r"pgpubsub_database_url and databases\['default'\] both have the database_url"),
    ],
)
def test_what_cannot_be_a_database_is_refused_with_its_alias(databases: Any, told: str) -> None:
    """Whichever database a process is for."""
    with pytest.raises(SettingsError, match=told):
        load({"pgpubsub_database_url": MAIN, "pgpubsub_databases": databases})


def test_an_alias_that_is_not_configured_is_refused_with_those_that_are() -> None:
    """A typing mistake must not listen somewhere else."""
    conf = {"pgpubsub_database_url": MAIN, "pgpubsub_databases": {"billing": BILLING}}
    told = r"There is no database 'biling': 'default', 'billing' is configured.*Did you mean 'billing'\?"
    with pytest.raises(SettingsError, match=told):
        load(conf, database="biling")


def test_a_database_without_a_url_says_where_to_set_it() -> None:
    """By its own variable."""
    conf: dict[str, Any] = {"pgpubsub_databases": {"billing": {}}}
    with pytest.raises(SettingsError, match=r"database 'billing' has no URL: set PGPUBSUB_DATABASE_URL_BILLING"):
        load(conf, database="billing").require_database_url()
    with pytest.raises(SettingsError, match=r"database 'default' has no URL: set PGPUBSUB_DATABASE_URL,"):
        load(conf).require_database_url()


def test_urls_of_databases_are_not_printed() -> None:
    """They have passwords."""
    settings = load({"pgpubsub_databases": {"billing": "postgresql://b:s3cret@db/b"}}, database="billing")
    assert "s3cret" not in repr(settings)


# Channels


@pytest.mark.usefixtures("nothing_declared")
def test_channels_are_in_one_database_several_or_all() -> None:
    """Without a word, in the default one; a subclass where its base is."""

    @dataclasses.dataclass
    class Visit(Channel):
        pass

    @dataclasses.dataclass
    class Invoice(Channel):
        database = "billing"

    @dataclasses.dataclass
    class Reminder(Invoice):
        pass

    @dataclasses.dataclass
    class Shared(Channel):
        database = ("default", "billing")

    @dataclasses.dataclass
    class Everywhere(Channel):
        database = "*"

    mine = {Visit, Invoice, Reminder, Shared, Everywhere, EnqueuedTask}
    assert mine & set(registered_channels("default")) == {Visit, Shared, Everywhere, EnqueuedTask}
    assert mine & set(registered_channels("billing")) == {Invoice, Reminder, Shared, Everywhere, EnqueuedTask}
    assert mine & set(registered_channels("crm")) == {Everywhere, EnqueuedTask}
    assert mine <= set(registered_channels())
    assert select_channels([Invoice.name()], "billing") == [Invoice, Reminder]
    with pytest.raises(UnknownChannelError, match="is not in the database 'default', but in 'billing': name that with"):
        select_channels([Invoice.name()], "default")
    check_databases(["default", "billing"])
    with pytest.raises(ChannelError, match="Invoice is in the database 'billing', which is not configured"):
        check_databases(["default"])


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("given", [None, 5, "", (), ("billing", 5)])
def test_a_database_that_is_no_alias_is_refused_in_the_class_statement(given: Any) -> None:
    """As every attribute of a channel."""
    with pytest.raises(ChannelError, match="expected the alias of a database, a tuple of several"):
        type("Wrong", (Channel,), {"database": given, "__module__": __name__})


# Messages


def test_a_message_tells_the_alias_only_where_it_is_not_the_default_one() -> None:
    """So that messages of applications with one database are what they were, for workers of every release."""
    told: dict[str, Any] = {
        "installation": uuid.uuid4(),
        "channel": "c",
        "listener": "l",
        "subscription": 1,
        "ids": (1,),
    }
    plain, billing = Envelope(**told), Envelope(**told, database="billing")
    assert "database" not in plain.to_kwargs()[KEYWORD]
    assert billing.to_kwargs()[KEYWORD]["database"] == "billing"
    for envelope in (plain, billing):
        assert Envelope.from_kwargs(envelope.to_kwargs()) == envelope
