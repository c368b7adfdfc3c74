"""Items of responses and conversations are found by their ids alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table of responses' item ids; there are no responses yet that it lacks."""
    op.create_table(
        "response_items",
        sa.Column(
            "response",
            NUMBER,
            sa.ForeignKey("responses.number", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("id", sa.String(), primary_key=True, index=True),
    )
    op.create_index(None, "conversation_items", ["id"])
