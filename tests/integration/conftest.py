"""What several integration tests stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.fixtures.notifications import Notifications, inconsistencies


@pytest.fixture
def notifications(installed_engine: Engine) -> Iterator[Notifications]:
    """The notification table of the test's database. Whatever a test does, each row must make sense at its end."""
    notifications = Notifications(installed_engine)
    yield notifications
    assert [wrong for row in notifications.rows() for wrong in inconsistencies(row)] == []
