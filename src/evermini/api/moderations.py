"""``POST /v1/moderations``: refused, for there is no model here that could judge texts."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.errors import NotFoundError

router = APIRouter()


@router.post("/v1/moderations")
async def create_moderation(request: Request) -> Response:
    """Say that there is none: a made-up verdict would be worse."""
    raise NotFoundError(
        "This server does not moderate: its models are not trained to classify harmful content. Send these requests to "
        "a moderation service, or leave them out.",
        code="unsupported_endpoint",
    )
