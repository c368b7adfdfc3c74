"""Projects that a fine-tuned model is shared with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "model_permissions",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column(
            "adapter", NUMBER, sa.ForeignKey("adapters.number", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
    )
    op.create_index(
        op.f("ix_model_permissions_adapter_project"),
        "model_permissions",
        ["adapter", "project"],
        unique=True,
    )
