"""What Django loads."""

from __future__ import annotations

import importlib
import os

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """The application."""

    name = "bench.applications.shop"
    label = "shop"

    def ready(self) -> None:
        """Register listeners, where they are of this run."""
        if os.environ.get("BENCH_DJANGO") == "pgpubsub":
            importlib.import_module("bench.applications.shop.listeners")
