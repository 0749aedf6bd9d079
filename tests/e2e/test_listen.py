"""`listen`, each option of it, with real processes: what it does, and what its absence does."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import enqueue, notify, notify_many
from pgpubsub_celery.embedded import EmbeddedValkey
from tests.fixtures import shop as app
from tests.fixtures.processes import Running, Shop, eventually


def emit(database: Engine, *messages: Any) -> None:
    """Emit in one transaction."""
    with Session(database) as session, session.begin():
        notify_many(session, messages)


def effects(database: Engine) -> Counter[tuple[str, int]]:
    """Return how often each effect is there."""
    with database.connect() as connection:
        return Counter((row.kind, row.value) for row in connection.execute(text("SELECT kind, value FROM effect")))


def states(database: Engine) -> Counter[str]:
    """Return how many notifications are in each state."""
    with database.connect() as connection:
        return Counter(connection.execute(text("SELECT state FROM pgpubsub_notification")).scalars())


def all_done(database: Engine, expected: dict[tuple[str, int], int]) -> None:
    """Wait until exactly these effects are there and nothing is stored any more."""
    eventually(lambda: not states(database), f"nothing stored; there is {states(database)}")
    assert effects(database) == expected


# The whole path


def test_committed_changes_become_finished_tasks(shop: Shop, database: Engine) -> None:
    """A table's changes, by ORM and by SQL, and a message; each listener has its own operations only."""
    shop.worker()
    shop.bridge()
    with Session(database) as session, session.begin():
        session.add(app.Author(id=1, name="Ann"))
        notify(session, app.Order(number=7))
        enqueue(session, app.plain.s(5))
    with database.begin() as connection:
        connection.execute(text("UPDATE author SET name = 'Anna'"))
        connection.execute(text("DELETE FROM author"))
    eventually(lambda: effects(database)["plain", 5], "the enqueued task ran")
    all_done(
        database,
        {("welcome", 1): 1, ("renamed", 1): 1, ("goodbye", 1): 1, ("order", 7): 1, ("plain", 5): 1},
    )


def test_bridge_and_worker_run_on_psycopg_3(shop: Shop, database: Engine) -> None:
    """The URL chooses it, for both and for their children."""
    shop.database_url = shop.database_url.replace("postgresql://", "postgresql+psycopg://")
    shop.worker()
    shop.bridge()
    emit(database, app.Order(number=1), app.Call(number=2), app.Ping(number=3))
    all_done(database, {("order", 1): 1, ("call-begun", 2): 1, ("call", 2): 1, ("ping", 3): 1})


def test_coroutines_run_in_a_worker_are_limited_there_and_finish_before_it_ends(shop: Shop, database: Engine) -> None:
    """A soft time limit cancels what one waits for; a warm shutdown waits for it."""
    worker = shop.worker()
    shop.bridge()
    emit(database, app.Errand(number=1, seconds=60))
    eventually(lambda: states(database) == {"failed": 1}, "the limit")
    with database.connect() as connection:
        error = connection.execute(text("SELECT error FROM pgpubsub_notification")).scalar()
    assert str(error).startswith("SoftTimeLimitExceeded")
    emit(database, app.Errand(number=2, seconds=1))
    eventually(lambda: effects(database)["errand-begun", 2] == 1, "it begins")
    worker.stop()
    assert effects(database) == {
        ("errand-begun", 1): 1,
        ("errand-cancelled", 1): 1,
        ("errand-begun", 2): 1,
        ("errand", 2): 1,
    }
    assert states(database) == {"failed": 1}


def test_a_rolled_back_transaction_leaves_nothing(shop: Shop, database: Engine) -> None:
    """Neither rows, nor tasks."""
    shop.worker()
    shop.bridge()
    with Session(database) as session:
        session.add(app.Author(id=1, name="Ann"))
        notify(session, app.Order(number=1))
        enqueue(session, app.plain.s(1))
        session.flush()
        session.rollback()
    emit(database, app.Order(number=2))
    all_done(database, {("order", 2): 1})


@pytest.mark.timeout(300)
def test_ten_thousand_rows_of_one_statement_arrive_once_each_with_flat_memory(shop: Shop, database: Engine) -> None:
    """The backlog waits in Postgres, not in the bridge and not in the broker."""
    shop.worker("--pool=prefork", "--concurrency=2")
    bridge = shop.bridge("--worker")
    before = psutil.Process(bridge.pid).memory_info().rss
    with database.begin() as connection:
        connection.execute(text("INSERT INTO author (id, name) SELECT n, 'a' || n FROM generate_series(1, 10000) n"))
    most = 0

    def finished() -> bool:
        nonlocal most
        most = max(most, psutil.Process(bridge.pid).memory_info().rss)
        return not states(database)

    eventually(finished, f"all done; there is {states(database)}", within=240)
    assert effects(database) == {("welcome", n): 1 for n in range(1, 10001)}
    assert most - before < 32 * 1024 * 1024


def test_a_list_is_handled_at_once_and_what_is_poisonous_in_it_fails_alone(shop: Shop, database: Engine) -> None:
    """Through a real bridge, broker and worker."""
    emit(database, *(app.Entry(number=n) for n in [*range(99), app.POISON]))
    shop.worker()
    shop.bridge("--recover")
    eventually(lambda: states(database) == {"failed": 1}, "one has failed, the others are done")
    found = effects(database)
    lists = {value: count for (kind, value), count in found.items() if kind == "list"}
    assert {value for kind, value in found if kind == "entry"} == set(range(99))
    assert sum(value * count for value, count in lists.items()) == 99
    assert max(lists) > 10


# --channels


def test_without_channels_all_registered_ones_are_listened_to(shop: Shop, database: Engine) -> None:
    """The default."""
    shop.worker()
    shop.bridge()
    emit(database, app.Order(number=1), app.SpecialOrder(number=2), app.Call(number=3))
    all_done(database, {("order", 1): 1, ("special", 2): 1, ("call-begun", 3): 1, ("call", 3): 1})


@pytest.mark.parametrize(
    "words",
    [
        ["--channels", "tests.fixtures.shop.SpecialOrder", "tests.fixtures.shop.Call"],
        ["--channels", "tests.fixtures.shop.SpecialOrder tests.fixtures.shop.Call"],
        ["--channels", "tests.fixtures.shop.SpecialOrder", "--channels=tests.fixtures.shop.Call"],
    ],
    ids=["words", "quoted", "repeated"],
)
def test_channels_selects_which_are_listened_to(shop: Shop, database: Engine, words: list[str]) -> None:
    """The others' notifications wait for somebody who listens to them."""
    shop.worker()
    shop.bridge(*words, "--processes", "1")
    emit(database, app.Order(number=1), app.SpecialOrder(number=2), app.Call(number=3))
    eventually(lambda: states(database) == {"waiting": 1}, "only the order waits")
    assert effects(database) == {("special", 2): 1, ("call-begun", 3): 1, ("call", 3): 1}


def test_channels_with_a_base_class_takes_its_subclasses(shop: Shop, database: Engine) -> None:
    """Order and SpecialOrder."""
    shop.worker()
    shop.bridge("--channels", "tests.fixtures.shop.Order")
    emit(database, app.Order(number=1), app.SpecialOrder(number=2), app.Call(number=3))
    eventually(lambda: states(database) == {"waiting": 1}, "only the call waits")
    assert effects(database) == {("order", 1): 1, ("special", 2): 1}


# --processes


def test_processes_share_stored_channels_and_each_hear_the_others(shop: Shop, database: Engine) -> None:
    """`lock_notifications` is what makes the difference."""
    shop.worker()
    bridge = shop.bridge("--processes", "2", ready=False)
    bridge.wait_for("listening to", count=2)
    assert len(bridge.children()) == 2
    emit(database, *(app.Order(number=n) for n in range(50)), app.Ping(number=1))
    eventually(lambda: effects(database)["ping", 1] == 2, "both processes heard the ping")
    eventually(lambda: not states(database), "nothing stored")
    assert effects(database) == {("ping", 1): 2} | {("order", n): 1 for n in range(50)}


def test_without_processes_there_is_one(shop: Shop, database: Engine) -> None:
    """Below a supervisor."""
    shop.worker()
    bridge = shop.bridge()
    assert len(bridge.children()) == 1
    emit(database, app.Ping(number=1))
    eventually(lambda: effects(database)["ping", 1], "the ping was heard")
    assert effects(database) == {("ping", 1): 1}


def test_a_message_of_an_unstored_channel_may_be_longer_than_a_notify(shop: Shop, database: Engine) -> None:
    """It arrives whole."""
    shop.worker()
    shop.bridge()
    emit(database, app.Ping(number=1, text="é" * 20_000))
    eventually(lambda: effects(database)["ping-length", 20_000], "the long ping was heard")


def test_two_bridges_share_a_backlog(shop: Shop, database: Engine) -> None:
    """As if on two hosts; each notification once."""
    shop.worker("--pool=prefork", "--concurrency=2")
    shop.bridge("--worker", "--batch-size", "20")
    shop.bridge("--worker", "--batch-size", "20")
    for start in range(0, 500, 100):
        emit(database, *(app.Order(number=n) for n in range(start, start + 100)))
    all_done(database, {("order", n): 1 for n in range(500)})


# --worker


def test_worker_is_one_process(shop: Shop, database: Engine) -> None:
    """Nothing below it, and nothing above it."""
    shop.worker()
    bridge = shop.bridge("--worker")
    assert bridge.children() == []
    emit(database, app.Order(number=1))
    all_done(database, {("order", 1): 1})
    assert bridge.stop() == 0


def test_worker_turns_into_the_parent_of_its_replacement_when_it_fails(shop: Shop, database: Engine) -> None:
    """The notification whose publication broke it comes again, and signals are forwarded."""
    bomb = shop.folder / "bomb"
    shop.worker()
    bridge = shop.bridge("--worker", SHOP_BOMB=str(bomb))
    bomb.touch()
    emit(database, app.Order(number=1))
    bridge.wait_for("listening to", count=2)
    assert "the bomb went off" in bridge.log()
    all_done(database, {("order", 1): 1})
    assert len(bridge.children()) == 1
    assert bridge.stop() == 0
    assert bridge.children() == []


# Failures, and --no-restart-on-failure


def test_a_failed_process_is_replaced_before_it_ends(shop: Shop, database: Engine) -> None:
    """Nothing is lost on the way, and nothing stored meanwhile is held back."""
    bomb = shop.folder / "bomb"
    shop.worker()
    bridge = shop.bridge(SHOP_BOMB=str(bomb))
    (first,) = bridge.children()
    bomb.touch()
    emit(database, *(app.Order(number=n) for n in range(20)))
    bridge.wait_for("replaced pid")
    log = bridge.log()
    assert log.rindex("listening to") < log.index(f"ended pid {first.pid}") if f"ended pid {first.pid}" in log else True
    all_done(database, {("order", n): 1 for n in range(20)})
    assert "held" not in bridge.log()


def test_without_restart_a_failed_process_is_not_replaced(shop: Shop, database: Engine) -> None:
    """The exit code tells; what was claimed is given back for the next one."""
    bomb = shop.folder / "bomb"
    bridge = shop.bridge("--no-restart-on-failure", SHOP_BOMB=str(bomb))
    bomb.touch()
    emit(database, app.Order(number=1))
    assert bridge.code() == 1
    assert bridge.log().count("listening to") == 1
    assert states(database) == {"waiting": 1}


def test_worker_without_restart_ends_with_its_failure(shop: Shop, database: Engine) -> None:
    """For whoever restarts it from outside."""
    bomb = shop.folder / "bomb"
    bridge = shop.bridge("--worker", "--no-restart-on-failure", SHOP_BOMB=str(bomb))
    bomb.touch()
    emit(database, app.Order(number=1))
    assert bridge.code() == 1
    assert "the bomb went off" in bridge.log()


def test_a_killed_process_is_replaced_and_nothing_is_lost(shop: Shop, database: Engine) -> None:
    """By SIGKILL."""
    shop.worker()
    bridge = shop.bridge()
    (child,) = bridge.children()
    child.kill()
    bridge.wait_for("listening to", count=2)
    emit(database, app.Order(number=1))
    all_done(database, {("order", 1): 1})


def test_no_process_is_left_when_the_supervisor_is_killed(shop: Shop) -> None:
    """Its children notice and end."""
    bridge = shop.bridge("--processes", "2", ready=False)
    bridge.wait_for("listening to", count=2)
    children = bridge.children()
    bridge.signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


# --recover


def store_before(database: Engine) -> None:
    """Something waiting, something failed, something delayed."""
    emit(database, *(app.Order(number=n) for n in range(1, 4)))
    with database.begin() as connection:
        connection.execute(
            text(
                "UPDATE pgpubsub_notification SET state = 'failed', available_at = NULL, failed_at = now(), "
                "error = 'x', dispatches = 1 WHERE payload->>'number' = '2'"
            )
        )
        connection.execute(
            text(
                "UPDATE pgpubsub_notification SET available_at = now() + interval '1 hour' "
                "WHERE payload->>'number' = '3'"
            )
        )


def make_due(database: Engine) -> None:
    """As if the hour had passed: what is delayed becomes due, and the bridge is told."""
    with database.begin() as connection:
        connection.execute(
            text(
                "UPDATE pgpubsub_notification SET available_at = now() WHERE available_at > now() AND state = 'waiting'"
            )
        )
        connection.execute(text("SELECT pgpubsub_ring('tests.fixtures.shop.Order')"))


def test_without_recover_what_was_stored_before_is_held_and_said(shop: Shop, database: Engine) -> None:
    """Delayed ones are not "before": they run when they are due. A later --recover takes the others."""
    store_before(database)
    shop.worker()
    bridge = shop.bridge()
    bridge.wait_for(r"held 1 notification\(s\)")
    emit(database, app.Order(number=9))
    make_due(database)
    eventually(lambda: effects(database) == {("order", 9): 1, ("order", 3): 1}, "the new and the delayed one ran")
    assert states(database) == {"held": 1, "failed": 1}
    assert bridge.stop() == 0
    shop.bridge("--recover")
    all_done(database, {("order", n): 1 for n in (1, 2, 3, 9)})


def test_recover_waiting_leaves_the_failed_ones(shop: Shop, database: Engine) -> None:
    """Only what was held."""
    store_before(database)
    shop.worker()
    shop.bridge("--recover=waiting")
    make_due(database)
    eventually(lambda: effects(database) == {("order", 1): 1, ("order", 3): 1}, "the waiting ones ran")
    assert states(database) == {"failed": 1}


def test_recover_may_be_followed_by_other_options_and_takes_failed_ones(shop: Shop, database: Engine) -> None:
    """As in the reference: a plain flag."""
    store_before(database)
    shop.worker()
    shop.bridge("--channels", "tests.fixtures.shop.Order", "--recover", "--loglevel", "debug")
    make_due(database)
    all_done(database, {("order", n): 1 for n in (1, 2, 3)})


def test_a_second_bridge_holds_nothing_back(shop: Shop, database: Engine) -> None:
    """A rolling deploy strands nothing: only the first one alive draws the line."""
    shop.bridge()
    with database.begin() as connection:  # not claimed: no quota for what is locked
        connection.execute(text("SELECT pg_sleep(0)"))
    emit(database, app.Order(number=1))
    second = shop.bridge()
    assert "held" not in second.log()
    shop.worker()
    all_done(database, {("order", 1): 1})


def test_a_transaction_that_commits_after_the_start_is_not_before(shop: Shop, database: Engine) -> None:
    """Although it stored its notification earlier."""
    shop.worker()
    with Session(database) as session:
        notify(session, app.Order(number=1))
        shop.bridge()
        session.commit()
    all_done(database, {("order", 1): 1})


# --loglevel and --logformat


def test_loglevel_and_logformat_apply_to_every_process(shop: Shop, database: Engine) -> None:
    """`json`: each line an object."""
    shop.worker()
    bridge = shop.bridge("--loglevel", "DEBUG", "--logformat", "json")
    emit(database, app.Order(number=1))
    all_done(database, {("order", 1): 1})
    assert bridge.stop() == 0
    lines = [json.loads(line) for line in bridge.log().splitlines()]
    assert {line["level"] for line in lines} >= {"debug", "info"}
    assert len({line["process"] for line in lines}) == 2


def test_the_default_level_is_info(shop: Shop, database: Engine) -> None:
    """No debug records."""
    shop.worker()
    bridge = shop.bridge("--logformat", "%(levelname)s|%(message)s")
    emit(database, app.Order(number=1))
    all_done(database, {("order", 1): 1})
    assert bridge.stop() == 0
    assert {line.partition("|")[0] for line in bridge.log().splitlines()} == {"INFO"}


# --worker-start-method


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_both_start_methods_work(shop: Shop, database: Engine, method: str) -> None:
    """Children have all options."""
    shop.worker()
    options = ["--worker-start-method", method, "--channels", "tests.fixtures.shop.Call", "--logformat", "%(message)s!"]
    bridge = shop.bridge(*options)
    (child,) = bridge.children()
    assert any("spawn_main" in word for word in child.cmdline()) == (method == "spawn")
    emit(database, app.Order(number=1), app.Call(number=2))
    eventually(lambda: states(database) == {"waiting": 1}, "only the order waits")
    assert bridge.stop() == 0
    assert all(line.endswith("!") for line in bridge.log().splitlines())


# --poll-interval, and being woken


def test_a_notification_that_nobody_rang_for_is_found_by_the_sweep(shop: Shop, database: Engine) -> None:
    """As where NOTIFY is lost or impossible."""
    shop.worker()
    shop.bridge("--poll-interval", "1")
    with database.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO pgpubsub_notification (channel, subscription, operation, payload) "
                "SELECT channel, id, 'message', '{\"number\": 1}' FROM pgpubsub_subscription "
                "WHERE channel = 'tests.fixtures.shop.Order'"
            )
        )
    all_done(database, {("order", 1): 1})


def test_a_ring_needs_no_sweep(shop: Shop, database: Engine) -> None:
    """With an hour between sweeps, what is committed is done at once; also what a delay makes due."""
    shop.worker()
    shop.bridge("--poll-interval", "3600")
    for number in range(5):
        emit(database, app.Order(number=number))
        all_done(database, {("order", n): 1 for n in range(number + 1)})
    with Session(database) as session, session.begin():
        notify(session, app.Order(number=9), countdown=1.0)
    all_done(database, {("order", n): 1 for n in (*range(5), 9)})


# --database-url


def test_database_url_is_handed_to_children_but_not_in_their_command_line(shop: Shop, database: Engine) -> None:
    """Everybody can read a command line; this one's owner has typed it, the children's nobody has."""
    shop.worker()
    url = shop.environment.pop("PGPUBSUB_DATABASE_URL")
    bridge = shop.bridge("--database-url", url)
    assert all(url not in " ".join(child.cmdline()) for child in bridge.children())
    emit(database, app.Order(number=1))
    eventually(lambda: states(database) == {"dispatched": 1} or not states(database), "published")


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [[], ["--worker"]], ids=["supervised", "worker"])
def test_a_signal_ends_it_with_exit_code_0(shop: Shop, signum: int, options: list[str]) -> None:
    """And quickly: nothing waits for the sweep."""
    bridge = shop.bridge(*options)
    bridge.signal(signum)
    assert bridge.code() == 0


# Outages


def test_lost_connections_to_postgres_are_said_once_and_made_anew(shop: Shop, database: Engine) -> None:
    """Nothing stored meanwhile is held back or lost."""
    shop.worker()
    bridge = shop.bridge("--worker")
    for number in range(3):
        with database.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name LIKE 'pgpubsub-bridge%'"
                )
            )
        emit(database, app.Order(number=number))
        bridge.wait_for("listening to", count=number + 2)
        all_done(database, {("order", n): 1 for n in range(number + 1)})
    assert bridge.log().count("database unavailable") == 3
    assert "held" not in bridge.log()


def test_a_broker_outage_loses_nothing_and_is_said_once(shop: Shop, database: Engine) -> None:
    """Refused, then back and empty."""
    with EmbeddedValkey() as valkey:
        shop.environment["SHOP_BROKER_URL"] = valkey.url
        bridge = shop.bridge("--worker")
        valkey.stop()
        emit(database, *(app.Order(number=n) for n in range(10)))
        bridge.wait_for("broker unavailable")
        emit(database, *(app.Order(number=n) for n in range(10, 20)))
        valkey.start()
        shop.worker()
        all_done(database, {("order", n): 1 for n in range(20)})
        assert bridge.log().count("broker unavailable") == 1
        assert bridge.log().count("broker available again") == 1
        assert bridge.stop() == 0


def test_a_broker_that_forgot_everything_gets_the_messages_again(shop: Shop, database: Engine) -> None:
    """After one lease."""
    with EmbeddedValkey() as valkey:
        shop.environment["SHOP_BROKER_URL"] = valkey.url
        shop.bridge("--worker", PGPUBSUB_LEASE="3", PGPUBSUB_HEARTBEAT_INTERVAL="1")
        emit(database, *(app.Order(number=n) for n in range(10)))
        eventually(lambda: states(database) == {"dispatched": 10}, "all published")
        valkey.kill()
        valkey.start()
        shop.worker()
        all_done(database, {("order", n): 1 for n in range(10)})


# Workers that die


def test_a_killed_pool_process_gives_its_notifications_back_at_once(shop: Shop, database: Engine) -> None:
    """The parent does it; no lease of 120 s is waited for."""
    worker = shop.worker("--pool=prefork", "--concurrency=1")
    shop.bridge("--worker")
    emit(database, app.Call(number=1, seconds=60))
    eventually(lambda: effects(database)["call-begun", 1], "the call has begun")
    with database.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_notification SET payload = jsonb_set(payload, '{seconds}', '0')"))
    (child,) = worker.children()
    child.kill()
    all_done(database, {("call-begun", 1): 2, ("call", 1): 1})


def test_a_killed_worker_is_recovered_from_by_the_lease(shop: Shop, database: Engine) -> None:
    """All of it is gone; another worker has the notification after its lease."""
    lease: dict[str, Any] = {"PGPUBSUB_LEASE": "3", "PGPUBSUB_HEARTBEAT_INTERVAL": "1"}
    worker = shop.worker("--pool=prefork", "--concurrency=1", **lease)
    shop.bridge("--worker", **lease)
    emit(database, app.Call(number=1, seconds=60))
    eventually(lambda: effects(database)["call-begun", 1], "the call has begun")
    with database.begin() as connection:
        connection.execute(text("UPDATE pgpubsub_notification SET payload = jsonb_set(payload, '{seconds}', '0')"))
    worker.destroy()
    shop.worker("--pool=prefork", "--concurrency=1", **lease)
    all_done(database, {("call-begun", 1): 2, ("call", 1): 1})


def test_what_kills_its_worker_each_time_is_failed_in_the_end(shop: Shop, database: Engine) -> None:
    """And harms nobody else."""
    shop.worker("--pool=prefork", "--concurrency=1")
    shop.bridge("--worker")
    emit(database, app.Order(number=app.DEADLY), *(app.Order(number=n) for n in range(20)))
    eventually(lambda: states(database) == {"failed": 1}, f"the deadly one failed; there is {states(database)}")
    assert effects(database) == {("order", n): 1 for n in range(20)}
    with database.connect() as connection:
        error = connection.execute(text("SELECT error FROM pgpubsub_notification")).scalar_one()
    assert "never finished" in error


def test_a_hard_time_limit_fails_the_notification(shop: Shop, database: Engine) -> None:
    """By the parent; the child is killed."""
    shop.worker("--pool=prefork", "--concurrency=1", "--time-limit=1")
    shop.bridge("--worker")
    emit(database, app.Call(number=1, seconds=60))
    eventually(lambda: states(database) == {"failed": 1}, "the call failed")
    with database.connect() as connection:
        error = connection.execute(text("SELECT error FROM pgpubsub_notification")).scalar_one()
    assert "time limit" in error


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_every_pool_runs_listeners(shop: Shop, database: Engine, pool: str) -> None:
    """Celery's tracer is the same in all."""
    shop.worker(f"--pool={pool}", "--concurrency=2")
    shop.bridge("--worker")
    emit(database, *(app.Order(number=n) for n in range(20)), *(app.Call(number=n) for n in range(5)))
    expected = {("order", n): 1 for n in range(20)}
    expected |= {(kind, n): 1 for n in range(5) for kind in ("call-begun", "call")}
    all_done(database, expected)


def test_celery_has_the_same_command(shop: Shop, database: Engine) -> None:
    """`celery -A app pgpubsub listen`."""
    shop.worker()
    from tests.fixtures.processes import APP, BIN

    bridge: Running = shop.start([str(BIN / "celery"), "-A", APP, "pgpubsub", "listen", "--worker"])
    bridge.wait_for("listening to")
    emit(database, app.Order(number=1))
    all_done(database, {("order", 1): 1})
    assert bridge.stop() == 0


def test_nothing_of_the_environment_is_needed_but_the_urls(shop: Shop) -> None:
    """`--help` documents every option."""
    told = shop.run("listen", "--help").stdout
    for option in (
        "--channels",
        "--processes",
        "--recover",
        "--loglevel",
        "--logformat",
        "--worker",
        "--no-restart-on-failure",
        "--worker-start-method",
        "--poll-interval",
        "--batch-size",
        "--max-in-flight",
        "--drain-timeout",
        "--database-url",
    ):
        assert option in told
    assert Path(os.environ.get("HOME", "/")).exists()


# Filters


def test_bridges_of_several_tenants_take_each_its_own(shop: Shop, database: Engine) -> None:
    """PGPUBSUB_LISTENER_FILTER: what is another's waits for that, and is not held by who would not take it."""

    def order(number: int, tenant: str) -> None:
        with Session(database) as session, session.begin():
            notify(session, app.Order(number=number), context={"tenant": tenant})

    order(1, "b")
    shop.worker()
    first = shop.bridge("--worker", PGPUBSUB_LISTENER_FILTER="context->>'tenant' = 'a'")
    order(2, "a")
    eventually(lambda: effects(database) == {("order", 2): 1}, "a's is done")
    assert states(database) == {"waiting": 1}
    shop.bridge("--worker", "--recover", PGPUBSUB_LISTENER_FILTER="context->>'tenant' = 'b'")
    order(3, "b")
    order(4, "a")
    all_done(database, {("order", n): 1 for n in (1, 2, 3, 4)})
    assert "held" not in first.log()
