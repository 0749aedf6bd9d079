"""authors, and new titles are indexed."""

import sqlalchemy as sa
from alembic import op

revision = "r2"
down_revision = "r1"


def upgrade():
    op.add_column("book", sa.Column("author", sa.String(), nullable=True))
    op.create_pgpubsub_subscription("library.Books", "library.index", ["update"])
    op.create_pgpubsub_trigger(
        "library.Books",
        "book",
        ["update"],
        columns=["id", "title", "author"],
        predicates=[{"listener": "library.index", "changed": ["title"]}],
        template=1,
    )
    op.replace_pgpubsub_trigger(
        "library.Books",
        "book",
        ["insert"],
        columns=["id", "title", "author"],
        template=1,
    )


def downgrade():
    op.drop_pgpubsub_trigger("library.Books", "book", ["update"])
    op.drop_pgpubsub_subscription("library.Books", "library.index")
    op.drop_column("book", "author")
    op.replace_pgpubsub_trigger(
        "library.Books",
        "book",
        ["insert"],
        columns=["id", "title"],
        template=1,
    )
