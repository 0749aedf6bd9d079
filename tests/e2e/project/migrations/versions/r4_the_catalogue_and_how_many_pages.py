"""the catalogue, and how many pages."""

import sqlalchemy as sa
from alembic import op

revision = "r4"
down_revision = "r3"


def upgrade():
    op.drop_pgpubsub_trigger("library.Books", "book", ["insert"])
    op.drop_pgpubsub_trigger("library.Books", "book", ["update"])
    op.add_column("book", sa.Column("pages", sa.String(), nullable=True))
    op.create_pgpubsub_channel(
        "library.Catalogue",
        table="book",
        aliases=["library.Books"],
    )
    op.alter_pgpubsub_subscription(
        "library.Catalogue",
        "library.arrange",
        ["insert"],
        channel_aliases=["library.Books"],
        aliases=["library.shelve"],
        was=["library.Books", "library.shelve"],
    )
    op.alter_pgpubsub_subscription(
        "library.Catalogue",
        "library.index",
        ["update"],
        channel_aliases=["library.Books"],
        was=["library.Books", "library.index"],
    )
    op.create_pgpubsub_trigger(
        "library.Catalogue",
        "book",
        ["insert"],
        aliases=["library.Books"],
        columns=["id", "name", "author", "pages"],
        template=1,
    )
    op.create_pgpubsub_trigger(
        "library.Catalogue",
        "book",
        ["update"],
        aliases=["library.Books"],
        columns=["id", "name", "author", "pages"],
        predicates=[{"listener": "library.index", "changed": ["name"]}],
        template=1,
    )


def downgrade():
    op.drop_pgpubsub_trigger("library.Catalogue", "book", ["update"])
    op.drop_pgpubsub_trigger("library.Catalogue", "book", ["insert"])
    op.alter_pgpubsub_subscription(
        "library.Books",
        "library.index",
        ["update"],
        was=["library.Catalogue", "library.index"],
    )
    op.alter_pgpubsub_subscription(
        "library.Books",
        "library.shelve",
        ["insert"],
        was=["library.Catalogue", "library.arrange"],
    )
    op.drop_pgpubsub_channel("library.Catalogue")
    op.drop_column("book", "pages")
    op.create_pgpubsub_trigger(
        "library.Books",
        "book",
        ["update"],
        columns=["id", "name", "author"],
        predicates=[{"listener": "library.index", "changed": ["name"]}],
        template=1,
    )
    op.create_pgpubsub_trigger(
        "library.Books",
        "book",
        ["insert"],
        columns=["id", "name", "author"],
        template=1,
    )
