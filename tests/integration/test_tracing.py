"""A writer's trace goes on in its listeners, whether it emitted a message or changed a table."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgpubsub_celery import Channel, TriggerChannel, channel_task, install, notify, set_notification_context
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
