"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.body import read_request
from evermini.api.description import described
from evermini.api.progress import ReadingWatch, answer_when_read
from evermini.api.services import services
from evermini.service import chat, wire
from evermini.service.caller import current_caller
from evermini.service.schemas import ChatRequest, parse_chat
from evermini.service.shapes import ChatAnswer, ChatChunk
from evermini.storage.chats import ChatStore
from evermini.storage.database import Database

router = APIRouter()


@router.post("/v1/chat/completions")
@described(body=ChatRequest, answer=ChatAnswer, events=ChatChunk)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    wanted = await read_request(request, parse_chat)
    mine = services(request)
    served = await mine.directory.resolve(wanted.model)
    watch, ticket = ReadingWatch(), chat.Ticket()
    starting = asyncio.create_task(
        chat.start(
            served,
            wanted,
            documents=mine.documents,
            metrics=mine.metrics,
            arrived=request.state.arrived,
            progress=watch.report,
            ticket=ticket,
        )
    )
    return await answer_when_read(
        request,
        starting,
        watch,
        stream=wanted.stream,
        chunk=partial(wire.chat_progress_chunk, ticket, served.info)
        if wanted.wants_progress
        else None,
        events=partial(_events, database=mine.database),
        whole=partial(_whole, database=mine.database),
    )


async def _whole(run: chat.ChatRun, database: Database) -> wire.Json:
    await run.collect()
    return await _stored(run, database)


async def _stored(run: chat.ChatRun, database: Database) -> wire.Json:
    """Return the whole answer, on the disk if that is wanted."""
    body = wire.chat_completion(run)
    if run.request.store:
        await database.run(
            ChatStore(database).add,
            body,
            wire.stored_messages(run),
            run.request.metadata or {},
            current_caller.get().project,
        )
    return body


async def _events(run: chat.ChatRun, database: Database) -> AsyncGenerator[bytes, None]:
    # Clients number the choices by their first appearance, so all open here, in order.
    for index in range(run.request.num_choices):
        yield sse.data(wire.chat_role_chunk(run, index))
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            for chunk in wire.chat_chunks(run, delta):
                yield sse.data(chunk)
    await _stored(run, database)  # whoever has read [DONE] can rely on it
    if run.request.wants_usage_chunk:
        yield sse.data(wire.chat_usage_chunk(run))
    yield sse.DONE
