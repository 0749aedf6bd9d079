"""One trace from a writer through the bridge to the listeners of what it emits.

Owns what OpenTelemetry's propagators put into a notification's context (`traceparent`, `tracestate`, …), how a run
continues from there, and the spans of ours: a producer's for each emitting, a consumer's for each run (the bridge's are
`spans`'). Does nothing, and imports nothing, in a process that does not use OpenTelemetry; makes no span where nobody
has set a tracer provider. No span has a payload.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.exceptions import TaskPredicate

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = "traceparent"
"""The W3C's name for which span of which trace caused something."""

TRACESTATE = "tracestate"

SYSTEM = "pgpubsub_celery"
"""What `messaging.system` is."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a span says."""

    name: str
    attributes: Mapping[str, Any]
    links: Sequence[Mapping[str, Any] | None] = ()
    """Contexts of other notifications that it is of."""
    error: Callable[[BaseException], str] = repr
    """Returns what may be told of an error, in one line."""


def tracer() -> Tracer | None:
    """Return what makes our spans; None where nobody has set a tracer provider.

    Asking costs more than most of what is done for a notification in a bundle: ask once for all.
    """
    # Whoever has set one has imported this.
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    found: Tracer = trace.get_tracer("pgpubsub_celery")
    return found


def with_trace(context: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a notification's context with the current trace added; what the caller gave goes before."""
    # Whoever has a current span has imported this.
    if "opentelemetry.trace" not in sys.modules:
        return context
    from opentelemetry import propagate

    carrier: dict[str, Any] = {}
    propagate.inject(carrier)
    return {**carrier, **(context or {})} if carrier else context


@contextlib.contextmanager
def emitting(caller: str, channels: Callable[[], Collection[str]], count: int) -> Iterator[None]:
    """Make a producer's span the current one within the block: what is emitted there carries it."""
    ours = tracer()
    if ours is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    names = set(channels())
    attributes: dict[str, Any] = _of(caller, "send", names.pop() if len(names) == 1 else None)
    if count != 1:
        attributes["messaging.batch.message_count"] = count
    destination = attributes.get("messaging.destination.name")
    name = f"send {destination}" if destination else "send"
    # What is raised here is told by its type alone: the database's error would quote what was to be emitted.
    with ours.start_as_current_span(
        name, kind=SpanKind.PRODUCER, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield
        except BaseException as exc:
            _failed(span, exc)
            raise


def continued(
    context: Mapping[str, Any] | None, ours: Tracer | None = None, told: Callable[[], Told] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Go on with the writer's trace within the block, in a consumer's span of `ours` where `told` says what of."""
    if ours is None and (not context or "opentelemetry.trace" not in sys.modules):
        return _NOTHING
    parent = extracted(context)
    return _NOTHING if ours is None and parent is None else _continuing(parent, ours, told)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _continuing(parent: Any, ours: Tracer | None, told: Callable[[], Told] | None) -> Iterator[None]:
    from opentelemetry import context as current

    token = None if parent is None else current.attach(parent)
    try:
        if ours is None or told is None:
            yield
        else:
            with _consuming(ours, told()):
                yield
    finally:
        if token is not None:
            current.detach(token)


def extracted(context: Mapping[str, Any] | None) -> Any:
    """Return the trace that a notification's context carries; None for none."""
    if not isinstance(context, Mapping) or TRACEPARENT not in context:
        return None
    from opentelemetry import propagate

    return propagate.extract(context)


def headers_of(context: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the trace that a notification's context carries, as the headers of a task's message.

    Instrumentation of Celery reads them in a worker; who publishes need not have OpenTelemetry.
    """
    if not isinstance(context, Mapping):
        return {}
    return {name: context[name] for name in (TRACEPARENT, TRACESTATE) if isinstance(context.get(name), str)}


def of_notification(operation: str, channel: str, listener: str, id: int | None) -> dict[str, Any]:
    """Return what our spans say of a notification, by OpenTelemetry's conventions for messaging."""
    attributes = _of(operation, "process" if operation == "process" else "send", channel)
    attributes["messaging.destination.subscription.name"] = listener
    if id:
        attributes["messaging.message.id"] = str(id)
    return attributes


@contextlib.contextmanager
def _consuming(ours: Tracer, told: Told) -> Iterator[None]:
    from opentelemetry.trace import Link, SpanKind, get_current_span

    spans = (get_current_span(found).get_span_context() for found in map(extracted, told.links) if found is not None)
    links = [Link(one) for one in spans]
    with ours.start_as_current_span(
        told.name,
        kind=SpanKind.CONSUMER,
        attributes=told.attributes,
        links=links,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except TaskPredicate as exc:  # Retry, Ignore, Reject: what a listener says, not what went wrong with it
            span.set_attribute("pgpubsub.ended_by", type(exc).__name__)
            raise
        except BaseException as exc:
            # Not by record_exception, whose traceback has the messages of all causes: a database's may quote values.
            span.add_event(
                "exception",
                {
                    "exception.type": type(exc).__qualname__,
                    "exception.message": told.error(exc),
                    "exception.stacktrace": "".join(traceback.format_tb(exc.__traceback__)),
                },
            )
            _failed(span, exc)
            raise


def _failed(span: Span, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, type(error).__qualname__))


def _of(operation: str, kind: str, channel: str | None) -> dict[str, Any]:
    attributes = {
        "messaging.system": SYSTEM,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
    }
    return attributes if channel is None else {**attributes, "messaging.destination.name": channel}
