"""What several integration tests stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine

from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.settings import sync_url
from tests.conftest import of_driver
from tests.fixtures.notifications import Notifications, inconsistencies


@pytest.fixture
def notifications(installed_engine: Engine) -> Iterator[Notifications]:
    """The notification table of the test's database. Whatever a test does, each row must make sense at its end."""
    notifications = Notifications(installed_engine)
    yield notifications
    assert [wrong for row in notifications.rows() for wrong in inconsistencies(row)] == []


@pytest.fixture(scope="module")
def shared_engine(postgres: EmbeddedPostgres, template: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A database with our tables, for a module's tests that commit nothing: quicker than one for each."""
    name = request.module.__name__.rpartition(".")[2]
    engine = create_engine(sync_url(of_driver(postgres.create_database(name, template=template))))
    yield engine
    engine.dispose()
    postgres.drop_database(name)
