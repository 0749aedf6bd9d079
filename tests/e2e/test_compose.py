"""docker-compose.yml, without Docker: what it names exists, and its commands, run here, do what it is for."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from pgpubsub_celery.cli import main
from tests.fixtures.command_lines import PROGRAMS, parse
from tests.fixtures.processes import BIN, ROOT, Running, eventually

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def commands(words: list[str]) -> Iterator[list[str]]:
    """Return the commands that a list of words means, also through a shell."""
    if words[:2] == ["sh", "-c"]:
        words = ["CMD-SHELL", words[2]]
    if words[0] == "CMD-SHELL":
        for part in re.split(r"&&|\|", words[1].replace("$$", "$")):
            yield [word for word in shlex.split(part) if word != "exec"]
    else:
        yield words[1:] if words[0] == "CMD" else words


def all_commands() -> Iterator[list[str]]:
    for service in SERVICES.values():
        for words in (service.get("command"), service.get("healthcheck", {}).get("test")):
            if words:
                yield from commands(words)


OUR_COMMANDS = [words for words in all_commands() if words[0] in PROGRAMS]


# The file


def test_the_services_are_what_a_deployment_needs() -> None:
    """Two servers, one step that ends, two that stay."""
    assert set(SERVICES) == {"postgres", "valkey", "install", "bridge", "worker"}
    assert set(OURS) == {"install", "bridge", "worker"}


@pytest.mark.parametrize("words", OUR_COMMANDS, ids=" ".join)
def test_commands_and_options_exist(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line itself reads them."""
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    assert len(parse(PROGRAMS[words[0]], words)) > 1


def test_a_wrong_option_would_be_noticed() -> None:
    """The parsing above is the real one."""
    with pytest.raises(click.NoSuchOption):
        parse(main, ["pgpubsub-bridge", "-A", "x", "listen", "--no-such-option"])
    with pytest.raises(click.UsageError):
        parse(main, ["pgpubsub-bridge", "no-such-command"])


def test_every_application_that_is_named_can_be_loaded() -> None:
    """With the broker that the environment names."""
    broker = OURS["bridge"]["environment"]["CELERY_BROKER_URL"]
    paths = {words[words.index("-A") + 1] for words in OUR_COMMANDS if "-A" in words}
    assert paths == {"pgpubsub_celery.demo.celery_app"}
    script = f"""
from pgpubsub_celery.apps import load_app
for path in {sorted(paths)}:
    app = load_app(path)
    print(app.main, app.conf.broker_url)
"""
    loaded = subprocess.run(  # in a process of its own: what it declares stays declared
        [sys.executable, "-c", script],
        env={**os.environ, "CELERY_BROKER_URL": broker},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert loaded.stdout == f"blog {broker}\n"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_can_be_waited_for(name: str) -> None:
    """By a health check, or because another waits for its end; and whoever waits names the right condition."""
    conditions = {
        condition["condition"]
        for service in SERVICES.values()
        for other, condition in service.get("depends_on", {}).items()
        if other == name
    }
    if "healthcheck" in SERVICES[name]:
        assert conditions <= {"service_healthy"}
        assert SERVICES[name]["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
        assert SERVICES[name]["restart"] == "unless-stopped"
    else:
        assert conditions == {"service_completed_successfully"}
        assert "restart" not in SERVICES[name]


def test_bridge_and_worker_start_after_what_they_need() -> None:
    """Tables and broker."""
    for name in ("bridge", "worker"):
        assert set(SERVICES[name]["depends_on"]) == {"install", "valkey"}
    assert set(SERVICES["install"]["depends_on"]) == {"postgres"}


def test_addresses_are_those_of_the_other_services() -> None:
    """User, password and database are those that the server is set up with."""
    server = SERVICES["postgres"]["environment"]
    for service in OURS.values():
        database = make_url(service["environment"]["PGPUBSUB_DATABASE_URL"])
        broker = make_url(service["environment"]["CELERY_BROKER_URL"])
        assert (database.host, database.port, broker.host, broker.port) == ("postgres", 5432, "valkey", 6379)
        assert (database.username, database.password) == (server["POSTGRES_USER"], server["POSTGRES_PASSWORD"])
        assert database.database == server.get("POSTGRES_DB", server["POSTGRES_USER"])


@pytest.mark.parametrize(("name", "image", "port"), [("postgres", "postgres", 5432), ("valkey", "valkey/valkey", 6379)])
def test_servers_have_a_pinned_image_and_a_port_on_this_machine_only(name: str, image: str, port: int) -> None:
    """Both are without any protection worth the name."""
    assert re.fullmatch(rf"{image}:\d+", SERVICES[name]["image"])
    (published,) = SERVICES[name]["ports"]
    assert re.fullmatch(rf"127\.0\.0\.1:\$\{{\w+:-\d{{5}}\}}:{port}", published)


def test_ours_publish_no_port_and_do_not_run_as_root() -> None:
    """There is nothing to connect to."""
    for service in OURS.values():
        assert "ports" not in service
        assert service["build"]["dockerfile_inline"].strip().endswith("USER nobody")


def test_the_image_has_what_the_build_reads() -> None:
    """Every file that is copied exists, and the package's own metadata need no other."""
    dockerfile = OURS["bridge"]["build"]["dockerfile_inline"]
    copied = [word for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]]
    assert set(copied) == {"pyproject.toml", "README.md", "LICENSE", "pgpubsub_celery"}
    assert all((ROOT / name).exists() for name in copied)


# What it does


class Compose:
    """The commands of our services, with servers of the test's own in place of the containers'."""

    def __init__(self, folder: Path, database_url: str, broker_url: str) -> None:
        self._folder = folder
        self._environment = {
            "PGPUBSUB_DATABASE_URL": database_url,
            "CELERY_BROKER_URL": broker_url,
            "HOSTNAME": socket.gethostname(),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        words = ["sh", "-c", words[1].replace("$$", "$")] if words[0] == "CMD-SHELL" else words
        environment = {**os.environ, **self._environment}
        return subprocess.run(
            words, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def start(self, name: str) -> Running:
        """Start the service's command."""
        program, *rest = SERVICES[name]["command"]
        return Running([str(BIN / program), *rest], self._folder / f"{name}.log", self._environment)

    def healthy(self, name: str) -> bool:
        """Whether its health check succeeds."""
        return self.run(SERVICES[name]["healthcheck"]["test"]).returncode == 0


@pytest.fixture
def compose(tmp_path: Path, database_url: str, broker_url: str) -> Compose:
    """The commands, on an empty database and an empty broker."""
    return Compose(tmp_path, database_url, broker_url)


def test_its_commands_make_a_post_of_an_author(compose: Compose, engine: Engine) -> None:
    """From an empty database, in the order of the file; services are healthy when they run, and not before."""
    installed = compose.run(SERVICES["install"]["command"])
    assert installed.returncode == 0, installed.stderr
    assert not compose.healthy("bridge")
    assert not compose.healthy("worker")
    running = [compose.start("bridge"), compose.start("worker")]
    try:
        for name in ("bridge", "worker"):
            eventually(lambda name=name: compose.healthy(name), f"{name} is healthy")  # type: ignore[misc]
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO author (name, password_hash) VALUES ('Ann', '')"))
        posts = eventually(lambda: contents(engine), "a post")
        assert posts == ["Welcome, Ann!"]
        assert [one.stop() for one in running] == [0, 0]
    finally:
        for one in running:
            one.destroy()


def test_install_can_be_repeated(compose: Compose) -> None:
    """Each `docker compose up` runs it again."""
    for _ in range(2):
        installed = compose.run(SERVICES["install"]["command"])
        assert installed.returncode == 0, installed.stderr
    assert "everything is in place" in installed.stdout


def contents(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT content FROM post")).scalars())
