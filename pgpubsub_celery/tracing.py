"""The trace of a writer, carried to the listeners of what it emits.

Owns what OpenTelemetry's propagators put into a notification's context (`traceparent`, `tracestate`, …) and how a run
continues from there. Does nothing, and imports nothing, in a process that does not use OpenTelemetry.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

TRACEPARENT = "traceparent"
"""The W3C's name for which span of which trace caused something."""


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
def continued(context: Mapping[str, Any] | None) -> Iterator[None]:
    """Make the writer's span the current one's parent, within the block."""
    if not isinstance(context, Mapping) or TRACEPARENT not in context or "opentelemetry.trace" not in sys.modules:
        yield
        return
    from opentelemetry import context as current
    from opentelemetry import propagate

    token = current.attach(propagate.extract(context))
    try:
        yield
    finally:
        current.detach(token)
