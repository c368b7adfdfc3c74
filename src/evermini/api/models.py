"""``/v1/models``: every name that a request's ``model`` may hold; fine-tuned ones can be deleted."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.description import described
from evermini.api.errors import JsonResponse
from evermini.api.services import services
from evermini.service import wire
from evermini.service.shapes import Deleted, ModelAnswer, ModelList

router = APIRouter()


@router.get("/v1/models")
@described(answer=ModelList)
async def list_models(request: Request) -> Response:
    """List the models, each under all of its names."""
    listed = [wire.model(name, info) for name, info in await services(request).directory.list()]
    return JsonResponse({"object": "list", "data": listed})


@router.get("/v1/models/{name:path}")
@described(answer=ModelAnswer)
async def retrieve_model(request: Request, name: str) -> Response:
    """Return one model; names may hold slashes."""
    return JsonResponse(wire.model(name, (await services(request).directory.resolve(name)).info))


@router.delete("/v1/models/{name:path}")
@described(answer=Deleted)
async def delete_model(request: Request, name: str) -> Response:
    """Delete a fine-tuned model, or an alias of one."""
    await services(request).directory.delete(name)
    return JsonResponse({"id": name, "object": "model", "deleted": True})
