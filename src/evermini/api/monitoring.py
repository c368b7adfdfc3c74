"""Health, readiness and metrics, for probes and Prometheus; never behind a key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.description import Media, described
from evermini.api.errors import JsonResponse
from evermini.api.services import services
from evermini.service.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/healthz")
async def health() -> Response:
    """The process answers."""
    return JsonResponse({"status": "ok"})


@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Engines, database and files work, and the server is not about to end; 503 while that is not so."""
    readiness = services(request).readiness
    checks = await readiness.check()
    states = {name: "ok" if works else "failing" for name, works in checks.items()}
    if readiness.is_draining:
        return JsonResponse({"status": "draining", "checks": states}, status_code=503)
    if all(checks.values()):
        return JsonResponse({"status": "ready", "checks": states})
    return JsonResponse({"status": "unavailable", "checks": states}, status_code=503)


@router.get("/metrics")
@described(answer=Media("text/plain"))
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    exposition = services(request).metrics.exposition()
    return Response(exposition, headers={"content-type": CONTENT_TYPE})
