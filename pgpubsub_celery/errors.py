"""The errors this package raises.

Owns one exception hierarchy under `PgPubSubError`, so that callers can catch everything of ours at
once. Never logs, prints or exits: the command line turns these into one clear line and an exit code.
A message says what failed, the value received and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PgPubSubError(Exception):
    """Base class of every error raised by pgpubsub_celery."""


class SettingsError(PgPubSubError, ValueError):
    """A setting, command option or environment variable has a value that cannot be used."""


class AppError(PgPubSubError, ImportError):
    """The Celery application named by `-A` cannot be found or imported; shows the cause."""


class ChannelError(PgPubSubError, TypeError):
    """A channel is declared in a way that cannot work (no `@dataclass`, reserved field, …)."""


class UnknownChannelError(PgPubSubError, LookupError):
    """A channel was named that is not registered; the message suggests near names."""


class ListenerError(PgPubSubError, TypeError):
    """A listener is declared in a way that cannot work (unknown parameter, missing `on=`, …)."""


class PayloadError(PgPubSubError, TypeError):
    """A value does not fit the field of a channel; refused before anything is stored."""


class DecodeError(PgPubSubError, ValueError):
    """A stored payload cannot be read back with the channel's present declaration."""


class BindError(PgPubSubError, TypeError):
    """`notify`, `enqueue` and the like were given something without an open transaction to join."""


class NotInstalledError(PgPubSubError, RuntimeError):
    """The database lacks the tables or functions of this package, or has another version of them."""


class ReadOnlyDatabaseError(PgPubSubError, RuntimeError):
    """The database is a read-only replica; a bridge needs the primary."""


class ConnectionLostError(PgPubSubError, RuntimeError):
    """The connection that a bridge listens on is gone; it reconnects."""


class BrokerError(PgPubSubError, RuntimeError):
    """The broker URL or transport cannot be used at all (as opposed to being down for now)."""


class LeaseLostError(PgPubSubError, RuntimeError):
    """The notification is no longer this worker's: its lease ran out and it was given to another."""


class TransactionEndedError(PgPubSubError, RuntimeError):
    """A listener ended the transaction that its notification was to be acknowledged in."""


class EmbeddedServerError(PgPubSubError, RuntimeError):
    """A Postgres or Valkey server for demo, dev or tests is missing, or did not start; shows the end of its log."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ` Did you mean 'a' or 'b'?` for near names, or an empty string when none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if not near:
        # A wrong module path often ends in the right class name.
        last = name.rpartition(".")[2].lower()
        near = [k for k in known if k.rpartition(".")[2].lower() == last][:limit]
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(n) for n in near)}?"
