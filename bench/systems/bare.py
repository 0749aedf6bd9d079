"""No system: the same statements, and nobody who is told of them."""

from __future__ import annotations

from bench.systems import System

SYSTEM = System(name="no trigger", application="no_tasks", consumers=[], unfinished=lambda _: False, settings={})
