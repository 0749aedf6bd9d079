"""a title is called a name."""

from alembic import op

revision = "r3"
down_revision = "r2"


def upgrade():
    op.alter_column("book", "title", new_column_name="name")
    op.replace_pgpubsub_trigger(
        "library.Books",
        "book",
        ["insert"],
        columns=["id", "name", "author"],
        template=1,
    )
    op.replace_pgpubsub_trigger(
        "library.Books",
        "book",
        ["update"],
        columns=["id", "name", "author"],
        predicates=[{"listener": "library.index", "changed": ["name"]}],
        template=1,
    )


def downgrade():
    op.alter_column("book", "name", new_column_name="title")
    op.replace_pgpubsub_trigger(
        "library.Books",
        "book",
        ["insert"],
        columns=["id", "title", "author"],
        template=1,
    )
    op.replace_pgpubsub_trigger(
        "library.Books",
        "book",
        ["update"],
        columns=["id", "title", "author"],
        predicates=[{"listener": "library.index", "changed": ["title"]}],
        template=1,
    )
