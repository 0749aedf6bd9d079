"""Listeners with `session`: effect and acknowledgement are one transaction, whatever the listener or Postgres does."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from psycopg2 import sql
from psycopg2.extras import DictCursor, execute_values
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from pgpubsub_celery import Channel, channel_task, notify, notify_many
from pgpubsub_celery.messages import Message, notification_task_id
from pgpubsub_celery.runs import Run
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.shortcut import Shortcut
from tests.fixtures.deliveries import Deliveries
from tests.fixtures.garbage import collected

SECRET = "correct horse battery staple"


@pytest.fixture
def app(installed_url: str) -> Iterator[Celery]:
    """An application on the test's database."""
    app = Celery("locked", broker="memory://", set_as_current=True)
    app.conf.pgpubsub_database_url = installed_url
    app.conf.pgpubsub_bundle_target = 60.0
    yield app
    app.close()


class Work:
    """One channel, one listener whose behaviour each test chooses, and what can be seen of them."""

    def __init__(self, app: Celery, engine: Engine, **options: Any) -> None:
        @dataclasses.dataclass
        class Change(Channel):
            channel_name = "work.Change"
            lock_notifications = True
            value: int
            secret: str = SECRET

        self.channel = Change
        self.app = app
        self.engine = engine
        self.calls: list[tuple[int, int]] = []
        self.seen: list[Any] = []
        self.do: Any = lambda task, value, session: self.effect(session, value)

        @channel_task(Change, app=app, bind=True, name="work.handle", **options)
        def handle(task: Any, value: int, session: Session, notification: Any) -> Any:
            self.calls.append((value, task.request.retries))
            self.seen.append((task.request, notification))
            return self.do(task, value, session)

        self.task: Any = handle
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE effect (value int)"))
        self.deliveries = Deliveries(app, engine)

    def effect(self, session: Session, value: int) -> None:
        session.execute(text("INSERT INTO effect VALUES (:value)"), {"value": value})

    def emit(self, *values: int) -> None:
        with Session(self.engine) as session, session.begin():
            notify_many(session, [self.channel(value=value) for value in values])

    @property
    def effects(self) -> list[int]:
        return sorted(self.deliveries.scalars("SELECT value FROM effect"))

    def rows(self) -> list[dict[str, Any]]:
        return self.deliveries.rows()

    @property
    def states(self) -> list[str]:
        return self.deliveries.states()


@pytest.fixture
def work(app: Celery, installed_engine: Engine, registry: None) -> Work:
    """A listener, one notification in a message."""
    return Work(app, installed_engine)


@pytest.fixture
def bundled(app: Celery, installed_engine: Engine, registry: None) -> Work:
    """The same, up to a hundred notifications in a message."""
    return Work(app, installed_engine, bundle=100)


# Done


def test_effect_and_acknowledgement_commit_together(work: Work) -> None:
    """Afterwards the effect is there and the row is not."""
    work.emit(1)
    (result,) = work.deliveries.run()
    assert result.info is None
    assert work.effects == [1]
    assert work.states == []


def test_success_is_told_only_once_it_is_committed(work: Work) -> None:
    """A receiver of task_success finds the row gone."""
    told: list[list[str]] = []

    def receiver(sender: Any, **_: Any) -> None:
        if sender.name == work.task.name:
            told.append(work.states)

    signals.task_success.connect(receiver)
    try:
        work.emit(1)
        work.deliveries.run()
    finally:
        signals.task_success.disconnect(receiver)
    assert told == [[]]


def test_the_request_is_that_of_a_task_of_its_own(bundled: Work) -> None:
    """Each notification of a bundle has its own task id, and knows which one it is."""
    bundled.emit(1, 2)
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    ids = [notification.id for _, notification in bundled.seen]
    assert ids == list(message.envelope.ids)
    assert len({request.id for request, _ in bundled.seen}) == 2
    assert all(request.called_directly is False for request, _ in bundled.seen)


def test_a_bundle_leaves_nothing_to_the_garbage_collector(bundled: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of runs a second, each with a reference to itself, would cost a fifth of them."""
    # Whoever else has been imported into this process may watch.
    for signal in (signals.task_prerun, signals.task_postrun, signals.task_success):
        monkeypatch.setattr(signal, "receivers", [])
    bundled.emit(*range(50))
    bundled.deliveries.run()
    bundled.emit(*range(50, 100))
    (message,) = bundled.deliveries.claim()
    with collected() as garbage:
        bundled.deliveries.deliver(message)
    assert not [one for one in garbage if isinstance(one, Run)]
    assert len(bundled.effects) == 100


def test_a_second_delivery_of_the_same_message_does_nothing(work: Work) -> None:
    """The broker may deliver twice."""
    work.emit(1)
    (message,) = work.deliveries.claim()
    work.deliveries.deliver(message)
    result = work.deliveries.deliver(message)
    assert work.effects == [1]
    assert work.calls == [(1, 0)]
    assert result.info is None
    assert "dropped" in result.retstr


def test_a_message_whose_row_was_published_again_does_nothing(work: Work) -> None:
    """A late message is another dispatch's."""
    work.emit(1)
    (late,) = work.deliveries.claim()
    work.deliveries.make_due()
    (current,) = work.deliveries.claim()
    work.deliveries.deliver(late)
    assert work.calls == []
    work.deliveries.deliver(current)
    assert work.effects == [1]


def test_a_row_that_another_worker_runs_is_left_to_it(work: Work) -> None:
    """Its lock says so; nobody waits for it."""
    work.emit(1)
    (message,) = work.deliveries.claim()
    with work.engine.begin() as other:
        work.deliveries.store.take_locked(other, message.envelope.ids, 1)
        work.deliveries.deliver(message)
        assert work.calls == []


def test_a_message_of_another_installation_is_refused(work: Work) -> None:
    """Row 17 of another database is not this one's row 17."""
    work.emit(1)
    (message,) = work.deliveries.claim()
    envelope = dataclasses.replace(message.envelope, installation=work.deliveries.fresh_installation())
    result = work.deliveries.deliver(Message(task=message.task, task_id=message.task_id, envelope=envelope))
    assert "different databases" in str(result.info.retval)
    assert work.states == ["dispatched"]
    assert work.calls == []


# What listeners do with what they are given


def test_a_listener_that_commits_its_session_is_acknowledged_with_all_it_did(work: Work) -> None:
    """Its commit ends at a savepoint."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, 1)
        session.commit()
        work.effect(session, 2)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.effects == [1, 2]
    assert work.states == []


def test_what_a_listener_rolls_back_is_gone_and_the_rest_stays(work: Work) -> None:
    """Its rollback ends at a savepoint."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, 1)
        session.rollback()
        work.effect(session, 2)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.effects == [2]
    assert work.states == []


def test_a_listener_that_closes_its_session_loses_what_it_did_not_commit(work: Work) -> None:
    """As with any session."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, 1)
        session.commit()
        work.effect(session, 2)
        session.close()

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.effects == [1]
    assert work.states == []


def test_a_listener_that_commits_and_then_fails_leaves_nothing(bundled: Work) -> None:
    """Effect and acknowledgement are one; its neighbours come again, alone, and are applied once."""

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2:
            session.commit()
            raise ValueError("afterwards")

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run()
    assert bundled.effects == []
    bundled.deliveries.run_until_idle()
    assert bundled.effects == [1, 3]
    assert bundled.states == ["failed"]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "  /* x */ commit", "-- x\nEND", "ABORT", "BEGIN"])
def test_a_listener_cannot_end_the_transaction_by_a_statement(bundled: Work, statement: str) -> None:
    """It fails with a message that says what to do instead; the others are not touched."""

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2:
            session.execute(text(statement))

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run_until_idle()
    assert bundled.effects == [1, 3]
    (row,) = bundled.rows()
    assert row["state"] == "failed"
    assert "session.commit()" in row["error"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_listener_cannot_end_the_transaction_through_the_connection(bundled: Work, end: str) -> None:
    """Nor by SQLAlchemy's own methods."""

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2:
            getattr(session.connection(), end)()

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run_until_idle()
    assert bundled.effects == [1, 3]
    (row,) = bundled.rows()
    assert row["state"] == "failed"


def test_rollback_to_a_savepoint_is_allowed(work: Work) -> None:
    """It does not end the transaction."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, 1)
        session.execute(text("SAVEPOINT mine"))
        work.effect(session, 2)
        session.execute(text("ROLLBACK TO SAVEPOINT mine"))

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.effects == [1]
    assert work.states == []


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_ended_behind_our_back_applies_nothing_twice(bundled: Work, end: str) -> None:
    """By the driver's own connection: what had been done is acknowledged or comes again, as it was committed or not."""

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2 and not bundled.deliveries.scalars("SELECT 1 FROM effect WHERE value = 2"):
            getattr(session.connection().connection.driver_connection, end)()

    bundled.do = do
    bundled.emit(1, 2, 3)
    for _ in range(3):
        bundled.deliveries.run()
        bundled.deliveries.make_due()
    bundled.do = lambda task, value, session: bundled.effect(session, value)
    bundled.deliveries.execute("UPDATE pgpubsub_notification SET state = 'waiting', available_at = now()")
    bundled.deliveries.run_until_idle()
    assert sorted(set(bundled.effects) - {2}) == [1, 3]
    assert bundled.effects.count(1) == 1
    assert bundled.effects.count(3) == 1


# Failures


def test_a_failed_listener_leaves_a_failed_row_and_no_effect(work: Work) -> None:
    """With error, traceback, time and task id, and without a due time."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, value)
        raise ValueError("broken")

    work.do = do
    work.emit(1)
    (result,) = work.deliveries.run()
    assert result.info.state == "FAILURE"
    (row,) = work.rows()
    assert row["state"] == "failed"
    assert row["error"] == "ValueError: broken"
    assert "raise ValueError" in row["traceback"]
    assert row["available_at"] is None
    assert row["failed_at"] is not None
    assert row["task_id"] == work.seen[0][0].id
    assert work.effects == []


def test_a_stored_traceback_has_no_statement_parameters(work: Work) -> None:
    """Nor any payload."""

    def do(task: Any, value: int, session: Session) -> None:
        session.execute(text("SELECT CAST(:secret AS text), 1 / (CAST(:zero AS int))"), {"secret": SECRET, "zero": 0})

    work.do = do
    work.emit(1)
    work.deliveries.run()
    (row,) = work.rows()
    assert "division by zero" in row["error"]
    assert SECRET not in row["error"] + row["traceback"]


def test_one_failure_in_a_bundle_fails_alone(bundled: Work) -> None:
    """Its neighbours are done in the same message."""

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2:
            raise ValueError("broken")

    bundled.do = do
    bundled.emit(1, 2, 3)
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    assert bundled.effects == [1, 3]
    assert bundled.states == ["failed"]


def test_a_payload_that_cannot_be_decoded_fails_alone(bundled: Work) -> None:
    """The error names the field and the versions, and the task's failure signal is sent."""
    bundled.deliveries.execute("CREATE TABLE alembic_version AS SELECT 'r7' AS version_num")
    bundled.emit(1, 2, 3)
    bundled.deliveries.execute("UPDATE alembic_version SET version_num = 'r9'")
    bundled.deliveries.execute(
        "UPDATE pgpubsub_notification SET payload = '{\"value\": \"x\"}' WHERE payload->>'value' = '2'"
    )
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    assert bundled.effects == [1, 3]
    (row,) = bundled.rows()
    assert row["state"] == "failed"
    assert "value" in row["error"]
    assert "stored at version r7 of the database, which is now at r9" in row["error"]


def test_a_run_that_never_ends_is_counted_and_fails_in_the_end(work: Work) -> None:
    """A worker killed in the middle of a redispatched row leaves its start behind."""

    class Killed(BaseException):
        pass

    def do(task: Any, value: int, session: Session) -> None:
        raise Killed

    work.do = do
    work.emit(1)
    for expected in (0, 1, 2, 3):  # the first run of a row is not counted: it may have been a neighbour's fault
        (message,) = work.deliveries.claim()
        with pytest.raises(Killed):
            work.deliveries.deliver(message)
        assert work.rows()[0]["starts"] == expected
        work.deliveries.make_due()
    assert work.deliveries.claim() == []
    (row,) = work.rows()
    assert row["state"] == "failed"
    assert "never finished" in row["error"]


# What is nobody's fault


@pytest.mark.parametrize(
    ("code", "name"),
    [("40P01", "deadlock_detected"), ("55P03", "lock_not_available"), ("40001", "serialization_failure")],
)
def test_transient_errors_give_the_row_back(bundled: Work, code: str, name: str) -> None:
    """Neither failed nor retried: it comes again, alone, as if it had never run."""
    raised: list[int] = []

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2 and not raised:
            raised.append(value)
            session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{name}'; END $$"))

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run()
    assert "failed" not in bundled.states
    assert raised == [2]
    bundled.deliveries.make_due()
    bundled.deliveries.run_until_idle()
    assert bundled.effects == [1, 2, 3]
    assert bundled.states == []


def test_a_lost_connection_gives_everything_back(bundled: Work) -> None:
    """Also what had been done before it in the same transaction; starts are not held against anybody."""
    lost: list[int] = []

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2 and len(lost) < 5:
            lost.append(value)
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    bundled.do = do
    bundled.emit(1, 2, 3)
    for _ in range(10):
        bundled.deliveries.run()
        bundled.deliveries.make_due()
    assert bundled.effects == [1, 2, 3]
    assert bundled.states == []
    assert len(lost) == 5


def test_a_real_deadlock_between_two_listeners_ends_well(work: Work) -> None:
    """The victim runs again."""
    import threading

    work.deliveries.execute(
        "CREATE TABLE account (id int PRIMARY KEY, n int); INSERT INTO account VALUES (1, 0), (2, 0)"
    )
    meeting = threading.Barrier(2, timeout=30)
    first = {1: True, 2: True}

    def do(task: Any, value: int, session: Session) -> None:
        session.execute(text("UPDATE account SET n = n + 1 WHERE id = :id"), {"id": value})
        if first.pop(value, False):
            meeting.wait()
        session.execute(text("UPDATE account SET n = n + 1 WHERE id = :id"), {"id": 3 - value})

    work.do = do
    work.emit(1, 2)
    threads = [threading.Thread(target=work.deliveries.deliver, args=(m,)) for m in work.deliveries.claim()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    work.deliveries.make_due()
    work.deliveries.run_until_idle()
    assert work.deliveries.scalars("SELECT n FROM account ORDER BY id") == [2, 2]
    assert work.states == []


def test_statement_timeout_is_the_listeners_failure(work: Work) -> None:
    """Its statement was too slow, and would be the next time."""

    def do(task: Any, value: int, session: Session) -> None:
        session.execute(text("SET LOCAL statement_timeout = '20ms'"))
        session.execute(text("SELECT pg_sleep(20)"))

    work.do = do
    work.emit(1)
    work.deliveries.run()
    (row,) = work.rows()
    assert row["state"] == "failed"
    assert "statement timeout" in row["error"]


def test_a_pause_too_long_for_the_server_is_the_listeners_failure(work: Work) -> None:
    """idle_in_transaction_session_timeout would strike the next time, too."""
    import select

    (database,) = work.deliveries.scalars("SELECT current_database()")
    work.deliveries.execute(f"ALTER DATABASE {database} SET idle_in_transaction_session_timeout = '50ms'")

    def do(task: Any, value: int, session: Session) -> None:
        driver: Any = session.connection().connection.driver_connection
        select.select([driver], [], [], 30)
        session.execute(text("SELECT 1"))

    work.do = do
    work.emit(1)
    work.deliveries.run()
    (row,) = work.rows()
    assert row["state"] == "failed"
    assert "idle_in_transaction_session_timeout" in row["error"]


def test_a_deferred_constraint_fails_the_notification_that_broke_it(bundled: Work) -> None:
    """Not its neighbours, although Postgres checks it at COMMIT; and constraints stay deferred within a run."""
    bundled.deliveries.execute(
        "CREATE TABLE parent (id int PRIMARY KEY); "
        "CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        session.execute(text("INSERT INTO child VALUES (:id)"), {"id": value})
        if value != 2:
            session.execute(text("INSERT INTO parent VALUES (:id)"), {"id": value})

    bundled.do = do
    bundled.emit(1, 2, 3)
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    assert bundled.effects == [1, 3]
    (row,) = bundled.rows()
    assert row["state"] == "failed"
    assert "foreign key" in row["error"]


def test_a_deferred_constraint_fails_a_notification_that_is_alone(work: Work) -> None:
    """The commit is refused inside its run, so Celery tells of a failure."""
    work.deliveries.execute("CREATE TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, value)
        session.execute(text("INSERT INTO once VALUES (1), (1)"))

    work.do = do
    work.emit(1)
    (result,) = work.deliveries.run()
    assert isinstance(result.info.retval, IntegrityError)
    assert work.states == ["failed"]
    assert work.effects == []


def test_a_soft_time_limit_in_a_bundle_gives_the_rest_back(bundled: Work) -> None:
    """It was the bundle's limit, so what is done is committed and nobody is to blame."""

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        if value == 2 and len(bundled.calls) < 3:
            raise SoftTimeLimitExceeded

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run()
    assert bundled.effects == [1]
    assert bundled.states == ["waiting", "waiting"]
    bundled.deliveries.run_until_idle()
    assert bundled.effects == [1, 2, 3]


def test_a_soft_time_limit_of_one_alone_is_its_failure(work: Work) -> None:
    """As Celery has it."""

    def do(task: Any, value: int, session: Session) -> None:
        raise SoftTimeLimitExceeded

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.states == ["failed"]


def test_a_slow_bundle_commits_what_is_done_and_gives_the_rest_back(
    app: Celery, installed_engine: Engine, registry: None
) -> None:
    """Other workers may have the rest."""
    app.conf.pgpubsub_bundle_target = 1e-9
    work = Work(app, installed_engine, bundle=100)
    work.emit(1, 2, 3)
    work.deliveries.run()
    assert work.effects == [1]
    assert work.states == ["waiting", "waiting"]
    assert work.deliveries.run_until_idle() == 2
    assert work.effects == [1, 2, 3]


def test_more_than_sixty_notifications_take_several_transactions(bundled: Work) -> None:
    """Above 64 savepoints the whole server would suffer."""
    transactions: list[int] = []

    def do(task: Any, value: int, session: Session) -> None:
        bundled.effect(session, value)
        transactions.append(session.execute(text("SELECT pg_current_xact_id()::text")).scalar_one())

    bundled.do = do
    bundled.emit(*range(100))
    (message,) = bundled.deliveries.claim()
    assert len(message.envelope.ids) == 100
    bundled.deliveries.deliver(message)
    assert bundled.effects == list(range(100))
    assert sorted(transactions.count(one) for one in set(transactions)) == [40, 60]


def test_listeners_that_leave_their_session_alone_share_one_transaction(bundled: Work) -> None:
    """Without savepoints nothing can overflow: once that is known, a message is one transaction."""
    bundled.do = lambda task, value, session: None
    runtime = Runtime.of(bundled.app)
    runtime.installation()
    commits: list[int] = []
    with runtime.connect() as connection:
        event.listen(connection.engine, "commit", lambda _: commits.append(1))
    for expected in (2, 1):
        bundled.emit(*range(100))
        (message,) = bundled.deliveries.claim()
        bundled.deliveries.deliver(message)
        assert len(commits) == expected
        commits.clear()
    assert bundled.rows() == []


def test_savepoints_that_turn_out_to_be_many_end_the_transaction_early(bundled: Work) -> None:
    """A listener that commits in between needs several: never more than sixty-four in a transaction."""
    transactions: list[int] = []

    def do(task: Any, value: int, session: Session) -> None:
        for _ in range(4):
            bundled.effect(session, value)
            session.commit()
            transactions.append(session.execute(text("SELECT pg_current_xact_id()::text")).scalar_one())

    bundled.do = do
    bundled.emit(*range(40))
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    assert bundled.effects == sorted(list(range(40)) * 4)
    assert max(transactions.count(one) for one in set(transactions)) <= 64
    assert bundled.rows() == []


# The savepoint that goes with a listener's first statement


def _by_cursor(cursor: Any, value: int) -> None:
    cursor.execute("INSERT INTO effect VALUES (%s)", (value,))


def _by_bytes(cursor: Any, value: int) -> None:
    cursor.execute(b"INSERT INTO effect VALUES (%s)" % str(value).encode())


def _by_composition(cursor: Any, value: int) -> None:
    cursor.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier("effect"), sql.Literal(value)))


def _by_many(cursor: Any, value: int) -> None:
    cursor.executemany("INSERT INTO effect VALUES (%s)", [(value,)])


def _by_values(cursor: Any, value: int) -> None:
    execute_values(cursor, "INSERT INTO effect VALUES %s", [(value,)])


def _by_copy(cursor: Any, value: int) -> None:
    cursor.copy_expert("COPY effect FROM STDIN", io.StringIO(f"{value}\n"))


def _by_another_kind_of_cursor(cursor: Any, value: int) -> None:
    with cursor.connection.cursor(cursor_factory=DictCursor) as other:
        other.execute("INSERT INTO effect VALUES (%(value)s)", {"value": value})


@pytest.mark.parametrize(
    "write", [_by_cursor, _by_bytes, _by_composition, _by_many, _by_values, _by_copy, _by_another_kind_of_cursor]
)
def test_what_a_listener_does_through_the_driver_is_in_its_savepoint(bundled: Work, write: Any) -> None:
    """Whatever its first statement is, and however it is sent: a failure takes back its own, and nobody else's."""

    def do(task: Any, value: int, session: Session) -> None:
        cursor: Any = session.connection().connection.cursor()
        write(cursor, value)
        cursor.close()
        if value == 2:
            raise ValueError("two")

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run()
    assert bundled.effects == [1, 3]
    assert bundled.states == ["failed"]


def test_a_session_that_sends_nothing_costs_no_savepoint(bundled: Work) -> None:
    """Begun, and committed or rolled back, with nothing in between."""

    def do(task: Any, value: int, session: Session) -> None:
        session.connection()
        session.rollback() if value % 2 else session.commit()
        if value == 5:
            bundled.effect(session, value)

    bundled.do = do
    bundled.emit(*range(100))
    (message,) = bundled.deliveries.claim()
    bundled.deliveries.deliver(message)
    assert bundled.effects == [5]
    assert bundled.rows() == []
    assert Runtime.of(bundled.app).savepoints_each["work.handle"] < 0.03


@pytest.mark.parametrize("copes", [True, False])
def test_a_statement_that_the_driver_cannot_put_together_harms_nobody(bundled: Work, copes: bool) -> None:
    """It was not sent, and the savepoint not with it: that goes with the next, or is not needed."""

    def do(task: Any, value: int, session: Session) -> None:
        if value == 2:
            with contextlib.suppress(DBAPIError) if copes else contextlib.nullcontext():
                session.execute(text("INSERT INTO effect VALUES (:value)"), {"value": {}})
        bundled.effect(session, value)
        if value == 2:
            bundled.effect(session, 20)

    bundled.do = do
    bundled.emit(1, 2, 3)
    assert bundled.deliveries.run_until_idle() == 1
    assert bundled.effects == ([1, 2, 3, 20] if copes else [1, 3])
    assert bundled.states == ([] if copes else ["failed"])


def test_a_statement_that_nobody_can_parse_fails_its_own_notification(bundled: Work) -> None:
    """Its savepoint, which went with it, was never set: what had been done before is done again, each once."""

    def do(task: Any, value: int, session: Session) -> None:
        session.execute(text("INSERT INTTO effect VALUES (2)")) if value == 2 else bundled.effect(session, value)

    bundled.do = do
    bundled.emit(1, 2, 3)
    bundled.deliveries.run_until_idle()
    assert bundled.effects == [1, 3]
    (row,) = bundled.rows()
    assert (row["state"], row["payload"]["value"]) == ("failed", 2)
    assert "syntax error" in row["error"]


@pytest.mark.parametrize("nested", [True, False])
def test_a_listener_may_cope_with_a_statement_that_nobody_can_parse(bundled: Work, nested: bool) -> None:
    """In a savepoint of its own at once; by a rollback of its session when its notification travels alone."""

    def do(task: Any, value: int, session: Session) -> None:
        with contextlib.suppress(DBAPIError):
            if nested:
                with session.begin_nested():
                    session.execute(text("SELEKT 1"))
            else:
                session.execute(text("SELEKT 1"))
        if not nested:
            session.rollback()
        bundled.effect(session, value)

    bundled.do = do
    bundled.emit(1, 2, 3)
    assert bundled.deliveries.run_until_idle() == (1 if nested else 4)
    assert bundled.effects == [1, 2, 3]
    assert bundled.states == []


# Runs that nobody watches


def test_a_run_that_raises_is_told_of_as_any_task_even_where_nobody_watches_successes(
    app: Celery, installed_engine: Engine, registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentry sees the error, once, with the request of its own notification and the listener's own lines."""
    told: list[tuple[str, str]] = []
    # Whoever else has been imported into this process may watch.
    for signal in (signals.task_prerun, signals.task_postrun, signals.task_success):
        monkeypatch.setattr(signal, "receivers", [])

    class Base(Task):  # type: ignore[misc]
        abstract = True

        def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            told.append(("hook", self.request.id))

    work = Work(app, installed_engine, bundle=100, base=Base)

    def do(task: Any, value: int, session: Session) -> None:
        if value == 2:
            raise ValueError("two")
        work.effect(session, value)

    def failed(sender: Any, task_id: str, exception: Any, einfo: Any, **_: Any) -> None:
        assert str(exception) == "two"
        assert 'raise ValueError("two")' in str(einfo)
        told.append(("signal", task_id))

    work.do = do
    work.emit(1, 2, 3)
    (message,) = work.deliveries.claim()
    assert Shortcut.of(work.task, work.task._tracer, {}) is not None
    signals.task_failure.connect(failed)
    try:
        work.deliveries.deliver(message)
    finally:
        signals.task_failure.disconnect(failed)
    (row,) = work.rows()
    assert sorted(told) == [("hook", row["task_id"]), ("signal", row["task_id"])]
    assert (row["state"], work.effects, [value for value, _ in work.calls]) == ("failed", [1, 3], [1, 2, 3])
    assert 'raise ValueError("two")' in row["traceback"]
    assert len({request.id for request, _ in work.seen}) == 3


@pytest.mark.parametrize("watch", ["prerun", "postrun", "success", "log", "hook", "tracer"])
def test_whoever_watches_runs_is_told_of_each(
    app: Celery, installed_engine: Engine, registry: None, caplog: pytest.LogCaptureFixture, watch: str
) -> None:
    """A signal's receiver, a log or a hook gets what Celery tells of any task, for each notification of a bundle."""
    told: list[str] = []

    class Base(Task):  # type: ignore[misc]
        abstract = True

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            told.append(task_id)

    def receiver(sender: Any, task_id: str | None = None, **_: Any) -> None:
        told.append(task_id or sender.request.id)

    if watch == "log":
        caplog.set_level("INFO", logger="celery.app.trace")
    work = Work(app, installed_engine, bundle=100, **({"base": Base} if watch == "hook" else {}))
    work.emit(1, 2, 3)
    ids = [notification_task_id(work.deliveries.installation, row["id"]) for row in work.rows()]
    (message,) = work.deliveries.claim()
    if watch == "log":
        work.deliveries.deliver(message)
        told = [record.data["id"] for record in caplog.records if record.name == "celery.app.trace"]  # type: ignore[attr-defined]
    elif watch == "hook":
        work.deliveries.deliver(message)
    elif watch == "tracer":
        # As monitors do that measure every task.
        tracer = work.task._tracer

        @functools.wraps(tracer)
        def measured(uuid: str, *arguments: Any) -> Any:
            told.append(uuid)
            return tracer(uuid, *arguments)

        work.task.__trace__ = measured
        work.deliveries.deliver(message)
    else:
        signal = getattr(signals, f"task_{watch}")
        signal.connect(receiver)
        try:
            work.deliveries.deliver(message)
        finally:
            signal.disconnect(receiver)
    assert told == ids
    assert work.effects == [1, 2, 3]


# Retries


def test_retry_makes_the_row_wait_and_undoes_the_run(work: Work) -> None:
    """The wait is in Postgres: nothing is sent to the broker, and the count is the row's."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, task.request.retries)
        if task.request.retries < 2:
            raise task.retry(countdown=300, max_retries=5)

    work.do = do
    work.emit(1)
    (result,) = work.deliveries.run()
    assert result.info.state == "RETRY"
    (row,) = work.rows()
    assert (row["state"], row["retries"], row["dispatches"]) == ("waiting", 1, 0)
    assert 290 < row["seconds"] <= 300
    assert work.effects == []
    assert work.deliveries.claim() == []
    for _ in range(2):
        work.deliveries.make_due()
        work.deliveries.run()
    assert work.calls == [(1, 0), (1, 1), (1, 2)]
    assert work.effects == [2]
    assert work.states == []


def test_a_duplicate_of_an_earlier_message_cannot_run_a_retry_early(work: Work) -> None:
    """The row says when."""

    def do(task: Any, value: int, session: Session) -> None:
        raise task.retry(countdown=300)

    work.do = do
    work.emit(1)
    (message,) = work.deliveries.claim()
    work.deliveries.deliver(message)
    work.deliveries.deliver(message)
    assert work.calls == [(1, 0)]


def test_retry_at_a_given_time(work: Work) -> None:
    """`eta` is when."""
    eta = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=2)

    def do(task: Any, value: int, session: Session) -> None:
        raise task.retry(eta=eta)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.rows()[0]["available_at"] == eta


def test_exhausted_retries_fail_with_the_last_error(work: Work) -> None:
    """As Celery raises it."""

    def do(task: Any, value: int, session: Session) -> None:
        try:
            raise ValueError("broken")
        except ValueError as exc:
            raise task.retry(countdown=0, max_retries=1, exc=exc) from exc

    work.do = do
    work.emit(1)
    work.deliveries.run_until_idle()
    (row,) = work.rows()
    assert row["state"] == "failed"
    assert row["error"] == "ValueError: broken"
    assert row["retries"] == 1
    assert work.calls == [(1, 0), (1, 1)]


def test_autoretry_backs_off_in_the_row(app: Celery, installed_engine: Engine, registry: None) -> None:
    """Celery computes the delays."""
    work = Work(app, installed_engine, autoretry_for=(OSError,), retry_backoff=10, retry_jitter=False, max_retries=2)

    def do(task: Any, value: int, session: Session) -> None:
        raise OSError("unreachable")

    work.do = do
    work.emit(1)
    delays = []
    for _ in range(2):
        work.deliveries.run()
        delays.append(round(float(work.rows()[0]["seconds"])))
        work.deliveries.make_due()
    work.deliveries.run()
    assert delays == [10, 20]
    (row,) = work.rows()
    assert (row["state"], row["error"]) == ("failed", "OSError: unreachable")


def test_retry_without_throwing_keeps_the_effect_and_waits(work: Work) -> None:
    """`throw=False`: the run went well, and is to be repeated."""

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, task.request.retries)
        if task.request.retries == 0:
            task.retry(countdown=0, throw=False)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert work.effects == [0]
    assert work.states == ["waiting"]
    work.deliveries.run()
    assert work.effects == [0, 1]
    assert work.states == []


def test_max_retries_of_one_call_do_not_leak_into_the_next(bundled: Work) -> None:
    """Celery keeps them on the task."""

    def do(task: Any, value: int, session: Session) -> None:
        if value == 1:
            raise task.retry(countdown=0, max_retries=50)
        raise task.retry(countdown=0, exc=ValueError("broken"))

    bundled.task.max_retries = 0
    bundled.do = do
    bundled.emit(1, 2)
    bundled.deliveries.run()
    assert bundled.states == ["waiting", "failed"]


def test_the_retry_signal_is_sent(work: Work) -> None:
    """As for any task."""
    told: list[Any] = []

    def receiver(sender: Any, request: Any, reason: Any, **_: Any) -> None:
        told.append((sender.name, request.id))

    def do(task: Any, value: int, session: Session) -> None:
        raise task.retry(countdown=0)

    signals.task_retry.connect(receiver)
    try:
        work.do = do
        work.emit(1)
        work.deliveries.run()
    finally:
        signals.task_retry.disconnect(receiver)
    assert told == [("work.handle", work.seen[0][0].id)]


# Celery's other ends


def test_ignore_acknowledges(work: Work) -> None:
    """The listener says that there is nothing to do."""

    def do(task: Any, value: int, session: Session) -> None:
        raise Ignore

    work.do = do
    work.emit(1)
    (result,) = work.deliveries.run()
    assert result.info.state == "IGNORED"
    assert work.states == []


def test_reject_fails_and_reject_with_requeue_gives_back(bundled: Work) -> None:
    """Neither is the broker's business."""

    def do(task: Any, value: int, session: Session) -> None:
        if value != 3:
            raise Reject("no", requeue=value == 2)
        bundled.effect(session, value)

    bundled.do = do
    bundled.emit(1, 2, 3)
    (message,) = bundled.deliveries.claim()
    result = bundled.deliveries.deliver(message)
    assert result.info is None
    assert bundled.states == ["failed", "waiting"]
    assert bundled.effects == [3]


def test_replace_is_refused(work: Work) -> None:
    """With what to do instead."""
    work.do = lambda task, value, session: task.replace(task.app.signature("other"))
    work.emit(1)
    work.deliveries.run()
    (row,) = work.rows()
    assert row["state"] == "failed"
    assert "enqueue" in row["error"]


def test_a_listener_may_call_itself_and_others_as_functions(work: Work) -> None:
    """That is a call, not the notification."""
    inner: list[int] = []

    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, value)
        if value == 1:
            inner.append(value)
            task(value=7, session=session, notification=None)

    work.do = do
    work.emit(1)
    work.deliveries.run()
    assert inner == [1]
    assert work.effects == [1, 7]
    assert work.states == []


def test_a_notification_emitted_by_a_listener_shares_its_fate(work: Work) -> None:
    """It is stored in the listener's transaction."""

    def do(task: Any, value: int, session: Session) -> None:
        if value == 1:
            notify(session, work.channel(value=2))
            notify(session, work.channel(value=3))
            return
        if value == 3:
            notify(session, work.channel(value=4))
            raise ValueError("broken")
        work.effect(session, value)

    work.do = do
    work.emit(1)
    work.deliveries.run_until_idle()
    assert work.effects == [2]
    assert work.states == ["failed"]


def test_direct_calls_fill_in_a_session_that_commits(work: Work) -> None:
    """As an ordinary function: no row, an own transaction."""
    work.task(value=5)
    assert work.effects == [5]
    work.do = _raise_after(work)
    with pytest.raises(ValueError, match="broken"):
        work.task(value=6)
    assert work.effects == [5]


def _raise_after(work: Work) -> Any:
    def do(task: Any, value: int, session: Session) -> None:
        work.effect(session, value)
        raise ValueError("broken")

    return do


def test_an_operation_that_this_release_does_not_know_is_left_to_another(work: Work) -> None:
    """An older worker gives it back, and waits longer each time."""
    work.emit(1)
    work.deliveries.execute("UPDATE pgpubsub_notification SET operation = 'merge'")
    work.deliveries.run()
    assert work.calls == []
    assert work.states == ["waiting"]


def test_a_worker_whose_pool_holds_dead_connections_takes_the_message_anyway(work: Work) -> None:
    """A restart of Postgres between two messages costs a reconnection, not a lease."""
    work.emit(1)
    work.deliveries.run()
    work.deliveries.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgpubsub-worker'"
    )
    work.emit(2)
    work.deliveries.run()
    assert work.effects == [1, 2]


def test_one_connection_serves_message_after_message(work: Work) -> None:
    """It goes back to the pool, whatever became of the run."""

    def do(task: Any, value: int, session: Session) -> None:
        backends.append(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
        if value == 2:
            raise ValueError("broken")

    backends: list[int] = []
    work.do = do
    work.emit(1, 2, 3)
    work.deliveries.run()
    assert len(backends) == 3
    assert len(set(backends)) == 1


def test_without_a_database_the_message_ends_quietly(app: Celery, installed_engine: Engine, registry: None) -> None:
    """The row's lease brings it back."""
    work = Work(app, installed_engine)
    work.emit(1)
    (message,) = work.deliveries.claim()
    runtime = Runtime.of(app)
    runtime.installation()
    runtime.engine.dispose()
    broken = create_engine("postgresql+psycopg2://postgres@127.0.0.1:1/none")
    runtime._engine = runtime._guard = broken
    result = work.deliveries.deliver(message)
    assert result.info is None
    assert "unavailable" in result.retstr
    assert work.states == ["dispatched"]
    with pytest.raises(DBAPIError):
        broken.connect()
