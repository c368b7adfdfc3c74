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
from evermini.api.answer import stream_or_collect
from evermini.api.body import read_request
from evermini.api.description import described
from evermini.api.progress import ReadingWatch, end
from evermini.service import chat, wire
from evermini.service.runtime import Runtime
from evermini.service.schemas import ChatRequest, parse_chat
from evermini.service.shapes import ChatAnswer, ChatChunk
from evermini.storage.chats import ChatStore
from evermini.storage.database import Database

router = APIRouter()


@router.post("/v1/chat/completions")
@described(body=ChatRequest, answer=ChatAnswer, events=ChatChunk)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    runtime: Runtime = request.app.state.runtime
    wanted = await read_request(request, parse_chat)
    served, watch, ticket = runtime.resolve(wanted.model), ReadingWatch(), chat.Ticket()
    starting = asyncio.create_task(
        chat.start(
            served,
            wanted,
            documents=request.app.state.documents,
            metrics=runtime.metrics,
            arrived=request.state.arrived,
            progress=watch.report,
            ticket=ticket,
        )
    )
    database: Database = request.app.state.database
    if wanted.stream and not await watch.started(request, starting):
        chunk = partial(wire.chat_progress_chunk, ticket, served.info)
        progress = watch.events(starting, chunk if wanted.wants_progress else None)
        return sse.EventStream(_read_first(starting, progress, database), partial(end, starting))
    # A long text is read before there is a run to abort.
    run = await sse.unless_disconnected(request, _result(starting))
    return await stream_or_collect(
        request,
        run,
        stream=wanted.stream,
        events=_events(run, database),
        whole=_whole(run, database),
    )


async def _result(starting: asyncio.Task[chat.ChatRun]) -> chat.ChatRun:
    """Return the run; it is ended if nobody waits for it any more."""
    try:
        return await starting
    except asyncio.CancelledError:
        end(starting)
        raise


async def _read_first(
    starting: asyncio.Task[chat.ChatRun],
    progress: AsyncGenerator[bytes, None],
    database: Database,
) -> AsyncGenerator[bytes, None]:
    """Yield how the reading of a long text goes, then the answer."""
    async with aclosing(progress):
        async for event in progress:
            yield event
    run = await starting
    async with aclosing(_events(run, database)) as events:
        async for event in events:
            yield event


async def _whole(run: chat.ChatRun, database: Database) -> wire.Json:
    await run.collect()
    return await _stored(run, database)


async def _stored(run: chat.ChatRun, database: Database) -> wire.Json:
    """Return the whole answer, on the disk if that is wanted."""
    body = wire.chat_completion(run)
    if run.request.store:
        await database.run(
            ChatStore(database).add, body, wire.stored_messages(run), run.request.metadata or {}
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
