"""(g) Backlogs of a thousand, a hundred thousand, five million: what does a claim cost, and how fast does it go?

The rows are put into the table by one statement. A claim is committed, and its rows go, as they do when workers finish;
so that small backlogs are filled up again, and each claim finds the table as large as it is said to be.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection

from sqlalchemy import Connection, create_engine

from bench.ground import Ground, Stage
from bench.processes import MeasurementError
from bench.results import Outcome
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.scenarios.drain import LIMIT, pgqueuer_of
from bench.systems import System, ours, pgqueuer
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.store import Quota, Store

CLAIM = "claim of 500"
CHUNK = 500_000

_FILL = """
INSERT INTO pgpubsub_notification (channel, subscription, operation, payload)
SELECT s.channel, s.id, 'message', jsonb_build_object('number', g)
FROM pgpubsub_subscription s, generate_series(1, %s) g WHERE s.listener LIKE %s
"""


def claim_of(waiting: int) -> str:
    """Return what the figure of a claim is called."""
    return f"{CLAIM}, {waiting:,} waiting"


def drain_of(waiting: int) -> str:
    """Return what the figure of a drain is called."""
    return f"drain of {waiting:,}"


def fill(stage: Stage, count: int, listener: str = "%work") -> None:
    """Store `count` notifications for a listener, in chunks."""
    for first in range(0, count, CHUNK):
        stage.execute(_FILL, min(CHUNK, count - first), listener)


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Claim from each backlog; drain those that a system drains in reasonable time."""
    record = Recorder("backlog")
    for waiting in scale.waiting:
        with record.measuring(OURS, claim_of(waiting)):
            _claims(ground, scale, record, waiting)
    for waiting in scale.drained:
        _drain(ground, scale, record, OURS, ours.variant("work"), waiting)
        if "pgqueuer" in peers:
            _drain(ground, scale, record, pgqueuer_of(500, 1), pgqueuer.batched(500), waiting)
    return record.outcome


def _claims(ground: Ground, scale: Scale, record: Recorder, waiting: int) -> None:
    with ours.variant("work").staged(ground, consumers=False) as staged:
        stage = staged.stage
        settings = Settings()
        store = Store(settings.schema)
        subscription = stage.scalar("SELECT id FROM pgpubsub_subscription WHERE listener LIKE %s", "%work")
        engine = create_engine(sync_url(stage.url), isolation_level="AUTOCOMMIT")
        milliseconds = []
        with contextlib.closing(engine.connect()) as connection:
            for round_number in range(scale.claims + 2):
                # The table keeps its size within a hundredth; the smallest is made anew.
                if round_number == 0 or waiting < 100 * settings.batch_size:
                    stage.execute("TRUNCATE pgpubsub_notification")
                    fill(stage, waiting)
                    stage.execute("VACUUM (ANALYZE) pgpubsub_notification")
                    stage.execute("CHECKPOINT")
                milliseconds.append(_claim(store, connection, settings, subscription))
        engine.dispose()
        # The first two meet cold caches and plans.
        record.add(claim_of(waiting), OURS, "ms", milliseconds[2:])


def _claim(store: Store, connection: Connection, settings: Settings, subscription: int) -> float:
    quota = Quota(
        subscription=subscription, limit=settings.batch_size, lease=settings.lease, lease_max=settings.lease_max
    )
    begin = time.perf_counter()
    claim = store.claim(connection, [quota], batch_size=settings.batch_size, max_starts=settings.max_starts)
    took = 1000 * (time.perf_counter() - begin)
    if len(claim.rows) != settings.batch_size:
        raise MeasurementError(f"a claim found {len(claim.rows)} rows, not {settings.batch_size}")
    connection.exec_driver_sql(
        "DELETE FROM pgpubsub_notification WHERE id = ANY(%s)", ([row.id for row in claim.rows],)
    )
    return took


def _drain(ground: Ground, scale: Scale, record: Recorder, title: str, contestant: System, waiting: int) -> None:
    with record.measuring(title, drain_of(waiting)), contestant.staged(ground) as staged:
        staged.drain(2_000, within=LIMIT)
        rates = [waiting / staged.drain(waiting, within=LIMIT) for _ in range(scale.repeats)]
        record.add(drain_of(waiting), title, "tasks/s", rates)
