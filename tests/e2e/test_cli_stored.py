"""`status`, `list`, `show`, `retry`, `discard`, as real processes on real rows; and `process_stored_notifications`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import insights, process_stored_notifications, upkeep
from pgpubsub_celery.errors import BindError, SettingsError, UnknownChannelError
from pgpubsub_celery.upkeep import Selection
from tests.fixtures import shop as shop_app
from tests.fixtures.commands import BRIDGE, Folder, done, refused
from tests.fixtures.notifications import Notifications, inconsistencies
from tests.fixtures.processes import DEADLINE, Shop, eventually

OLD = {"created_at": "2026-01-01 12:00:00+00"}


@pytest.fixture
def folder(tmp_path: Path, installed_url: str) -> Folder:
    """Anywhere: these commands need no application."""
    return Folder(tmp_path, PGPUBSUB_DATABASE_URL=installed_url)


@pytest.fixture
def stored(installed_engine: Engine) -> Iterator[Notifications]:
    """Two listeners, of two channels. Whatever a command does, each row must make sense afterwards."""
    stored = Notifications(installed_engine)
    stored.execute("DELETE FROM pgpubsub_subscription")
    stored.subscribe("blog.read", "blog.News", id=1)
    stored.subscribe("blog.call", "blog.Call", id=2)
    yield stored
    assert [wrong for row in stored.rows() for wrong in inconsistencies(row)] == []


OWNER = uuid.uuid4()


def states(stored: Notifications) -> Counter[str]:
    return Counter(row["state"] for row in stored.rows())


def one_of_each(stored: Notifications) -> dict[str, int]:
    """Insert a row in each state; return the ids."""
    return {
        "waiting": stored.add_one(),
        "delayed": stored.add_one(ago=-3600, retries=2),
        "dispatched": stored.dispatch()[0],
        "running": stored.run(owner=OWNER)[0],
        "failed": stored.add_one(state="failed", error="OSError: no [red]route[/red]", traceback="Trace\n  back"),
        "held": stored.add_one(state="held"),
    }


# status


def test_status_counts_by_listener_and_state(folder: Folder, stored: Notifications) -> None:
    """What waits, for how long, what is delayed, in flight, held and failed; and channels without a listener."""
    one_of_each(stored)
    stored.add(3, subscription=2, channel="blog.Call", ago=90)
    stored.add(2, subscription=None, channel="blog.Later")
    told = json.loads(done(folder.run("status", "--json")))
    found = {(one["channel"], one["listener"]): one for one in told["listeners"]}
    read, call, later = found["blog.News", "blog.read"], found["blog.Call", "blog.call"], found["blog.Later", None]
    assert {name: read[name] for name in ("waiting", "delayed", "in_flight", "held", "failed")} == {
        "waiting": 1,
        "delayed": 1,
        "in_flight": 2,
        "held": 1,
        "failed": 1,
    }
    assert (call["waiting"], later["waiting"]) == (3, 2)
    assert call["oldest_seconds"] == pytest.approx(90, abs=30)
    assert told["bridges"] == []


def test_status_for_people_shows_the_same(folder: Folder, stored: Notifications) -> None:
    """A table; and that nobody is there to publish anything."""
    stored.add(3, subscription=2, channel="blog.Call")
    lines = done(folder.run("status")).splitlines()
    (call,) = [line.split() for line in lines if "blog.call" in line]
    assert call[:3] == ["blog.Call", "blog.call", "3"]
    assert any("No bridge is connected" in line for line in lines)


def test_status_is_an_alarm_when_asked(folder: Folder, stored: Notifications) -> None:
    """Exit code 4 when something waits too long or too much has failed; the line on standard error says which."""
    stored.add_one(ago=600)
    stored.add(2, subscription=2, channel="blog.Call", state="failed")
    done(folder.run("status", "--max-age", "1h", "--max-failed", "2"))
    late = folder.run("status", "--max-age", "5m", "--max-failed", "2")
    assert late.returncode == 4
    assert late.stderr.startswith("blog.read: due for ")
    failed = folder.run("status", "--max-age", "1h", "--max-failed", "1")
    assert (failed.returncode, failed.stderr) == (4, "blog.call: 2 failed\n")


def test_status_knows_which_bridges_are_connected(shop: Shop) -> None:
    """And for which channels; no longer when they have ended."""
    bridge = shop.bridge("--channels", "tests.fixtures.shop.Call", "--processes", "2", ready=False)
    bridge.wait_for("listening to", count=2)
    bridges = json.loads(done(shop.run("status", "--json")))["bridges"]
    assert [one["channels"] for one in bridges] == [["tests.fixtures.shop.Call"]] * 2
    assert {one["host"] for one in bridges} == {"127.0.0.1"}
    assert bridge.stop() == 0
    eventually(lambda: json.loads(done(shop.run("status", "--json")))["bridges"] == [], "no bridge is connected")


def test_status_looks_at_a_bounded_number_of_rows(
    stored: Notifications, installed_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: it says so, and never reads the whole table, not even for a listener that has none."""
    monkeypatch.setattr(insights, "COUNT_LIMIT", 100)
    stored.add(20_000)
    stored.execute("ANALYZE pgpubsub_notification")
    with installed_engine.begin() as connection:
        read, call = sorted(insights.read_listeners(connection, "public"), key=lambda one: str(one.listener))[::-1]
        assert (read.waiting, call.waiting) == (100, 0)
        statement = text("EXPLAIN (ANALYZE, FORMAT JSON) " + insights.listeners_sql("public"))
        plan = connection.execute(statement, {"limit": 100}).scalar_one()[0]["Plan"]
    assert 0 < rows_read(plan) < 2_000


def rows_read(plan: dict[str, Any]) -> float:
    """Return how many rows the plan's scans of the notification table have gone through."""
    own = 0.0
    if plan.get("Relation Name") == "pgpubsub_notification":
        own = (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"]
    return own + sum(rows_read(below) for below in plan.get("Plans", []))


@pytest.mark.parametrize("command", ["status", "list", "show 1", "retry --all", "discard 1 --yes"])
def test_a_database_without_the_tables_is_refused(folder: Folder, database_url: str, command: str) -> None:
    """With the command that makes them."""
    refused(folder.run(*command.split(), "--database-url", database_url), "pgpubsub-bridge", "install")


def test_a_database_that_does_not_answer_is_told_without_its_password(folder: Folder) -> None:
    """Exit code 5, for monitoring."""
    result = folder.run("status", "--database-url", "postgresql://somebody:s3cret@127.0.0.1:1/nothing")
    assert "s3cret" not in refused(result, "cannot be reached", "127.0.0.1", code=5)


# list and show


def test_list_shows_what_is_stored_oldest_first(folder: Folder, stored: Notifications) -> None:
    """Each in a line, its error as it is: no part of it is taken for markup."""
    ids = one_of_each(stored)
    lines = done(folder.run("list")).splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == list(ids.values())
    assert "OSError: no [red]route[/red]" in lines[4]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--state failed", ["failed"]),
        ("--state held --state waiting", ["waiting", "delayed", "held", "call"]),
        ("--channel blog.Call", ["call"]),
        ("--listener blog.call", ["call"]),
        ("--older-than 2d", ["old"]),
        ("--error oserror", ["failed"]),
        ("--error nothing", []),
        ("--limit 2", ["waiting", "delayed"]),
        ("--channel blog.News --state failed --error route", ["failed"]),
        ("--channel blog.Call --state failed", []),
    ],
)
def test_list_shows_what_fits_all_that_is_given(
    folder: Folder, stored: Notifications, words: str, expected: list[str]
) -> None:
    """By state, channel, listener, age and error."""
    ids = one_of_each(stored)
    ids["call"] = stored.add_one(subscription=2, channel="blog.Call")
    ids["old"] = stored.dispatch(created_at="2026-01-01 12:00:00+00")[0]
    told = [json.loads(line) for line in done(folder.run("list", "--json", *words.split())).splitlines()]
    assert [one["id"] for one in told] == [ids[name] for name in expected]


def test_list_shows_and_finds_keys_where_there_are_some(folder: Folder, stored: Notifications) -> None:
    """A column more; what has no value to be ordered by shows nothing."""
    stored.add(ordering_key="none:8f2b")
    assert "key" not in done(folder.run("list")).splitlines()[0].split()
    (ordered,) = stored.add(ordering_key="a-17", unique_key="u-5")
    (unique,) = stored.add(unique_key="u-5")
    lines = done(folder.run("list")).splitlines()
    assert "key" in lines[0].split()
    assert ["a-17, u-5" in line for line in lines[1:]] == [False, True, False]
    assert not any("none:" in line for line in lines)
    for words, expected in (("--key a-17", [ordered]), ("--key u-5", [ordered, unique]), ("--key 17", [])):
        told = [
            json.loads(line)
            for line in folder.run("list", "--json", *words.split()).stdout.splitlines()
            if line[0] == "{"
        ]
        assert [row["id"] for row in told] == expected
    assert "ordering_key  a-17" in done(folder.run("show", str(ordered)))


def test_a_name_that_nobody_knows_is_said(folder: Folder, stored: Notifications) -> None:
    """An empty answer would look like good news."""
    result = folder.run("list", "--channel", "blog.Newz")
    assert "The database knows no channel 'blog.Newz'. Did you mean 'blog.News'?" in result.stderr
    result = folder.run("retry", "--listener", "blog.raed")
    assert "The database knows no listener 'blog.raed'. Did you mean 'blog.read'" in result.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("list --state lost", ["'lost'", "waiting, dispatched, running, failed, held"]),
        ("list --older-than soon", ["'soon'", "2h"]),
        ("retry", ["--all", "by id"]),
        ("discard", ["by id"]),
        ("show seventeen", ["'seventeen'"]),
        ("show", ["ID"]),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(folder: Folder, words: str, told: list[str]) -> None:
    """Everything is never meant by saying nothing."""
    refused(folder.run(*words.split()), *told)


def test_show_has_payload_and_traceback(folder: Folder, stored: Notifications) -> None:
    """All that is known of one."""
    id = stored.add_one(state="failed", payload='{"number": 7}', error="OSError: x", traceback="Traceback:\n  line 3\n")
    told = done(folder.run("show", str(id)))
    assert '"number": 7' in told
    assert "blog.read" in told
    assert told.endswith("Traceback:\n  line 3\n")
    assert json.loads(done(folder.run("show", str(id), "--json")))["payload"] == {"number": 7}


def test_show_of_one_that_is_gone_says_so(folder: Folder, stored: Notifications) -> None:
    """Acknowledged ones leave nothing behind."""
    result = folder.run("show", "17")
    assert (result.returncode, result.stdout) == (1, "")
    assert "No notification 17 is stored" in result.stderr


# retry


def test_retry_makes_held_and_failed_ones_due_as_if_they_had_never_run(folder: Folder, stored: Notifications) -> None:
    """Failed ones travel alone. What waits or is in flight is left alone, and said."""
    ids = one_of_each(stored)
    result = folder.run("retry", "--all")
    assert done(result) == "2 notification(s) made due.\n"
    assert "2 in flight: left alone" in result.stderr
    failed, held = stored.row(ids["failed"]), stored.row(ids["held"])
    assert (failed["state"], failed["error"], failed["traceback"], failed["retries"]) == ("waiting", None, None, 0)
    assert (failed["dispatches"], held["state"], held["dispatches"]) == (1, "waiting", 0)
    assert states(stored) == {"waiting": 4, "dispatched": 1, "running": 1}
    assert stored.row(ids["delayed"])["seconds"] > 0


def test_retry_by_id_makes_a_delayed_one_due_now(folder: Folder, stored: Notifications) -> None:
    """Whoever names it means it."""
    id = stored.add_one(ago=-3600, retries=2)
    other = stored.add_one(ago=-3600)
    assert done(folder.run("retry", str(id))) == "1 notification(s) made due.\n"
    assert stored.row(id)["seconds"] <= 0
    assert stored.row(other)["seconds"] > 0


def test_a_dry_run_changes_nothing(folder: Folder, stored: Notifications) -> None:
    """And says what would be."""
    ids = one_of_each(stored)
    before = stored.rows()
    assert done(folder.run("retry", "--all", "--dry-run")) == "2 notification(s) would be made due.\n"
    told = json.loads(done(folder.run("discard", str(ids["failed"]), "--dry-run", "--json")))
    assert told == {"selected": 1, "in_flight": 0, "changed": 0, "dry_run": True}
    assert [{**row, "seconds": 0} for row in stored.rows()] == [{**row, "seconds": 0} for row in before]


def test_force_includes_what_is_in_flight(folder: Folder, stored: Notifications) -> None:
    """A message that is still out finds nothing: the row's count or owner is not its own any more."""
    ids = one_of_each(stored)
    words = [str(ids["dispatched"]), str(ids["running"])]
    assert done(folder.run("retry", *words)) == "0 notification(s) made due.\n"
    assert json.loads(done(folder.run("retry", *words, "--force", "--json")))["changed"] == 2
    for id in (ids["dispatched"], ids["running"]):
        assert (stored.row(id)["state"], stored.row(id)["owner"], stored.row(id)["dispatches"]) == ("waiting", None, 1)
    stored.dispatch()
    assert done(folder.run("discard", "--state", "dispatched", "--yes", "--force")) == "1 notification(s) discarded.\n"
    assert "dispatched" not in states(stored)


def test_retry_rings_a_bridge_that_sleeps(shop: Shop, database: Engine) -> None:
    """With an hour between its sweeps, it comes at once."""
    shop.worker()
    shop.bridge("--poll-interval", "3600")
    rows = Notifications(database)
    with database.connect() as connection:
        subscription = connection.execute(
            text("SELECT id FROM pgpubsub_subscription WHERE listener LIKE '%.take_order'")
        )
        held = rows.add_one(
            state="held",
            channel="tests.fixtures.shop.Order",
            subscription=subscription.scalar_one(),
            payload='{"number": 1}',
        )
    assert done(shop.run("retry", str(held))) == "1 notification(s) made due.\n"
    eventually(lambda: rows.rows() == [], "it has been run")


# discard


def test_discard_deletes_what_is_meant_and_nothing_else(folder: Folder, stored: Notifications) -> None:
    """With --yes it does not ask; what is in flight stays, and is said."""
    ids = one_of_each(stored)
    result = folder.run("discard", "--channel", "blog.News", "--state", "failed", "--state", "running", "--yes")
    assert done(result) == "1 notification(s) discarded.\n"
    assert "1 in flight: left alone" in result.stderr
    assert [row["id"] for row in stored.rows()] == [id for state, id in ids.items() if state != "failed"]


def test_discard_asks_and_takes_anything_but_yes_for_no(folder: Folder, stored: Notifications) -> None:
    """How many it is about."""
    stored.add(3, state="failed")
    result = folder.run("discard", "--state", "failed", said="\n")
    assert result.returncode == 1
    assert "Discard 3 notification(s), for good?" in result.stderr
    assert states(stored) == {"failed": 3}
    assert done(folder.run("discard", "--state", "failed", said="y\n")) == "3 notification(s) discarded.\n"
    assert states(stored) == {}


def test_many_are_changed_in_batches(folder: Folder, stored: Notifications) -> None:
    """More than one transaction's worth."""
    stored.add(2 * upkeep.BATCH + 500, state="failed")
    assert done(folder.run("retry", "--state", "failed")) == "2500 notification(s) made due.\n"
    assert states(stored) == {"waiting": 2500}
    assert done(folder.run("discard", "--state", "waiting", "--yes")) == "2500 notification(s) discarded.\n"


def test_locked_ones_are_passed_over_and_said(folder: Folder, stored: Notifications) -> None:
    """A listener may be at work on one."""
    first, _ = stored.add(2, state="failed")
    with stored.transaction() as other:
        other.execute(text("SELECT FROM pgpubsub_notification WHERE id = :id FOR UPDATE"), {"id": first})
        result = folder.run("discard", "--state", "failed", "--yes")
    assert done(result) == "1 notification(s) discarded.\n"
    assert "1 were due already, or locked" in result.stderr
    assert stored.ids() == [first]


def test_what_fails_again_meanwhile_is_not_retried_again(
    stored: Notifications, installed_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a command beside a running bridge might never end."""
    monkeypatch.setattr(upkeep, "BATCH", 2)
    ids = stored.add(5, state="failed")
    after: int | None = 0
    changed = []
    while after is not None:
        with installed_engine.begin() as connection:
            batch = upkeep.retry_batch(connection, "public", Selection(states=("failed",)), after=after, last=max(ids))
        changed.append(batch.changed)
        after = batch.after
        stored.execute(
            "UPDATE pgpubsub_notification SET state = 'failed', available_at = NULL, failed_at = now(), error = 'x' "
            "WHERE state = 'waiting'"
        )
        stored.add(1, state="failed")
    assert changed == [2, 2, 1]


# process_stored_notifications


def test_process_stored_notifications_takes_held_and_failed_ones(
    stored: Notifications, installed_engine: Engine
) -> None:
    """In the caller's transaction, and never more than that."""
    one_of_each(stored)
    before = states(stored)
    with Session(installed_engine) as session:
        assert process_stored_notifications(session) == 2
        session.rollback()
    assert states(stored) == before
    with installed_engine.begin() as connection:
        assert process_stored_notifications(connection, failed=False) == 1
    assert states(stored) == before + Counter(waiting=1) - Counter(held=1)


def test_process_stored_notifications_of_some_channels(stored: Notifications, installed_engine: Engine) -> None:
    """Given as classes or by name; of a base class its subclasses, too."""
    for channel in (shop_app.Order, shop_app.SpecialOrder, shop_app.Call):
        stored.add(2, state="held", channel=channel.name())
    with installed_engine.begin() as connection:
        assert process_stored_notifications(connection, ["tests.fixtures.shop.Call"]) == 2
        assert process_stored_notifications(connection, [shop_app.Order]) == 4


@pytest.mark.parametrize(
    ("channels", "error"), [([], SettingsError), (["tests.fixtures.shop.Ordr"], UnknownChannelError)]
)
def test_process_stored_notifications_refuses_channels_that_are_none(
    installed_engine: Engine, channels: list[str], error: type[Exception]
) -> None:
    """An empty list is not all of them."""
    with installed_engine.begin() as connection, pytest.raises(error):
        process_stored_notifications(connection, channels)


def test_process_stored_notifications_needs_a_transaction(installed_engine: Engine) -> None:
    """As everything that the caller commits."""
    with pytest.raises(BindError):
        process_stored_notifications(installed_engine)


# Colours


def test_piped_output_is_plain(folder: Folder, stored: Notifications) -> None:
    """No escape sequences, no lines, and no line is cut."""
    stored.add(1, state="failed", error="x" * 150)
    told = done(folder.run("status", COLUMNS="80")) + done(folder.run("list", COLUMNS="80"))
    assert "\x1b" not in told
    assert "│" not in told
    assert "x" * 150 in told


@pytest.mark.parametrize("words", [["list"], ["show", "1"], ["list", "--json"]])
def test_characters_that_the_terminal_lacks_do_no_harm(folder: Folder, stored: Notifications, words: list[str]) -> None:
    """What somebody's error says cannot be chosen."""
    stored.add(1, state="failed", error="Porto → Rio")
    assert "Porto \\u2192 Rio" in done(folder.run(*words, PYTHONIOENCODING="latin-1"))


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colours_unless_no_color_is_set(folder: Folder, stored: Notifications, no_color: bool) -> None:
    """As https://no-color.org asks."""
    stored.add(1, state="failed")
    told = in_terminal(folder, "status", NO_COLOR="1" if no_color else "")
    assert "│" in told
    assert ("\x1b[31m" in told) != no_color


def test_status_watch_shows_what_changes_until_ctrl_c(folder: Folder, stored: Notifications) -> None:
    """Without a trace of how it was ended."""
    again_at = 0.0

    def meddle(told: str, process: subprocess.Popen[bytes]) -> None:
        nonlocal again_at
        # Each as soon as the one before is seen; whoever sees it go on presses the keys again.
        if "blog.read" in told and not stored.ids():
            stored.add(4711, ago=-3600)
        if "4711" in told and time.monotonic() > again_at:
            again_at = time.monotonic() + 5
            process.send_signal(signal.SIGINT)

    told = in_terminal(folder, "status", "--watch", meddle=meddle)
    assert "4711" in told
    assert "Traceback" not in told
    assert "Aborted" not in told


def in_terminal(
    folder: Folder,
    *words: str,
    meddle: Callable[[str, subprocess.Popen[bytes]], None] | None = None,
    **environment: str,
) -> str:
    """Return what a command prints on a terminal; `meddle` is called with what it has printed so far."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [BRIDGE, *words],
        cwd=folder.path,
        env=folder.env({"TERM": "xterm-256color", "COLUMNS": "120", **environment}),
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    told = b""
    try:
        # Not until the other side is closed: whoever was forked meanwhile may have it, too.
        deadline = time.monotonic() + DEADLINE
        while _readable(ours) or process.poll() is None:
            assert time.monotonic() < deadline, told.decode(errors="replace")
            if not _readable(ours):
                continue
            told += os.read(ours, 4096)
            if meddle is not None:
                meddle(told.decode(errors="replace"), process)
    except OSError:  # how Linux says that nobody has the other side any more
        pass
    finally:
        os.close(ours)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE)
        process.kill()
    assert process.wait() == 0
    return told.decode()


def _readable(file: int) -> bool:
    return bool(select.select([file], [], [], 0.05)[0])
