"""The promises, under fire: nothing lost, nothing applied twice, nothing that was rolled back.

Short by default. `make chaos` goes on for longer: CHAOS_NOTIFICATIONS, CHAOS_FAULTS and CHAOS_PAUSE (seconds from one
fault to the next, at least) say how long, CHAOS_SEED which choices. CHAOS_APART=1 deals one fault at a time, and waits
until all is caught up with: that measures what each kind costs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.harness import Chaos, Plan
from tests.chaos.verdict import Verdict
from tests.conftest import POSTGRES_BIN

PLAN = Plan(
    notifications=int(os.environ.get("CHAOS_NOTIFICATIONS", "2000")),
    faults=int(os.environ.get("CHAOS_FAULTS", "40")),
    seed=int(os.environ.get("CHAOS_SEED", "1")),
    pause=float(os.environ.get("CHAOS_PAUSE", "1")),
    apart=bool(os.environ.get("CHAOS_APART")),
)


@pytest.mark.timeout(240 + 10 * PLAN.faults)
def test_every_committed_notification_has_its_effect_whatever_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes, killed at random and at every step, while writers commit and roll back; then effects count."""
    with Chaos(PLAN, tmp_path, bin_dir=os.environ.get(POSTGRES_BIN)) as chaos:
        chaos.run()
        endings = chaos.end()
        verdict = Verdict(chaos, endings)
        with capsys.disabled():
            print(f"\n{verdict.report()}")  # noqa: T201 - what a run has shown is worth reading
        assert not verdict.violations, "\n\n".join([*verdict.violations, chaos.log_tails()])
        assert len(chaos.killer.faults) >= PLAN.faults
