"""Listeners without `session`: running under an owner token and a heartbeat, with no transaction open meanwhile.

Owns the taking of such rows, the settling of each run as it ends, and what a listener's own acknowledgement means. If a
worker dies, the lease that nobody renews gives its rows back: they run at least once.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pgpubsub_celery import announcements, runs
from pgpubsub_celery.channels import TriggerChannel
from pgpubsub_celery.delivery import Arguments, Delivery, Part, halves
from pgpubsub_celery.errors import LeaseLostError, TransactionEndedError
from pgpubsub_celery.runs import DONE, FAILED, RETRY, SPLIT, BatchRun, Run
from pgpubsub_celery.store import Taken

logger = logging.getLogger(__name__)


class OwnedDelivery(Delivery):
    """For listeners without `session`: running under an owner token, each acknowledged as it finishes."""

    def _run_all(self) -> None:
        owner = uuid.uuid4()
        lease = self.listener.channel.lease or self.runtime.settings.lease
        rows = self.begin(lambda: self._take(owner, lease))
        announcements.dropped(self.listener, self.envelope.ids, (row.id for row in rows))
        # If we die after this, the lease gives the rows back; their starts say that a run began.
        if not rows:
            return
        self.runtime.heartbeat.add([row.id for row in rows], owner, lease)
        # Every row that is not settled yet, or cannot be run.
        left = [row.id for row in rows]
        try:
            in_turn = self._in_turn(rows)
            parts = self.parts(in_turn, self._decode_all(in_turn))
            while parts:
                part, _ = self.unblocked(parts.pop(0))
                run = None if part is None else self._run_part(part, owner, left)
                if part is None or run is None:
                    continue
                if run.outcome == SPLIT:
                    parts = [*halves(part), *parts]
                elif isinstance(run.error, SoftTimeLimitExceeded):
                    break
        finally:
            for row in rows:
                self.runtime.heartbeat.remove(row.id)
            if left:
                self._settle(lambda connection: self._release(connection, left, owner, started=1))
                announcements.ended(self.listener, [], left)

    def _take(self, owner: uuid.UUID, lease: float) -> list[Taken]:
        with self.runtime.autocommit() as connection:
            return self.store.take_owned(connection, self.envelope.ids, self.envelope.dispatches, owner, lease)

    def _in_turn(self, rows: Sequence[Taken]) -> Sequence[Taken]:
        if not self.ordered or len(rows) == len(self.envelope.ids):
            return rows
        with self.runtime.autocommit() as connection:
            return self.in_turn(connection, self.envelope.ids, rows)[0]

    def _decode_all(self, rows: Sequence[Taken]) -> list[Arguments]:
        if not issubclass(self.listener.channel, TriggerChannel):
            return self.decode_messages(rows)
        with self.runtime.connect() as connection:
            return self.decode(rows, connection)

    def _run_part(self, part: Part, owner: uuid.UUID, left: list[int]) -> Run | None:
        """Run a part and settle it, but for what is to be run in halves; its rows are not `left` from then on."""
        rows, arguments = part
        if not self.wants(rows[0]):
            left.remove(rows[0].id)
            self._settle(lambda connection: self._release(connection, [rows[0].id], owner, started=1))
            announcements.ended(self.listener, [], [rows[0].id])
            self.block(rows)
            return None
        run = self.make_run(rows, self._invoke)
        acknowledged = {row.id: _Acknowledged(self, row, owner) for row in rows}
        if isinstance(run, BatchRun):
            run.acknowledges = lambda row: acknowledged[row.id].acknowledge
        else:
            run.acknowledge = acknowledged[rows[0].id].acknowledge
        run.is_transient = lambda exc: not self.single and isinstance(exc, SoftTimeLimitExceeded)
        if len(rows) == 1:
            left.remove(rows[0].id)
        self.trace(run, arguments)
        self.count(run)
        if run.outcome == SPLIT:
            return run
        for row in rows:
            self.runtime.heartbeat.remove(row.id)
        if len(rows) > 1:
            left[:] = [id for id in left if id not in acknowledged]
        if self._settle(lambda connection: self._write(connection, run, owner, acknowledged)):
            self.note_end(run)
        else:
            self.block(rows)
        return run

    def _invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        run = runs.current_run()
        assert run is not None
        return call(**kwargs, **run.injected())

    def _write(
        self, connection: Connection, run: Run, owner: uuid.UUID, acknowledged: Mapping[int, _Acknowledged]
    ) -> None:
        asked = [id for id in run.ids if acknowledged[id].asked]
        # The others were committed by the listener, or lost: then its own commit was refused.
        unkept = [id for id in asked if self.store.is_owned(connection, id, owner)]
        if unkept and run.outcome == DONE:
            run.outcome = FAILED
            run.error = TransactionEndedError(
                "notification.acknowledge(session) was called, but the session was not committed: commit it before "
                "the listener returns."
            )
        ids = [id for id in run.ids if id in unkept or id not in asked]
        if not ids:
            announcements.ended(self.listener, [run])
            return
        if run.outcome == DONE:
            rings = self.listener.channel.name() if self.ordered else None
            ours = self.store.acknowledge_all_owned(connection, ids, owner, rings=rings) == len(ids)
        elif run.outcome == RETRY:
            ours = self.write_retry(connection, run, owner)
            self.runtime.ring(connection, [run.taken.channel])
        elif run.outcome == FAILED:
            ours = self.write_failure(connection, run, owner, ids)
            if self.frees_by_failing:
                self.runtime.ring(connection, [self.listener.channel.name()])
        else:
            ours = self._release(connection, ids, owner, started=1)
        if ours:
            announcements.ended(self.listener, [run])
        else:
            self.block(run.rows)
            logger.warning(
                "Notification %s of %s: its lease was lost while it ran (outcome: %s); it was given to another worker",
                ", ".join(map(str, ids)),
                run.taken.channel,
                run.outcome,
                extra=run.told_ids(),
            )

    def _release(self, connection: Connection, ids: Sequence[int], owner: uuid.UUID, *, started: int) -> bool:
        released = self.store.release_owned(connection, ids, owner, started=started, delay=self.release_delay())
        self.runtime.ring(connection, [self.listener.channel.name()])
        return bool(released)

    def _settle(self, write: Callable[[Connection], object]) -> bool:
        # If we die before this, the listener has run and the lease gives the row back: it runs again (at least once).
        for attempt in (1, 2):
            try:
                with self.runtime.autocommit() as connection:
                    write(connection)
                return True
            except DBAPIError as exc:
                # The pool may have held a connection that died meanwhile; the second one is new.
                if attempt == 2 or not exc.connection_invalidated:
                    logger.warning("Settling a notification failed; its lease gives it back: %s", exc.orig)
                    return False
        return False


class _Acknowledged:
    """Whether and how a listener acknowledged its notification itself."""

    def __init__(self, delivery: OwnedDelivery, row: Taken, owner: uuid.UUID) -> None:
        self._delivery = delivery
        self._row = row
        self._owner = owner
        self.asked = False

    def acknowledge(self, session: Session) -> None:
        delivery = self._delivery
        rings = delivery.listener.channel.name() if delivery.ordered else None
        deleted = delivery.store.acknowledge_owned(session.connection(), self._row.id, self._owner, rings=rings)
        if not deleted:
            raise LeaseLostError(
                f"Notification {self._row.id} is no longer this worker's: its lease ran out and it was given to "
                "another. "
                "Roll back; the other one does the work."
            )
        self.asked = True
        # The open transaction locks the row: a heartbeat would only skip it.
        self._delivery.runtime.heartbeat.remove(self._row.id)
