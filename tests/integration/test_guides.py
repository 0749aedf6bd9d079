"""What the guides show works as it stands there: their applications, with the real frameworks, on a real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text

from pgpubsub_celery import install
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.pages import DOCS, Written, application, written

__all__ = ["written"]

GUIDES = DOCS / "guides"


def rows(engine: Engine, statement: str) -> list[tuple[Any, ...]]:
    """Return what a query finds."""
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(statement))]


def test_fastapi(written: Written, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order and its notification are one transaction; one that is refused leaves neither."""
    monkeypatch.setenv("DATABASE_URL", database_url.replace("postgresql://", "postgresql+asyncpg://"))
    written.write(application(GUIDES / "fastapi.md"))
    celery_app = written.load("shop.celery_app").app
    written.load("shop.listeners")
    written.load("shop.models").Base.metadata.create_all(engine)
    install(engine)
    api = written.load("shop.api")

    async def order(*emails: str) -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api.app), base_url="http://shop") as client:
            answers = [await client.post("/orders", json={"email": email}) for email in emails]
        await api.engine.dispose()
        return [answer.status_code for answer in answers]

    assert asyncio.run(order("ann@example.org", "nobody")) == [201, 422]
    deliveries = Deliveries(celery_app, engine)
    (stored,) = deliveries.rows()
    assert (stored["channel"], stored["payload"]) == ("shop.channels.OrderPlaced", {"order_id": 1})
    deliveries.run()
    assert rows(engine, "SELECT id, email, confirmed FROM shop_order") == [(1, "ann@example.org", True)]
    assert deliveries.rows() == []


def test_flask(written: Written, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """create_all() brings the triggers, db.session emits, and listeners have the application's context."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    written.write(application(GUIDES / "flask.md"))
    celery_app = written.load("shop.celery_app")
    db = written.load("shop.models").db
    with celery_app.flask_app.app_context():
        db.create_all()
        client = celery_app.flask_app.test_client()
        assert client.post("/orders", data={"email": "ann@example.org"}).status_code == 201
        assert client.post("/catalogue", data={"email": "bob@example.org"}).status_code == 202
        db.session.remove()
        db.engine.dispose()
    deliveries = Deliveries(celery_app.app, engine)
    assert [row["channel"] for row in deliveries.rows()] == [
        "shop.channels.OrderChanges",
        "shop.channels.CatalogueRequested",
    ]
    deliveries.run()
    assert rows(engine, 'SELECT "to", about FROM mail ORDER BY id') == [
        ("ann@example.org", "order 1"),
        ("bob@example.org", "shop.web"),
    ]
    assert deliveries.rows() == []
