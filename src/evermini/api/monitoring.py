"""Health, readiness and metrics, for probes and Prometheus; never behind a key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.errors import JsonResponse
from evermini.service.metrics import CONTENT_TYPE
from evermini.service.runtime import Runtime

router = APIRouter()


@router.get("/healthz")
async def health() -> Response:
    """The process answers."""
    return JsonResponse({"status": "ok"})


@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Every engine takes requests; 503 while one does not."""
    runtime: Runtime = request.app.state.runtime
    if runtime.is_ready:
        return JsonResponse({"status": "ready"})
    return JsonResponse({"status": "unavailable"}, status_code=503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    runtime: Runtime = request.app.state.runtime
    return Response(runtime.metrics.exposition(), headers={"content-type": CONTENT_TYPE})
