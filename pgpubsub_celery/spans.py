"""The bridge's part of a writer's trace: a span for each notification from its claim to the broker's confirmation.

Owns these spans, and the reading of which trace a claimed row belongs to, in one statement for each claim and listener.
Connected only in a process with a tracer provider; without one nothing is looked up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from pgpubsub_celery import signals, tracing
from pgpubsub_celery.schema import Names

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

REMEMBERED = 20_000
"""Claimed notifications of which nobody has said yet what became of them, at most."""

# By the primary key. Only what propagators have put there leaves the table.
_TRACES = """
SELECT n.id, (SELECT jsonb_object_agg(t.key, t.value) FROM jsonb_each_text(n.context) t
    WHERE t.key = ANY (CAST(:fields AS text[]))) AS carrier
FROM {n} n WHERE n.id = ANY (CAST(:ids AS bigint[])) AND jsonb_typeof(n.context) = 'object'
    AND jsonb_exists(n.context, :traceparent)
"""


class DispatchSpans:
    """Makes them while it is connected."""

    def __init__(self, tracer: Tracer, schema: str) -> None:
        self._tracer = tracer
        self._traces = text(_TRACES.format(n=Names(schema).notification))
        self._claimed: dict[int, tuple[Any, int]] = {}

    def __enter__(self) -> DispatchSpans:
        signals.notification_claimed.connect(self._on_claimed, weak=False)
        signals.notification_published.connect(self._on_published, weak=False)
        signals.notification_released.connect(self._on_released, weak=False)
        return self

    def __exit__(self, *_: object) -> None:
        signals.notification_claimed.disconnect(self._on_claimed)
        signals.notification_published.disconnect(self._on_published)
        signals.notification_released.disconnect(self._on_released)
        # A forked process ends without the interpreter's own goodbyes.
        from opentelemetry import trace

        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush is not None:
            flush()

    def _on_claimed(self, ids: Sequence[int], connection: Connection, **_: Any) -> None:
        from opentelemetry import propagate

        now = time.time_ns()
        fields = sorted({tracing.TRACEPARENT, *propagate.get_global_textmap().fields})
        parameters = {"ids": list(ids), "fields": fields, "traceparent": tracing.TRACEPARENT}
        try:
            rows = connection.execute(self._traces, parameters).all()
        except SQLAlchemyError as exc:  # the bridge meets it itself, and says so
            logger.debug("traces are not read: %s", type(exc).__name__)
            return
        if len(self._claimed) > REMEMBERED:
            self._claimed.clear()
        self._claimed.update((row.id, (tracing.extracted(row.carrier), now)) for row in rows)

    def _on_published(self, sender: str, channel: str, ids: Sequence[int], **_: Any) -> None:
        for id in ids:
            self._span(id, channel, sender, None)

    def _on_released(self, sender: str, channel: str, ids: Sequence[int], reason: str, **_: Any) -> None:
        for id in ids:
            self._span(id, channel, sender, reason)

    def _span(self, id: int, channel: str, listener: str, reason: str | None) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        context, began = self._claimed.pop(id, (None, 0))
        if context is None:
            return
        span = self._tracer.start_span(
            f"publish {channel}",
            context=context,
            kind=SpanKind.PRODUCER,
            attributes=tracing.of_notification("publish", channel, listener, id),
            start_time=began,
        )
        if reason is not None:
            span.set_status(Status(StatusCode.ERROR, reason))
        span.end()
