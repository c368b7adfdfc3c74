"""The engine in a thread of its own, for any number of threads and event loops.

    worker = EngineWorker(engine)
    worker.start()
    submission = worker.submit(prompt_ids, params)
    for event in submission: ...            # from a thread
    async for event in submission: ...      # or from a coroutine
    worker.stop(timeout=10)

Callers never wait for the engine: they append to an inbox that the thread empties between two steps. Events go to one
queue per submission; event loops are woken once per step, however many submissions they read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import uuid
from collections import abc
from dataclasses import replace
from functools import partial
from typing import Self

from evermini.engine.adapters import LoadedAdapter
from evermini.engine.engine import Engine, EngineStats, overloaded
from evermini.engine.request import (
    INTERACTIVE,
    Embedded,
    Emphasis,
    Event,
    Finished,
    SamplingParams,
)
from evermini.errors import EngineStoppedError
from evermini.models.batch import Adapter
from evermini.models.lora import LoraWeights

log = logging.getLogger(__name__)

_STUCK_SECONDS = 30.0
"""How long stop() waits for a step that is still running when its timeout is over."""


class Submission:
    """One request's stream of events, ending with `Finished`; read it once, with ``for`` or ``async for``.

    Leaving the loop early, cancelling the reading task, or closing the iterator aborts the request. Where it may
    never be iterated, use the submission as a context manager (``with`` or ``async with``), which aborts on exit.
    """

    def __init__(self, request_id: str, abort: abc.Callable[[str], None]) -> None:
        self.request_id = request_id
        self._request_abort = abort
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_claimed = False
        self._is_finished = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None

    def abort(self) -> None:
        """End the request with `Finished` ``"abort"`` within a step; ended ones stay as they are. Never waits."""
        if not self._is_finished:
            self._request_abort(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.abort()

    def __iter__(self) -> abc.Generator[Event]:
        self._claim()
        try:
            while True:
                event = self._events.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.abort()

    async def __aiter__(self) -> abc.AsyncGenerator[Event]:
        self._claim()
        arrived = self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                # Cleared before the queue is emptied: what arrives later sets it again.
                arrived.clear()
                for event in self._take():
                    yield event
                    if isinstance(event, Finished):
                        return
                await arrived.wait()
        finally:
            self.abort()

    def _claim(self) -> None:
        if self._is_claimed:
            raise RuntimeError("a submission can be iterated only once")
        self._is_claimed = True

    def _take(self) -> abc.Iterator[Event]:
        while True:
            try:
                yield self._events.get_nowait()
            except queue.Empty:
                return

    def _put(self, event: Event) -> asyncio.AbstractEventLoop | None:
        """Store an event and return the loop to wake. Called by the engine's thread."""
        self._is_finished = isinstance(event, Finished)
        self._events.put(event)
        return self._loop

    def _wake(self) -> None:
        """Called in the reader's loop."""
        assert self._arrived is not None
        self._arrived.set()


class EngineWorker:
    """Runs ``engine`` in a thread; all methods are safe from any thread and from coroutines.

    Args:
        engine: Not to be touched by anyone else from `start` on.
        check_integrity: Check the engine's state whenever it becomes idle. ``None``: if the environment variable
            ``EVERMINI_DEBUG_INTEGRITY`` is set.
    """

    def __init__(self, engine: Engine, *, check_integrity: bool | None = None) -> None:
        if check_integrity is None:
            check_integrity = bool(os.environ.get("EVERMINI_DEBUG_INTEGRITY"))
        self._engine = engine
        self._check_integrity = check_integrity
        self._thread = threading.Thread(target=self._run, name="evermini-engine", daemon=True)
        # Guards what follows; notified when the thread has a reason to wake up. Reentrant, because an iterator may
        # be collected, and so aborted, anywhere.
        self._changed = threading.Condition(threading.RLock())
        self._inbox: list[abc.Callable[[], None]] = []
        self._submissions: dict[str, Submission] = {}
        self._deadline: float | None = None
        self._closed: str | None = "The engine is not started."
        self._stats = engine.stats()

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return self._engine.max_model_len

    @property
    def hidden_size(self) -> int:
        """Numbers in a pooled prompt."""
        return self._engine.hidden_size

    @property
    def is_alive(self) -> bool:
        """Requests are accepted."""
        return self._closed is None

    def start(self) -> None:
        """Start the thread. A worker can be started once."""
        with self._changed:
            self._thread.start()
            self._closed = None

    def stop(self, timeout: float = 10.0) -> None:
        """Accept nothing more, let running requests end within ``timeout`` seconds, abort the rest.

        Every submission has its `Finished` when this returns. Blocks: in a coroutine, use `asyncio.to_thread`.
        """
        with self._changed:
            if self._thread.ident is None:
                return
            self._closed = (
                self._closed or "The engine is shutting down. Try another server, or later."
            )
            if self._deadline is None:
                self._deadline = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join(timeout + _STUCK_SECONDS)
        if self._thread.is_alive():
            log.error("the engine's thread is stuck in a step; giving it up")
            self._end_all("The engine did not answer while it was being stopped.")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop(timeout=0.0)

    def load_adapter(self, lora: LoraWeights) -> Adapter:
        """Return an adapter as the model computes with it. Blocks, but not the engine.

        Raises:
            AdapterError: It does not fit the model.
        """
        return self._engine.load_adapter(lora)

    def validate(self, prompt_ids: abc.Sequence[int], params: SamplingParams) -> None:
        """Refuse what `submit` would refuse for its content."""
        self._engine.validate(prompt_ids, params)

    def submit(
        self,
        prompt_ids: abc.Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        cache_salt: bytes = b"",
        priority: int = INTERACTIVE,
        adapter: LoadedAdapter | None = None,
        embedded: Embedded | None = None,
        emphasis: Emphasis | None = None,
    ) -> Submission:
        """Hand a request to the engine. Never waits.

        Args:
            prompt_ids: At least one token.
            params: How to generate.
            request_id: Not the id of an unfinished request; ``None``: a random one.
            cache_salt: Requests with different salts share no KV memory.
            priority: `INTERACTIVE` or `BATCH`.
            adapter: What to compute it with, on top of the model.
            embedded: The images in the prompt.
            emphasis: Tokens of the prompt that weigh more.

        Raises:
            ContextLengthError: Prompt and ``max_tokens`` exceed `max_model_len`.
            InvalidRequestError: Another value is out of range.
            OverloadedError: Too many requests are unfinished.
            EngineStoppedError: The engine is not running.
        """
        self._engine.validate(prompt_ids, params)
        token_ids = list(prompt_ids)  # the caller may reuse its own
        request_id = uuid.uuid4().hex if request_id is None else request_id
        with self._changed:
            if self._closed is not None:
                raise EngineStoppedError(self._closed)
            if request_id in self._submissions:
                raise ValueError(f"request {request_id!r} is not finished; choose another id")
            if len(self._submissions) >= self._engine.max_unfinished:
                raise overloaded(self._engine.max_unfinished)
            submission = Submission(request_id, self._abort)
            self._submissions[request_id] = submission
            self._send(
                partial(
                    self._engine.add,
                    request_id,
                    token_ids,
                    params,
                    cache_salt=cache_salt,
                    priority=priority,
                    adapter=adapter,
                    embedded=embedded,
                    emphasis=emphasis,
                )
            )
        return submission

    def stats(self) -> EngineStats:
        """Return the gauges and counters as of the last step."""
        stats = self._stats
        return replace(
            stats,
            waiting=max(0, len(self._submissions) - stats.running),
            disk=self._engine.disk_stats(),
        )

    def _abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._submissions:
                self._send(partial(self._engine.abort, request_id))

    def _send(self, command: abc.Callable[[], None]) -> None:
        self._inbox.append(command)
        self._changed.notify()

    def _run(self) -> None:
        message = "The engine has stopped."
        try:
            self._serve()
        except Exception as error:  # a bug of ours: the engine's state cannot be trusted any more
            log.exception("the engine failed and has stopped")
            message = f"The engine failed and has stopped ({type(error).__name__}: {error}). Restart the server."
        finally:
            self._end_all(message)
            self._engine.close()

    def _serve(self) -> None:
        """Serve until stopped: commands, step, events."""
        while True:
            with self._changed:
                while not (self._inbox or self._engine.has_work or self._deadline is not None):
                    self._changed.wait()
                inbox, self._inbox = self._inbox, []
                deadline = self._deadline
                unfinished = list(self._submissions)
            for command in inbox:
                command()
            if deadline is not None and time.monotonic() >= deadline:
                for request_id in unfinished:
                    self._engine.abort(request_id, "The server is shutting down.")
            events = self._engine.step()
            self._stats = self._engine.stats()
            if self._check_integrity and not self._engine.has_work:
                self._engine.check_integrity()
            self._deliver(events)
            if deadline is not None and not self._engine.has_work:
                return

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        loops: dict[asyncio.AbstractEventLoop, set[Submission]] = {}
        for request_id, event in events:
            with self._changed:
                if isinstance(event, Finished):
                    submission = self._submissions.pop(request_id, None)
                else:
                    submission = self._submissions.get(request_id)
            if submission is not None and (loop := submission._put(event)):
                loops.setdefault(loop, set()).add(submission)
        for loop, submissions in loops.items():
            try:
                loop.call_soon_threadsafe(_wake_all, submissions)
            except RuntimeError:  # the loop is closed, so nobody reads any more
                for submission in submissions:
                    submission.abort()

    def _end_all(self, message: str) -> None:
        """Close for good, with an error for whoever is still waiting."""
        with self._changed:
            self._closed = message
            orphans = list(self._submissions)
        self._deliver([(request_id, Finished("error", message)) for request_id in orphans])


def _wake_all(submissions: abc.Iterable[Submission]) -> None:
    for submission in submissions:
        submission._wake()
