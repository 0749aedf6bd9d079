"""What can be chosen about supervision, and the exit codes it ends with.

Owns `Plan`, its checks, and the arithmetic of backing off. Starts nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pgpubsub_celery.errors import SettingsError

EXIT_STOPPED = 0
"""Stopped as asked, everything finished."""
EXIT_FAILED = 1
"""A process failed and was not to be replaced, or failed while it was stopping."""
EXIT_DRAIN_TIMEOUT = 3
"""Something was killed because it had not finished within `drain_timeout`. (2 is the command line's: wrong usage.)"""
EXIT_SIGNAL_BASE = 128
"""A second signal ended it at once: this plus the signal's number, as shells count."""

START_METHODS = ("spawn", "fork")

# A delay is shortened by up to a quarter, so that processes that failed together do not come back together,
# and yet each delay is longer than the one before.
_JITTER = 0.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run the processes. Durations are seconds.

    Raises:
        SettingsError: a value is out of range; names the field, the value, the fix.
    """

    processes: int = 1
    """How many processes run the entry at the same time, below one supervisor."""
    worker: bool = False
    """Run the entry in this very process, without a supervisor until it fails for the first time."""
    restart_on_failure: bool = True
    """Replace processes that fail. Otherwise the others go on, and the exit code is `EXIT_FAILED`."""
    start_method: str = "spawn"
    """`spawn` or `fork`. Fork is quicker, but not for entries that start threads or hold connections open."""
    drain_timeout: float = 30.0
    """How long a stopping process may take to finish before it is killed."""
    ready_timeout: float = 30.0
    """How long a failed process waits for its replacement to be ready. The replacement may take longer."""
    backoff_initial: float = 1.0
    """The delay before the second replacement in a row; it doubles from there. The first starts at once."""
    backoff_max: float = 60.0
    """What that delay may grow to."""
    backoff_reset: float = 60.0
    """A process that was ready for this long ran fine: its failure counts as the first one again."""

    def __post_init__(self) -> None:
        if isinstance(self.processes, bool) or not isinstance(self.processes, int) or self.processes < 1:
            raise SettingsError(f"processes is {self.processes!r}: expected a whole number of at least 1.")
        if self.worker and self.processes != 1:
            raise SettingsError(
                f"processes is {self.processes} with worker: a worker is one process; choose one of the two."
            )
        if self.start_method not in START_METHODS:
            raise SettingsError(
                f"start_method is {self.start_method!r}: expected {' or '.join(map(repr, START_METHODS))}."
            )
        for name in ("drain_timeout", "ready_timeout", "backoff_initial", "backoff_max", "backoff_reset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise SettingsError(f"{name} is {value!r}: expected a number of seconds, at least 0.")

    def backoff(self, failures: int) -> float:
        """Return the seconds to wait before the replacement that follows `failures` failures in a row."""
        if failures <= 1:
            return 0.0
        # The exponent is bounded because a float overflows after some thousand failures.
        nominal = min(self.backoff_max, self.backoff_initial * 2.0 ** min(failures - 2, 64))
        return nominal * random.uniform(1 - _JITTER, 1)
