"""What a stream says while a long text is read, before there is anything to answer.

    : reading 120000 of 900000 tokens

That is a comment, which every SSE reader skips; it keeps the connection open and shows people that something happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, Protocol

from starlette.requests import Request

from evermini.api import sse

OPEN_SECONDS = 15.0
"""A stream opens after this time even if nothing is read yet: another text may be before it in the queue."""
INTERVAL_SECONDS = 2.0
"""Pause between two comments."""


class Report(Protocol):
    """How far a reading is."""

    @property
    def done_tokens(self) -> int:
        """Tokens read."""

    @property
    def total_tokens(self) -> int:
        """Tokens to read."""


class ReadingWatch:
    """Takes reports of progress from any thread and makes events of them. Belongs to the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._latest: Report | None = None
        self._begun = asyncio.Event()

    def report(self, now: Report) -> None:
        """Note how far the reading is."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._note, now)

    def _note(self, now: Report) -> None:
        self._latest = now
        self._begun.set()

    async def started(self, request: Request, starting: asyncio.Task[Any]) -> bool:
        """Wait until ``starting`` is done, or a long text is being read; return whether it is done.

        Until then a failure can still become a status of its own.

        Raises:
            ClientDisconnect: The client left; ``starting`` is cancelled.
        """
        try:
            await sse.unless_disconnected(request, self._first(starting))
        except BaseException:
            end(starting)
            raise
        return starting.done()

    async def _first(self, starting: asyncio.Task[Any]) -> None:
        begun = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait(
                {starting, begun}, timeout=OPEN_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            begun.cancel()

    async def events(
        self, starting: asyncio.Task[Any], chunk: Callable[[Any], Any] | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield comments, and what ``chunk`` makes of a report, until ``starting`` is done."""
        told: Report | None = None
        while not starting.done():
            now = self._latest
            if now is not None and now is not told:
                told = now
                yield f": reading {now.done_tokens} of {now.total_tokens} tokens\n\n".encode()
                if chunk is not None:
                    yield sse.data(chunk(now))
            await asyncio.wait({starting}, timeout=INTERVAL_SECONDS)


def end(starting: asyncio.Task[Any]) -> None:
    """End what is starting, or the run it has become."""
    if not starting.done():
        starting.cancel()
    elif not starting.cancelled() and starting.exception() is None:
        starting.result().abort()
