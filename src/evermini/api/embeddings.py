"""``POST /v1/embeddings``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.body import read_request
from evermini.api.description import described
from evermini.api.errors import JsonResponse
from evermini.service import wire
from evermini.service.directory import Directory
from evermini.service.embedded import EmbeddingRequest
from evermini.service.embeddings import embed, parse_embeddings
from evermini.service.generation import Usage
from evermini.service.metrics import RequestTimer
from evermini.service.runtime import Runtime
from evermini.service.shapes import EmbeddingsAnswer

router = APIRouter()


@router.post("/v1/embeddings")
@described(body=EmbeddingRequest, answer=EmbeddingsAnswer)
async def create_embeddings(request: Request) -> Response:
    """Return a vector for each input."""
    runtime: Runtime = request.app.state.runtime
    wanted = await read_request(request, parse_embeddings)
    directory: Directory = request.app.state.directory
    served = await directory.resolve(wanted.model)
    found = await sse.unless_disconnected(request, embed(served, wanted))
    timer = RequestTimer(runtime.metrics, found.model, request.state.arrived)
    timer.used(Usage(found.prompt_tokens, completion_tokens=0, cached_tokens=0))
    return JsonResponse(wire.embeddings(found, as_base64=wanted.encoding_format == "base64"))
