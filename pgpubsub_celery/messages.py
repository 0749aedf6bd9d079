"""Claimed rows made into task messages.

Owns the form of a message (which task, which notifications, under which dispatch) and which notifications
share one. Pure: what is published, and how, is `broker`'s; what a worker does with it is `delivery`'s.

A message carries ids: payloads and secrets stay in Postgres. Only messages of channels without stored rows, and
of those whose rows go at publication, carry what they tell of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pgpubsub_celery.errors import DecodeError

if TYPE_CHECKING:
    from pgpubsub_celery.store import Claimed

KEYWORD = "pgpubsub"
"""The keyword argument that marks a call as the bridge's, and carries the envelope."""

FORMAT = 1
"""Version of the envelope. A worker reads all versions up to its own; a newer one is given back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Envelope:
    """What a message says: whose notifications, and which."""

    installation: uuid.UUID
    channel: str
    listener: str
    subscription: int | None = None
    dispatches: int = 0
    """The dispatch that published this message; rows dispatched again since are another message's."""
    ids: tuple[int, ...] = ()
    retries: tuple[int, ...] = ()
    """How often each of the ids had been retried; never, where it is left out."""
    carried: tuple[Mapping[str, Any], ...] = ()
    """For messages without rows: operation, payload, context, created_at, db_version of each."""
    database: str | None = None
    """The alias of the database, where it is not the default one. A hint: the installation decides."""

    def __post_init__(self) -> None:
        if not self.retries:
            object.__setattr__(self, "retries", (0,) * len(self.ids))

    def to_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the task message; JSON-compatible."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "installation": str(self.installation),
            "channel": self.channel,
            "listener": self.listener,
        }
        if self.database is not None:
            body["database"] = self.database
        if self.carried:
            body["carried"] = [dict(one) for one in self.carried]
        else:
            body |= {"subscription": self.subscription, "dispatches": self.dispatches, "ids": list(self.ids)}
            if any(self.retries):
                body["retries"] = list(self.retries)
        return {KEYWORD: body}

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> Envelope | None:
        """Read an envelope; None when the call is not the bridge's.

        Raises:
            DecodeError: the envelope is malformed, or of a newer release than this one.
        """
        body = kwargs.get(KEYWORD)
        if body is None:
            return None
        try:
            newer = int(body["format"]) > FORMAT
            if not newer:
                return cls._from_body(body)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise DecodeError(f"The message's envelope is malformed ({type(exc).__name__}: {exc}).") from exc
        raise DecodeError(
            f"The message has format {body['format']}; this release reads up to {FORMAT}: upgrade the workers first."
        )

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> Envelope:
        ids, carried, subscription = body.get("ids", []), body.get("carried", []), body.get("subscription")
        if not isinstance(ids, list) or not isinstance(carried, list) or bool(ids) == bool(carried):
            raise ValueError("expected a list of either ids or carried notifications")
        if not all(isinstance(one, Mapping) for one in carried):
            raise TypeError("a carried notification is not an object")
        retries = tuple(int(number) for number in body.get("retries") or [0] * len(ids))
        if len(retries) != len(ids):
            raise ValueError("expected a number of retries for each id")
        return cls(
            installation=uuid.UUID(body["installation"]),
            channel=str(body["channel"]),
            listener=str(body["listener"]),
            subscription=None if subscription is None else int(subscription),
            dispatches=int(body["dispatches"]) if ids else 0,
            ids=tuple(int(id) for id in ids),
            retries=retries,
            carried=tuple(carried),
            database=None if body.get("database") is None else str(body["database"]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One task message, ready to publish."""

    task: str
    task_id: str
    envelope: Envelope

    @property
    def claimed(self) -> list[tuple[int, int]]:
        """The rows that it speaks for, as (id, dispatches)."""
        return [(id, self.envelope.dispatches) for id in self.envelope.ids]


def notification_task_id(installation: uuid.UUID, id: int) -> str:
    """Return the task id of a stored notification: the same in each of its runs, as Celery keeps it over retries."""
    # uuid.uuid5(installation, str(id)) as text, without the objects in between: every run of a bundle needs one.
    digest = hashlib.sha1(installation.bytes + str(id).encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """Where the notifications of one subscription go."""

    channel: str
    listener: str
    """The subscription's listener, as installed."""
    task: str
    """The Celery task of it in this release."""
    bundle: int = 1
    carries: bool = False
    """The message carries the payload, because its row goes when the broker has confirmed."""


def build_messages(
    claimed: Iterable[Claimed],
    addresses: Mapping[int, Address],
    installation: uuid.UUID,
    database: str | None = None,
) -> list[Message]:
    """Return the messages for claimed rows, in the rows' order; `database` is for their envelopes.

    First dispatches of one listener share messages of up to its bundle size; a row dispatched before is a suspect
    and travels alone, or one poison row would kill its neighbours again and again. Rows of one ordering key, which run
    one after the other, are never in two messages.
    """
    alone: list[tuple[int, Sequence[Claimed]]] = []
    together: dict[int, list[Claimed]] = {}
    for row in claimed:
        if row.dispatches > 1:
            alone.append((row.subscription, [row]))
        else:
            together.setdefault(row.subscription, []).append(row)
    groups = alone + [
        (subscription, group)
        for subscription, rows in together.items()
        for group in _chunks(rows, addresses[subscription].bundle)
    ]
    groups.sort(key=lambda group: group[1][0].id)
    return [
        _message(addresses[subscription], subscription, group, installation, database) for subscription, group in groups
    ]


def _chunks(rows: Sequence[Claimed], size: int) -> Iterator[Sequence[Claimed]]:
    if any(row.ordering_key is not None for row in rows):
        yield from _chunks_of_keys(rows, size)
        return
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _chunks_of_keys(rows: Sequence[Claimed], size: int) -> Iterator[Sequence[Claimed]]:
    by_key: dict[Any, list[Claimed]] = {}
    for row in rows:
        by_key.setdefault(row.id if row.ordering_key is None else row.ordering_key, []).append(row)
    chunk: list[Claimed] = []
    for mine in by_key.values():
        if chunk and len(chunk) + len(mine) > size:
            yield sorted(chunk, key=lambda row: row.id)
            chunk = []
        chunk += mine
    yield sorted(chunk, key=lambda row: row.id)


def _message(
    address: Address, subscription: int, rows: Sequence[Claimed], installation: uuid.UUID, database: str | None
) -> Message:
    carried: tuple[Mapping[str, Any], ...] = ()
    if address.carries:
        carried = tuple(
            {
                "id": row.id,
                "operation": row.operation,
                "payload": row.payload,
                "context": row.context,
                "created_at": row.created_at.isoformat(),
                "retries": row.retries,
                "db_version": row.db_version,
            }
            for row in rows
        )
    return Message(
        task=address.task,
        task_id=notification_task_id(installation, rows[0].id) if len(rows) == 1 else str(uuid.uuid4()),
        envelope=Envelope(
            installation=installation,
            channel=address.channel,
            listener=address.listener,
            subscription=subscription,
            dispatches=rows[0].dispatches,
            ids=tuple(row.id for row in rows),
            retries=tuple(row.retries for row in rows),
            carried=carried,
            database=database,
        ),
    )
