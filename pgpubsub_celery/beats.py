"""What a bridge's signals say of its health: that its loop turns, and whether it listens.

Owns how long a bridge may take from one sign of life to the next. A start, and what follows a sweep, may be one
statement over all that is stored, so they are given long; every other turn comes within `poll_interval`, and an outage
within its own pause. Ends nothing: whoever probes the process does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgpubsub_celery import signals
from pgpubsub_celery.settings import Settings

if TYPE_CHECKING:
    from pgpubsub_celery.supervisor import Control

LONG = 900.0
"""Seconds that a statement over all stored notifications may take: holding, recovering or adopting them."""


class Beats:
    """Tells a control, while it is connected."""

    def __init__(self, control: Control, settings: Settings) -> None:
        self._control = control
        self._late = settings.health_timeout
        self._look = settings.poll_interval + self._late
        self._began = False
        self._listens = False

    def __enter__(self) -> Beats:
        self._connect(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._connect(False)

    def _connect(self, wanted: bool) -> None:
        for signal, receiver in (
            (signals.bridge_connected, self._connected),
            (signals.bridge_looked, self._looked),
            (signals.bridge_woken, self._woken),
            (signals.bridge_interrupted, self._interrupted),
            (signals.bridge_stopped, self._stopped),
        ):
            if wanted:
                signal.connect(receiver, weak=False)
            else:
                signal.disconnect(receiver)

    def _connected(self, **_: Any) -> None:
        self._began = self._listens = True
        self._control.beat(self._look, ready=True)

    def _looked(self, **_: Any) -> None:
        self._control.beat(self._look, ready=self._listens)

    def _woken(self, reason: str, **_: Any) -> None:
        # Before a sweep, which adopts what has been stored without a listener.
        self._control.beat(max(LONG, self._look) if reason == "sweep" else self._look, ready=self._listens)

    def _interrupted(self, what: str, seconds: float, **_: Any) -> None:
        # Without its broker it listens all the same: what it hears of waits in the table.
        self._listens = self._listens and what != "database"
        # What it was interrupted in may be its start, which it then begins anew.
        self._control.beat(max(self._look, seconds + self._late) if self._began else LONG, ready=self._listens)

    def _stopped(self, **_: Any) -> None:
        self._listens = False
        self._control.beat(self._look, ready=False)
