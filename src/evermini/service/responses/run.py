"""One response: its context, its object, and the answer in flight until it is on the disk."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial

from evermini.errors import (
    ContextLengthError,
    EngineStoppedError,
    EverminiError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    StorageError,
    UpstreamError,
)
from evermini.service import chat, wire
from evermini.service.answer import FinishReason
from evermini.service.documents import Documents
from evermini.service.metrics import Metrics
from evermini.service.offload import tokenise
from evermini.service.reading import OnProgress
from evermini.service.responses.events import EventWriter
from evermini.service.responses.items import ITEM_CHARACTERS, Json, new_id
from evermini.service.responses.schemas import (
    ContextRequest,
    ResponseRequest,
    chat_request,
    located,
)
from evermini.service.runtime import Served
from evermini.service.schemas import ChatRequest

log = logging.getLogger(__name__)

Save = Callable[[Json, Json, Exception | None], Awaitable[None]]
"""Stores a finished response: its object, its last event, and why it failed, if it did."""


def new_body(request: ResponseRequest, model: str, status: str) -> Json:
    """Return the object of a new response; every key of the contract is there, even when null."""
    conversation = request.conversation and {"id": request.conversation.id}
    text_format: Json = {"type": "text"}
    if request.text is not None and request.text.format is not None:
        text_format = request.text.format.model_dump(by_alias=True, exclude_unset=True)
    choice: object = "auto"
    if request.tool_choice is not None:
        choice = request.tool_choice.model_dump(exclude_none=True)
        choice = choice if len(choice) > 1 else request.tool_choice.type
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "background": bool(request.background),
        "completed_at": None,
        "conversation": conversation,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.is_stored,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": text_format, "verbosity": "medium"},
        "tool_choice": choice,
        "tools": [tool.model_dump(exclude_unset=True) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def new_writer(body: Json, request: ResponseRequest) -> EventWriter:
    """Return what writes a response's events."""
    return EventWriter(body, wire.token_logprobs if request.wants_logprobs else None)


class AbandonedError(Exception):
    """Raised by what saves a response that this process is not to finish: nothing is written of it.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class ResponseRun:
    """A response in flight: iterate `events` or await `collect`, and `abort` if neither is finished."""

    def __init__(self, writer: EventWriter, running: chat.ChatRun, save: Save) -> None:
        self.body = writer.body
        self.error: Exception | None = None
        self._writer = writer
        self._chat = running
        self._save = save
        writer.annotate = partial(wire.file_citations, running)

    async def events(self) -> AsyncGenerator[Json, None]:
        """Yield the events. The last comes when the response is stored; a failure is an event, too, and `error`."""
        writer = self._writer
        try:
            for event in writer.started():
                yield event
            reason: FinishReason | None = None
            async with aclosing(self._chat.deltas()) as deltas:
                async for delta in deltas:
                    reason = delta.finish_reason
                    for event in writer.add(delta):
                        yield event
            for event in writer.finish(reason, self._chat.usage):
                yield event
            if self._chat.request.wants_why:
                self.body["x_evermini"] = {
                    **self.body.get("x_evermini", {}),
                    **wire.why(self._chat, self._chat.choices),
                }
            last = writer.terminal()
            await self._save(self.body, last, None)
            yield last
        except AbandonedError:
            raise
        except Exception as error:
            self.error = error
            yield writer.fail(failure(error))
            last = writer.terminal()
            with suppress(StorageError):  # the client is told of the failure in any case
                await self._save(self.body, last, error)
            yield last

    async def collect(self) -> Json:
        """Return the finished response's object.

        Raises:
            EngineError: The engine failed or stopped.
            StorageError: The response could not be stored.
        """
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        if self.error is not None:
            raise self.error
        return self.body

    def abort(self) -> None:
        """End the request in the engine if it still runs."""
        self._chat.abort()


async def as_chat(request: ContextRequest, context: Sequence[Json]) -> ChatRequest:
    """Return the chat completion that answers a response; many items are checked off the event loop.

    Raises:
        InvalidRequestError: As `chat_request` says.
    """
    return await tokenise(ITEM_CHARACTERS * len(context), chat_request, request, context)


async def start_chat(
    served: Served,
    request: ResponseRequest,
    context: Sequence[Json],
    body: Json,
    *,
    documents: Documents,
    metrics: Metrics | None,
    arrived: float | None = None,
    progress: OnProgress | None = None,
) -> chat.ChatRun:
    """Hand a response's context to the engine, by way of a chat completion.

    With ``truncation: auto``, a context that does not fit loses its oldest turns; the object then says which items.
    ``progress`` is told, from any thread, how reading a long text goes.

    Raises:
        ContextLengthError: The context does not fit, and nothing may or can be dropped.
        InvalidRequestError: As for a chat completion.
        OverloadedError: The engine's queue is full.
        EngineStoppedError: The engine is stopped.
    """

    async def start(first: int) -> chat.ChatRun:
        wanted = await as_chat(request, context[first:])
        try:
            return await chat.start(
                served,
                wanted,
                documents=documents,
                metrics=metrics,
                arrived=arrived,
                progress=progress,
            )
        except InvalidRequestError as error:
            raise located(error, request, context[first:]) from None

    try:
        return await start(0)
    except ContextLengthError:
        if request.truncation != "auto":
            raise
        places = turn_starts(context)
        if not places:
            raise
    # The fewest turns dropped that make it fit, by bisection: what fits still fits with more of them gone.
    low, high = 0, len(places) - 1
    running = await start(places[high])
    while low < high:
        middle = (low + high) // 2
        try:
            shorter = await start(places[middle])
        except ContextLengthError:
            low = middle + 1
        except BaseException:
            running.abort()
            raise
        else:
            running.abort()
            running, high = shorter, middle
    dropped = [item["id"] for item in context[: places[high]]]
    body["x_evermini"] = {
        "truncation": {"dropped_items": len(dropped), "dropped_item_ids": dropped}
    }
    return running


def turn_starts(context: Sequence[Json]) -> list[int]:
    """Return where a user's turn begins after the first item: cut there, no call loses its output."""
    return [
        number
        for number, item in enumerate(context)
        if number
        and item["type"] == "message"
        and item["role"] == "user"
        and _stands_alone(context[number:])
    ]


def _stands_alone(items: Sequence[Json]) -> bool:
    calls = {item["call_id"] for item in items if item["type"].endswith("_call")}
    return all(item["call_id"] in calls for item in items if item["type"].endswith("_output"))


def failure(error: Exception) -> Json:
    """Return a response's ``error``: its code is one of the contract's, its message holds no internals."""
    match error:
        case OverloadedError():
            return {"code": "rate_limit_exceeded", "message": error.message}
        case RequestError():
            return {"code": "invalid_prompt", "message": error.message}
        case EngineStoppedError() | UpstreamError():
            return {"code": "server_error", "message": error.message}
    if isinstance(error, EverminiError):
        log.error("response failed: %s", error.message)
    else:
        # As text: renderers that show local variables would write prompts into the log.
        log.error("response failed: %s", "".join(traceback.format_exception(error)))
    return {
        "code": "server_error",
        "message": "The server had an error while computing this response. Send the request again; if that fails too, "
        "the server's log tells the cause.",
    }
