"""readers, and pages are a number."""

import sqlalchemy as sa
from alembic import op

revision = "r6"
down_revision = "r5"


def upgrade():
    op.create_table("reader", sa.Column("id", sa.Integer(), nullable=False), sa.PrimaryKeyConstraint("id"))
    op.alter_column(
        "book",
        "pages",
        existing_type=sa.VARCHAR(),
        type_=sa.Integer(),
        existing_nullable=True,
        postgresql_using="CASE WHEN pages ~ '^[0-9]+$' THEN pages::int END",
    )
    op.create_pgpubsub_channel("library.Readers", table="reader")
    op.create_pgpubsub_subscription("library.Readers", "library.greet", ["insert"])
    op.create_pgpubsub_trigger(
        "library.Readers",
        "reader",
        ["insert"],
        columns=["id"],
        template=1,
    )


def downgrade():
    op.drop_pgpubsub_trigger("library.Readers", "reader", ["insert"])
    op.drop_pgpubsub_subscription("library.Readers", "library.greet")
    op.drop_pgpubsub_channel("library.Readers")
    op.alter_column("book", "pages", existing_type=sa.Integer(), type_=sa.VARCHAR(), existing_nullable=True)
    op.drop_table("reader")
