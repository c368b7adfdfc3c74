"""Answers from prompts that exceed the model's window: long texts are read once, and each question takes what it needs.

    reader = LongReader(indexer, tokenizer, template, home=home)
    plan = await reader.plan(request, window=8192)
    recalled = await reader.read(request, plan, progress=None)
    recalled.prompt          # fits the window; hand it to the engine

Two kinds of threads work here, neither of them the event loop's. One, at low priority, ingests, one text after the
other: the kernels start their helper threads from it, which inherit its priority, so that the engine's steps come
first, and requests for the same text find it done. The others answer questions to what is indexed already. Whoever
waits can leave: an ingest ends after the chunk in work (a second or two), and the next request goes on from there.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from evermini.engine.request import Emphasis
from evermini.errors import EngineStoppedError
from evermini.recall.calibration import find_calibration
from evermini.recall.load import Indexer
from evermini.recall.recall import Ingested, Progress, Recall, Selection
from evermini.recall.segment import Segment
from evermini.recall.select import Policy
from evermini.service.assembly import MAX_PROMPT_TOKENS, Assembler, Passage, Plan, texts
from evermini.service.offload import step_back
from evermini.service.places import Place
from evermini.service.schemas import ChatRequest
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer

T = TypeVar("T")

OnProgress = Callable[[Progress], None]
"""Told how an ingest goes, or the calibration of an unknown model before it, from the thread that does it."""


@dataclass(frozen=True)
class Recalled:
    """A prompt that fits, made from one that does not.

    Attributes:
        prompt: What the engine computes.
        emphasis: Tokens of it that are closest to the question.
        texts: The same before the chat template, by message.
        full_tokens: Tokens that were sent.
        cached_tokens: Those of them that had been ingested before.
        question: What was looked for.
        passages: What was chosen, in order.
        shown: What of the documents is in the prompt.
        selection: How it was found.
        ingest_seconds: Time spent on reading what was new, the wait for other texts included.
        note: What the caller should know of it.
    """

    prompt: Sequence[int]
    emphasis: Emphasis | None
    texts: Sequence[str]
    full_tokens: int
    cached_tokens: int
    question: str
    passages: tuple[Passage, ...]
    shown: tuple[Place, ...]
    selection: Selection
    ingest_seconds: float
    note: str | None = None


class LongReader:
    """Recall for the chats of one model.

    Args:
        indexer: The model that finds passages: the one that answers, or a better finder.
        tokenizer: The answering model's tokenizer.
        template: Its chat template.
        home: Evermini's home folder, where the index lives.
        policy: How much to read for a question.
        max_bytes: Cap on the index on disk.
        max_prompt_tokens: Longer prompts are refused.
        sweep_limit: Longer ones are not read as a whole unless that is asked for.
    """

    def __init__(
        self,
        indexer: Indexer,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        home: Path,
        policy: Policy | None = None,
        max_bytes: int | None = None,
        max_prompt_tokens: int = MAX_PROMPT_TOKENS,
        sweep_limit: int = 0,
    ) -> None:
        self.indexer = indexer
        self.policy = policy or Policy()
        self.max_prompt_tokens = max_prompt_tokens
        self.sweep_limit = sweep_limit
        self.home = home
        self.assembler = Assembler(tokenizer, template, self._known_tokens)
        self.tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._recall: Recall | None = None
        self._num_urgent = 0
        self._opening = threading.Lock()
        self._closed = threading.Event()
        self._slow = ThreadPoolExecutor(1, "evermini-ingest", initializer=step_back)
        self._quick = ThreadPoolExecutor(2, "evermini-recall")

    async def plan(
        self, request: ChatRequest, *, window: int, counted: int | None = None
    ) -> Plan | None:
        """Take a prompt apart, or return ``None`` if it fits anyway (and may be read whole) or has no long text.

        Args:
            request: The conversation.
            window: Tokens the engine takes, the answer's included.
            counted: Tokens of the prompt, if it was tokenised as a whole.

        Raises:
            ContextLengthError: The prompt is too long, or what must stay whole is.
            EngineStoppedError: The reader was closed.
        """
        planning = partial(
            self.assembler.plan, window=window, limit=self.max_prompt_tokens, counted=counted
        )
        return await self._in(self._quick, planning, request)

    async def read(self, request: ChatRequest, plan: Plan, progress: OnProgress | None) -> Recalled:
        """Return a prompt that fits: with the excerpts that the question needs.

        Cancelled, an ingest ends after the chunk in work.

        Args:
            request: The conversation.
            plan: How it is taken apart.
            progress: Told, from a thread, how reading new text goes.

        Raises:
            RecallDiskError: The index does not fit under the cap.
            EngineStoppedError: The reader was closed.
        """
        began = time.monotonic()
        new = await self._ingest(plan.segments, progress)
        ingested = time.monotonic()
        recalled = await self._in(self._quick, self._recall_for, request, plan)
        return replace(
            recalled,
            cached_tokens=sum(map(self.assembler.count, plan.segments)) - new,
            ingest_seconds=ingested - began,
        )

    async def index(self, segments: Sequence[Segment], progress: OnProgress | None) -> int:
        """Index what is not indexed yet, for nobody who waits: prompts that come in meanwhile are read first.

        Cancelled, it ends after the chunk in work.

        Args:
            segments: The texts.
            progress: Told, from a thread, how it goes.

        Returns:
            The tokens of all of them, as the index counts.

        Raises:
            RecallDiskError: The index does not fit under the cap.
            EngineStoppedError: The reader was closed.
        """
        while True:
            done = await self._ingest_new(segments, progress, yields=True)
            if await self._in(self._quick, self._is_known, segments):
                return done.num_tokens

    async def forget(self, digests: Collection[str]) -> bool:
        """Delete the index of texts; false if some of it is being written, and is still there."""
        if self._recall is None and find_calibration(self.home, self.indexer.weights) is None:
            return True  # nothing was ever indexed
        removed = await self._in(
            self._quick, lambda: [self.recall().remove(digest) for digest in digests]
        )
        return all(removed)

    def close(self) -> None:
        """End what runs after the chunk in work; nothing is accepted any more."""
        self._closed.set()
        for pool in (self._slow, self._quick):
            pool.shutdown(cancel_futures=True)

    async def _ingest(self, segments: Sequence[Segment], progress: OnProgress | None) -> int:
        """Index what is not indexed yet and return how many tokens that were."""
        if await self._in(self._quick, self._is_known, segments):
            return 0
        self._num_urgent += 1
        try:
            return (await self._ingest_new(segments, progress)).num_new_tokens
        finally:
            self._num_urgent -= 1

    async def _ingest_new(
        self, segments: Sequence[Segment], progress: OnProgress | None, *, yields: bool = False
    ) -> Ingested:
        """Index, one text after the other; ``yields``: end early, after a chunk, when somebody waits."""
        left = threading.Event()

        def work() -> Ingested:
            return self.recall(progress).ingest(
                segments,
                progress=progress,
                cancelled=lambda: (
                    left.is_set() or self._closed.is_set() or (yields and self._num_urgent > 0)
                ),
            )

        try:
            done = await self._in(self._slow, work)
        finally:
            left.set()
        if self._closed.is_set():
            raise _stopped()
        return done

    def _is_known(self, segments: Sequence[Segment]) -> bool:
        return self._recall is not None and self._recall.missing_tokens(segments) == 0

    def _recall_for(self, request: ChatRequest, plan: Plan) -> Recalled:
        """Find what the question needs and write the prompt."""
        policy = replace(self.policy, max_tokens=min(self.policy.max_tokens, plan.budget * 2 // 3))
        selection = self.recall().ask(plan.segments, plan.query, policy)
        readings, included = self.assembler.excerpts(
            plan, selection.spans, mark_end=policy.mark_end, hops=selection.hops
        )
        written = [reading.text for reading in readings]
        prompt = self.assembler.encode(request, plan.parts, written)
        return Recalled(
            prompt=prompt,
            emphasis=self.assembler.emphasis(prompt, readings, policy.emphasis),
            texts=texts(request, plan.parts, written),
            full_tokens=plan.full_tokens,
            cached_tokens=0,
            question=plan.query,
            passages=plan.passages(selection.spans, included),
            shown=plan.shown(included),
            selection=selection,
            ingest_seconds=0.0,
        )

    def _known_tokens(self, digest: str) -> int | None:
        if self.indexer.tokenizer is not self.tokenizer:
            return None  # the index counts in other tokens
        if self._recall is None and find_calibration(self.home, self.indexer.weights) is None:
            return None  # nothing can be indexed yet, and calibrating takes too long for a plan
        return self.recall().num_tokens(digest)

    def recall(self, progress: OnProgress | None = None) -> Recall:
        """Return recall; an unknown model is calibrated first, which takes a minute or more.

        Args:
            progress: Told how calibrating goes.

        Raises:
            EngineStoppedError: The reader was closed meanwhile.
        """

        def report(now: Progress) -> None:
            if self._closed.is_set():
                raise _stopped()
            if progress is not None:
                progress(now)

        with self._opening:
            if self._recall is None:
                self._recall = self.indexer.open(
                    self.home, max_bytes=self._max_bytes, progress=report
                )
            return self._recall

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., T], *args: object) -> T:
        if self._closed.is_set():
            raise _stopped()
        task = asyncio.current_task()
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *args))
        except asyncio.CancelledError:
            if task is None or task.cancelling():
                raise
            raise _stopped() from None  # `close` took it off the queue


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("The server is shutting down. Try another server, or later.")
