"""What answers of the Batch API look like; see `evermini.service.shapes`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from evermini.service.responses.shapes import ResponseUsage
from evermini.service.shapes import EXACT, Metadata


@with_config(EXACT)
class BatchCounts(TypedDict):
    """A batch's requests."""

    total: int
    completed: int
    failed: int


@with_config(EXACT)
class BatchAnswer(TypedDict):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: ResponseUsage | None
    metadata: Metadata | None
