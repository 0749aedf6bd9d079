"""`listen` before anything starts: its words, finding the application, and one clear line for whatever cannot work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pgpubsub_celery.cli import main
from pgpubsub_celery.cli.listening import normalise
from tests.fixtures.commands import CELERY, Folder, done, refused, started
from tests.fixtures.processes import Running

COMMANDS = ["demo", "dev", "discard", "health", "install", "list", "listen"]
COMMANDS += ["retry", "show", "status", "triggers", "uninstall"]
NOWHERE = "postgresql://somebody:s3cret@127.0.0.1:1/nothing"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Where `-A news.celery_app` is, with a database that does not answer."""
    folder = Folder(tmp_path, PGPUBSUB_DATABASE_URL=NOWHERE)
    folder.write_news()
    return folder


@contextlib.contextmanager
def listening(folder: Folder, *words: str, **options: str) -> Iterator[Running]:
    running = started(folder, *words, **options)
    try:
        yield running
    finally:
        running.destroy()


# Words


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", ""),
        ("--channels a.B", "--channels a.B"),
        ("--channels a.B c.D", "--channels a.B --channels c.D"),
        ("--channels a.B c.D --processes 2", "--channels a.B --channels c.D --processes 2"),
        ("--processes 2 --channels a.B c.D", "--processes 2 --channels a.B --channels c.D"),
        ("--channels=a.B c.D --worker", "--channels=a.B --channels c.D --worker"),
        ("--channels a.B --channels c.D e.F", "--channels a.B --channels c.D --channels e.F"),
        ("--channels a.B -A app", "--channels a.B -A app"),
        ("--recover", "--recover=all"),
        ("--recover --loglevel debug", "--recover=all --loglevel debug"),
        ("--recover=waiting", "--recover=waiting"),
        ("--channels a.B --recover --worker", "--channels a.B --recover=all --worker"),
        ("--recover --channels a.B c.D", "--recover=all --channels a.B --channels c.D"),
        ("--channels a.B -- c.D --recover", "--channels a.B -- c.D --recover"),
    ],
)
def test_words_are_read_as_the_reference_reads_them(given: str, meant: str) -> None:
    """Several values after `--channels`, and none after `--recover`."""
    assert normalise(given.split()) == meant.split()


def test_a_quoted_value_stays_one_word() -> None:
    """What is within is split later: it may have been quoted for the shell's sake."""
    assert normalise(["--channels", "a.B c.D", "--logformat", "- %(message)s"]) == [
        "--channels",
        "a.B c.D",
        "--logformat",
        "- %(message)s",
    ]


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("--channels", "expected full module paths"),
        ("--channels --worker", "expected full module paths"),
        ("--recover waiting", "write --recover=waiting"),
        ("--recover all --worker", "write --recover=all"),
    ],
)
def test_words_that_would_be_misread_are_refused(given: str, fix: str) -> None:
    """A forgotten value, and one that a plain flag cannot have."""
    with pytest.raises(click.UsageError, match=fix):
        normalise(given.split())


# Bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["listen"], ["-A", "PGPUBSUB_APP"]),
        (["-A", "nowhere", "listen"], ["'nowhere'", "no module", "blog.celery_app"]),
        (["-A", "news.nothing", "listen"], ["'news.nothing'", "no module"]),
        (["-A", "news.celery_app:nothing", "listen"], ["'news.celery_app:nothing'", "blog.celery_app"]),
        (["-A", "json", "listen"], ["'json'", "blog.celery_app:app"]),
        (["-A", "broken", "listen"], ["ZeroDivisionError: division by zero", "broken.py:2"]),
        (["-A", "half", "listen"], ["'half'", "ZeroDivisionError", "half_listeners.py:3"]),
        (["-A", "empty", "listen"], ["No channel is registered", "autodiscover_tasks"]),
        (
            ["-A", "news.celery_app", "listen", "--channels", "news.channels.Isue"],
            ["'news.channels.Isue'", "Did you mean 'news.channels.Issue'"],
        ),
        (
            ["-A", "news.celery_app", "listen", "--channels", "nothing.Issue"],
            ["'nothing.Issue'", "news.channels.Issue"],
        ),
        (["-A", "news.celery_app", "listen", "--channels", "news.channels.Reader"], ["Reader", "not a channel"]),
        (["-A", "news.celery_app", "listen", "--channels", "news.channels"], ["news.channels", "not a channel"]),
        (["-A", "news.celery_app", "listen", "--channels"], ["--channels", "blog.channels.PostReads"]),
        (["-A", "news.celery_app", "listen", "--channels", " "], ["--channels is empty", "leave it out for all"]),
        (["-A", "news.celery_app", "listen", "--worker", "--processes", "1"], ["--worker", "--processes 1"]),
        (["-A", "news.celery_app", "listen", "--processes", "3", "--worker"], ["--worker", "--processes 3"]),
        (["-A", "news.celery_app", "listen", "--processes", "0"], ["--processes is 0", "at least 1"]),
        (["-A", "news.celery_app", "listen", "--processes", "two"], ["--processes", "'two'"]),
        (
            ["-A", "news.celery_app", "listen", "--worker-start-method", "forkserver"],
            ["--worker-start-method", "'forkserver'", "spawn or fork"],
        ),
        (["-A", "news.celery_app", "listen", "--loglevel", "debgu"], ["'debgu'", "Did you mean 'debug'"]),
        (
            ["-A", "news.celery_app", "listen", "--logformat", "%(nope)s"],
            ["%(nope)s", "%(asctime)s %(message)s", "json"],
        ),
        (["-A", "news.celery_app", "listen", "--logformat", "{message}"], ["{message}", "json"]),
        (["-A", "news.celery_app", "listen", "--recover=some"], ["'some'", "--recover=waiting"]),
        (["-A", "news.celery_app", "listen", "--recover", "waiting"], ["--recover=waiting"]),
        (["-A", "news.celery_app", "listen", "--batch-size", "0"], ["batch_size is 0", "at least 1"]),
        (["-A", "news.celery_app", "listen", "--poll-interval", "-1"], ["poll_interval is -1", "above 0"]),
        (["-A", "news.celery_app", "listen", "--database-url", "mysql://here/x"], ["'mysql'", "PostgreSQL"]),
        (["-A", "news.celery_app", "listen", "--proceses", "2"], ["--proceses", "Did you mean", "--processes"]),
        (["-A", "news.celery_app", "listen", "blog.channels.X"], ["blog.channels.X", "--help"]),
        (["-A", "news.celery_app", "lisen"], ["lisen", "listen"]),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_one_line_and_exit_code_2(folder: Folder, words: list[str], told: list[str]) -> None:
    """It names the value and the fix, and nothing has been started."""
    folder.write("broken.py", "import json\njson.x = 1 / 0\n")
    folder.write("half.py", "from celery import Celery\napp = Celery(include=['half_listeners'])\n")
    folder.write("half_listeners.py", "import json\n\n1 / 0\n")
    folder.write("empty.py", "from celery import Celery\napp = Celery()\n")
    refused(folder.run(*words), *told)


def test_a_cause_of_many_lines_is_told_in_one(folder: Folder) -> None:
    """What the user's module raises is not ours to shape."""
    folder.write("wordy.py", "raise RuntimeError('first\\nsecond')\n")
    refused(folder.run("-A", "wordy", "listen"), "RuntimeError: first second", "wordy.py:1")


def test_a_channel_that_cannot_be_used_is_refused_with_the_reason(folder: Folder) -> None:
    """Without @dataclass, its fields are nothing."""
    folder.write("careless.py", "from pgpubsub_celery import Channel\nclass Note(Channel):\n    number: int\n")
    result = folder.run("-A", "news.celery_app", "listen", "--channels", "careless.Note")
    refused(result, "careless.Note", "@dataclass")


def test_no_database_configured_names_the_three_places(folder: Folder) -> None:
    """Environment, Celery's configuration, option."""
    del folder.environment["PGPUBSUB_DATABASE_URL"]
    result = folder.run("-A", "news.celery_app", "listen")
    refused(result, "PGPUBSUB_DATABASE_URL", "pgpubsub_database_url", "--database-url")


def test_a_database_without_the_tables_names_install(folder: Folder, database_url: str) -> None:
    """Nothing is created behind anybody's back."""
    result = folder.run("-A", "news.celery_app", "listen", PGPUBSUB_DATABASE_URL=database_url)
    refused(result, "pgpubsub-bridge", "install", "pgpubsub_installation")


def test_a_broker_of_unknown_kind_is_refused(folder: Folder, installed_url: str) -> None:
    """It could not be reached however long one waits."""
    result = folder.run(
        "-A", "news.celery_app", "listen", PGPUBSUB_DATABASE_URL=installed_url, NEWS_BROKER_URL="rdis://x"
    )
    refused(result, "'rdis'", "redis://")


def test_a_wrong_environment_variable_is_refused_by_its_name(folder: Folder) -> None:
    """Settings come from there, too."""
    result = folder.run("-A", "news.celery_app", "listen", PGPUBSUB_BATCH_SIZE="many")
    refused(result, "PGPUBSUB_BATCH_SIZE", "'many'")


# What is not an error


def test_a_database_that_does_not_answer_is_waited_for(folder: Folder) -> None:
    """It may be starting, too; the password stays out of the log."""
    with listening(folder, "-A", "news.celery_app", "listen", NEWS_BROKER_URL="redis://127.0.0.1:1/0") as running:
        running.wait_for("database unavailable, trying again")
        assert running.stop() == 0
        assert "s3cret" not in running.log()
        assert "Traceback" not in running.log()


def test_recover_with_only_unstored_channels_warns_and_goes_on(
    folder: Folder, installed_url: str, broker_url: str
) -> None:
    """There is nothing to recover, which is no reason not to listen."""
    urls = {"PGPUBSUB_DATABASE_URL": installed_url, "NEWS_BROKER_URL": broker_url}
    words = ["-A", "news.celery_app", "listen", "--recover", "--channels", "news.channels.Flash", "--worker"]
    with listening(folder, *words, **urls) as running:
        running.wait_for("listening to 1 channel")
        assert running.log().count("WARNING") == 1
        assert "--recover has nothing to do" in running.log()
        assert running.stop() == 0


# Finding the application


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["-A", "news.celery_app", "listen"], {}),
        (["listen", "-A", "news.celery_app"], {}),
        (["--app=news.celery_app:app", "listen"], {}),
        (["-A", "news", "listen"], {}),
        (["listen"], {"PGPUBSUB_APP": "news.celery_app"}),
        (["-A", "nowhere", "listen", "--app", "news.celery_app"], {"PGPUBSUB_APP": "nothing"}),
    ],
    ids=["before", "after", "attribute", "package", "environment", "the last word"],
)
def test_the_application_is_found_as_celery_finds_it(
    folder: Folder, words: list[str], environment: dict[str, str]
) -> None:
    """In the current folder, with the listeners that it discovers: the refusal of a wrong channel knows them."""
    folder.write("news/celery.py", "from news.celery_app import app\n")
    result = folder.run(*words, "--channels", "news.channels.Isue", **environment)
    refused(result, "Did you mean 'news.channels.Issue'")


def test_celery_runs_the_same_commands(folder: Folder) -> None:
    """`celery -A news.celery_app pgpubsub listen`: its -A is enough, and so is its --workdir."""
    words = ["pgpubsub", "listen", "--channels", "news.channels.Isue"]
    refused(folder.run("-A", "news.celery_app", *words, program=CELERY), "Did you mean 'news.channels.Issue'")
    elsewhere = Folder(folder.path / "elsewhere", **folder.environment)
    elsewhere.path.mkdir()
    result = elsewhere.run("--workdir", str(folder.path), "-A", "news.celery_app", *words, program=CELERY)
    refused(result, "Did you mean 'news.channels.Issue'")


def test_celery_without_an_application_is_told_of_it(folder: Folder) -> None:
    """Celery itself would go on with an empty one."""
    refused(folder.run("pgpubsub", "listen", program=CELERY), "-A")


def test_help_says_how_listeners_are_found(folder: Folder) -> None:
    """It is what a newcomer does not find."""
    told = done(folder.run("--help"))
    assert "autodiscover_tasks" in told
    assert [line.split()[0] for line in told.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_s_help_has_examples(command: str) -> None:
    """To be copied."""
    told = CliRunner().invoke(main, [command, "--help"]).output
    assert f"pgpubsub-bridge -A blog.celery_app {command}" in told or f"pgpubsub-bridge {command}" in told


def test_version_is_the_package_s(folder: Folder) -> None:
    """For bug reports."""
    from pgpubsub_celery import __version__

    assert folder.run("--version").stdout == f"pgpubsub-bridge, version {__version__}\n"
