"""One RabbitMQ node for the run. Tests that stop it start their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.rabbitmq.server import RabbitMQ

_numbers = itertools.count()


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """A running node."""
    with RabbitMQ() as node:
        yield node


@pytest.fixture
def own() -> Iterator[RabbitMQ]:
    """A node of the test's own, to be treated badly."""
    with RabbitMQ() as node:
        yield node


@pytest.fixture
def queue() -> str:
    """The name of a queue that no other test uses."""
    return f"queue-{next(_numbers)}"
