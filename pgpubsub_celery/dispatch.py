"""From claimed rows to published messages, and back to the rows: build, publish, settle.

Owns what a bridge does with what it has claimed, and with messages that are not stored. Rows whose message the broker
has not confirmed are given back; those that can never be published are failed, and hold nobody up. Never claims and
never waits.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from celery import Celery
from celery.backends.base import DisabledBackend
from kombu import Producer
from sqlalchemy import Connection

from pgpubsub_celery import announcements, tracing
from pgpubsub_celery.broker import Broker, Publication
from pgpubsub_celery.bundles import Bundling
from pgpubsub_celery.channels import Channel
from pgpubsub_celery.emit import EnqueuedTask
from pgpubsub_celery.listeners import Listener, listeners_of
from pgpubsub_celery.messages import Address, Envelope, Message, build_messages
from pgpubsub_celery.publishing import Publisher
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.settings import DEFAULT_DATABASE, Settings
from pgpubsub_celery.signatures import publish_signature
from pgpubsub_celery.store import Claimed, Measured, Store

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Standing:
    """How one listener stood when some of its notifications were claimed."""

    in_flight: int = 0
    """Published before, and not finished."""
    more: bool = False
    """What was claimed is not all that is due."""


REFUSED_DELAY = 5.0
"""Seconds before a notification whose queue would not have it is published again."""

_NEW = Standing()


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What became of a batch."""

    published: int
    outage: BaseException | None
    """Why the broker did not take all of it, when that is the broker's doing."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one claim has become, published or about to be."""

    speaks_for: Sequence[list[tuple[int, int]]]
    """For each message its rows, as (id, dispatches)."""
    goes: Sequence[bool]
    """For each message whether its rows go once it is confirmed."""
    outcomes: Callable[[], list[BaseException | None]]
    """Returns what became of each message; publishes, or waits for the thread that does."""
    rows: Sequence[Claimed] = ()
    """What was claimed."""


class Dispatcher:
    """Publishes the notifications of the listeners that this process knows."""

    def __init__(self, app: Celery, store: Store, broker: Broker, installation: uuid.UUID, settings: Settings) -> None:
        self._app = app
        self._store = store
        self._broker = broker
        self._installation = installation
        self._settings = settings
        # As messages have been until there were several databases.
        self._database = None if settings.database == DEFAULT_DATABASE else settings.database
        # Used by the thread that publishes, which is one at a time.
        self._publisher = Publisher()
        self._listeners: Mapping[int, Listener] = {}
        self._bundlings: Mapping[int, Bundling] = {}
        self.measured: Mapping[int, Measured] = {}
        """How listeners' runs went lately, by subscription; set by the bridge."""

    def know(self, listeners: Mapping[int, Listener]) -> None:
        """Set the listeners, by subscription, that claimed rows can be for."""
        self._listeners = listeners
        self._bundlings = {id: bundling_of(listener, self._app, self._settings) for id, listener in listeners.items()}

    def run_of_a_key(self, id: int) -> int:
        """Return how many notifications of one ordering key may be claimed together: as many as a message carries."""
        return self._bundle(id, 1, Standing(more=True))

    def dispatch(
        self, connection: Connection, claimed: Sequence[Claimed], standings: Mapping[int, Standing] | None = None
    ) -> Dispatched:
        """Publish claimed rows and settle those that were not confirmed, or that go once they were."""
        return self.finish(connection, self.begin(claimed, standings))

    def begin(
        self,
        claimed: Sequence[Claimed],
        standings: Mapping[int, Standing] | None = None,
        thread: Executor | None = None,
    ) -> Batch:
        """Build the messages of claimed rows; with a `thread`, publish them there from now on, else in `finish`."""
        fresh = Counter(row.subscription for row in claimed if row.dispatches == 1)
        subscriptions = {row.subscription for row in claimed}
        addresses = {id: self._address(id, fresh[id], (standings or {}).get(id, _NEW)) for id in subscriptions}
        of_tasks = {id for id in subscriptions if self._listeners[id].channel is EnqueuedTask}
        enqueued = [row for row in claimed if row.subscription in of_tasks]
        others = [row for row in claimed if row.subscription not in of_tasks]
        messages = build_messages(others, addresses, self._installation, self._database)
        publications: list[Publication] = [functools.partial(_publish_enqueued, row) for row in enqueued]
        publications += [functools.partial(self._publisher.publish, message) for message in messages]
        speaks_for = [[(row.id, row.dispatches)] for row in enqueued] + [message.claimed for message in messages]
        goes = [True] * len(enqueued) + [bool(message.envelope.carried) for message in messages]
        # If we die after it has published, the messages are out and the lease stands: nothing is left to do but for
        # `goes`, whose rows come again and are published twice.
        publish = functools.partial(self._publish, publications)
        return Batch(speaks_for, goes, publish if thread is None else thread.submit(publish).result, claimed)

    def _publish(self, publications: Sequence[Publication]) -> list[BaseException | None]:
        self._publisher.begin()
        return self._broker.publish(publications)

    def finish(self, connection: Connection, batch: Batch) -> Dispatched:
        """Wait for a batch to be published, and settle it."""
        try:
            outcomes = batch.outcomes()
        except BaseException:
            claimed = [row for rows in batch.speaks_for for row in rows]
            self._store.release_unpublished(connection, claimed)
            raise
        return self._settle(connection, batch, outcomes)

    def dispatch_unstored(self, message: Mapping[str, Any], channels: Sequence[type[Channel]]) -> BaseException | None:
        """Publish one message that is not stored, to each of its channel's listeners; return why not, if not all."""
        if message.get("installation") != str(self._installation):
            return None  # another installation shares the database and the channel's name
        name = message.get("channel")
        carried = {key: message.get(key) for key in ("operation", "payload", "context", "created_at", "db_version")}
        publications: list[Publication] = []
        wanted: list[Listener] = []
        for channel in channels:
            if name not in (channel.name(), *channel.aliases):
                continue
            for listener in listeners_of(channel):
                # Its trigger has looked at the listeners' conditions.
                unwanted = listener.name in (message.get("unwanted") or ())
                if carried["operation"] in listener.operations and not unwanted:
                    envelope = Envelope(
                        installation=self._installation,
                        channel=channel.name(),
                        listener=listener.name,
                        carried=(carried,),
                        database=self._database,
                    )
                    one = Message(task=listener.name, task_id=str(uuid.uuid4()), envelope=envelope)
                    publications.append(functools.partial(self._publisher.publish, one))
                    wanted.append(listener)
        outcomes = self._publish(publications)
        for listener, outcome in zip(wanted, outcomes, strict=True):
            if outcome is None:
                announcements.unstored(listener, carried["created_at"])
        return next((outcome for outcome in outcomes if outcome is not None), None)

    def _address(self, id: int, rows: int, standing: Standing) -> Address:
        listener = self._listeners[id]
        return Address(
            channel=listener.channel.name(),
            listener=listener.name,
            task=listener.name,
            bundle=self._bundle(id, rows, standing),
            carries=listener.channel.acknowledge == "published",
        )

    def _bundle(self, id: int, rows: int, standing: Standing) -> int:
        measured = self.measured.get(id)
        return self._bundlings[id].size(
            rows,
            mean_seconds=None if measured is None else measured.mean_seconds,
            processes=0 if measured is None else measured.processes,
            in_flight=standing.in_flight,
            more=standing.more,
        )

    def _settle(
        self,
        connection: Connection,
        batch: Batch,
        outcomes: Sequence[BaseException | None],
    ) -> Dispatched:
        published_rows: list[list[tuple[int, int]]] = []
        confirmed: list[tuple[int, int]] = []
        unpublished: list[tuple[int, int]] = []
        refused: list[tuple[int, int]] = []
        outage: BaseException | None = None
        published = 0
        for rows, go, outcome in zip(batch.speaks_for, batch.goes, outcomes, strict=True):
            if outcome is None:
                published += len(rows)
                published_rows.append(rows)
                confirmed += rows if go else []
            elif self._broker.is_refusal(outcome):
                logger.warning(
                    "the broker has refused %d notification(s), trying again in %g s: %s",
                    len(rows),
                    REFUSED_DELAY,
                    one_line(outcome),
                )
                refused += rows
            elif self._broker.is_outage(outcome):
                outage = outage or outcome
                unpublished += rows
            else:
                self._fail(connection, rows, outcome)
                told = f"cannot be published: {one_line(outcome)}"
                announcements.unpublishable(self._listeners, batch.rows, [id for id, _ in rows], told)
        if confirmed:
            self._store.delete_published(connection, confirmed)
        if unpublished:
            self._store.release_unpublished(connection, unpublished)
        if refused:
            # Their queue's trouble, and no other's.
            self._store.release_unpublished(connection, refused, delay=REFUSED_DELAY)
        announcements.settled(
            self._listeners,
            batch.rows,
            published_rows,
            acknowledged=confirmed,
            unpublished=unpublished,
            refused=refused,
        )
        return Dispatched(published, outage)

    def _fail(self, connection: Connection, rows: Sequence[tuple[int, int]], error: BaseException) -> None:
        """Whatever is wrong with the message itself will be so the next time."""
        told = f"cannot be published: {one_line(error)}"
        for id, dispatches in rows:
            logger.error("Notification %s %s", id, told, extra={"notification_id": id})
            self._store.fail(connection, [id], owner=None, dispatches=dispatches, error=told, traceback=None)


def bundling_of(listener: Listener, app: Celery, settings: Settings) -> Bundling:
    """Return how a listener's notifications may be put together.

    Not at all, unless asked for, where each is a task of its own to somebody: with a result that is kept, a rate limit,
    or when the message itself is the record (`acknowledge="published"`).
    """
    if listener.batch is not None:
        return Bundling(most=listener.batch)
    bundle = listener.bundle
    if bundle is None:
        bundle = "auto" if listener.wants_session else 1
    if bundle != "auto":
        return Bundling(most=bundle)
    task = app.tasks.get(listener.name)
    if task is None or listener.channel.acknowledge == "published":
        return Bundling()
    kept = not task.ignore_result and not isinstance(app.backend, DisabledBackend)
    if kept or task.rate_limit:
        return Bundling()
    limits = (
        task.soft_time_limit,
        task.time_limit,
        app.conf.task_soft_time_limit,
        app.conf.task_time_limit,
    )
    return Bundling(
        most=settings.bundle_max,
        automatic=True,
        target=settings.bundle_target,
        time_limit=min((float(limit) for limit in limits if limit), default=None),
    )


def _publish_enqueued(row: Claimed, app: Celery, producer: Producer) -> None:
    with tracing.continued(row.context):
        publish_signature(row.payload, app, producer, tracing.headers_of(row.context))
