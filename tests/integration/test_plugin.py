"""The pytest plugin, as users have it: suites of their own, in processes of their own, with warnings as errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sqlalchemy import create_engine, text

from pgpubsub_celery.embedded import EmbeddedPostgres
from pgpubsub_celery.settings import sync_url
from tests.fixtures.pages import DOCS, application

PAGE = DOCS / "testing.md"
OPTIONS = ("-W", "error", "-p", "no:cacheprovider", "-q")


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with the application of docs/testing.md, and no tests."""
    pytester.path.joinpath("blog.py").write_text(application(PAGE)["blog.py"], encoding="utf-8")
    return pytester


@pytest.fixture
def server(postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that exists already, for suites that do not start their own."""
    monkeypatch.setenv("PGPUBSUB_TEST_SERVER_URL", postgres.url)
    return postgres.url


def databases(server: str) -> list[str]:
    engine = create_engine(sync_url(server))
    with engine.connect() as connection:
        names = connection.execute(text("SELECT datname FROM pg_database WHERE datname LIKE 'pgpubsub\\_test%'"))
        found = list(names.scalars())
    engine.dispose()
    return found


def test_the_examples_of_the_page_work(suite: pytest.Pytester, server: str) -> None:
    """All of them, on one server, in two processes that share it; of their databases none is left."""
    for name, source in application(PAGE).items():
        suite.path.joinpath(name).write_text(source, encoding="utf-8")
    suite.runpytest_subprocess(*OPTIONS, "-n", "2").assert_outcomes(passed=6)
    assert databases(server) == []


def test_without_a_server_one_is_started(suite: pytest.Pytester) -> None:
    """And nothing has to be configured."""
    suite.path.joinpath("test_welcome.py").write_text(application(PAGE)["test_welcome.py"], encoding="utf-8")
    suite.runpytest_subprocess(*OPTIONS).assert_outcomes(passed=1)


def test_a_suite_on_a_server_of_somebody_elses(suite: pytest.Pytester, postgres: EmbeddedPostgres) -> None:
    """As pytest-postgresql's: one fixture of a plain URL gives it, others the tables and the application.

    Its tests do not see each other, whatever they commit; one that fails shows the near misses, and not our code.
    """
    suite.makeconftest(f"""
        import pytest
        from sqlalchemy import text
        from blog import Base, app
        from pgpubsub_celery import install

        @pytest.fixture(scope="session")
        def somebody_elses_server():
            return {postgres.url!r}.replace("postgresql://", "postgres://")

        @pytest.fixture(scope="session")
        def pgpubsub_server_url(somebody_elses_server):
            return somebody_elses_server

        @pytest.fixture(scope="session")
        def pgpubsub_prepare():
            def prepare(engine):
                Base.metadata.create_all(engine)
                install(engine)
                with engine.begin() as connection:
                    connection.execute(text("CREATE TABLE prepared ()"))
            return prepare

        @pytest.fixture
        def pgpubsub_app():
            return app
    """)
    suite.makepyfile("""
        import pytest
        from celery import Celery
        from sqlalchemy import text
        from sqlalchemy.orm import Session
        from blog import Author, PostReads, app, read_post
        from pgpubsub_celery.testing import assert_emitted, drain


        @pytest.mark.parametrize("n", [1, 2])
        def test_rolled_back(pgpubsub_session, pgpubsub_drain, n):
            Celery("another", set_as_current=True)
            pgpubsub_session.execute(text("SELECT FROM prepared"))
            pgpubsub_session.add(Author(id=1, name="Ann"))
            pgpubsub_session.commit()
            assert pgpubsub_session.execute(text("SELECT count(*) FROM author")).scalar() == 1
            assert len(pgpubsub_drain()) == 1


        @pytest.mark.parametrize("n", [1, 2])
        def test_committed(pgpubsub_engine, pgpubsub_session, n):
            with Session(pgpubsub_engine) as session, session.begin():
                session.add(Author(id=1, name="Ann"))
            assert len(drain(pgpubsub_engine, app=app)) == 1
            assert pgpubsub_session.execute(text("SELECT count(*) FROM author")).scalar() == 0


        def test_failing(pgpubsub_session):
            read_post(pgpubsub_session, 5, "Bea")
            assert_emitted(pgpubsub_session, PostReads, post_id=6)
    """)
    result = suite.runpytest_subprocess(*OPTIONS)
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*assert_emitted(pgpubsub_session, PostReads, post_id=6)",
            "E*at least one PostReads with post_id=6 expected, 0 emitted. There is:",
            "E*PostReads(post_id=5, reader='Bea')",
            "E*post_id is 5, not 6",
        ]
    )
    assert "def assert_emitted" not in result.stdout.str()


def test_a_suite_that_uses_no_fixture_pays_nothing() -> None:
    """The plugin imports nothing but pytest."""
    heavy = "sqlalchemy", "celery", "kombu", "psycopg2", "psycopg", "redis", "click"
    program = f"import pgpubsub_celery.testing.plugin, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
