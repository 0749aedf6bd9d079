"""books are shelved."""

import sqlalchemy as sa
from alembic import op

revision = "r1"
down_revision = None


def upgrade():
    op.create_table(
        "book",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "done",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("what", sa.String(), nullable=False),
        sa.Column("db_version", sa.String(), nullable=True),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_pgpubsub(version=1)
    op.create_pgpubsub_channel("pgpubsub.enqueue")
    op.create_pgpubsub_channel("library.Books", table="book")
    op.create_pgpubsub_channel("library.Borrowed")
    op.create_pgpubsub_subscription("library.Books", "library.shelve", ["insert"])
    op.create_pgpubsub_subscription("library.Borrowed", "library.lend", ["message"])
    op.create_pgpubsub_subscription("pgpubsub.enqueue", "pgpubsub.enqueue", ["message"])
    op.create_pgpubsub_trigger(
        "library.Books",
        "book",
        ["insert"],
        columns=["id", "title"],
        template=1,
    )


def downgrade():
    op.drop_pgpubsub_trigger("library.Books", "book", ["insert"])
    op.drop_pgpubsub_subscription("pgpubsub.enqueue", "pgpubsub.enqueue")
    op.drop_pgpubsub_subscription("library.Borrowed", "library.lend")
    op.drop_pgpubsub_subscription("library.Books", "library.shelve")
    op.drop_pgpubsub_channel("library.Borrowed")
    op.drop_pgpubsub_channel("library.Books")
    op.drop_pgpubsub_channel("pgpubsub.enqueue")
    op.drop_pgpubsub(version=1)
    op.drop_table("done")
    op.drop_table("book")
