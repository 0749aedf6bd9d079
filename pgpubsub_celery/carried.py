"""Messages without rows: they carry what they tell of, and Celery's own guarantees apply.

Owns the reading of carried notifications, and the messages that their retries send. Touches Postgres only to give a
listener its `session`, or to read a row's types.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pgpubsub_celery import runs
from pgpubsub_celery.channels import TriggerChannel
from pgpubsub_celery.delivery import Delivery, halves, own_session
from pgpubsub_celery.errors import DecodeError
from pgpubsub_celery.messages import KEYWORD
from pgpubsub_celery.runs import SPLIT
from pgpubsub_celery.store import Taken


class CarriedDelivery(Delivery):
    """For messages without rows: they carry what they tell of, and Celery's own guarantees apply."""

    def _run_all(self) -> None:
        rows = [self._row(one) for one in self.envelope.carried]
        if issubclass(self.listener.channel, TriggerChannel):
            with self.runtime.connect() as connection:
                arguments = self.decode(rows, connection)
        else:
            arguments = self.decode_messages(rows)
        parts = self.parts(rows, arguments)
        while parts:
            part = parts.pop(0)
            run = self.make_run(part[0], self._invoke)
            # Nothing but the message's own id is known of it elsewhere.
            run.task_id = self.uuid if self.single else str(uuid.uuid4())
            run.retry_message = self._retry_message(part[0])
            self.trace(run, part[1])
            self.count(run)
            if run.outcome == SPLIT:
                parts = [*halves(part), *parts]

    def _row(self, carried: Mapping[str, Any]) -> Taken:
        try:
            return Taken(
                id=int(carried.get("id") or 0),
                channel=self.envelope.channel,
                subscription=self.envelope.subscription or 0,
                operation=str(carried["operation"]),
                payload=carried["payload"],
                context=carried.get("context"),
                created_at=datetime.datetime.fromisoformat(str(carried["created_at"])),
                db_version=carried.get("db_version"),
                dispatches=self.envelope.dispatches,
                starts=0,
                # Retried by Celery, so the message counts.
                retries=int(self.request.get("retries") or 0) if self.single else 0,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise DecodeError(f"The message carries a malformed notification ({type(exc).__name__}: {exc}).") from exc

    def _invoke(self, call: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        run = runs.current_run()
        assert run is not None
        if not self.listener.wants_session:
            return call(**kwargs, **run.injected())
        with own_session(self.runtime) as session:
            return call(**kwargs, **run.injected(), session=session)

    def _retry_message(self, rows: Sequence[Taken]) -> Callable[..., Any]:
        ids = {row.id for row in rows}

        def message(request: Any, **options: Any) -> Any:
            # As the message came, not as it was decoded: listeners' arguments need not be JSON.
            body = self.envelope.to_kwargs()[KEYWORD]
            if not self.single:
                body["carried"] = [one for one in body["carried"] if int(one.get("id") or 0) in ids]
            return self.task.message_from_request(request, {KEYWORD: body}, **options)

        return message
