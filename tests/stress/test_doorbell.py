"""The doorbell under a great many commits, with real bridges that sleep, wake, die, hang and reconnect.

Short by default. `make stress` goes on for a million commits: STRESS_COMMITS says how many, STRESS_SEED which choices.
The sweep would find everything in the end, so how long each notification waits is what is looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import POSTGRES_BIN
from tests.stress.app import LEASE
from tests.stress.harness import Disturbance, Stress, Wait

COMMITS = int(os.environ.get("STRESS_COMMITS", "6000"))
SEED = int(os.environ.get("STRESS_SEED", "1"))

SWEEP = 25.0
"""Seconds."""
SOON = 10.0
"""Seconds in which a commit that rings, or that an awake bridge looks for, is published on a machine that has much to
do. Less than any sweep."""
OTHERS_TURN = LEASE + 2.0 + SOON
"""The same where the bridge that was to do it is killed or cut off: its lease runs out, another becomes keeper."""


def allowed(wait: Wait, disturbances: list[Disturbance]) -> float:
    """Return the seconds that a notification may have waited."""
    during = {
        one.kind
        for one in disturbances
        if one.since < wait.since + wait.seconds and one.until > wait.since - OTHERS_TURN
    }
    if wait.prepared or "stop" in during:
        # A prepared transaction cannot ring, and a bridge that is stopped keeps its locks and looks at nothing.
        return SWEEP + OTHERS_TURN
    return OTHERS_TURN if during else SOON


@pytest.mark.timeout(300 + COMMITS // 100)
def test_no_commit_waits_for_longer_than_it_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither while bridges only sleep and wake, nor while they are killed, stopped, cut off and started again."""
    within = 120 + COMMITS / 200
    with Stress(tmp_path, bridges=3, sweep=SWEEP, seed=SEED, bin_dir=os.environ.get(POSTGRES_BIN)) as stress:
        calm = stress.write(COMMITS // 2, writers=3, within=within)
        calm_waits = [*stress.waits]
        wild = stress.write(COMMITS // 2, writers=3, within=within, storm=True)
    longest = max(wait.seconds for wait in calm_waits if not wait.prepared)
    kinds = sorted({one.kind for one in stress.disturbances})
    with capsys.disabled():
        print(  # noqa: T201 - what a run has shown is worth reading
            f"\nseed {SEED}: {calm:,} notifications in the calm, {wild:,} in the storm with {len(stress.disturbances)} "
            f"disturbances ({', '.join(kinds)}); longest wait {longest:.1f} s in the calm, "
            f"{max(wait.seconds for wait in stress.waits):.1f} s in the storm, sweep {SWEEP:g} s"
        )
    assert min(calm, wild) > COMMITS // 4
    assert len(stress.disturbances) >= 3
    late = [wait for wait in stress.waits if wait.seconds > allowed(wait, stress.disturbances)]
    assert not late, f"{len(late)} waited too long: {late[:5]}; disturbances: {stress.disturbances}"
