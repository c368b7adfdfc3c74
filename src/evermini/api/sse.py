"""Server-sent events that end the request in the engine as soon as the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evermini.api.errors import public

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"
"""A comment, which every SSE reader skips. It keeps proxies from cutting a stream while a long prompt is computed."""

HEARTBEAT_SECONDS = 15.0


def data(content: Any, name: str | None = None) -> bytes:
    """Return one event, with a name if its consumers go by names."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(content) + b"\n\n"


class EventStream(Response):
    """Sends ``events`` until they end or the client leaves, then calls ``close``.

    The client's leaving is listened for, not noticed at the next write: during a long prompt there is none. An error
    after the head is out becomes an ``{"error": …}`` event, and the stream ends without ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        tasks = [
            asyncio.create_task(work)
            for work in (self._produce(send), self._keep_alive(send), wait_disconnected(receive))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
        producer = tasks[0]
        if not producer.cancelled():
            producer.result()  # raises what sending raised

    async def _produce(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            async for event in self._events:
                await self._send(send, event)
        except Exception as error:
            await self._send(send, data(public(error).to_wire()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last_sent = loop.time()
        while True:
            await asyncio.sleep(self._last_sent + HEARTBEAT_SECONDS - loop.time())
            if loop.time() >= self._last_sent + HEARTBEAT_SECONDS:
                await self._send(send, HEARTBEAT)


async def wait_disconnected(receive: Receive) -> None:
    """Return when the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, which is cancelled if the client leaves first.

    Raises:
        ClientDisconnect: The client left; there is nobody to answer.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(wait_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
