"""no authors, and lost books are remembered."""

import sqlalchemy as sa
from alembic import op

revision = "r5"
down_revision = "r4"


def upgrade():
    op.drop_pgpubsub_trigger("library.Catalogue", "book", ["update"])
    op.drop_column("book", "author")
    op.create_pgpubsub_subscription(
        "library.Catalogue",
        "library.remember",
        ["delete"],
        channel_aliases=["library.Books"],
    )
    op.drop_pgpubsub_subscription("library.Catalogue", "library.index")
    op.create_pgpubsub_trigger(
        "library.Catalogue",
        "book",
        ["delete"],
        aliases=["library.Books"],
        columns=["id", "name", "pages"],
        template=1,
    )
    op.replace_pgpubsub_trigger(
        "library.Catalogue",
        "book",
        ["insert"],
        aliases=["library.Books"],
        columns=["id", "name", "pages"],
        template=1,
    )


def downgrade():
    op.drop_pgpubsub_trigger("library.Catalogue", "book", ["delete"])
    op.create_pgpubsub_subscription(
        "library.Catalogue",
        "library.index",
        ["update"],
        channel_aliases=["library.Books"],
    )
    op.drop_pgpubsub_subscription("library.Catalogue", "library.remember")
    op.add_column("book", sa.Column("author", sa.VARCHAR(), autoincrement=False, nullable=True))
    op.create_pgpubsub_trigger(
        "library.Catalogue",
        "book",
        ["update"],
        aliases=["library.Books"],
        columns=["id", "name", "author", "pages"],
        predicates=[{"listener": "library.index", "changed": ["name"]}],
        template=1,
    )
    op.replace_pgpubsub_trigger(
        "library.Catalogue",
        "book",
        ["insert"],
        aliases=["library.Books"],
        columns=["id", "name", "author", "pages"],
        template=1,
    )
