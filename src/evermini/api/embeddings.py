"""``POST /v1/embeddings``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.body import read_request
from evermini.api.description import described
from evermini.api.errors import JsonResponse
from evermini.api.services import services
from evermini.service import wire
from evermini.service.embedded import EmbeddingRequest
from evermini.service.embeddings import embed, parse_embeddings
from evermini.service.generation import Usage
from evermini.service.metrics import RequestTimer
from evermini.service.shapes import EmbeddingsAnswer

router = APIRouter()


@router.post("/v1/embeddings")
@described(body=EmbeddingRequest, answer=EmbeddingsAnswer)
async def create_embeddings(request: Request) -> Response:
    """Return a vector for each input."""
    wanted = await read_request(request, parse_embeddings)
    mine = services(request)
    served = await mine.directory.resolve(wanted.model)
    found = await sse.unless_disconnected(request, embed(served, wanted))
    timer = RequestTimer(mine.metrics, found.model, request.state.arrived)
    timer.used(Usage(found.prompt_tokens, completion_tokens=0, cached_tokens=0))
    return JsonResponse(wire.embeddings(found, as_base64=wanted.encoding_format == "base64"))
