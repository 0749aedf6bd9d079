"""The application's environment; the plugin is found by its entry point, the listeners by the application."""

import os

from alembic import context
from library.models import Base
from sqlalchemy import create_engine

engine = create_engine(os.environ["PGPUBSUB_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg2://"))

with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, pgpubsub_app="library.celery_app")
    with context.begin_transaction():
        context.run_migrations()
