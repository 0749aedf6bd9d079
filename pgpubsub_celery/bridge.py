"""The bridge: wake, claim, build, publish, settle, and wait for what comes next.

Owns the life of one listening process from its first connection to its last batch: starting (what was stored before is
held or recovered), being awake, falling asleep, outages of Postgres and of the broker. Holds no state that matters:
killed at any line, its leases run out and another bridge goes on. Never runs a listener and never reads a payload that
a message need not carry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from celery import Celery
from sqlalchemy.exc import DBAPIError, ProgrammingError

from pgpubsub_celery import announcements, drift, filters, signals, subscriptions
from pgpubsub_celery.apps import load_app
from pgpubsub_celery.broker import Broker
from pgpubsub_celery.channels import Channel, select_channels
from pgpubsub_celery.claims import Claims
from pgpubsub_celery.dispatch import Batch, Dispatcher, Standing
from pgpubsub_celery.drivers import sqlstate
from pgpubsub_celery.emit import EnqueuedTask
from pgpubsub_celery.errors import ConnectionLostError, NotInstalledError, PgPubSubError, ReadOnlyDatabaseError
from pgpubsub_celery.keyed import KeyedClaim
from pgpubsub_celery.listeners import Listener, registered_listeners
from pgpubsub_celery.logs import configure_logging
from pgpubsub_celery.observing import observed
from pgpubsub_celery.pacing import Backoff
from pgpubsub_celery.runs import one_line
from pgpubsub_celery.schema import VERSION
from pgpubsub_celery.settings import Settings, sync_url
from pgpubsub_celery.wakeups import Link, bridge_engine
from pgpubsub_celery.watch import MOMENT, Looked, Watch

if TYPE_CHECKING:
    from pgpubsub_celery.store import Claim
    from pgpubsub_celery.supervisor import Control

logger = logging.getLogger(__name__)

MEASURE_SECONDS = 0.25
"""How often a bridge that is publishing looks how long listeners' runs take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """What `listen` was asked for; picklable, and handed to each process through a pipe."""

    app: str
    channels: tuple[str, ...] = ()
    """Module paths; empty for all that are registered."""
    recover: str | None = None
    """None, "all" (held and failed) or "waiting" (held)."""
    resume: bool = False
    """This follows a process that has listened, and was its supervisor, too: nothing is stored "before" it."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """Settings given as options; they go before environment and Celery configuration."""
    loglevel: str = "info"
    logformat: str | None = None


def prepare(options: ListenOptions) -> None:
    """Configure logging in a process that is going to listen, or to supervise those that do."""
    configure_logging(options.loglevel, options.logformat)


def run(control: Control, options: ListenOptions) -> None:
    """Listen until asked to stop: what the supervisor runs in each process.

    Raises:
        PgPubSubError: the application, a channel or a setting cannot be used.
    """
    app = load_app(options.app)
    settings = Settings.load(app.conf, **options.settings)
    control.replacement = control.replacement or options.resume
    channels = select_channels(options.channels, settings.database)
    with observed(control, settings):
        Bridge(app, settings, channels, control, recover=options.recover).run()


class Bridge:
    """One listening process."""

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        channels: Sequence[type[Channel]],
        control: Control,
        *,
        recover: str | None = None,
    ) -> None:
        """Describe it; nothing happens before `run`. `channels` without stored ones are heard, never recovered."""
        self._app = app
        self._settings = settings
        self._control = control
        self._recover = recover
        self._stored = [channel for channel in channels if channel.lock_notifications]
        self._unstored = [channel for channel in channels if not channel.lock_notifications]
        self._claims = Claims(settings)
        self._broker = Broker(app, timeout=settings.publish_timeout)
        self._database_trouble = _Trouble("database", control.index)
        self._broker_trouble = _Trouble("broker", control.index)
        # A process that follows one which has listened must hold nothing back: the boundary was that one's start.
        self._began = control.replacement
        self._connected = False
        self._measure_at = float("-inf")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pgpubsub-publish")
        self._batch: Batch | None = None
        self._outage: BaseException | None = None

    def run(self) -> None:
        """Listen until the control says stop; reconnect for as long as that takes."""
        url = self._settings.require_database_url()
        # Who gives a URL to listen at does so because the other goes through a pooler.
        pooled = self._settings.listen_url is not None
        listen_url = url if self._settings.listen_url is None else sync_url(self._settings.listen_url)
        engine, listen_engine = bridge_engine(url), bridge_engine(listen_url, names_itself=True)
        try:
            while not self._control.stopping.is_set():
                try:
                    with Link(engine, listen_engine, self._settings.schema, pooled=pooled) as link:
                        self._serve(link)
                except (ConnectionLostError, NotInstalledError, ReadOnlyDatabaseError) as exc:
                    self._database_trouble.met(exc, self._control)
                except DBAPIError as exc:
                    if not _is_outage(exc):
                        raise
                    self._database_trouble.met(exc, self._control)
                finally:
                    self._forget()
            signals.bridge_stopped.send(self._control.index)
        finally:
            self._thread.shutdown()
            self._broker.close()

    def _serve(self, link: Link) -> None:
        link.require_primary()
        installation = link.require_installed(VERSION)
        # It listens before it looks, so that nothing falls between.
        link.listen([channel.listen_safe_name() for channel in (*self._stored, *self._unstored)])
        listeners = self._subscribe(link)
        if not self._began:
            self._look_at_triggers(link)
        self._claims.serve(self._conditions(link, listeners))
        dispatcher = Dispatcher(self._app, self._claims.store, self._broker, installation, self._settings)
        dispatcher.know(listeners)
        self._start(link, listeners)
        self._database_trouble.over()
        self._control.ready()
        signals.bridge_connected.send(self._control.index, again=self._connected)
        self._connected = True
        Watch(self, link, dispatcher, listeners).run()

    def _subscribe(self, link: Link) -> dict[int, Listener]:
        wanted = {channel.name() for channel in self._stored}
        mine = [listener for listener in registered_listeners() if listener.channel.name() in wanted]
        return subscriptions.register(link.claims, self._settings.schema, mine)

    def _look_at_triggers(self, link: Link) -> None:
        """Say which triggers and keys are missing or out of date: what they miss is stored nowhere, or in no order."""
        try:
            channels = [*self._stored, *self._unstored]
            found = drift.trigger_differences(link.claims, link.names, channels)
            found += drift.key_differences(link.claims, link.names, channels)
        except ProgrammingError as exc:  # a role that may not look at the tables' schema
            logger.debug("triggers are not looked at: %s", one_line(exc))
            return
        except PgPubSubError as exc:  # what install would refuse
            logger.warning("triggers are not looked at: %s", exc)
            return
        for what in found:
            logger.warning("%s: run `pgpubsub-bridge install`, or migrate", what)

    def _conditions(self, link: Link, listeners: Mapping[int, Listener]) -> Mapping[int, str]:
        """Return what is this bridge's: what does not meet it is left to others."""
        conditions = filters.conditions(listeners, self._settings.listener_filter)
        filters.check(link.claims, link.names, conditions, listeners)
        return conditions

    def _start(self, link: Link, listeners: Mapping[int, Listener]) -> None:
        """Hold or recover what was stored before, and say so; then say that it listens."""
        self._claims.store.adopt(link.claims, list(listeners))
        held = 0
        for channel in self._stored:
            mine = [id for id, listener in listeners.items() if listener.channel is channel]
            first = link.first_alive(channel.name())
            if first and not self._began and self._recover is None and channel is not EnqueuedTask:
                held += self._claims.store.hold(link.claims, mine)
            link.announce(channel.name(), first=first)
        if held:
            logger.info(
                "held %d notification(s) stored before this: `listen --recover` (or `pgpubsub-bridge retry "
                "--state held`) "
                "takes them",
                held,
            )
        if self._recover is not None and not self._began:
            self._take_up(link, listeners)
        self._began = True
        names = [channel.name() for channel in (*self._stored, *self._unstored) if channel is not EnqueuedTask]
        logger.info("listening to %d channel(s): %s", len(names), ", ".join(names) or "none")

    def _take_up(self, link: Link, listeners: Mapping[int, Listener]) -> None:
        """Recover in batches, which several bridges may share."""
        recovered = 0
        # What fails while this goes on is not taken up again and again.
        before = self._claims.store.now(link.claims)
        while not self._control.stopping.is_set():
            batch = self._claims.store.recover(
                link.claims, list(listeners), failed=self._recover == "all", before=before
            )
            recovered += batch
            if not batch:
                break
        logger.info("recovered %d stored notification(s)", recovered)
        announcements.recovered(None, (), recovered)

    # One claim

    def claim_and_dispatch(self, link: Link, dispatcher: Dispatcher, listeners: Mapping[int, Listener]) -> Looked:
        """Claim what is due and publish it; the claim is committed before anything is published."""
        quotas = self._claims.quotas(listeners, dispatcher)
        # A broker that answers may still take nothing (its memory or disk is full): try it with one.
        batch_size = 1 if self._broker_trouble.since else self._settings.batch_size
        claim = self._claims.claim(link.claims, quotas, batch_size)
        now = time.monotonic()
        _tell(claim, link, listeners)
        # Those that were lost are counted in flight already.
        claimed = Counter(row.subscription for row in claim.rows if not row.was_lost)
        full = len(claim.rows) >= batch_size
        standings: dict[int, Standing] = {}
        limited, soon = False, float("inf")
        for quota in quotas:
            id, in_flight = quota.subscription, claim.in_flight.get(quota.subscription, 0)
            self._claims.paces[id].observe(in_flight, claimed[id], now)
            used_up = in_flight + claimed[id] >= quota.limit
            if used_up:
                limited, soon = True, min(soon, self._claims.paces[id].seconds_for(quota.limit / 3))
            standings[id] = Standing(in_flight=in_flight, more=full or used_up)
        try:
            self.finish(link, dispatcher)
        except BaseException:
            # What went wrong is the batch's before; what was claimed meanwhile need not wait for its lease.
            self._claims.store.release_unpublished(link.claims, [(row.id, row.dispatches) for row in claim.rows])
            raise
        if claim.rows:
            # Where the next claim follows at once, it need not wait for this to be published.
            overlaps = full and self._outage is None
            self._batch = dispatcher.begin(claim.rows, standings, self._thread if overlaps else None)
            if not overlaps:
                self.finish(link, dispatcher)
            if now >= self._measure_at:
                # For the batches to come: this one is not to wait for it.
                self._measure_at = now + MEASURE_SECONDS
                dispatcher.measured = self._claims.store.run_times(link.claims, list(listeners))
        outage, self._outage = self._outage, None
        if outage is None:
            self._broker_trouble.over()
        busy = isinstance(claim, KeyedClaim) and claim.busy
        return Looked(
            claimed=len(claim.rows),
            full=full,
            unfinished=isinstance(claim, KeyedClaim) and claim.unfinished,
            limited=limited or busy,
            soon=MOMENT if busy else soon,
            outage=outage,
            in_flight=claim.in_flight,
        )

    def finish(self, link: Link, dispatcher: Dispatcher) -> None:
        """Settle the batch that is being published, if any. The next look tells whether the broker took it."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        outcome = dispatcher.finish(link.claims, batch)
        logger.debug("published %d notification(s)", outcome.published)
        if outcome.outage is not None:
            # What was given back is before where the drain stood, and no worker has finished it.
            self._claims.begin_anew()
            for pace in self._claims.paces.values():
                pace.disregard()
            self._outage = self._outage or outcome.outage

    def _forget(self) -> None:
        """Wait for what a lost connection's thread is publishing: the leases settle it, or a worker already has."""
        batch, self._batch = self._batch, None
        if batch is not None:
            with contextlib.suppress(Exception):
                batch.outcomes()

    # What a watch needs

    @property
    def settings(self) -> Settings:
        """The settings."""
        return self._settings

    @property
    def control(self) -> Control:
        """The control."""
        return self._control

    @property
    def stored(self) -> list[str]:
        """The names of the stored channels."""
        return [channel.name() for channel in self._stored]

    def sweep(self, link: Link, listeners: Mapping[int, Listener]) -> None:
        """Do what need not be done at once: adopt what had no listener, drop failed rows past their retention."""
        self._claims.store.adopt(link.claims, list(listeners))
        self._claims.store.forget_run_times(link.claims)
        if self._settings.failed_retention is not None:
            pruned = self._claims.store.prune_failed(link.claims, list(listeners), self._settings.failed_retention)
            announcements.discarded(None, (), pruned)

    def next_due(self, link: Link, listeners: Mapping[int, Listener]) -> float | None:
        """Return the seconds until something is due, or None."""
        return self._claims.next_due(link.claims, listeners)

    def something_happened(self) -> None:
        """Note that what was looked at may have changed."""
        self._claims.something_happened()

    def ring_others(self, link: Link) -> None:
        """Tell the other bridges that there is more than one of them can take."""
        link.ring([channel.listen_safe_name() for channel in self._stored])

    def broker_works(self) -> bool:
        """Whether the broker can be reached; while it cannot, wait, and claim nothing."""
        if not self._broker_trouble.since:
            return True
        error = self._broker.reachable()
        if error is None:
            return True
        self._broker_trouble.met(error, self._control)
        return False

    def broker_failed(self, error: BaseException) -> None:
        """Say so once, and back off."""
        self._broker_trouble.met(error, self._control)

    def publish_unstored(self, dispatcher: Dispatcher, message: Mapping[str, Any]) -> None:
        """Publish a message that is not stored: at most once, to every listening process's listeners."""
        error = dispatcher.dispatch_unstored(message, self._unstored)
        if error is not None:
            logger.warning(
                "a message of the unstored channel %s is lost: %s",
                message.get("channel"),
                one_line(error),
                extra={"channel": message.get("channel")},
            )


def _tell(claim: Claim, link: Link, listeners: Mapping[int, Listener]) -> None:
    """Say what a claim has found that is out of the ordinary, and to signals what it has done."""
    announcements.claimed(listeners, claim.rows, link.claims)
    announcements.given_up(listeners, claim.given_up)
    if isinstance(claim, KeyedClaim) and claim.superseded:
        logger.debug("deleted %d notification(s): newer ones of their unique key wait", claim.superseded_count)
        announcements.superseded(listeners, claim.superseded)
    if claim.failed:
        logger.error(
            "failed %d notification(s): started and never finished, each time",
            claim.failed,
            extra={"notification_ids": [row.id for row in claim.given_up]},
        )
    if claim.lost:
        logger.warning(
            "publishing %d notification(s) again: their lease ran out or their run was lost",
            claim.lost,
            extra={"notification_ids": [row.id for row in claim.rows if row.was_lost]},
        )


class _Trouble:
    """An outage: said once, backed off from, said to be over once."""

    def __init__(self, what: str, index: int) -> None:
        self._what = what
        self._index = index
        self._backoff = Backoff()
        self.since: float | None = None

    def met(self, error: BaseException, control: Control) -> None:
        """Wait a while, or until asked to stop."""
        if self.since is None:
            self.since = time.monotonic()
            logger.error("%s unavailable, trying again until it is back: %s", self._what, one_line(error))
        seconds = self._backoff.next()
        signals.bridge_interrupted.send(self._index, what=self._what, error=one_line(error), seconds=seconds)
        control.stopping.wait(seconds)

    def over(self) -> None:
        """It works."""
        if self.since is not None:
            seconds = time.monotonic() - self.since
            logger.info("%s available again after %.1f s", self._what, seconds)
            signals.bridge_restored.send(self._index, what=self._what, seconds=seconds)
        self.since = None
        self._backoff.reset()


# Server-side ends of a connection, and a server that is starting, stopping or full.
_OUTAGE_STATES = ("08", "57P", "53", "25006")


def _is_outage(exc: DBAPIError) -> bool:
    state = sqlstate(exc)
    # Without a state it never reached a server, or lost it in the middle.
    return exc.connection_invalidated or state is None or state.startswith(_OUTAGE_STATES)
