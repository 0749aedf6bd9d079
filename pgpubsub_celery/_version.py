"""The version, in the one place that packaging and code both read. Never imports anything."""

__version__ = "0.1.0"
