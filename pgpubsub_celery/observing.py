"""A bridge as others see it: what its processes tell of themselves, and what their supervisor makes of it.

Owns the two ends of health and metrics in `listen`: `observed`, around the bridge in each process, and `watching`, for
the process above them. With neither port nor file asked for there is nothing of it: no receiver, no thread, no signal.
Nor is there of traces, where the application has set no tracer provider.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from pgpubsub_celery import metrics, tracing
from pgpubsub_celery.beats import Beats
from pgpubsub_celery.gauges import Reader
from pgpubsub_celery.settings import Settings
from pgpubsub_celery.spans import DispatchSpans
from pgpubsub_celery.supervisor import Control, Page, State, Watching


@contextlib.contextmanager
def observed(control: Control, settings: Settings) -> Iterator[None]:
    """Tell the supervisor, within the block, that the bridge lives and what it does."""
    with contextlib.ExitStack() as stack:
        tracer = tracing.tracer()
        if tracer is not None:
            stack.enter_context(DispatchSpans(tracer, settings.schema))
        if control.watched:
            stack.enter_context(Beats(control, settings))
        if control.watched and settings.health_port is not None and metrics.available():
            tally = metrics.Tally(metrics.LAGS)

            def flush() -> None:
                taken = tally.take()
                if taken is not None and not control.tell(taken):
                    tally.merge(taken)

            stack.enter_context(metrics.Meter(tally, flush))
            if control.index == 0:
                # One is enough: all would read the same.
                Reader(settings, tally, flush, control.stopping).start()
        yield


def watching(settings: Settings) -> Watching | None:
    """Return what the supervisor is to show; None for nothing."""
    if settings.health_port is None and settings.health_file is None:
        return None
    totals = metrics.Tally(metrics.LAGS)
    collector = metrics.Collector(totals)

    def page(states: Sequence[State]) -> Page:
        collector.states = states
        return metrics.page(collector)

    return Watching(
        host=settings.health_host,
        port=settings.health_port,
        file=settings.health_file,
        pages={"/metrics": page},
        told=lambda _, message: totals.merge(message),
    )
