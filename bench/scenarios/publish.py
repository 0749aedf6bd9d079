"""(c) A backlog becomes messages in the broker, one for each: how many in a second?"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from bench.ground import Ground
from bench.processes import wait_until
from bench.results import Outcome
from bench.scale import Scale
from bench.scenarios import OURS, Recorder
from bench.systems import Staged, System, ours, system

MEASURE = "backlog to broker"
APPLY_ASYNC = "Celery apply_async"
TWO_PROCESSES = f"{OURS}, 2 processes"
ALONE = f"{OURS}, what is claimed already"
LIMIT = 120.0


def run(ground: Ground, scale: Scale, peers: Collection[str]) -> Outcome:
    """Measure the bridge beside loops and a relay; others have no broker."""
    record = Recorder("publish")
    if "plain_celery" in peers:
        _loops(ground, scale, record)
    sending = dataclasses.replace(ours.variant("sent"), consumers=[ours.bridge("sent")])
    count = scale.backlog // 2
    _backlog(ground, record, OURS, sending, count, scale.repeats, "claimed, one message for each, deleted")
    if scale.name == "full":
        both = dataclasses.replace(sending, consumers=[ours.bridge("sent", "--processes", "2")])
        _backlog(ground, record, TWO_PROCESSES, both, count, scale.repeats)
    _alone(ground, scale, record)
    if "on_commit" in peers:
        _backlog(ground, record, system("on_commit").name, system("on_commit"), scale.small_backlog, scale.repeats)
    if "celery_outbox" in peers:
        outbox = system("celery_outbox")
        _backlog(ground, record, outbox.name, outbox, scale.small_backlog, scale.repeats)
    return record.outcome


def _loops(ground: Ground, scale: Scale, record: Recorder) -> None:
    celery = system("plain_celery")
    count = scale.small_backlog
    with record.measuring(celery.name), celery.staged(ground, consumers=False) as staged:
        for title, action in ((celery.name, "publish_by_delay"), (APPLY_ASYNC, "publish")):
            staged.application.call(action, 100)
            rates = [count / staged.application.call(action, count) for _ in range(scale.repeats)]
            record.add(MEASURE, title, "messages/s", rates, f"{count:,} in a loop, one producer")


def _alone(ground: Ground, scale: Scale, record: Recorder) -> None:
    """What a bridge does with the broker, without what it does with Postgres."""
    with record.measuring(ALONE), ours.variant("sent").staged(ground, consumers=False) as staged:
        staged.application.call("publish", 100)
        count = scale.backlog // 2
        rates = [count / staged.application.call("publish", count) for _ in range(scale.repeats)]
        record.add(MEASURE, ALONE, "messages/s", rates, f"{count:,}, as a bridge publishes, without Postgres")


def _backlog(
    ground: Ground, record: Recorder, title: str, contestant: System, count: int, repeats: int, note: str = ""
) -> None:
    """Measure from the COMMIT that makes the backlog until the broker has a message for each."""
    # Whoever publishes is the first of the consumers; workers, which would take the messages away, stay out.
    publishers = [command for command in contestant.consumers if "worker" not in command]
    with record.measuring(title), contestant.staged(ground, consumers=False) as staged:
        stage = staged.stage
        staged.consumers = [stage.start(command) for command in publishers]
        _wait_until_it_publishes(staged)
        rates = []
        for _ in range(repeats):
            stage.broker.flushall()
            began = staged.application.call("backlog", count)
            ended = wait_until(
                lambda: stage.queued() >= count, "all is in the broker", within=LIMIT, alive=staged.consumers
            )
            rates.append(count / (ended - began))
        record.add(MEASURE, title, "messages/s", rates, f"{count:,}" + (f", {note}" if note else ""))


def _wait_until_it_publishes(staged: Staged) -> None:
    def tried() -> bool:
        staged.application.call("backlog", 1)
        return bool(staged.stage.queued())

    wait_until(tried, "the first message", within=60, every=0.3, alive=staged.consumers)
