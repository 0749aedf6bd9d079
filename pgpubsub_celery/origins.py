"""Which of a worker's databases a message is of.

Owns the way from what a message says (an installation, and how its bridge calls the database) to the runtime of one of
the worker's. A name is a hint, which another configuration may use for another database: the installation decides.
Never takes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pgpubsub_celery.errors import PgPubSubError, SettingsError
from pgpubsub_celery.runtime import Runtime
from pgpubsub_celery.settings import DEFAULT_DATABASE

if TYPE_CHECKING:
    from celery import Celery

    from pgpubsub_celery.messages import Envelope

T = TypeVar("T")


class Origin:
    """Where one message comes from."""

    def __init__(self, app: Celery, envelope: Envelope, message: str) -> None:
        """`message` names it in errors. Nothing is asked of any database yet.

        Raises:
            SettingsError: the default database cannot be used.
        """
        self._app = app
        self._envelope = envelope
        self._message = message
        self._is_renamed = False
        self.runtime = self._named()
        """By the name that the message has for it."""

    def _named(self) -> Runtime:
        database = self._envelope.database
        try:
            return Runtime.of(self._app, database)
        except SettingsError:
            if database is None:
                raise
            self._is_renamed = True
            return Runtime.of(self._app)

    def checked(self, begin: Callable[[Callable[[], T]], T]) -> Runtime:
        """Return the runtime of the database that has the message's installation.

        `begin` does a first step with a database. A message without rows, of a database that has its name here, is not
        looked into: it needs none.

        Raises:
            PgPubSubError: none of this worker's has it, so bridge and worker use different databases but one queue.
            DBAPIError: none that can be reached has it.
        """
        if self._envelope.carried and not self._is_renamed:
            return self.runtime
        wanted, named = self._envelope.installation, self._envelope.database
        ours = begin(self.runtime.installation)  # type: ignore[arg-type]
        if ours == wanted:
            return self.runtime
        other = begin(lambda: self.runtime.other_with(self._app, wanted))  # type: ignore[arg-type,return-value]
        if isinstance(other, Runtime):
            return other
        known = self.runtime.settings.aliases
        if len(known) > 1 or named is not None:
            raise PgPubSubError(
                f"Message {self._message} is of the installation {wanted} (the bridge calls its database "
                f"{named or DEFAULT_DATABASE!r}), which none of this worker's databases has "
                f"({', '.join(map(repr, known))}): add it to pgpubsub_databases. Its notification is left to its lease."
            )
        raise PgPubSubError(
            f"Message {self._message} is of the installation {wanted}, this worker's database has {ours}: bridge and "
            "worker use different databases but the same queue. Check PGPUBSUB_DATABASE_URL."
        )
