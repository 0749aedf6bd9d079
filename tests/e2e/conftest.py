"""The shop: real processes on a database and a broker of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from pgpubsub_celery import install
from pgpubsub_celery.settings import sync_url
from tests.fixtures import shop as shop_app
from tests.fixtures.processes import Shop
from tests.fixtures.shop import Base

SHOP_CHANNELS = [
    shop_app.Order,
    shop_app.SpecialOrder,
    shop_app.Call,
    shop_app.Entry,
    shop_app.Errand,
    shop_app.Ping,
    shop_app.AuthorChanges,
]


@pytest.fixture
def shop(tmp_path: Path, installed_url: str, broker_url: str) -> Iterator[Shop]:
    """The shop's database with tables and triggers; whatever it starts has ended after the test."""
    engine = create_engine(sync_url(installed_url))
    Base.metadata.create_all(engine)
    install(engine, channels=SHOP_CHANNELS)
    engine.dispose()
    shop = Shop(tmp_path, installed_url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def database(shop: Shop) -> Iterator[Engine]:
    """An engine on the shop's database."""
    engine = create_engine(sync_url(shop.database_url))
    yield engine
    engine.dispose()
