"""Listeners with batch=: a list at once, one fate, and halves until what is poisonous stands alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, signals
from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import Channel, NotificationInfo, TriggerChannel, channel_task, install, notify_many
from pgpubsub_celery.errors import ListenerError
from pgpubsub_celery.listeners import listeners_of
from tests.fixtures.deliveries import Deliveries


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("batches", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    app.conf.task_default_queue = "batches"
    yield app
    app.close()


class Index:
    """A listener of lists, what it was given, and what it leaves."""

    def __init__(self, app: Celery, engine: Engine, *, session: bool, acknowledge: str = "finished", **options: Any):
        @dataclasses.dataclass
        class Document(Channel):
            channel_name = "batches.Document"
            lock_notifications = True
            value: int

        Document.acknowledge = acknowledge  # type: ignore[assignment]
        self.channel = Document
        self.engine = engine
        self.given: list[list[int]] = []
        self.infos: list[list[NotificationInfo]] = []
        self.poison: set[int] = set()
        self.raised: type[Exception] = ValueError
        options = {"batch": 100, "name": "batches.index", **options}

        def handle(task: Any, documents: list[Any], notifications: list[NotificationInfo]) -> None:
            assert all(isinstance(one, Document) for one in documents)
            values = [one.value for one in documents]
            self.given.append(values)
            self.infos.append(notifications)
            if self.poison & set(values):
                raise self.raised(sorted(self.poison & set(values)))

        if session:

            @channel_task(Document, app=app, bind=True, **options)
            def index(
                task: Any, documents: list[Document], session: Session, notifications: list[NotificationInfo]
            ) -> None:
                for one in documents:
                    session.execute(text("INSERT INTO effect VALUES (:value)"), {"value": one.value})
                handle(task, documents, notifications)

            self.task: Any = index
        else:

            @channel_task(Document, app=app, bind=True, **options)
            def index_apart(task: Any, documents: list[Document], notifications: list[NotificationInfo]) -> None:
                handle(task, documents, notifications)
                with engine.begin() as connection:
                    for one in documents:
                        connection.execute(text("INSERT INTO effect VALUES (:value)"), {"value": one.value})

            self.task = index_apart
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE effect (value int)"))
        self.deliveries = Deliveries(app, engine)

    def emit(self, *values: int) -> None:
        with Session(self.engine) as session, session.begin():
            notify_many(session, [self.channel(value=value) for value in values])

    @property
    def effects(self) -> list[int]:
        return sorted(self.deliveries.scalars("SELECT value FROM effect"))


@pytest.fixture(params=[True, False], ids=["session", "apart"])
def index(request: pytest.FixtureRequest, app: Celery, installed_engine: Engine, registry: None) -> Index:
    """A listener with, and one without `session`."""
    return Index(app, installed_engine, session=request.param)


def test_a_list_is_given_at_once_and_acknowledged_together(index: Index) -> None:
    """In the order in which they were stored, up to `batch`, with a NotificationInfo for each."""
    index.emit(*range(150))
    assert index.deliveries.run_until_idle() == 2
    assert index.given == [list(range(100)), list(range(100, 150))]
    assert index.effects == list(range(150))
    assert index.deliveries.rows() == []
    ids = [info.id for infos in index.infos for info in infos]
    assert len(set(ids)) == 150
    assert all(info.listener == "batches.index" for infos in index.infos for info in infos)


def test_what_fails_is_split_in_halves_until_it_stands_alone(index: Index) -> None:
    """The others are done, without an effect of what failed beside them; the poisonous one fails as any would."""
    index.poison = {13}
    index.emit(*range(32))
    failures: list[Any] = []

    def failed(sender: Any, exception: Any, **_: Any) -> None:
        failures.append(exception)

    signals.task_failure.connect(failed)
    try:
        index.deliveries.run()
    finally:
        signals.task_failure.disconnect(failed)
    assert index.effects == [value for value in range(32) if value != 13]
    (row,) = index.deliveries.rows()
    assert (row["state"], row["payload"]["value"], row["error"]) == ("failed", 13, "ValueError: [13]")
    # Each time the half with it, down to one: 32, 16, 8, 4, 2, 1; and each other half once.
    assert sorted(len(given) for given in index.given if 13 in given) == [1, 2, 4, 8, 16, 32]
    assert len(index.given) == 11
    assert [str(exception) for exception in failures] == ["[13]"], "only what stood alone is a failure to Celery"


def test_several_poisonous_ones_fail_each_alone(index: Index) -> None:
    """However many there are."""
    index.poison = {0, 7, 31}
    index.emit(*range(32))
    index.deliveries.run()
    assert index.effects == [value for value in range(32) if value not in index.poison]
    assert [row["payload"]["value"] for row in index.deliveries.rows()] == [0, 7, 31]
    assert set(index.deliveries.states()) == {"failed"}


def test_a_retry_is_all_of_theirs(app: Celery, installed_engine: Engine, registry: None) -> None:
    """Somebody else's service is down: it is not asked for each; the list waits, and counts, as one."""
    index = Index(app, installed_engine, session=True, autoretry_for=(OSError,), max_retries=2, default_retry_delay=30)
    index.raised, index.poison = OSError, {1}
    index.emit(1, 2, 3)
    for retries in (1, 2):
        index.deliveries.run()
        rows = index.deliveries.rows()
        assert [(row["state"], row["retries"], row["later"]) for row in rows] == [("waiting", retries, True)] * 3
        assert index.effects == []
        index.deliveries.make_due()
    assert index.given == [[1, 2, 3]] * 2
    index.deliveries.run()
    # Used up: what is poisonous is found, the others are done.
    assert index.effects == [2, 3]
    (row,) = index.deliveries.rows()
    assert (row["state"], row["payload"]["value"], row["retries"]) == ("failed", 1, 2)


def test_what_cannot_be_decoded_fails_alone(index: Index) -> None:
    """The list is of the others."""
    index.emit(1, 2, 3)
    index.deliveries.execute(
        "UPDATE pgpubsub_notification SET payload = '{\"value\": \"two\"}' WHERE payload->>'value' = '2'"
    )
    index.deliveries.run()
    assert index.given == [[1, 3]]
    assert index.effects == [1, 3]
    assert index.deliveries.states() == ["failed"]


def test_one_published_before_is_a_list_of_one(index: Index) -> None:
    """A suspect travels alone, in a list as its listener expects it."""
    index.emit(1, 2)
    index.deliveries.claim()
    index.deliveries.make_due()
    assert index.deliveries.run_until_idle() == 2
    assert index.given == [[1], [2]]
    assert index.effects == [1, 2]


def test_each_may_be_acknowledged_with_a_transaction_of_the_listeners(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """Slow work first, then result and acknowledgements together; what was not acknowledged so is at the end."""

    @dataclasses.dataclass
    class Slow(Channel):
        lock_notifications = True
        value: int

    @channel_task(Slow, app=app, batch=10, name="batches.slow")
    def slow(messages: list[Slow], notifications: list[NotificationInfo]) -> None:
        with Session(installed_engine) as session:
            for message, notification in zip(messages, notifications, strict=True):
                if message.value != 3:
                    notification.acknowledge(session)
                    session.execute(text("INSERT INTO effect VALUES (:value)"), {"value": message.value})
            session.commit()

    with installed_engine.begin() as connection:
        connection.execute(text("CREATE TABLE effect (value int)"))
    deliveries = Deliveries(app, installed_engine)
    with Session(installed_engine) as session, session.begin():
        notify_many(session, [Slow(value=value) for value in range(5)])
    deliveries.run()
    assert deliveries.rows() == []
    assert sorted(deliveries.scalars("SELECT value FROM effect")) == [0, 1, 2, 4]


def test_messages_that_carry_their_notifications_are_lists_too(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """acknowledge="published": the rows are gone, the halves are still found."""
    index = Index(app, installed_engine, session=False, acknowledge="published")
    index.poison = {2}
    index.emit(1, 2, 3, 4)
    (message,) = index.deliveries.claim()
    index.deliveries.execute("DELETE FROM pgpubsub_notification")
    index.deliveries.deliver(message)
    assert index.effects == [1, 3, 4]
    assert [2] in index.given


def test_changes_of_a_table_come_as_instances_of_their_channel(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """With `old` and `new`, as the ORM would load them."""
    Base.metadata.create_all(installed_engine)

    class ArticleChanges(TriggerChannel[Article]):
        lock_notifications = True

    given: list[tuple[str | None, str | None]] = []

    @channel_task(ArticleChanges, on=("insert", "delete"), app=app, batch=10, name="batches.articles")
    def articles(changes: list[ArticleChanges], session: Session) -> None:
        assert all(isinstance(change, ArticleChanges) for change in changes)
        given.extend((getattr(change.old, "title", None), getattr(change.new, "title", None)) for change in changes)

    install(installed_engine, channels=[ArticleChanges])
    deliveries = Deliveries(app, installed_engine)
    with Session(installed_engine) as session, session.begin():
        session.add(Article(id=1, title="one"))
        session.flush()
        session.execute(text("DELETE FROM article"))
    deliveries.run_until_idle()
    assert given == [(None, "one"), ("one", None)]


def test_a_batch_listener_is_declared_with_one_list(registry: None) -> None:
    """Everything else is refused at import, with how to write it."""

    @dataclasses.dataclass
    class Thing(Channel):
        value: int

    with pytest.raises(ListenerError, match=r"batch=0: expected a whole number"):
        channel_task(Thing, batch=0)
    with pytest.raises(ListenerError, match=r"batch=5 and bundle=5: a batch is what a message carries"):
        channel_task(Thing, batch=5, bundle=5)
    with pytest.raises(ListenerError, match=r"has batch= and the parameters value, other: .*def two\(messages"):

        @channel_task(Thing, batch=5)
        def two(value: Any, other: Any) -> None: ...

    with pytest.raises(ListenerError, match=r"the parameters messages, notification: "):

        @channel_task(Thing, batch=5)
        def wrong(messages: Any, notification: Any) -> None: ...

    with pytest.raises(ListenerError, match=r"the parameters session: "):

        @channel_task(Thing, batch=5)
        def none(session: Any) -> None: ...

    assert listeners_of(Thing) == []
