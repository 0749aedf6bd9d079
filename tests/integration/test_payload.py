"""Payloads in a real jsonb column: nothing is refused, and what comes back is what was sent."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from pgpubsub_celery.channels import Channel
from pgpubsub_celery.payload import decode_message, encode_message
from tests.fixtures.typed_values import Kind, kinds, sameness, through_jsonb

pytestmark = pytest.mark.usefixtures("registry")


def message_of(annotation: Any, value: Any) -> Any:
    return dataclasses.make_dataclass("Generated", [("value", annotation)], bases=(Channel,))(value)


def through_postgres(connection: Connection, texts: list[str]) -> list[Any]:
    """Return what Postgres gives back for JSON texts, as psycopg2 reads it."""
    rows = connection.execute(
        text("SELECT t::jsonb FROM unnest(CAST(:texts AS text[])) WITH ORDINALITY AS x (t, n) ORDER BY n"),
        {"texts": texts},
    )
    return list(rows.scalars())


def test_values_of_any_supported_type_survive_postgres(engine: Engine) -> None:
    """And what the unit tests take for jsonb is what it does."""
    with engine.connect() as connection:

        @given(st.lists(kinds().flatmap(lambda kind: st.tuples(st.just(kind), kind.values)), min_size=5, max_size=30))
        @settings(
            derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck)
        )
        def survive(drawn: list[tuple[Kind, Any]]) -> None:
            messages = [message_of(kind.annotation, value) for kind, value in drawn]
            texts = [json.dumps(encode_message(message), allow_nan=False, ensure_ascii=False) for message in messages]
            for message, sent, stored in zip(messages, texts, through_postgres(connection, texts), strict=True):
                assert sameness(decode_message(type(message), stored)) == sameness(message)
                assert sameness(stored) == sameness(through_jsonb(sent))

        survive()
