"""Outages of the broker and of Postgres, as a bridge and a worker of flesh and blood meet them.

Each is said once when it begins and once when it is over, nothing is lost meanwhile, and nobody has to do anything.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from pgpubsub_celery import install
from pgpubsub_celery.embedded import EmbeddedPostgres, EmbeddedValkey
from pgpubsub_celery.migrations import grant_run
from pgpubsub_celery.settings import sync_url
from tests.chaos.proxy import FaultProxy
from tests.e2e.conftest import SHOP_CHANNELS
from tests.e2e.test_listen import all_done, emit, states
from tests.fixtures import shop as app
from tests.fixtures.processes import Shop, eventually

QUICK: dict[str, Any] = {"PGPUBSUB_PUBLISH_TIMEOUT": "1", "PGPUBSUB_POLL_INTERVAL": "300"}
"""No sweep comes to the rescue of a bridge that does not go on by itself."""


# The broker


@contextlib.contextmanager
def refusing(valkey: EmbeddedValkey, admin: redis.Redis) -> Iterator[None]:
    """Connections are refused."""
    valkey.stop()
    yield
    valkey.start()


@contextlib.contextmanager
def hanging(valkey: EmbeddedValkey, admin: redis.Redis) -> Iterator[None]:
    """Connections are accepted by the system, and nothing answers."""
    valkey.pause()
    yield
    valkey.resume()


@contextlib.contextmanager
def unauthenticated(valkey: EmbeddedValkey, admin: redis.Redis) -> Iterator[None]:
    """The password was changed."""
    admin.config_set("requirepass", "another")
    admin.client_kill_filter(_type="normal", skipme=True)
    yield
    admin.config_set("requirepass", "")


@contextlib.contextmanager
def out_of_memory(valkey: EmbeddedValkey, admin: redis.Redis) -> Iterator[None]:
    """No command that writes is taken."""
    admin.config_set("maxmemory", "1")
    yield
    admin.config_set("maxmemory", "0")


@contextlib.contextmanager
def disk_full(valkey: EmbeddedValkey, admin: redis.Redis) -> Iterator[None]:
    """Snapshots fail, so nothing is written any more."""
    folder = Path(str(admin.config_get("dir")["dir"]))
    # What cannot be replaced by the snapshot, whoever the server runs as.
    (folder / str(admin.config_get("dbfilename")["dbfilename"]) / "occupied").mkdir(parents=True)
    admin.config_set("save", "3600 1")
    with contextlib.suppress(redis.ResponseError):
        admin.bgsave()
    eventually(lambda: admin.info("persistence")["rdb_last_bgsave_status"] != "ok", "the snapshot has failed")
    yield
    admin.config_set("stop-writes-on-bgsave-error", "no")


Break = Callable[[EmbeddedValkey, redis.Redis], contextlib.AbstractContextManager[None]]


def published(admin: redis.Redis, database: Engine) -> bool:
    """Whether a message of the one stored notification is in the broker."""
    with database.connect() as connection:
        id = connection.execute(text("SELECT id FROM pgpubsub_notification")).scalar_one()
    messages: Any = admin.lrange("shop", 0, -1)
    return any(f"<notification {id} of " in message for message in messages)


@pytest.mark.timeout(240)
def test_every_kind_of_broker_outage_is_said_once_and_ends_by_itself(shop: Shop, database: Engine) -> None:
    """Refused, hanging, authentication lost, out of memory, its disk full."""
    with EmbeddedValkey() as valkey:
        shop.environment["SHOP_BROKER_URL"] = valkey.url
        bridge = shop.bridge("--worker", **QUICK)
        kinds: list[Break] = [refusing, hanging, unauthenticated, out_of_memory, disk_full]
        for number, kind in enumerate(kinds, start=1):
            admin = redis.Redis.from_url(valkey.url, decode_responses=True)
            with kind(valkey, admin):
                emit(database, app.Order(number=number))
                bridge.wait_for("broker unavailable", count=number)
                eventually(lambda: states(database) == {"waiting": 1}, f"{kind.__name__}: given back")
            bridge.wait_for("broker available again", count=number)
            eventually(lambda: states(database) == {"dispatched": 1}, f"{kind.__name__}: claimed")
            # Without a worker it is there to be seen; what the broker had from an earlier outage may arrive late.
            eventually(functools.partial(published, admin, database), f"{kind.__name__}: published")
            admin.delete("shop")
            admin.close()
            with database.begin() as connection:
                connection.execute(text("DELETE FROM pgpubsub_notification"))
        assert bridge.log().count("broker unavailable") == len(kinds)
        assert bridge.log().count("broker available again") == len(kinds)
        assert "Traceback" not in bridge.log()
        shop.worker()
        emit(database, app.Order(number=7))
        all_done(database, {("order", 7): 1})


def test_a_bridge_whose_broker_is_out_of_reach_leaves_the_doors_to_another(shop: Shop, database: Engine) -> None:
    """Its network is broken, not the broker: the other bridge keeps the doors, and hears every ring."""
    broker = make_url(shop.broker_url)
    assert broker.port is not None
    proxy = FaultProxy(broker.port)
    try:
        through = broker.set(port=proxy.port).render_as_string(hide_password=False)
        shop.worker()
        broken = shop.bridge("--worker", SHOP_BROKER_URL=through, **QUICK)
        shop.bridge("--worker", **QUICK)
        proxy.close()
        number = 0
        while "broker unavailable" not in broken.log():
            # Whichever of them was quicker has it.
            number += 1
            emit(database, app.Order(number=number))
            all_done(database, {("order", n): 1 for n in range(1, number + 1)})
        # The first is down for good. Neither a sweep nor luck brings these.
        for _ in range(5):
            number += 1
            emit(database, app.Order(number=number))
            all_done(database, {("order", n): 1 for n in range(1, number + 1)})
    finally:
        with contextlib.suppress(OSError, ValueError):
            proxy.close()


# Postgres


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A Postgres of the test's own, to be treated badly."""
    with EmbeddedPostgres(fsync=False) as server:
        yield server


def prepared(server: EmbeddedPostgres) -> Engine:
    """Return an engine on the server, with the shop's tables."""
    engine = create_engine(sync_url(server.url))
    app.Base.metadata.create_all(engine)
    install(engine, channels=SHOP_CHANNELS)
    return engine


@pytest.mark.timeout(240)
def test_a_postgres_that_restarts_or_crashes_is_waited_for(
    shop: Shop, server: EmbeddedPostgres, request: pytest.FixtureRequest
) -> None:
    """Said once each time; what was stored, in flight or not, is done when it is back."""
    engine = prepared(server)
    shop.environment["PGPUBSUB_DATABASE_URL"] = server.url
    shop.worker()
    bridge = shop.bridge("--worker", **QUICK)
    for number, immediate in enumerate((False, True), start=1):
        emit(engine, *(app.Order(number=100 * number + n) for n in range(20)))
        server.stop(immediate=immediate)
        bridge.wait_for("database unavailable", count=number)
        server.start()
        bridge.wait_for("listening to", count=number + 1)
        engine.dispose()
        emit(engine, app.Order(number=number))
        expected = [100 * k + n for k in range(1, number + 1) for n in range(20)] + list(range(1, number + 1))
        # What a worker had taken when the server went comes again after its lease at the latest: make that now.
        with engine.begin() as connection:
            connection.execute(
                text("UPDATE pgpubsub_notification SET available_at = now() WHERE state IN ('dispatched', 'running')")
            )
        with engine.begin() as connection:
            connection.execute(text("SELECT pgpubsub_ring('tests.fixtures.shop.Order')"))
        all_done(engine, {("order", n): 1 for n in expected})
        assert bridge.log().count("database unavailable") == number
    engine.dispose()


def test_a_connection_limit_is_waited_out(shop: Shop, server: EmbeddedPostgres) -> None:
    """Too many connections are an outage like any other: said once, with the server's own words."""
    engine = prepared(server)
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE runner LOGIN CONNECTION LIMIT 1"))
        grant_run(connection, "runner")
        connection.execute(text("GRANT ALL ON ALL TABLES IN SCHEMA public TO runner"))
    url = make_url(server.url).set(username="runner").render_as_string(hide_password=False)
    bridge = shop.bridge("--worker", ready=False, PGPUBSUB_DATABASE_URL=url, **QUICK)
    bridge.wait_for("database unavailable.*too many connections for role")
    with engine.begin() as connection:
        connection.execute(text("ALTER ROLE runner CONNECTION LIMIT -1"))
    bridge.wait_for("listening to")
    assert bridge.log().count("database unavailable") == 1
    assert bridge.log().count("database available again") == 1
    engine.dispose()


def test_a_replica_taken_for_the_primary_is_refused_with_the_fix_until_it_is_promoted(
    shop: Shop, server: EmbeddedPostgres
) -> None:
    """A standby cannot LISTEN: the bridge says which address is wrong, and goes on when a failover makes it right."""
    prepared(server).dispose()
    server.stop()
    copy = EmbeddedPostgres(fsync=False)
    # With owners and modes, which Postgres insists on.
    subprocess.run(["cp", "-a", server.directory / "data", copy.directory / "data"], check=True)
    (copy.directory / "data" / "standby.signal").touch()
    with standby(copy) as url:
        bridge = shop.bridge("--worker", ready=False, PGPUBSUB_DATABASE_URL=url, **QUICK)
        bridge.wait_for("database unavailable.*read-only replica.*point database_url at the primary")
        engine = create_engine(sync_url(url))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT pg_promote()")).scalar()
        bridge.wait_for("listening to")
        assert bridge.log().count("database unavailable") == 1
        engine.dispose()


@contextlib.contextmanager
def standby(server: EmbeddedPostgres) -> Iterator[str]:
    """Start a server whose data was copied; yield its URL."""
    with server:
        yield server.url


# Clocks


def test_clocks_that_jump_decide_nothing(shop: Shop, database: Engine) -> None:
    """A bridge a day ahead and a worker a day behind: what is due, leased and retried is Postgres's time alone."""
    shop.bridge("--worker", SHOP_CLOCK="86400")
    shop.worker(SHOP_CLOCK="-86400")
    emit(database, app.Order(number=1))
    from pgpubsub_celery import notify

    def later(countdown: float, number: int) -> None:
        with database.begin() as connection:
            notify(connection, app.Order(number=number), countdown=countdown)

    later(0.5, 2)
    later(3600, 3)
    later(0.2, app.STUBBORN)
    done: dict[tuple[str, int], Any] = {("order", 1): 1, ("order", 2): 1, ("order", app.STUBBORN): 1}
    eventually(lambda: states(database) == {"waiting": 1}, "only what is due in an hour is left")
    with database.connect() as connection:
        rows = connection.execute(text("SELECT kind, value FROM effect")).all()
    assert {(row.kind, row.value): 1 for row in rows} == done
