"""The supervisor, with real processes: hand-over, backing off, stopping, and nothing left behind whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.supervisor import (
    EXIT_DRAIN_TIMEOUT,
    EXIT_FAILED,
    EXIT_SIGNAL_BASE,
    EXIT_STOPPED,
    Control,
    Plan,
    StopEvent,
    run,
)
from tests.fixtures.supervised import WITHOUT_PARENT_DEATH_SIGNAL, is_alive, read_events

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0

# No test is to wait for these: they are what happens when something does not work.
PATIENT = {"drain_timeout": DEADLINE, "ready_timeout": DEADLINE}
QUICK = {"backoff_initial": 0.01, "backoff_max": 0.08}

Event = dict[str, Any]


class Supervised:
    """A run of `tests.fixtures.supervised` and what can be seen of it."""

    def __init__(
        self, folder: Path, entry: str, *, failures: int = 0, environment: dict[str, str], **plan: Any
    ) -> None:
        self.folder = folder
        self._log = folder / "log"
        command = [sys.executable, "-m", "tests.fixtures.supervised", entry, str(folder)]
        command += ["--failures", str(failures), "--plan", json.dumps({**PATIENT, **QUICK, **plan})]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdin=subprocess.PIPE,
                # Every process below inherits its writing end: it ends when the last of them has ended.
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self.process.stdin.write(b"a secret")
        self.process.stdin.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[Event]:
        return [event for event in read_events(self.folder) if event["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> list[Event]:
        """Return the events `name` as soon as there are `count` of them."""
        self.eventually(lambda: len(self.events(name)) >= count, f"{count} x {name}")
        return self.events(name)

    def eventually(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not holds():
            assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}\n{self.log()}"
            time.sleep(0.01)

    def wait_for_log(self, pattern: str) -> None:
        self.eventually(lambda: re.search(pattern, self.log()) is not None, pattern)

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def signal_group(self, signum: int) -> None:
        os.killpg(self.pid, signum)

    def open_gate(self, pid: int) -> None:
        """Let the entry in process `pid` finish, as soon as it waits for that."""

        def opened() -> bool:
            with contextlib.suppress(OSError):  # nobody has it open for reading
                os.close(os.open(self.folder / f"gate-{pid}", os.O_WRONLY | os.O_NONBLOCK))
                return True
            return False

        self.eventually(opened, f"pid {pid} waits at its gate")

    def code(self) -> int:
        """Return the exit code, once it and everything below it has ended."""
        self.wait_until_all_have_ended()
        return self.process.wait(DEADLINE)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.code()

    def wait_until_all_have_ended(self) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        assert readable, f"processes left:\n{self.log()}"
        assert self.process.stdout.read() == b""

    def destroy(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)
        self.process.wait(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Return a function that starts `tests.fixtures.supervised`; whatever it started is gone after the test."""
    runs: list[Supervised] = []

    def begin(entry: str, *, failures: int = 0, environment: dict[str, str] | None = None, **plan: Any) -> Supervised:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(Supervised(folder, entry, failures=failures, environment=environment or {}, **plan))
        return runs[-1]

    yield begin
    for supervised in runs:
        supervised.destroy()


@pytest.fixture(params=["spawn", "fork"])
def method(request: pytest.FixtureRequest) -> str:
    """Each start method in turn."""
    return str(request.param)


Start = Callable[..., Supervised]


# Starting and stopping


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_finish_their_batch_before_the_supervisor_exits_0(start: Start, method: str, signum: int) -> None:
    """A stop signal to the supervisor lets every child end its work."""
    supervised = start("finish_batch", processes=2, start_method=method)
    children = supervised.wait_for("listening", 2)
    assert sorted(child["index"] for child in children) == [0, 1]
    assert {child["ppid"] for child in children} == {supervised.pid}

    supervised.signal(signum)
    supervised.wait_for("finishing", 2)
    assert supervised.process.poll() is None
    for child in children:
        supervised.open_gate(child["pid"])

    assert supervised.code() == EXIT_STOPPED
    assert len(supervised.events("finished")) == 2
    assert all(event["is_set"] for event in supervised.events("stopping"))


def test_ctrl_c_in_a_terminal_is_one_stop_request_for_the_children_too(start: Start, method: str) -> None:
    """SIGINT reaches the whole foreground group; children leave it to the supervisor, and finish."""
    supervised = start("finish_batch", processes=2, start_method=method)
    children = supervised.wait_for("listening", 2)
    supervised.signal_group(signal.SIGINT)
    supervised.wait_for("finishing", 2)
    for child in children:
        supervised.open_gate(child["pid"])
    assert supervised.code() == EXIT_STOPPED
    assert len(supervised.events("finished")) == 2
    assert len(supervised.events("begun")) == 2


def test_sigterm_to_the_whole_group_starts_no_replacements(start: Start, method: str) -> None:
    """Children that obey a signal sent to everybody are not taken for lost."""
    supervised = start("listen", processes=2, start_method=method)
    supervised.wait_for_log("(?s)ready pid.*ready pid")
    supervised.signal_group(signal.SIGTERM)
    assert supervised.code() == EXIT_STOPPED
    assert len(supervised.events("begun")) == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_everything_at_once(start: Start, method: str, signum: int) -> None:
    """The supervisor kills its children and says by which signal it ended."""
    supervised = start("never_end", processes=2, start_method=method)
    supervised.wait_for("listening", 2)
    supervised.signal(signum)
    supervised.wait_for("stopping", 2)
    supervised.signal(signum)
    assert supervised.code() == EXIT_SIGNAL_BASE + signum
    assert not supervised.events("exit")


def test_what_outlives_the_drain_timeout_is_killed_and_told(start: Start, method: str) -> None:
    """A child that does not end is killed, and the exit code says so."""
    supervised = start("never_end", start_method=method, drain_timeout=0.2)
    (child,) = supervised.wait_for("listening")
    assert supervised.stop() == EXIT_DRAIN_TIMEOUT
    assert f"killed pid {child['pid']} (process 0): not ended after 0.2 s" in supervised.log()


def test_a_child_that_fails_while_stopping_shows_in_the_exit_code(start: Start) -> None:
    """A drain that raised is no graceful stop, and nothing is started instead."""
    supervised = start("fail_while_stopping")
    supervised.wait_for("listening")
    assert supervised.stop() == EXIT_FAILED
    assert len(supervised.events("begun")) == 1
    assert supervised.log().count("Broken: while stopping") == 1


def test_a_stop_while_children_start_is_graceful_too(start: Start, method: str) -> None:
    """A child that is told to stop before it could listen begins nothing, or ends what it began."""
    supervised = start("listen", processes=2, start_method=method)
    supervised.wait_for_log("(?s)started pid.*started pid")
    assert supervised.stop() == EXIT_STOPPED
    assert "Traceback" not in supervised.log()
    assert len(supervised.events("stopping")) == len(supervised.events("begun"))


def test_an_entry_that_returns_unasked_has_finished(start: Start, method: str) -> None:
    """It is not replaced, and the supervisor ends when all have finished."""
    supervised = start("return_unasked", processes=2, start_method=method)
    assert supervised.code() == EXIT_STOPPED
    assert len(supervised.events("begun")) == 2


def test_children_inherit_environment_and_argument_but_no_secret_in_their_command_line(start: Start) -> None:
    """The argument is handed over through a pipe."""
    supervised = start("listen", environment={"SUPERVISED_MARK": "inherited"})
    (child,) = supervised.wait_for("begun")
    assert child["environment"] == "inherited"
    assert "a secret" not in " ".join(child["argv"])
    supervised.wait_for("listening")
    assert supervised.stop() == EXIT_STOPPED


def test_every_process_is_initialised_before_it_begins(start: Start, method: str) -> None:
    """Logging is configured in the supervisor, in each child and in each replacement."""
    supervised = start("fail_after_ready", failures=1, start_method=method)
    supervised.wait_for("listening")
    supervised.stop()
    initialised = {event["pid"]: event["at"] for event in supervised.events("initialised")}
    begun = {event["pid"]: event["at"] for event in supervised.events("begun")}
    assert set(initialised) == {supervised.pid, *begun}
    assert all(initialised[pid] < at for pid, at in begun.items())


# Hand-over


def test_the_replacement_listens_before_the_failing_process_ends(start: Start, method: str) -> None:
    """One clock proves the order; the failure is logged once, with its traceback, by the process that failed."""
    supervised = start("listen", start_method=method)
    (first,) = supervised.wait_for("listening")
    os.kill(first["pid"], signal.SIGUSR1)
    _, second = supervised.wait_for("listening", 2)
    (gone,) = supervised.wait_for("exit")
    assert gone["pid"] == first["pid"]
    assert second["at"] < gone["at"]
    assert [event["replacement"] for event in supervised.events("begun")] == [False, True]
    assert [event["index"] for event in supervised.events("begun")] == [0, 0]

    assert supervised.stop() == EXIT_STOPPED
    log = supervised.log()
    assert f"{first['pid']} ERROR failed pid {first['pid']} (process 0)\nTraceback" in log
    assert log.count("Broken: told to") == 1
    assert f"replaced pid {first['pid']} by pid {second['pid']} (process 0)" in log


def test_the_failing_process_waits_no_longer_than_the_ready_timeout(start: Start, method: str) -> None:
    """A replacement that takes long may go on; the failed process does not wait for ever."""
    supervised = start("never_ready_again", start_method=method, ready_timeout=0.2)
    (first,) = supervised.wait_for("listening")
    os.kill(first["pid"], signal.SIGUSR1)
    supervised.wait_for("exit")
    second = supervised.wait_for("begun", 2)[1]
    assert f"not ready after 0.2 s: pid {second['pid']} (process 0)" in supervised.log()
    assert is_alive(second["pid"])
    assert supervised.stop() == EXIT_STOPPED


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_killed_outright_is_replaced(start: Start, method: str, signum: int) -> None:
    """No report is needed for that, and the other children are left alone."""
    supervised = start("listen", processes=2, start_method=method)
    victim, other = supervised.wait_for("listening", 2)
    os.kill(victim["pid"], signum)
    replacement = supervised.wait_for("listening", 3)[2]
    assert replacement["index"] == victim["index"]
    assert is_alive(other["pid"])
    assert supervised.stop() == EXIT_STOPPED
    assert f"unasked: {signal.Signals(signum).name}" in supervised.log()


def test_a_child_that_exits_without_a_word_is_replaced(start: Start, method: str) -> None:
    """`os._exit` in an entry is a failure like any other, and was never a first listener."""
    supervised = start("vanish", failures=1, start_method=method)
    supervised.wait_for("listening")
    assert [event["replacement"] for event in supervised.events("begun")] == [False, False]
    assert supervised.stop() == EXIT_STOPPED
    assert "unasked: exit code 7" in supervised.log()


def test_a_child_told_to_stop_by_somebody_else_finishes_and_is_replaced(start: Start, method: str) -> None:
    """`kill CHILD` restarts that one."""
    supervised = start("finish_batch", start_method=method)
    (first,) = supervised.wait_for("listening")
    os.kill(first["pid"], signal.SIGTERM)
    supervised.wait_for("finishing")
    supervised.open_gate(first["pid"])
    _, second = supervised.wait_for("listening", 2)
    assert [event["pid"] for event in supervised.events("finished")] == [first["pid"]]
    supervised.signal(signal.SIGTERM)
    supervised.wait_for("finishing", 2)
    supervised.open_gate(second["pid"])
    assert supervised.code() == EXIT_STOPPED


def test_a_failing_process_killed_while_it_waits_does_not_stop_its_replacement(start: Start) -> None:
    """The hand-over goes on without the one that was to hand over."""
    supervised = start("never_ready_again")
    (first,) = supervised.wait_for("listening")
    os.kill(first["pid"], signal.SIGUSR1)
    second = supervised.wait_for("begun", 2)[1]
    os.kill(first["pid"], signal.SIGKILL)
    supervised.wait_for_log(rf"ended pid {first['pid']} \(process 0\): SIGKILL")
    assert is_alive(second["pid"])
    assert supervised.stop() == EXIT_STOPPED
    assert len(supervised.events("begun")) == 2


@pytest.mark.parametrize("entry", ["fail_before_ready", "fail_after_ready", "vanish"])
def test_twenty_failures_in_a_row_never_pile_up(start: Start, method: str, entry: str) -> None:
    """At no start are more than two processes alive, this one included; the delays grow up to their maximum."""
    supervised = start(entry, failures=20, start_method=method)
    supervised.wait_for("listening")
    assert supervised.stop() == EXIT_STOPPED
    begun = supervised.events("begun")
    assert len(begun) == 21
    assert max(event["living"] for event in begun) <= 2
    delays = backoffs(supervised)
    assert len(delays) == 19  # the first replacement starts at once
    assert delays[0] < delays[1] < delays[2] < delays[3]
    assert max(delays) <= 0.08


def test_a_process_that_ran_fine_for_a_while_is_replaced_without_delay(start: Start) -> None:
    """Only failures in a row back off."""
    supervised = start("fail_after_ready", failures=5, backoff_reset=0)
    supervised.wait_for("listening")
    assert supervised.stop() == EXIT_STOPPED
    assert backoffs(supervised) == []


def test_a_failed_process_that_does_not_end_is_killed_when_its_place_is_needed(start: Start, method: str) -> None:
    """A left-over thread keeps the first process alive; the third is only started once it is gone."""
    supervised = start("linger_after_failure", start_method=method)
    supervised.wait_for("listening")
    begun = supervised.events("begun")
    assert max(event["living"] for event in begun) <= 2
    assert f"killed pid {begun[0]['pid']} (process 0): its place is needed" in supervised.log()
    assert supervised.stop() == EXIT_STOPPED


def test_a_stop_during_a_delay_starts_nothing_more(start: Start) -> None:
    """A supervisor that backs off stops as fast as any other, and lets the failed process go."""
    supervised = start("fail_after_ready", failures=20, backoff_initial=DEADLINE, backoff_max=DEADLINE)
    supervised.wait_for_log("backing off")
    assert supervised.stop() == EXIT_STOPPED
    assert len(supervised.events("begun")) == 2


# Without restarts


def test_without_restarts_the_others_go_on_and_the_exit_code_tells(start: Start, method: str) -> None:
    """A failed process is not replaced; the supervisor ends with the last one, non-zero."""
    supervised = start("listen", processes=2, restart_on_failure=False, start_method=method)
    first, second = supervised.wait_for("listening", 2)
    os.kill(first["pid"], signal.SIGUSR1)
    supervised.wait_for("exit")
    supervised.wait_for_log(rf"ended pid {first['pid']} ")
    assert is_alive(second["pid"])
    os.kill(second["pid"], signal.SIGKILL)
    assert supervised.code() == EXIT_FAILED
    assert len(supervised.events("begun")) == 2


def test_without_restarts_a_later_stop_is_graceful_and_still_tells(start: Start) -> None:
    """The others finish as asked; the failure is not forgotten."""
    supervised = start("listen", processes=2, restart_on_failure=False)
    first, _ = supervised.wait_for("listening", 2)
    os.kill(first["pid"], signal.SIGKILL)
    supervised.wait_for_log(rf"ended pid {first['pid']} ")
    assert supervised.stop() == EXIT_FAILED
    assert len(supervised.events("stopping")) == 1


# Nothing left behind


@pytest.mark.parametrize("parent_death_signal", [True, False], ids=["with-signal", "by-pipe-alone"])
def test_children_finish_and_end_when_the_supervisor_is_killed(
    start: Start, method: str, parent_death_signal: bool
) -> None:
    """SIGKILL of the supervisor: the children notice, finish their batch and end by themselves."""
    environment = {} if parent_death_signal else {WITHOUT_PARENT_DEATH_SIGNAL: "1"}
    supervised = start("finish_batch", processes=3, start_method=method, environment=environment)
    children = supervised.wait_for("listening", 3)
    supervised.signal(signal.SIGKILL)
    supervised.wait_for("finishing", 3)
    for child in children:
        supervised.open_gate(child["pid"])
    supervised.wait_until_all_have_ended()
    assert len(supervised.events("finished")) == 3


def test_a_child_stuck_without_its_supervisor_ends_itself(start: Start, method: str) -> None:
    """With nobody left to enforce the drain timeout, the child does."""
    supervised = start("never_end", start_method=method, drain_timeout=0.1)
    supervised.wait_for("listening")
    supervised.signal(signal.SIGKILL)
    supervised.wait_until_all_have_ended()
    assert re.search(r"killed pid \d+: not finished", supervised.log())


def test_nothing_is_left_when_the_supervisor_is_killed_while_children_start(start: Start, method: str) -> None:
    """A child that comes up without a supervisor ends."""
    supervised = start("listen", processes=2, start_method=method)
    supervised.wait_for_log("started pid")
    supervised.signal(signal.SIGKILL)
    supervised.wait_until_all_have_ended()


def test_nothing_is_left_when_the_supervisor_is_killed_in_the_middle_of_a_hand_over(start: Start, method: str) -> None:
    """The failing process and its replacement both end."""
    supervised = start("never_ready_again", start_method=method)
    (first,) = supervised.wait_for("listening")
    os.kill(first["pid"], signal.SIGUSR1)
    supervised.wait_for("begun", 2)
    supervised.signal(signal.SIGKILL)
    supervised.wait_until_all_have_ended()


# One process, without a supervisor


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_worker_runs_the_entry_in_the_very_process(start: Start, signum: int) -> None:
    """No process is started, and a signal stops it gracefully."""
    supervised = start("finish_batch", worker=True)
    (only,) = supervised.wait_for("listening")
    assert only["pid"] == supervised.pid
    supervised.signal(signum)
    supervised.wait_for("finishing")
    supervised.open_gate(only["pid"])
    assert supervised.code() == EXIT_STOPPED
    assert len(supervised.events("begun")) == 1


def test_worker_ends_at_once_on_a_second_signal(start: Start) -> None:
    """It says by which signal."""
    supervised = start("never_end", worker=True)
    supervised.wait_for("listening")
    supervised.signal(signal.SIGTERM)
    supervised.wait_for("stopping")
    supervised.signal(signal.SIGINT)
    assert supervised.code() == EXIT_SIGNAL_BASE + signal.SIGINT


def test_worker_ends_itself_after_the_drain_timeout(start: Start) -> None:
    """An entry that does not return has no say in it."""
    supervised = start("never_end", worker=True, drain_timeout=0.2)
    supervised.wait_for("listening")
    assert supervised.stop() == EXIT_DRAIN_TIMEOUT
    assert f"killed pid {supervised.pid}: not finished 0.2 s" in supervised.log()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_worker_stays_as_parent_of_its_secondary_and_forwards_the_stop(start: Start, method: str, signum: int) -> None:
    """From the first failure on, the initial process only supervises."""
    supervised = start("finish_batch", worker=True, start_method=method)
    supervised.wait_for("listening")
    supervised.signal(signal.SIGUSR1)
    _, secondary = supervised.wait_for("listening", 2)
    assert secondary["ppid"] == supervised.pid
    assert secondary["pid"] != supervised.pid
    assert [event["replacement"] for event in supervised.events("begun")] == [False, True]

    supervised.signal_group(signum)
    supervised.wait_for("finishing")
    assert supervised.process.poll() is None
    supervised.open_gate(secondary["pid"])
    assert supervised.code() == EXIT_STOPPED
    assert [event["pid"] for event in supervised.events("finished")] == [secondary["pid"]]


def test_worker_replaces_secondaries_without_nesting_or_piling_up(start: Start, method: str) -> None:
    """All are children of the initial process; never more than it, one, and one being replaced."""
    supervised = start("fail_after_ready", failures=8, worker=True, start_method=method)
    supervised.wait_for("listening")
    begun = supervised.events("begun")
    assert {event["ppid"] for event in begun[1:]} == {supervised.pid}
    assert max(event["living"] for event in begun) <= 3
    assert len(backoffs(supervised)) == 7  # the failure of the initial process is the first of the row
    assert supervised.stop() == EXIT_STOPPED


def test_worker_without_restarts_logs_the_failure_and_exits_non_zero(start: Start) -> None:
    """Whoever runs it restarts it."""
    supervised = start("fail_after_ready", failures=1, worker=True, restart_on_failure=False)
    assert supervised.code() == EXIT_FAILED
    assert len(supervised.events("begun")) == 1
    assert supervised.log().count("Broken: after ready") == 1


def test_the_secondary_ends_when_the_initial_process_is_killed(start: Start, method: str) -> None:
    """SIGKILL of the parent, seen through the pipe alone."""
    supervised = start("listen", worker=True, start_method=method, environment={WITHOUT_PARENT_DEATH_SIGNAL: "1"})
    supervised.wait_for("listening")
    supervised.signal(signal.SIGUSR1)
    supervised.wait_for("listening", 2)
    supervised.signal(signal.SIGKILL)
    supervised.wait_until_all_have_ended()
    assert len(supervised.events("stopping")) == 1


# The parts


def test_all_processes_sleep_until_something_happens(start: Start) -> None:
    """They wake for signals, reports and deadlines, and do not spin on a line that has ended."""
    supervised = start("finish_batch")
    (first,) = supervised.wait_for("listening")
    os.kill(first["pid"], signal.SIGUSR1)
    _, second = supervised.wait_for("listening", 2)
    supervised.wait_for("exit")
    supervised.signal(signal.SIGTERM)
    supervised.wait_for("finishing")
    supervised.open_gate(second["pid"])
    assert supervised.code() == EXIT_STOPPED
    (returned,) = supervised.events("returned")
    assert 0 < returned["wakes"] < 20
    assert all(event["wakes"] < 20 for event in supervised.events("exit"))


def test_run_puts_the_previous_signal_handlers_back() -> None:
    """A program that calls it has its own handlers again afterwards."""
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    code = run(lambda control, argument: None, None, Plan(worker=True, restart_on_failure=False))
    assert code == EXIT_STOPPED
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_argument_that_cannot_be_pickled_is_refused_before_anything_runs() -> None:
    """Not at the first failure, when a replacement would be needed."""
    begun: list[object] = []
    with pytest.raises(Exception, match="pickle"):
        run(lambda control, argument: begun.append(argument), None, Plan(worker=True))
    assert begun == []


def test_a_stop_event_wakes_select() -> None:
    """It can be waited for together with sockets."""
    event = StopEvent()
    assert select.select([event], [], [], 0) == ([], [], [])
    event.set()
    event.set()
    assert select.select([event], [], [], 0) == ([event], [], [])
    assert event.is_set()


def test_ready_is_told_once() -> None:
    """Entries may say it again after a reconnection."""
    told: list[bytes] = []
    control = Control(report=told.append)
    control.ready()
    control.ready()
    assert len(told) == 1


def test_delays_double_up_to_their_maximum_and_the_first_replacement_has_none() -> None:
    """A jitter of a quarter never makes a delay shorter than the one before."""
    plan = Plan(backoff_initial=1, backoff_max=60)
    delays = [plan.backoff(failures) for failures in range(1, 9)]
    assert delays[0] == 0
    assert all(0.75 * 2**n <= delay <= 2**n for n, delay in enumerate(delays[1:7]))
    assert 45 <= plan.backoff(100_000) <= 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"processes": True}, "processes is True"),
        ({"processes": 2, "worker": True}, "a worker is one process"),
        ({"start_method": "forkserver"}, "'spawn' or 'fork'"),
        ({"drain_timeout": -1}, "drain_timeout is -1"),
        ({"ready_timeout": float("nan")}, "ready_timeout is nan"),
        ({"backoff_max": "9"}, "backoff_max is '9'"),
    ],
)
def test_a_plan_refuses_values_it_cannot_use(options: dict[str, Any], message: str) -> None:
    """The message names field, value and fix."""
    with pytest.raises(SettingsError, match=re.escape(message)):
        Plan(**options)


def backoffs(supervised: Supervised) -> list[float]:
    """Return the delays that the supervisor has logged, in order."""
    return [float(seconds) for seconds in re.findall(r"backing off ([\d.]+) s", supervised.log())]
