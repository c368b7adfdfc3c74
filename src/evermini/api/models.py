"""``GET /v1/models``: every name that a request's ``model`` may hold."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.description import described
from evermini.api.errors import JsonResponse
from evermini.service import wire
from evermini.service.runtime import Runtime
from evermini.service.shapes import ModelAnswer, ModelList

router = APIRouter()


@router.get("/v1/models")
@described(answer=ModelList)
async def list_models(request: Request) -> Response:
    """List the models, each under all of its names."""
    runtime: Runtime = request.app.state.runtime
    listed = [wire.model(name, served.info) for name, served in runtime.names.items()]
    return JsonResponse({"object": "list", "data": listed})


@router.get("/v1/models/{name:path}")
@described(answer=ModelAnswer)
async def retrieve_model(request: Request, name: str) -> Response:
    """Return one model; names may hold slashes."""
    runtime: Runtime = request.app.state.runtime
    return JsonResponse(wire.model(name, runtime.resolve(name).info))
