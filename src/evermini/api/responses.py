"""``/v1/responses``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.body import read_request
from evermini.api.description import PageOf, Parameter, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import page_of, read_cursor
from evermini.api.progress import ReadingWatch, answer_when_read
from evermini.api.services import services
from evermini.errors import InvalidRequestError, UnsupportedParameterError
from evermini.service.responses.run import ResponseRun
from evermini.service.responses.schemas import (
    ResponseRequest,
    TokenCountRequest,
    parse_response,
    parse_token_count,
)
from evermini.service.responses.shapes import Item, ResponseAnswer, ResponseEvent, TokenCount
from evermini.service.shapes import Deleted

router = APIRouter(prefix="/v1/responses")

_FOLLOWING = [
    Parameter("stream", {"type": "boolean"}, "As events; of background streams alone."),
    Parameter("starting_after", {"type": "integer"}, "Those after this number alone."),
]


@router.post("")
@described(body=ResponseRequest, answer=ResponseAnswer, events=ResponseEvent)
async def create_response(request: Request) -> Response:
    """Answer, at once, as a stream, or in the background."""
    responses = services(request).responses
    wanted = await read_request(request, parse_response)
    if wanted.background:
        queued = await responses.submit(wanted)
        if not wanted.stream:
            return JsonResponse(queued)
        return sse.EventStream(_sent(await responses.follow(queued["id"], -1)), _nothing_to_end)
    watch = ReadingWatch()
    starting = asyncio.create_task(
        responses.start(wanted, request.state.arrived, progress=watch.report)
    )
    return await answer_when_read(
        request,
        starting,
        watch,
        stream=wanted.stream,
        events=lambda run: _sent(run.events()),
        whole=ResponseRun.collect,
    )


@router.post("/input_tokens")
@described(body=TokenCountRequest, answer=TokenCount)
async def count_input_tokens(request: Request) -> Response:
    """Return how many tokens a response's input has."""
    wanted = await read_request(request, parse_token_count)
    count = await sse.unless_disconnected(request, services(request).responses.count_tokens(wanted))
    return JsonResponse({"object": "response.input_tokens", "input_tokens": count})


@router.post("/compact")
async def compact_response(request: Request) -> Response:
    """Refused: a compacted context is for models that read an encrypted summary."""
    raise UnsupportedParameterError(
        "Compaction is not supported by this server. Long contexts are read as they are, up to the model's "
        "context_window; 'truncation': 'auto' drops the oldest turns beyond it.",
    )


@router.get("/{response_id}")
@described(query=_FOLLOWING, answer=ResponseAnswer, events=ResponseEvent)
async def retrieve_response(request: Request, response_id: str) -> Response:
    """Return a stored response, or stream the events of a background one from any place on."""
    responses, query = services(request).responses, request.query_params
    streams = _flag(request, "stream")
    if not streams:
        return JsonResponse((await responses.get(response_id)).body)
    after = query.get("starting_after", "-1")
    if not (after.removeprefix("-").isdecimal() and after.isascii() and len(after) < 10):
        raise InvalidRequestError(
            f"Invalid type for 'starting_after': expected an integer, but got '{after[:40]}' instead.",
            param="starting_after",
            code="invalid_type",
        )
    return sse.EventStream(_sent(await responses.follow(response_id, int(after))), _nothing_to_end)


@router.delete("/{response_id}")
@described(answer=Deleted)
async def delete_response(request: Request, response_id: str) -> Response:
    """Delete a stored response."""
    await services(request).responses.delete(response_id)
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel")
@described(answer=ResponseAnswer)
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a background response."""
    return JsonResponse(await services(request).responses.cancel(response_id))


@router.get("/{response_id}/input_items")
@described(query=cursor("desc"), answer=PageOf(Item))
async def list_input_items(request: Request, response_id: str) -> Response:
    """List the items of a response's own input."""
    cursor = read_cursor(request, order="desc")
    stored = await services(request).responses.get(response_id)
    return JsonResponse(page_of(stored.items, cursor))


async def _sent(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield sse.data(event, event["type"])


def _nothing_to_end() -> None:
    """Do nothing: a background response goes on without its readers."""


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequestError(
            f"Invalid type for '{name}': expected a boolean, but got '{value[:40]}' instead.",
            param=name,
            code="invalid_type",
        )
    return value == "true"
