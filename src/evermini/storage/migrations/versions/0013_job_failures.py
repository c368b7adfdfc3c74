"""Jobs know how often they have failed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "jobs", sa.Column("num_failures", sa.Integer(), nullable=False, server_default="0")
    )
