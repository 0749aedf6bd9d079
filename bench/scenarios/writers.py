"""(b) Single-row transactions, one writer and eight, while somebody listens: what do commits cost?

Where a trigger does the work, pgbench writes: it costs next to nothing, so that the server is what is measured. Our
trigger is compared with itself: with its doorbell, with one that never rings, with one that always does. Where users
call a function, their processes write, with the call and without it. Rounds are in turns, so that whatever else the
machine does falls on all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from bench.applications.given import INSERT
from bench.ground import Ground
from bench.results import Outcome
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.systems import Staged, System, django_pgpubsub, ours, system
from bench.systems.bare import SYSTEM as BARE

STORES = "our trigger, stores only, nobody drains"
STORES_AND_NOTIFIES = "a statement trigger by hand, stores and sends NOTIFY"
DRAINED = f"{OURS}, bridge drains all"
STORES_DRAINED = "our trigger, stores only, bridge drains all"
NOTIFIES_DRAINED = "our trigger, always sends NOTIFY, bridge drains all"
PLAIN = "the transaction alone"

CALLERS = ("plain_celery", "on_commit", "celery_outbox", "procrastinate", "pgqueuer")
"""Peers without a trigger."""

ONE = INSERT.replace("%s", "1")

BY_HAND = """
CREATE TABLE stored (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload jsonb, created_at timestamptz DEFAULT now()
);
CREATE FUNCTION store_and_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO stored (payload) SELECT to_jsonb(c) FROM changed c;
    PERFORM pg_notify('stored', '');
    RETURN NULL;
END $$;
CREATE TRIGGER store_and_notify AFTER INSERT ON item REFERENCING NEW TABLE AS changed FOR EACH STATEMENT
    EXECUTE FUNCTION store_and_notify()
"""
"""As one would write it without this package. With somebody who listens, or NOTIFY would cost nothing."""

RING = """
DO $do$ DECLARE
    changed regproc;
    before text;
    after text;
BEGIN
    FOR changed IN SELECT DISTINCT t.tgfoid FROM pg_trigger t WHERE t.tgrelid = 'item'::regclass LOOP
        before := pg_get_functiondef(changed);
        after := regexp_replace(before, 'PERFORM CASE.*\\) door;', $$%s$$);
        IF after = before THEN
            RAISE EXCEPTION 'the doorbell of %% is not where it was', changed;
        END IF;
        EXECUTE after;
    END LOOP;
END $do$
"""
"""Another doorbell in the triggers' functions."""
SILENT = RING % ""
ALWAYS = RING % (
    "PERFORM pg_notify(c.listen_name, '') FROM public.pgpubsub_channel c WHERE c.name = ANY (emitted.names);"
)

_WAITING = {"procrastinate_jobs": "status = 'todo'", "pgqueuer": "status = 'queued'", "celery_outbox": "true"}
"""Where peers store what nobody has begun."""


def measure_of(writers: int) -> str:
    """Return what is measured, for so many writers."""
    return f"{writers} writer{'' if writers == 1 else 's'}"


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure triggers with pgbench, and calls with their own processes."""
    record = Recorder("writers")
    _triggers(ground, scale, peers, record)
    # The guard is about triggers.
    for name in CALLERS if scale.name != "quick" else ():
        if name in peers:
            with record.measuring(system(name).name):
                _calls(ground, scale, system(name), record)
    return record.outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trigger:
    title: str
    system: System
    ddl: str = ""
    """What is changed after its preparation."""
    bridge: Sequence[str] = ()
    """The command of the bridge that drains what is written."""
    listener: bool = False
    """Whether the system's own consumers listen."""


def _contestants(scale: Scale, peers: Collection[str]) -> list[_Trigger]:
    drained = dataclasses.replace(ours.variant("drained"), consumers=[])
    bridge = ours.bridge("drained")
    # One that nobody rings has to look by itself.
    looking = [*bridge, "--poll-interval", "0.1"]
    found = [
        _Trigger(title=STORES_DRAINED, system=drained, ddl=SILENT, bridge=looking),
        _Trigger(title=NOTIFIES_DRAINED, system=drained, ddl=ALWAYS, bridge=bridge),
        _Trigger(title=DRAINED, system=drained, bridge=bridge),
    ]
    if scale.name == "quick":
        return found
    alone = [
        _Trigger(title=BARE.name, system=BARE),
        _Trigger(title=STORES, system=drained, ddl=SILENT),
        _Trigger(title=STORES_AND_NOTIFIES, system=BARE, ddl=BY_HAND),
    ]
    if "django_pgpubsub" in peers:
        peer = django_pgpubsub.SYSTEM
        alone.append(_Trigger(title=peer.name, system=peer, listener=True))
    return [*alone, *found]


def _triggers(ground: Ground, scale: Scale, peers: Collection[str], record: Recorder) -> None:
    contestants = _contestants(scale, peers)
    with contextlib.ExitStack() as stack:
        staged: dict[str, Staged] = {}
        for one in contestants:
            with record.measuring(one.title):
                staged[one.title] = stack.enter_context(one.system.staged(ground, consumers=False))
                if one.ddl:
                    staged[one.title].stage.execute(one.ddl)
        for writers in scale.writers:
            rates: dict[str, list[float]] = {title: [] for title in staged}
            left: dict[str, list[float]] = {title: [] for title in staged}
            for _ in range(scale.repeats):
                for one in contestants:
                    if one.title in staged and not record.failed(one.title):
                        with record.measuring(one.title):
                            rate, share = _write(staged[one.title], one, writers, scale.writer_seconds)
                            rates[one.title].append(rate)
                            left[one.title].append(share)
            for one in contestants:
                if rates.get(one.title):
                    share = 100 * max(left[one.title])
                    note = f"at most {share:.0f} % not drained yet when the writers stopped" if one.bridge else ""
                    record.add(measure_of(writers), one.title, "commits/s", rates[one.title], note)


def _write(staged: Staged, one: _Trigger, writers: int, seconds: float) -> tuple[float, float]:
    """Return commits a second, and which share of what was written was not yet drained at the end."""
    stage = staged.stage
    share = 0.0
    try:
        if one.listener:
            staged.start_consumers()
        if one.bridge:
            staged.start_listening(one.bridge)
        with emptied(stage.broker), stage.listening("stored"):
            rate = stage.pgbench(ONE, writers=writers, seconds=seconds)
            if one.bridge:
                left = stage.scalar("SELECT count(*) FROM pgpubsub_notification")
                share = left / stage.scalar("SELECT greatest(1, count(*)) FROM item")
                staged.wait_until_finished()
    finally:
        # What is left to do must not be done while others are measured.
        staged.stop_consumers()
    stage.truncate("item", "pgpubsub_notification", "stored")
    return rate, share


def _calls(ground: Ground, scale: Scale, contestant: System, record: Recorder) -> None:
    with contestant.staged(ground) as staged:
        applications = [staged.stage.application(contestant.application) for _ in range(max(scale.writers))]
        for application in applications:
            application.call("write_plain", 0)
        for writers in scale.writers:
            rates: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(scale.repeats):
                for plain in (True, False):
                    for application in applications[:writers]:
                        application.tell("hammered", scale.writer_seconds, plain)
                    answers = [application.answer() for application in applications[:writers]]
                    rates[plain].append(sum(count / seconds for count, seconds in answers))
                    _discard(staged)
            record.add(measure_of(writers), f"{contestant.name}: {PLAIN}", "commits/s", rates[True])
            record.add(measure_of(writers), contestant.name, "commits/s", rates[False])


def _discard(staged: Staged) -> None:
    """Take away what was written, so that workers do not work on it while the next is measured."""
    stage = staged.stage
    for table, condition in _WAITING.items():
        if stage.has(table):
            stage.execute(f"DELETE FROM {table} WHERE {condition}")
    stage.broker.delete("celery")
    staged.wait_until_finished()
    stage.truncate("item")


@contextlib.contextmanager
def emptied(broker: Any) -> Iterator[None]:
    """A consumer without any work: whatever comes into the broker goes, ten times a second."""
    stopping = threading.Event()

    def empty() -> None:
        while not stopping.wait(0.1):
            broker.delete("celery")

    thread = threading.Thread(target=empty, name="emptying", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
