"""One request to an upstream engine in flight: asked for as a stream or whole, ended from either side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from anyio import CancelScope

from evermini.recall.calibrate import CalibrationProgress
from evermini.recall.recall import Progress
from evermini.service.reading import OnProgress
from evermini.service.sweep.result import SweepProgress
from evermini.service.upstream.model import UpstreamModel

Json = dict[str, Any]


class Exchange:
    """A request in flight, read by a task of its own, which can be ended at any time.

    Args:
        served: The model.
        path: What is asked, such as ``/chat/completions``.
        body: The request; its ``stream`` says how it is answered.
        progress: Told how another Evermini reads a long prompt; its stream counts as begun when that is done.
    """

    def __init__(
        self, served: UpstreamModel, path: str, body: Json, progress: OnProgress | None = None
    ) -> None:
        self._progress = progress
        self._served = served
        self._path = path
        self._body = body
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._news: asyncio.Queue[Json | Exception | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        # Not `Task.cancel`: httpcore closes connections, those of other requests too, behind shields against scopes.
        self._scope = CancelScope()

    async def start(self) -> None:
        """Send the request; return when the engine has accepted it, or, if it answers whole, has answered.

        Raises:
            EverminiError: The engine refuses it, fails, or cannot be reached.
            EngineStoppedError: The model is closed.
        """
        self._served.add(self)
        self._task = asyncio.create_task(self._run())
        try:
            await self._accepted
        except BaseException:
            self.close()
            await self._closing()
            raise

    async def replies(self) -> AsyncGenerator[Json, None]:
        """Yield the events of the stream, or the whole answer; leaving early ends the request.

        Raises:
            EverminiError: The engine failed, or broke off.
            EngineStoppedError: The model was closed.
        """
        try:
            while (news := await self._news.get()) is not None:
                if isinstance(news, Exception):
                    raise news
                yield news
        finally:
            self.close()
            await self._closing()

    def end(self, error: Exception) -> None:
        """End the request with an error. Called from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._fail, error)

    def close(self) -> None:
        """End the request if it still runs; does nothing the second time."""
        self._served.remove(self)
        self._scope.cancel()

    async def _closing(self) -> None:
        """Wait until the connection is closed: the loop may end with this request."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        with self._scope:
            try:
                await self._ask()
                self._news.put_nowait(None)
            except Exception as error:
                self._fail(error)

    async def _ask(self) -> None:
        client = self._served.client
        if not self._body.get("stream"):
            self._news.put_nowait(await client.post(self._path, self._body))
            self._accept()
            return
        async with client.stream(self._path, self._body) as events, aclosing(events):
            if self._progress is None:
                self._accept()
            async for event in events:
                if self._progress is not None and (report := _report(event)) is not None:
                    self._progress(report)
                    continue
                self._news.put_nowait(event)
                self._accept()

    def _accept(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Tell whoever waits now: for the engine to accept the request, or for more of its answer."""
        if not self._accepted.done():
            self._accepted.set_exception(error)
        else:
            self._news.put_nowait(error)


def _report(event: Json) -> Progress | None:
    """Return how far a reading is, if an event of another Evermini's stream says that."""
    told = event.get("x_evermini")
    told = told.get("progress") if isinstance(told, dict) else None
    if not isinstance(told, dict):
        return None
    kinds = {kind.stage: kind for kind in (Progress, SweepProgress, CalibrationProgress)}
    kind = kinds.get(str(told.get("stage")), Progress)
    try:
        return kind(
            int(told["done_tokens"]),
            int(told["total_tokens"]),
            float(told["seconds"]),
            float(told["tokens_per_second"]),
            None if told["eta_seconds"] is None else float(told["eta_seconds"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
