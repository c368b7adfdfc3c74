"""``/v1/batches``: created, read, listed, cancelled; and the way that their requests take through the application."""

from __future__ import annotations

import httpx
from fastapi import APIRouter
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from evermini.api.body import read_request
from evermini.api.description import PageOf, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import page_object, read_cursor
from evermini.api.middleware import INTERNAL
from evermini.api.services import services
from evermini.service.batches.requests import BatchCreate, parse_batch
from evermini.service.batches.shapes import BatchAnswer
from evermini.service.batches.worker import Execute
from evermini.service.caller import Caller

router = APIRouter(prefix="/v1/batches")


@router.post("")
@described(body=BatchCreate, answer=BatchAnswer)
async def create_batch(request: Request) -> Response:
    """Create a batch."""
    wanted = await read_request(request, parse_batch)
    batch = await services(request).batches.create(wanted)
    services(request).jobs.poke()
    return JsonResponse(batch.body)


@router.get("")
@described(query=cursor("desc"), answer=PageOf(BatchAnswer))
async def list_batches(request: Request) -> Response:
    """List batches, the newest first."""
    cursor = read_cursor(request, order="desc")
    found = await services(request).batches.list(cursor)
    return JsonResponse(page_object(found, cursor, lambda batch: batch.body))


@router.get("/{batch_id}")
@described(answer=BatchAnswer)
async def retrieve_batch(request: Request, batch_id: str) -> Response:
    """Return a batch."""
    return JsonResponse((await services(request).batches.get(batch_id)).body)


@router.post("/{batch_id}/cancel")
@described(answer=BatchAnswer)
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Let a batch end early."""
    return JsonResponse((await services(request).batches.cancel(batch_id)).body)


def executor(app: ASGIApp) -> Execute:
    """Return what sends a batch's requests to the application itself: the same answers, the same errors.

    They need no key (whoever created the batch had one) and yield to requests that somebody waits for.
    """

    async def execute(caller: Caller, body: bytes) -> tuple[int, str, object]:
        async def internal(scope: Scope, receive: Receive, send: Send) -> None:
            scope[INTERNAL] = caller
            await app(scope, receive, send)

        transport = httpx.ASGITransport(internal, raise_app_exceptions=False)
        headers = {"content-type": "application/json"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None
        ) as client:
            answer = await client.post(caller.endpoint, content=body, headers=headers)
        return answer.status_code, answer.headers["x-request-id"], from_json(answer.content)

    return execute
