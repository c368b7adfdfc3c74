"""Background responses are jobs like all others, and know who asked for them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make a job of every unfinished response, and drop the leases of their own.

    A process of an earlier version that still works on one cannot write its result any more, so nobody waits for it.
    """
    op.add_column("responses", sa.Column("caller", sa.JSON()))
    op.execute(
        "INSERT INTO jobs (kind, subject, run_after, num_attempts) "
        "SELECT 'response', id, 0, num_attempts FROM responses "
        "WHERE lease_expires IS NOT NULL AND status IN ('queued', 'in_progress') ORDER BY number"
    )
    op.drop_index("ix_responses_lease_expires", "responses")
    for column in ("owner", "lease_expires", "num_attempts"):
        op.drop_column("responses", column)
