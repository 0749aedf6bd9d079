"""`python -m pgpubsub_celery.demo.tables` makes the blog's tables in PGPUBSUB_DATABASE_URL.

For docker-compose.yml, where they have to be there before `pgpubsub-bridge install`; an application has migrations.
"""

from __future__ import annotations

from sqlalchemy import create_engine

from pgpubsub_celery.demo.models import Base
from pgpubsub_celery.settings import Settings


def main() -> None:
    """Create the tables that are not there yet."""
    engine = create_engine(Settings.load().require_database_url())
    Base.metadata.create_all(engine)
    engine.dispose()


if __name__ == "__main__":
    main()
