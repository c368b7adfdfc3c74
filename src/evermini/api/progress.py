"""What a stream says while a long text is read, before there is anything to answer.

    : reading 120000 of 900000 tokens

That is a comment, which every SSE reader skips; it keeps the connection open and shows people that something happens.
Where there is nothing to tell, because another text is read before this one, it is ``: waiting``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.answer import Run, stream_or_collect

RunT = TypeVar("RunT", bound=Run)

OPEN_SECONDS = 15.0
"""A stream opens after this time even if nothing is read yet: another text may be before it in the queue. It is not
silent for longer after that either."""
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
        quiet_since = self._loop.time()
        while not starting.done():
            now = self._latest
            if now is not None and now is not told:
                told, quiet_since = now, self._loop.time()
                yield f": reading {now.done_tokens} of {now.total_tokens} tokens\n\n".encode()
                if chunk is not None:
                    yield sse.data(chunk(now))
            elif self._loop.time() - quiet_since >= OPEN_SECONDS:  # proxies cut what is silent
                quiet_since = self._loop.time()
                yield b": waiting\n\n"
            await asyncio.wait({starting}, timeout=INTERVAL_SECONDS)


async def answer_when_read(
    request: Request,
    starting: asyncio.Task[RunT],
    watch: ReadingWatch,
    *,
    stream: bool | None,
    events: Callable[[RunT], AsyncGenerator[bytes, None]],
    whole: Callable[[RunT], Coroutine[Any, Any, dict[str, Any]]],
    chunk: Callable[[Any], Any] | None = None,
) -> Response:
    """Return the response of a run that may first have to read a long text; the run ends if the client leaves.

    Args:
        request: The HTTP request.
        starting: Becomes the run.
        watch: Is told how the reading goes.
        stream: Whether the answer is a stream: it then opens when the reading begins.
        events: Gives the stream's events of a run.
        whole: Gives the whole answer's body of a run.
        chunk: Makes of a report what stands in the stream besides comments.
    """
    if stream and not await watch.started(request, starting):
        progress = watch.events(starting, chunk)
        return sse.EventStream(_read_first(starting, progress, events), partial(end, starting))
    run = await sse.unless_disconnected(request, _result(starting))
    return await stream_or_collect(
        request, run, stream=stream, events=events(run), whole=whole(run)
    )


async def _result(starting: asyncio.Task[RunT]) -> RunT:
    """Return the run; it is ended if nobody waits for it any more."""
    try:
        return await starting
    except asyncio.CancelledError:
        end(starting)
        raise


async def _read_first(
    starting: asyncio.Task[RunT],
    progress: AsyncGenerator[bytes, None],
    events: Callable[[RunT], AsyncGenerator[bytes, None]],
) -> AsyncGenerator[bytes, None]:
    """Yield how the reading of a long text goes, then the answer."""
    async with aclosing(progress):
        async for event in progress:
            yield event
    async with aclosing(events(await starting)) as following:
        async for event in following:
            yield event


def end(starting: asyncio.Task[Any]) -> None:
    """End what is starting, or the run it has become."""
    if not starting.done():
        starting.cancel()
    elif not starting.cancelled() and starting.exception() is None:
        starting.result().abort()
