"""What the guides show works as it stands there: their applications, with the real frameworks, on a real Postgres."""

from __future__ import annotations

import asyncio
import datetime
import re
from typing import Any

import httpx
import pytest
from celery import Celery
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

import pgpubsub_celery
from pgpubsub_celery import enqueue, install, notify
from pgpubsub_celery.cli.listening import listen
from pgpubsub_celery.errors import PgPubSubError
from pgpubsub_celery.migrations import check
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.pages import DOCS, ROOT, Written, application, blocks, written

__all__ = ["written"]

GUIDES = DOCS / "guides"


def rows(engine: Engine, statement: str) -> list[tuple[Any, ...]]:
    """Return what a query finds."""
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(statement))]


MODELS = """
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase): ...


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    password_hash: Mapped[str] = mapped_column(default="")


class Post(Base):
    __tablename__ = "post"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    content: Mapped[str]
"""
"""The models that the first pages say the reader has."""
TASK = """
from celery import shared_task


@shared_task
def send_email(number): ...
"""


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_what_the_first_pages_show_runs(page: str, written: Written, engine: Engine, database_url: str) -> None:
    """What somebody reads first: a row becomes a post, messages are emitted, psql can do so, too."""
    written.write({"blog/models.py": MODELS, "blog/tasks.py": TASK, **application(ROOT / page)})
    app = written.load("blog.celery_app").app
    app.conf.pgpubsub_database_url = database_url
    listeners = written.load("blog.listeners")
    models = written.load("blog.models")
    models.Base.metadata.create_all(engine)
    install(engine)
    snippets = [block for block in blocks(ROOT / page) if block.file is None and block.language in ("python", "sql")]
    known = {
        "Session": sessionmaker(engine),
        "datetime": datetime,
        "notify": notify,
        "enqueue": enqueue,
        "send_email": written.load("blog.tasks").send_email,
        "PostReads": listeners.PostReads,
    }
    emitted = 1
    with known["Session"].begin() as session:
        session.add(models.Author())
    for block in snippets:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), dict(known))
            emitted += 2
        else:
            with engine.begin() as connection:
                connection.execute(text(block.text.replace(":", r"\:")))
            emitted += 1
    deliveries = Deliveries(app, engine)
    assert len(deliveries.rows()) == emitted >= 3
    for message in deliveries.claim():
        if message.task != "pgpubsub.enqueue":
            deliveries.deliver(message)
    assert rows(engine, "SELECT author_id, content FROM post") == [(1, "Welcome!")]
    assert {row["channel"] for row in deliveries.rows()} == {"pgpubsub.enqueue"}  # a bridge publishes that itself


BANK = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase): ...


class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]


class Product(Base):
    __tablename__ = "product"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int]


class Entry(Base):
    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]


class Saved(Base):
    __tablename__ = "saved"
    id: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[int]
"""
"""The models of the page about order."""


def test_what_the_page_of_order_shows_is_in_order_or_only_the_newest(
    written: Written, engine: Engine, database_url: str
) -> None:
    """Changes of a row and messages of an account one after the other; else the newest alone."""
    page = DOCS / "ordering.md"
    written.write({"shop/models.py": BANK, **application(page)})
    app = Celery("shop", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = database_url
    written.load("shop.listeners")
    models, channels = written.load("shop.models"), written.load("shop.channels")
    models.Base.metadata.create_all(engine)
    install(engine)
    begin = sessionmaker(engine)
    with begin.begin() as session:
        session.add_all(
            [models.Account(id=1, owner="Ann"), models.Product(id=1, price=5), models.Product(id=2, price=5)]
        )
    for number in range(3):
        with begin.begin() as session:
            session.get_one(models.Account, 1).owner = f"Ann {number}"
            session.get_one(models.Product, 1).price = number
            notify(session, channels.Booked(account=7, amount=number))
            (snippet,) = [block for block in blocks(page) if block.file is None]
            exec(
                compile(snippet.text, str(snippet), "exec"),
                {"Session": begin, "notify": notify, "Typed": channels.Typed},
            )
    deliveries = Deliveries(app, engine)
    while messages := deliveries.claim():
        for message in reversed(messages):
            deliveries.deliver(message)
    found = [what for (what,) in rows(engine, "SELECT what FROM entry ORDER BY id")]
    assert [what for what in found if what.startswith("account")] == [
        f"account 1: Ann{n}" for n in ("", " 0", " 1", " 2")
    ]
    assert [what for what in found if what.startswith("7")] == ["7: 0", "7: 1", "7: 2"]
    assert sorted(what for what in found if what.startswith("product")) == ["product 1", "product 2"]
    assert rows(engine, "SELECT document FROM saved") == []
    deliveries.make_due()
    deliveries.run()
    assert rows(engine, "SELECT document FROM saved") == [(7,)]
    assert deliveries.rows() == []
    app.close()


def test_an_order_by_fastapi_and_its_notification_are_one_transaction(
    written: Written, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_flask_sqlalchemy_installs_by_create_all_and_emits_by_its_session(
    written: Written, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


CELERY_APP = """
from celery import Celery

app = Celery("shop", broker="memory://")
app.set_default()
"""
SHOP = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


class Receipt(Base):
    __tablename__ = "receipt"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    email: Mapped[str]
"""


def test_a_task_that_was_sent_on_commit_is_part_of_the_transaction(
    written: Written, installed_engine: Engine, installed_url: str
) -> None:
    """The task is in the transaction, under the id that is returned; a rollback takes it back."""
    files = {"shop/celery_app.py": CELERY_APP, "shop/models.py": SHOP, **application(GUIDES / "from-on-commit.md")}
    written.write(files)
    app = written.load("shop.celery_app").app
    app.conf.pgpubsub_database_url = installed_url
    orders = written.load("shop.orders")
    listeners = written.load("shop.listeners")
    written.load("shop.models").Base.metadata.create_all(installed_engine)
    install(installed_engine, channels=[listeners.OrderPlaced])
    with Session(installed_engine) as session:
        orders.place_order(session, "nobody@example.org")
        session.rollback()
        id = orders.place_order(session, "ann@example.org")
        notify(session, listeners.OrderPlaced(order_id=2))
        session.commit()
    deliveries = Deliveries(app, installed_engine)
    enqueued, _ = deliveries.rows()
    assert id in str(enqueued["payload"])
    (message,) = [message for message in deliveries.claim() if message.task != "pgpubsub.enqueue"]
    deliveries.deliver(message)
    assert rows(installed_engine, "SELECT order_id, email FROM receipt") == [(2, "ann@example.org")]


BOTO3 = """
asked = []


class Client:
    def generate_db_auth_token(self, *, DBHostname, Port, DBUsername):
        asked.append((DBHostname, Port, DBUsername))
        return "a token"


def client(service):
    assert service == "rds"
    return Client()
"""
LISTENER = """
from dataclasses import dataclass

from celery import Celery
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task

app = Celery("blog", broker="memory://")
app.set_default()


@dataclass
class Ping(Channel):
    lock_notifications = True


@channel_task(Ping)
def answer(session: Session): ...
"""


def test_a_worker_asks_for_a_token_for_each_connection(
    written: Written, installed_engine: Engine, installed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's connections are the session factory's, each made with a token of its own."""
    monkeypatch.setenv("DATABASE_URL", installed_url)
    files = application(GUIDES / "managed-postgres.md")
    written.write({"boto3.py": BOTO3, "blog/pings.py": LISTENER, **files})
    pings = written.load("blog.pings")
    (snippet,) = [
        block for block in blocks(GUIDES / "managed-postgres.md") if block.language == "python" and block.file is None
    ]
    exec(compile(snippet.text, str(snippet), "exec"), {"app": pings.app})
    install(installed_engine, channels=[pings.Ping])
    with Session(installed_engine) as session, session.begin():
        notify(session, pings.Ping())
    deliveries = Deliveries(pings.app, installed_engine)
    deliveries.run()
    assert deliveries.rows() == []
    url = installed_engine.url
    asked = written.load("boto3").asked
    assert set(asked) == {(url.host, url.port, url.username)}
    written.load("blog.db").engine.dispose()


def test_beside_django_pgpubsub_it_needs_a_schema_of_its_own(engine: Engine) -> None:
    """Its table has the name of ours: that is noticed, and the schema that the guide names is the way out."""
    guide = (GUIDES / "from-django-pgpubsub.md").read_text()
    (schema,) = set(re.findall(r'pgpubsub_schema = "(\w+)"', guide))
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE pgpubsub_notification (id serial PRIMARY KEY, channel varchar(63), payload jsonb)")
        )
    with pytest.raises(PgPubSubError, match="pgpubsub_schema"):
        install(engine, channels=[])
    install(engine, channels=[], schema=schema)
    with engine.connect() as connection:
        assert check(connection, channels=[], schema=schema) == []


def test_what_django_pgpubsub_calls_otherwise_is_there() -> None:
    """Each name of ours in the guide's table, and each option."""
    guide = (GUIDES / "from-django-pgpubsub.md").read_text()
    table = guide.partition("## Names")[2].partition("## What behaves differently")[0]
    names = set(re.findall(r"`pgpubsub_celery\.(\w+)`", table))
    assert len(names) > 8
    assert names <= set(pgpubsub_celery.__all__)
    options = {option for parameter in listen.params for option in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", table)) <= options
