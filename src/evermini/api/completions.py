"""``POST /v1/completions``, the legacy endpoint that evaluation harnesses still score with."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.answer import stream_or_collect
from evermini.api.body import read_request
from evermini.api.description import described
from evermini.api.services import services
from evermini.service import completions, wire
from evermini.service.schemas import CompletionRequest, parse_completion
from evermini.service.shapes import TextAnswer

router = APIRouter()


@router.post("/v1/completions")
@described(body=CompletionRequest, answer=TextAnswer, events=TextAnswer)
async def create_completion(request: Request) -> Response:
    """Continue one or more prompts, at once or as a stream."""
    wanted = await read_request(request, parse_completion)
    mine = services(request)
    run = await completions.start(
        await mine.directory.resolve(wanted.model),
        wanted,
        metrics=mine.metrics,
        arrived=request.state.arrived,
    )
    return await stream_or_collect(
        request, run, stream=wanted.stream, events=_events(run), whole=_whole(run)
    )


async def _whole(run: completions.CompletionRun) -> wire.Json:
    return wire.text_completion(run, await run.collect())


async def _events(run: completions.CompletionRun) -> AsyncGenerator[bytes, None]:
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            yield sse.data(wire.text_chunk(run, delta))
    if run.request.wants_usage_chunk:
        yield sse.data(wire.text_usage_chunk(run))
    yield sse.DONE
