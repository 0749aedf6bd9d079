"""The Django guide as it stands there: migrations, a bridge and a worker as real processes, writes by Django's ORM."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, make_url, text

from tests.fixtures.commands import CELERY, Folder, done, started
from tests.fixtures.pages import DOCS, application
from tests.fixtures.processes import Running, eventually

APP = ("-A", "mysite.celery")

# What every project has, and the guide leaves out.
MANAGE = """
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
"""
SETTINGS = """
SECRET_KEY = "of a test"
USE_TZ = True
INSTALLED_APPS = ["library"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {{"default": {database}}}
CELERY_BROKER_URL = "{broker_url}"
"""
WRITES = """
import datetime
from django.db import transaction
from library.channels import PostsRead
from library.models import Author, Post
from library.notifying import notify
ann, bob = Author.objects.bulk_create([Author(name="Ann"), Author(name="Bob")])
bob.name = "Robert"
bob.save()
Author.objects.filter(name="Ann").update(password_hash="x")
with transaction.atomic():
    post = Post.objects.create(author=ann, content="")
    notify(PostsRead(post_id=post.id, day=datetime.date(2026, 1, 2)))
with transaction.atomic():
    Author.objects.create(name="Nobody")
    notify(PostsRead(post_id=post.id, day=datetime.date(2026, 1, 2)))
    transaction.set_rollback(True)
"""


@pytest.fixture
def site(tmp_path: Path, database_url: str, broker_url: str) -> Folder:
    """The guide's project in a folder, with Django's own migration made."""
    folder = Folder(tmp_path / "site", DJANGO_SETTINGS_MODULE="mysite.settings")
    folder.path.mkdir()
    url = make_url(database_url)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.database,
        "USER": url.username,
        "HOST": url.host,
        "PORT": url.port,
    }
    folder.write("manage.py", MANAGE)
    folder.write("mysite/settings.py", SETTINGS.format(database=database, broker_url=broker_url))
    files = application(DOCS / "guides" / "django.md")
    migration = "library/migrations/0002_pgpubsub.py"
    for name, content in files.items():
        if name != migration:
            folder.write(name, content)
    manage(folder, "makemigrations", "library", "--verbosity=0")
    folder.write(migration, files[migration])
    return folder


def manage(folder: Folder, *words: str) -> str:
    """Run a management command."""
    return done(folder.run("manage.py", *words, program=sys.executable))


@contextlib.contextmanager
def running(folder: Folder, *words: str, program: str) -> Iterator[Running]:
    """A process of the project's, ended afterwards."""
    process = started(folder, *words, program=program)
    try:
        yield process
    finally:
        process.destroy()


def test_changes_by_djangos_orm_reach_listeners(site: Folder, engine: Engine) -> None:
    """A migration installs; changes by the ORM, in bulk, and messages in its transactions reach listeners."""
    script = done(site.run(*APP, "install", "--sql"))
    (site.path / "library/migrations/0002_pgpubsub.sql").write_text(script)
    manage(site, "migrate", "--verbosity=0")
    assert "everything is in place" in done(site.run(*APP, "install", "--check"))
    manage(site, "shell", "-c", WRITES)

    def contents() -> list[str]:
        with engine.connect() as connection:
            return list(connection.execute(text("SELECT content FROM library_post ORDER BY content")).scalars())

    def stored() -> int:
        with engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM pgpubsub_notification")).scalar_one())

    assert stored() == 4  # two authors, one of them renamed, one message; nothing of the password, nothing rolled back
    worker = (*APP, "worker", "--concurrency=1", "--without-gossip", "--without-mingle")
    with (
        running(site, *worker, program=CELERY),
        running(site, *APP, "listen", "--recover", program=str(Path(CELERY).with_name("pgpubsub-bridge"))),
    ):
        eventually(lambda: stored() == 0, "every notification is acknowledged")
    assert contents() == ["Bob is Robert now.", "Read on 02 January 2026", "Welcome, Ann!", "Welcome, Bob!"]
