"""The blog's listeners: found by `app.autodiscover_tasks([…], related_name="listeners")`."""

from __future__ import annotations

import datetime
import os
from functools import lru_cache
from typing import Any

from celery import shared_task
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from pgpubsub_celery import channel_task
from pgpubsub_celery.demo.channels import AuthorChanges, Misprint, Newsletter, PostReads
from pgpubsub_celery.demo.models import Author, Effect, Post
from pgpubsub_celery.settings import sync_url


@channel_task(AuthorChanges, on="insert")
def create_first_post(new: Author, session: Session) -> None:
    """With `session`: the post and the acknowledgement are committed together. Up to 50 may travel in one message."""
    session.add(Post(author_id=new.id, content=f"Welcome, {new.name}!"))
    session.add(Effect(kind="first post", value=new.id))


@channel_task(AuthorChanges, on="update")
def follow_renaming(old: Author, new: Author, session: Session) -> None:
    """Only updates come here."""
    session.add(Effect(kind=f"{old.name} is now {new.name}", value=new.id))


@channel_task(AuthorChanges, on="delete")
def say_goodbye(old: Author, session: Session) -> None:
    """Only deletes come here."""
    session.add(Effect(kind="goodbye", value=old.id))


@channel_task(PostReads)
def count_read(model_id: int, date: datetime.date) -> None:
    """Without `session`: no transaction is open while it runs; what it does is its own."""
    with Session(_engine()) as session, session.begin():
        session.add(Effect(kind="read", value=model_id))


@channel_task(Newsletter, bind=True, autoretry_for=(OSError,), max_retries=5, default_retry_delay=0.3)
def send_newsletter(self: Any, issue: int, session: Session) -> None:
    """Fails twice, and then succeeds; between the runs its row waits in Postgres."""
    if self.request.retries < 2:
        raise OSError("the mail server does not answer")
    session.add(Effect(kind="newsletter", value=issue))


@channel_task(Misprint)
def correct_misprint(page: int, session: Session) -> None:
    """Fails for good: its row stays, with the traceback, until somebody retries or discards it."""
    session.add(Effect(kind="correction", value=page))
    raise ValueError(f"page {page} is already printed")


@shared_task  # type: ignore[untyped-decorator, unused-ignore]
def send_mail(author: int) -> None:
    """An ordinary task, sent by `enqueue`."""
    with Session(_engine()) as session, session.begin():
        session.add(Effect(kind="mail", value=author))


@lru_cache
def _engine() -> Engine:
    return create_engine(sync_url(os.environ["PGPUBSUB_DATABASE_URL"]))
