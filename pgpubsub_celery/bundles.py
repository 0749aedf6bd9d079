"""How many notifications share a message.

Owns the policy of automatic bundles: as many as a worker is likely to finish within `bundle_target`, by what workers
have measured, and no more than keeps idle workers idle no longer. It exists because a task costs Celery 1.5 to 2 ms
whatever it does: a short listener's notifications cost a small part of that when they come together. Pure arithmetic.
"""

from __future__ import annotations

import dataclasses
import math

LANES = 4
"""Messages over which a short backlog is spread, at least: what a few workers can have in their hands.

With more, a stream that single messages cannot keep up with waits behind that many of them: with 16, two processes that
were given 500 notifications a second began each after 26 ms instead of 10.
"""

LANES_OF_A_PROCESS = 2

LIMIT_SHARE = 10
"""Expected work stays under this part (a tenth) of a listener's time limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundling:
    """How the notifications of one listener may be put together."""

    most: int = 1
    """In one message, at most."""
    automatic: bool = False
    """By the measured run time; else always as many as there are, up to `most`."""
    target: float = 0.1
    """Seconds of work in a message."""
    time_limit: float | None = None
    """Seconds after which the worker interrupts the message's task."""

    def size(self, rows: int, *, mean_seconds: float | None, processes: int, in_flight: int, more: bool) -> int:
        """Return how many of `rows` notifications go into one message.

        `mean_seconds` is of a run, None when nothing is known, which is a reason for caution. `in_flight` are those
        that workers have not finished yet; `more` says that these rows are not all that is due.
        """
        if not self.automatic or self.most == 1:
            return self.most
        if mean_seconds is None or mean_seconds <= 0:
            return 1
        budget = self.target if self.time_limit is None else min(self.target, self.time_limit / LIMIT_SHARE)
        fitting = max(1, min(self.most, int(budget / mean_seconds)))
        if more:
            return fitting
        # With idle workers, each should get a part; with none, all of it waits the same time in fewer messages.
        lanes = max(1, max(LANES, LANES_OF_A_PROCESS * processes) - in_flight)
        return min(fitting, math.ceil(rows / lanes))
