"""`status` with an application, and again and again: broker queues, bridges of every kind, rates, and completion."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from pgpubsub_celery import insights, notify_many
from tests.e2e.test_cli_stored import in_terminal, rows_read
from tests.fixtures import shop as app
from tests.fixtures.commands import BRIDGE, Folder, done, refused
from tests.fixtures.notifications import Notifications
from tests.fixtures.processes import APP, ROOT, Shop, eventually


@pytest.fixture
def folder(tmp_path: Path, installed_url: str) -> Folder:
    """Anywhere: most of these commands need no application."""
    return Folder(tmp_path, PGPUBSUB_DATABASE_URL=installed_url)


@pytest.fixture
def stored(installed_engine: Engine) -> Notifications:
    """One listener."""
    stored = Notifications(installed_engine)
    stored.execute("DELETE FROM pgpubsub_subscription")
    stored.subscribe("blog.read", "blog.News", id=1)
    return stored


def test_status_shows_queues_rates_and_every_bridge(shop: Shop, database: Engine) -> None:
    """Also a bridge that listens to nothing stored; what waits in the broker; what is finished, to who looks on."""
    unstored = shop.bridge("--channels", "tests.fixtures.shop.Ping")
    stored = shop.bridge("--channels", "tests.fixtures.shop.Order", "--worker")
    with Session(database) as session, session.begin():
        notify_many(session, [app.Order(number=n) for n in range(3)])

    def queued() -> bool:
        told = json.loads(done(shop.run("-A", APP, "status", "--json")))
        assert told["triggers"] == []
        return bool(told["queues"]["shop"])

    eventually(queued, "it is in the broker")
    told = json.loads(done(shop.run("-A", APP, "status", "--json", "--min-bridges", "2")))
    by_channels = {len(one["channels"]): one["process"] for one in told["bridges"]}
    assert set(by_channels) == {0, 2}, "a base class takes its subclass"
    assert by_channels[2].startswith(f"{stored.pid}@")
    assert by_channels[0].startswith(f"{unstored.children()[0].pid}@")
    assert "unstored only" in done(shop.run("status"))
    few = shop.run("status", "--min-bridges", "3")
    assert (few.returncode, few.stderr) == (4, "2 bridge(s) connected\n")

    shop.worker()
    with subprocess.Popen(
        [BRIDGE, "status", "--watch", "--json"],
        cwd=ROOT,
        env={**shop.environment, "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        rates = (json.loads(line)["finished_per_second"] for line in watching.stdout)
        assert next(rates) is None
        assert any(rate and rate > 0 for rate in rates)
        watching.terminate()


def test_a_broker_that_is_away_leaves_the_rest_of_status(shop: Shop) -> None:
    """It is the database's that matters."""
    shown = done(shop.run("-A", APP, "status", SHOP_BROKER_URL="redis://:s3cret@127.0.0.1:1/0"))
    assert "tests.fixtures.shop.take_order" in shown
    assert "The broker cannot be asked" in shown
    assert "s3cret" not in shown


def test_what_metrics_count_is_bounded_too(
    stored: Notifications, installed_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read every few seconds, whatever the table holds."""
    monkeypatch.setattr(insights, "COUNT_LIMIT", 100)
    stored.add(20_000)
    stored.add(20_000, state="failed", error="OSError")
    stored.execute("ANALYZE pgpubsub_notification")
    with installed_engine.begin() as connection:
        (read,) = insights.read_counts(connection, "public")
        assert (read.waiting, read.failed) == (100, 100)
        for sql in (insights.counts_sql("public"), insights.listeners_sql("public")):
            plan = connection.execute(text("EXPLAIN (ANALYZE, FORMAT JSON) " + sql), {"limit": 100}).scalar_one()
            assert 0 < rows_read(plan[0]["Plan"]) < 2_000


# list


def test_list_goes_page_by_page_in_either_direction(folder: Folder, stored: Notifications) -> None:
    """Each page names the next; the last one does not."""
    ids = stored.add(5)
    first = folder.run("list", "--limit", "2", "--columns", "id")
    assert done(first).split() == ["id", *map(str, ids[:2])]
    assert first.stderr == f"There are more: --after {ids[1]} shows the next 2.\n"
    last = folder.run("list", "--limit", "3", "--columns", "id", "--after", str(ids[1]))
    assert (done(last).split(), last.stderr) == (["id", *map(str, ids[2:])], "")
    newest = folder.run("list", "--newest", "--limit", "2", "--json", "--columns", "id,state", "--after", str(ids[4]))
    assert [json.loads(line) for line in done(newest).splitlines()] == [
        {"id": ids[3], "state": "waiting"},
        {"id": ids[2], "state": "waiting"},
    ]


def test_columns_are_chosen_and_a_wrong_one_is_named(folder: Folder, stored: Notifications) -> None:
    """Also those that are not shown by default."""
    stored.add_one(state="failed", error="OSError: x\nmore", traceback="Trace\n  back", payload='{"n": 1}')
    shown = done(folder.run("list", "--columns", "error,payload,traceback"))
    assert shown.splitlines()[0].split() == ["error", "payload", "traceback"]
    assert shown.splitlines()[1].split() == ["OSError:", "x", '{"n":', "1}", "Trace"]
    refused(folder.run("list", "--columns", "eror"), "'eror'", "Did you mean 'error'")


def test_what_a_channel_excludes_by_now_is_not_shown(folder: Folder, stored: Notifications) -> None:
    """It was stored before somebody thought of it; an application is needed to know that."""
    folder.write_news()
    channels = folder.path / "news" / "channels.py"
    declared = channels.read_text()
    declared = declared.replace("class Welcomed(", "    secret: Mapped[str] = mapped_column()\n\n\nclass Welcomed(")
    declared = declared.replace("Channel[Reader]):\n", "Channel[Reader]):\n    exclude = ('secret',)\n")
    channels.write_text(declared)
    payload = '{"old": null, "new": {"id": "1", "secret": "s3cret", "gone": "x"}}'
    id = stored.add_one(channel="news.channels.ReaderChanges", operation="insert", payload=payload)
    for words in (["show", str(id)], ["list", "--json"], ["list", "--columns", "payload"]):
        shown = done(folder.run("-A", "news.celery_app", *words))
        assert "s3cret" not in shown
        assert '"gone": "x"' in shown
        assert "s3cret" in done(folder.run(*words))


# Terminals


def test_a_long_change_shows_its_progress_on_a_terminal_only(folder: Folder, stored: Notifications) -> None:
    """Whoever redirects it gets lines."""
    stored.add(6_000, state="held")
    piped = folder.run("retry", "--all")
    assert (done(piped), piped.stderr) == ("6000 notification(s) made due.\n", "")
    shown = in_terminal(folder, "discard", "--state", "waiting", "--yes")
    assert "/6000" in shown
    assert "6000 notification(s) discarded." in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("list --channel blog.", ["blog.News"]),
        ("retry --listener blog.r", ["blog.read"]),
        ("discard --state fa", ["failed"]),
        ("list --columns id,trace", ["id,traceback"]),
        ("sta", ["status"]),
    ],
)
def test_shells_complete_commands_names_and_states(
    folder: Folder, stored: Notifications, words: str, expected: list[str]
) -> None:
    """Channels and listeners as the database knows them."""
    given = ["pgpubsub-bridge", *words.split()]
    result = folder.run(
        _PGPUBSUB_BRIDGE_COMPLETE="bash_complete", COMP_WORDS=" ".join(given), COMP_CWORD=str(len(given) - 1)
    )
    assert [line.partition(",")[2] for line in done(result).splitlines()] == expected


def test_completion_without_a_database_is_silent(folder: Folder) -> None:
    """A shell has nowhere to show an error."""
    result = folder.run(
        PGPUBSUB_DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing",
        _PGPUBSUB_BRIDGE_COMPLETE="bash_complete",
        COMP_WORDS="pgpubsub-bridge list --channel b",
        COMP_CWORD="3",
    )
    assert (done(result).strip(), result.stderr) == ("", "")
