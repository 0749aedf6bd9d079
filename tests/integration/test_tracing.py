"""A writer's trace goes on in its listeners, whether it emitted a message or changed a table."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, group, signals
from celery.exceptions import Ignore
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from sqlalchemy import Engine, text
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import (
    Channel,
    TriggerChannel,
    channel_task,
    enqueue,
    install,
    notify,
    notify_many,
    set_notification_context,
)
from pgpubsub_celery.bridge import Bridge
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.dispatch import Dispatcher
from pgpubsub_celery.emit import ENQUEUE_LISTENER
from pgpubsub_celery.errors import NotInstalledError
from pgpubsub_celery.migrations import register_subscriptions
from pgpubsub_celery.observing import observed
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.store import Quota, Store
from pgpubsub_celery.supervisor import Control
from pgpubsub_celery.wakeups import Link, bridge_engine
from tests.fixtures.deliveries import Deliveries


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    __tablename__ = "parcel"
    id: Mapped[int] = mapped_column(primary_key=True)


class _Kept(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


@pytest.fixture
def spans() -> Iterator[tuple[trace.Tracer, list[ReadableSpan]]]:
    """A tracer of the test's own, and the spans that it has ended."""
    kept = _Kept()
    provider = TracerProvider()
    provider.add_span_processor(kept)
    yield provider.get_tracer("test"), kept.spans
    provider.shutdown()


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("tracing", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    yield app
    app.close()


def test_a_listener_s_spans_belong_to_the_trace_of_the_writer(
    app: Celery, installed_engine: Engine, registry: None, spans: tuple[trace.Tracer, list[ReadableSpan]]
) -> None:
    """Emitted by notify(), or by a trigger in a transaction with a context; bundled and alone."""
    tracer, ended = spans
    Base.metadata.create_all(installed_engine)

    @dataclasses.dataclass
    class Sent(Channel):
        lock_notifications = True
        value: int

    class Parcels(TriggerChannel[Parcel]):
        lock_notifications = True

    contexts: list[dict[str, Any]] = []

    @channel_task(Sent, app=app, name="tracing.with_session", bundle=10)
    def with_session(value: int, session: Session, context: dict[str, Any]) -> None:
        contexts.append(context)
        with tracer.start_as_current_span(f"session {value}"):
            session.execute(text("SELECT 1"))

    @channel_task(Sent, app=app, name="tracing.without")
    def without(value: int) -> None:
        with tracer.start_as_current_span(f"without {value}"):
            pass

    @channel_task(Parcels, on="insert", app=app, name="tracing.parcel")
    def parcel(new: Parcel) -> None:
        with tracer.start_as_current_span(f"parcel {new.id}"):
            pass

    install(installed_engine, channels=[Sent, Parcels])
    for number in (1, 2):
        with tracer.start_as_current_span(f"writer {number}"), Session(installed_engine) as session, session.begin():
            set_notification_context(session, {"user": number})
            notify(session, Sent(value=number), context={"more": True})
            session.add(Parcel(id=number))
    with Session(installed_engine) as session, session.begin():
        notify(session, Sent(value=3))
    Deliveries(app, installed_engine).run_until_idle()

    by_name = {span.name: span for span in ended}
    for number in (1, 2):
        writer = by_name[f"writer {number}"].get_span_context()
        assert writer is not None
        for name in (f"session {number}", f"without {number}", f"parcel {number}"):
            own, parent = by_name[name].get_span_context(), by_name[name].parent
            assert own is not None
            assert parent is not None
            assert (own.trace_id, parent.span_id) == (writer.trace_id, writer.span_id), name
    assert by_name["session 3"].parent is None
    assert not trace.get_current_span().get_span_context().is_valid, "nothing of it is left in the worker"
    assert [{key for key in one if key != "traceparent"} for one in contexts] == [{"user", "more"}] * 2 + [set()]


# Spans of our own


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What the process's tracer provider has exported. Set as an application does, and taken back."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def trace_of(span: ReadableSpan) -> int:
    """Return the id of a span's trace."""
    context = span.get_span_context()
    assert context is not None
    return context.trace_id


def publish(app: Celery, engine: Engine, channel: type[Channel], *tasks: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Have a bridge publish what is due; return each message's headers and arguments, as a worker gets them."""
    url = engine.url.render_as_string(hide_password=False)
    settings = Settings(database_url=url)
    claiming = bridge_engine(sync_url(url))
    control = Control()
    with observed(control, settings), Link(claiming, claiming, "public") as link:
        listeners = register_subscriptions(link.claims, "public", [task.listener for task in tasks])
        store = Store("public")
        dispatcher = Dispatcher(app, store, Broker(app, timeout=1.0), store.installation(link.claims), settings)
        dispatcher.know(listeners)
        bridge = Bridge(app, settings, [channel], control)
        bridge.claim_and_dispatch(link, dispatcher, listeners)
        bridge.finish(link, dispatcher)
    messages = []
    with app.connection_for_read() as connection, connection.SimpleQueue(app.conf.task_default_queue) as queue:
        while queue.qsize():
            message = queue.get()
            message.ack()
            messages.append((message.headers, message.payload[1]))
    return messages


@pytest.mark.parametrize("bundle", [1, 10])
def test_emitting_publishing_and_running_are_one_trace(
    app: Celery, installed_engine: Engine, registry: None, exporter: InMemorySpanExporter, bundle: int
) -> None:
    """The producer's span is below the writer's own, those of bridge and run below the producer's; one for each."""

    @dataclasses.dataclass
    class Traced(Channel):
        channel_name = "tracing.Traced"
        lock_notifications = True
        value: int

    @channel_task(Traced, app=app, name="tracing.traced", bundle=bundle)
    def traced(value: int, session: Session) -> None:
        trace.get_current_span().set_attribute("value", value)
        if value == 1:
            raise ValueError("poison")
        if value == 2:
            raise Ignore("not mine")

    install(installed_engine, channels=[Traced])
    app.conf.task_default_queue = f"tracing-{bundle}"
    Deliveries(app, installed_engine)  # as a worker would, it has the tasks traced
    with trace.get_tracer("test").start_as_current_span("writer"), Session(installed_engine) as session:
        notify_many(session, [Traced(value=value) for value in range(3)])
        session.commit()
    messages = publish(app, installed_engine, Traced, traced)
    assert len(messages) == (3 if bundle == 1 else 1)
    for headers, kwargs in messages:
        request = {"id": headers["id"], "task": headers["task"], "delivery_info": {}, "retries": 0}
        app.tasks[headers["task"]].__trace__(headers["id"], (), kwargs, request)

    spans = exporter.get_finished_spans()
    (writer,) = [span for span in spans if span.name == "writer"]
    (sent,) = [span for span in spans if span.name == "send tracing.Traced"]
    published = [span for span in spans if span.name == "publish tracing.Traced"]
    ran = [span for span in spans if span.name == "process tracing.Traced"]
    assert (len(published), len(ran)) == (3, 3)
    assert {trace_of(span) for span in (sent, *published, *ran)} == {trace_of(writer)}
    assert sent.parent is not None
    assert sent.parent.span_id == writer.get_span_context().span_id  # type: ignore[union-attr]
    ours = sent.get_span_context().span_id  # type: ignore[union-attr]
    assert [span.parent.span_id for span in (*published, *ran) if span.parent is not None] == [ours] * 6
    assert (sent.kind, {one.kind for one in ran}) == (SpanKind.PRODUCER, {SpanKind.CONSUMER})

    ids = {dict(span.attributes or {})["messaging.message.id"] for span in ran}
    assert ids == {dict(span.attributes or {})["messaging.message.id"] for span in published}
    by_value = {dict(span.attributes or {})["value"]: span for span in ran}
    attributes = dict(by_value[0].attributes or {})
    assert attributes["messaging.system"] == "pgpubsub_celery"
    assert attributes["messaging.operation.type"] == "process"
    assert attributes["messaging.destination.name"] == "tracing.Traced"
    assert attributes["messaging.destination.subscription.name"] == "tracing.traced"
    assert dict(sent.attributes or {})["messaging.batch.message_count"] == 3
    assert [by_value[value].status.is_ok for value in range(3)] == [True, False, True]
    assert [event.name for event in by_value[1].events] == ["exception"]
    assert dict(by_value[2].attributes or {})["pgpubsub.ended_by"] == "Ignore"
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_list_of_notifications_is_one_span_with_links_to_all(
    app: Celery, installed_engine: Engine, registry: None, exporter: InMemorySpanExporter
) -> None:
    """It goes on with the trace of one of them."""

    @dataclasses.dataclass
    class Listed(Channel):
        lock_notifications = True
        value: int

    @channel_task(Listed, app=app, name="tracing.listed", batch=10)
    def listed(messages: list[Listed], session: Session) -> None: ...

    install(installed_engine, channels=[Listed])
    for value in range(3):
        with Session(installed_engine) as session, session.begin():
            notify(session, Listed(value=value))
    Deliveries(app, installed_engine).run_until_idle()
    spans = exporter.get_finished_spans()
    sent = {trace_of(span) for span in spans if span.kind == SpanKind.PRODUCER}
    (ran,) = [span for span in spans if span.kind == SpanKind.CONSUMER]
    assert len(sent) == 3
    assert {trace_of(ran), *(link.context.trace_id for link in ran.links)} == sent
    assert dict(ran.attributes or {})["messaging.batch.message_count"] == 3


def test_no_span_tells_what_a_statement_was_given(
    app: Celery, installed_engine: Engine, registry: None, exporter: InMemorySpanExporter
) -> None:
    """Neither a writer's nor a listener's error quotes its parameters there, nor does what has caused it."""

    @dataclasses.dataclass
    class Quoted(Channel):
        lock_notifications = True
        text: str

    @channel_task(Quoted, app=app, name="tracing.quoted")
    def quoted(text: str, session: Session) -> None:
        try:
            session.execute(sql("SELECT CAST(:value AS text) / 0"), {"value": text})
        except DBAPIError as exc:
            raise ValueError("nothing works") from exc

    install(installed_engine, channels=[Quoted])
    with Session(installed_engine) as session, session.begin():
        notify(session, Quoted(text="s3cret"))
    Deliveries(app, installed_engine).run_until_idle()
    with installed_engine.begin() as connection:
        connection.execute(sql("DROP TABLE pgpubsub_notification"))
    with Session(installed_engine) as session, pytest.raises(NotInstalledError):
        notify(session, Quoted(text="s3cret"))
    sent, ran, refused = exporter.get_finished_spans()
    assert [span.status.is_ok for span in (sent, ran, refused)] == [True, False, False]
    (event,) = ran.events
    assert "nothing works" in str(event.attributes)
    assert "in quoted" in str(event.attributes)
    assert "s3cret" not in "".join(span.to_json() for span in (sent, ran, refused))


def test_an_enqueued_task_has_a_producer_s_span(
    app: Celery, installed_engine: Engine, registry: None, exporter: InMemorySpanExporter
) -> None:
    """Nothing of its arguments is in it."""

    @app.task(name="tracing.later")
    def later(secret: str) -> None: ...

    with Session(installed_engine) as session, session.begin():
        enqueue(session, later.s("s3cret"))
    (sent,) = exporter.get_finished_spans()
    assert (sent.name, sent.kind) == ("send pgpubsub.enqueue", SpanKind.PRODUCER)
    assert "s3cret" not in sent.to_json()


@pytest.mark.parametrize("canvas", ["task", "chain", "group"])
def test_an_enqueued_task_s_message_continues_the_writer_s_trace(
    app: Celery, installed_engine: Engine, registry: None, exporter: InMemorySpanExporter, canvas: str
) -> None:
    """In its headers, where instrumentation of Celery looks for it."""

    @app.task(name=f"tracing.step_{canvas}")
    def step(number: int) -> None: ...

    signature = {"task": step.s(1), "chain": step.si(1) | step.si(2), "group": group(step.s(1), step.s(2))}[canvas]
    with trace.get_tracer("writer").start_as_current_span("request") as request:
        with Session(installed_engine) as session, session.begin():
            enqueue(session, signature)
        wanted = f"{request.get_span_context().trace_id:032x}"
    published: list[dict[str, Any]] = []

    def publish(sender: Any = None, headers: Any = None, **_: Any) -> None:
        published.append(dict(headers))

    signals.before_task_publish.connect(publish)
    try:
        with Link(engine := bridge_engine(sync_url(app.conf.pgpubsub_database_url)), engine, "public") as link:
            store = Store("public")
            listeners = register_subscriptions(link.claims, "public", [ENQUEUE_LISTENER])
            settings = Settings(database_url=app.conf.pgpubsub_database_url)
            broker = Broker(app, timeout=1.0)
            dispatcher = Dispatcher(app, store, broker, store.installation(link.claims), settings)
            dispatcher.know(listeners)
            quotas = [Quota(subscription=id, limit=10, lease=60, lease_max=60, with_payload=True) for id in listeners]
            dispatcher.dispatch(link.claims, store.claim(link.claims, quotas, batch_size=10, max_starts=3).rows)
            broker.close()
    finally:
        signals.before_task_publish.disconnect(publish)
    assert len(published) == (2 if canvas == "group" else 1)
    assert [headers["traceparent"].split("-")[1] for headers in published] == [wanted] * len(published)


def test_without_a_tracer_provider_there_is_no_span_and_no_look_up(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """Though OpenTelemetry is imported: nobody would see it."""

    @dataclasses.dataclass
    class Untraced(Channel):
        lock_notifications = True

    seen: list[bool] = []

    @channel_task(Untraced, app=app, name="tracing.untraced")
    def untraced(session: Session, context: dict[str, Any]) -> None:
        seen.append(trace.get_current_span().get_span_context().is_valid or bool(context))

    install(installed_engine, channels=[Untraced])
    with Session(installed_engine) as session, session.begin():
        notify(session, Untraced())
    with observed(Control(), Settings()):
        from pgpubsub_celery import signals

        assert not signals.notification_claimed.receivers
    Deliveries(app, installed_engine).run_until_idle()
    assert seen == [False]


def test_without_opentelemetry_nothing_of_it_is_imported() -> None:
    """It is an extra; who has not asked for it pays nothing."""
    code = (
        "import sys, pgpubsub_celery\n"
        "from pgpubsub_celery import notify, channel_task\n"
        "from pgpubsub_celery.tracing import with_trace, continued\n"
        "assert with_trace({'a': 1}) == {'a': 1}\n"
        "with continued({'traceparent': '00-1-1-01'}): pass\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
