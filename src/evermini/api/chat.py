"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.body import read_request
from evermini.api.errors import JsonResponse
from evermini.service import chat, wire
from evermini.service.runtime import Runtime
from evermini.service.schemas import parse_chat

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    runtime: Runtime = request.app.state.runtime
    wanted = await read_request(request, parse_chat)
    starting = chat.start(
        runtime.resolve(wanted.model),
        wanted,
        metrics=runtime.metrics,
        arrived=request.state.arrived,
    )
    # A long text is read before there is a run to abort.
    run = await sse.unless_disconnected(request, starting)
    if wanted.stream:
        return sse.EventStream(_events(run), run.abort)
    try:
        choices = await sse.unless_disconnected(request, run.collect())
    finally:
        run.abort()
    return JsonResponse(wire.chat_completion(run, choices))


async def _events(run: chat.ChatRun) -> AsyncGenerator[bytes, None]:
    # Clients number the choices by their first appearance, so all open here, in order.
    for index in range(run.request.num_choices):
        yield sse.data(wire.chat_role_chunk(run, index))
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            for chunk in wire.chat_chunks(run, delta):
                yield sse.data(chunk)
    if run.request.wants_usage_chunk:
        yield sse.data(wire.chat_usage_chunk(run))
    yield sse.DONE
