"""Health of `listen`: alive while its loop turns, ready while it listens; by HTTP and by a file, in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from sqlalchemy import Engine, text

from tests.fixtures.commands import done
from tests.fixtures.processes import Running, Shop, eventually

QUICK: dict[str, Any] = {"PGPUBSUB_POLL_INTERVAL": "0.5", "PGPUBSUB_HEALTH_TIMEOUT": "1.5"}


def port_of(bridge: Running) -> int:
    """Return the port that it says it serves."""
    bridge.wait_for(r"health on port \d+")
    found = re.search(r"health on port (\d+)", bridge.log())
    assert found is not None
    return int(found[1])


def ask(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Return status and body of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def is_ready(port: int) -> bool:
    return ask(port, "/readyz")[0] == 200


def is_alive(port: int) -> bool:
    return ask(port, "/livez")[0] == 200


@pytest.mark.parametrize("how", [["--processes", "2"], ["--processes", "1", "--worker-start-method", "fork"]])
def test_a_bridge_that_hangs_is_not_alive(shop: Shop, how: list[str]) -> None:
    """One of the processes is enough; it is told which, and it lives again when it turns again."""
    bridge = shop.bridge("--health-port", "0", *how, **QUICK)
    port = port_of(bridge)
    eventually(lambda: is_ready(port), "ready")
    code, told = ask(port, "/livez")
    assert code == 200
    assert all(one["alive"] and one["ready"] for one in told["processes"])
    hanging = psutil.Process(told["processes"][-1]["pid"])
    hanging.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: not is_alive(port), "the one that hangs is noticed")
        code, told = ask(port, "/readyz")
        assert (code, told["ok"]) == (503, False)
        assert [one["alive"] for one in told["processes"]] == [True] * (len(told["processes"]) - 1) + [False]
    finally:
        hanging.send_signal(signal.SIGCONT)
    eventually(lambda: is_alive(port) and is_ready(port), "alive and ready again")
    assert bridge.stop() == 0


def test_a_lost_database_makes_it_unready_and_not_dead(shop: Shop, database: Engine) -> None:
    """Starting it anew would not help. A lost broker changes neither: what it hears of waits in the table."""
    bridge = shop.bridge("--health-port", "0", **QUICK)
    port = port_of(bridge)
    eventually(lambda: is_ready(port), "ready")
    name = database.url.database
    admin = database.url.set(database="postgres")
    connection = psycopg2.connect(admin.render_as_string(hide_password=False).replace("+psycopg2", ""))
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            eventually(lambda: not is_ready(port), "not ready without its database")
            bridge.wait_for("database unavailable")
            assert is_alive(port)
            cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        eventually(lambda: is_ready(port), "ready again")
        assert is_alive(port)
    finally:
        connection.close()


def test_a_broker_that_is_away_makes_it_neither(shop: Shop, database: Engine) -> None:
    """It listens, and its loop turns: it says so though it can publish nothing."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        nowhere = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
    bridge = shop.bridge("--health-port", "0", "--recover", SHOP_BROKER_URL=nowhere, **QUICK)
    port = port_of(bridge)
    with database.begin() as connection:
        connection.execute(text("INSERT INTO author (id, name) VALUES (1, 'Ann')"))
    bridge.wait_for("broker unavailable")
    eventually(lambda: is_ready(port), "ready")
    assert is_alive(port)


def test_a_worker_s_health_goes_on_while_it_becomes_a_parent(shop: Shop, database: Engine, tmp_path: Path) -> None:
    """`--worker` serves it from its one process, and after a failure from the parent of the next, on the same port."""
    file = tmp_path / "health"
    bomb = str(tmp_path / "bomb")
    bridge = shop.bridge("--worker", "--health-port", "0", "--health-file", str(file), SHOP_BOMB=bomb, **QUICK)
    port = port_of(bridge)
    eventually(lambda: is_ready(port), "ready")
    (before,) = ask(port, "/livez")[1]["processes"]
    assert before["pid"] == bridge.pid
    eventually(file.exists, "the file is there")
    assert done(shop.run("health", "--file", str(file))) in ("ready\n", "alive\n")

    (tmp_path / "bomb").touch()
    with database.begin() as connection:
        connection.execute(text("INSERT INTO author (id, name) VALUES (1, 'Ann')"))
    bridge.wait_for("failed pid")
    eventually(lambda: is_ready(port), "the next one is ready")
    (after,) = ask(port, "/livez")[1]["processes"]
    assert after["pid"] != bridge.pid
    eventually(lambda: json.loads(file.read_text())["processes"][0]["pid"] == after["pid"], "the file tells of it")
    assert bridge.stop() == 0
    assert not file.exists()


def test_a_file_that_nobody_renews_says_so(shop: Shop, tmp_path: Path) -> None:
    """Killed outright, a supervisor leaves its file behind: its age tells."""
    file = tmp_path / "health"
    bridge = shop.bridge("--health-file", str(file), **QUICK)
    eventually(file.exists, "the file is there")
    done(shop.run("health", "--file", str(file)))
    bridge.signal(signal.SIGKILL)
    bridge.code()
    os.utime(file, (0, 0))
    late = shop.run("health", "--file", str(file))
    assert (late.returncode, late.stdout) == (1, "")
    assert "was renewed" in late.stderr
    gone = shop.run("health", "--file", str(tmp_path / "nothing"))
    assert (gone.returncode, "there is no" in gone.stderr) == (1, True)


def test_what_cannot_be_served_is_refused_before_anything_starts(shop: Shop, tmp_path: Path) -> None:
    """A port that is taken, a folder that is not there: one line, exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = shop.run("-A", "tests.fixtures.shop", "listen", "--health-port", port, "--health-host", "127.0.0.1")
    assert (refused.returncode, f"port {port}" in refused.stderr) == (2, True)
    nowhere = str(tmp_path / "no" / "file")
    refused = shop.run("-A", "tests.fixtures.shop", "listen", "--health-file", nowhere)
    assert (refused.returncode, nowhere in refused.stderr) == (2, True)
