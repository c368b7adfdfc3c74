"""Answers from prompts that exceed the model's window: long texts are read once, and each question takes what it needs.

    reader = LongReader(model, tokenizer, template, weights=fingerprint, home=home)
    recalled = await reader.read(request, window=8192, progress=None)
    recalled.prompt          # fits the window; hand it to the engine

Two kinds of threads work here, neither of them the event loop's. One, at low priority, ingests, one text after the
other: the kernels start their helper threads from it, which inherit its priority, so that the engine's steps come
first, and requests for the same text find it done. The others answer questions to what is indexed already. Whoever
waits can leave: an ingest ends after the chunk in work (a second or two), and the next request goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from evermini.errors import ContextLengthError, EngineStoppedError
from evermini.models.batch import IndexModel
from evermini.recall.load import open_recall
from evermini.recall.prompt import Span, excerpts
from evermini.recall.recall import Progress, Recall, Selection
from evermini.recall.segment import Segment, cut
from evermini.recall.select import Policy
from evermini.service.parts import QUESTION_CHARS, TIERS, Parts, Piece, split
from evermini.service.schemas import ChatRequest
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer

T = TypeVar("T")

OnProgress = Callable[[Progress], None]
"""Told how an ingest goes, from the thread that does it."""

MAX_PROMPT_TOKENS = 1_047_576
"""Longest prompt of a chat completion (gpt-4.1's published window)."""
EXCERPT_TOKENS = 3072
"""What is read of the long texts at most, marks included: it is computed anew for each question."""
MIN_EXCERPT_TOKENS = 512
"""With less room than this, no answer is tried."""
MARK_TOKENS = 48
"""Room for the mark of a place nothing was taken from."""
DEFAULT_ROOM = 1024
"""Tokens left for the answer if the request names no limit; an eighth of a small window."""
_COUNTS_KEPT = 1 << 16
_NICENESS = 10


@dataclass(frozen=True)
class Passage:
    """A span that was chosen, and where the caller finds it.

    Attributes:
        score: Its vote; comparable within one question.
        source: The document's name, if it has one.
        message: Number of the message.
        part: Number of the content part.
        characters: First and past-the-end character, in the document or else in the part.
        lines: First and last line, from 1, likewise.
        is_included: It is in the prompt; false: there was no room.
    """

    score: float
    source: str | None
    message: int
    part: int
    characters: tuple[int, int]
    lines: tuple[int, int]
    is_included: bool


@dataclass(frozen=True)
class Recalled:
    """A prompt that fits, made from one that does not.

    Attributes:
        prompt: What the engine computes.
        full_tokens: Tokens that were sent.
        cached_tokens: Those of them that had been ingested before.
        question: What was looked for.
        passages: What was chosen, in order.
        selection: How it was found.
        ingest_seconds: Time spent on reading what was new, the wait for other texts included.
    """

    prompt: Sequence[int]
    full_tokens: int
    cached_tokens: int
    question: str
    passages: tuple[Passage, ...]
    selection: Selection
    ingest_seconds: float


@dataclass(frozen=True)
class _Plan:
    parts: Parts
    pieces: list[list[Segment]]
    """The segments of each long piece."""
    full_tokens: int
    budget: int

    @property
    def segments(self) -> list[Segment]:
        return [segment for segments in self.pieces for segment in segments]


class LongReader:
    """Recall for the chats of one model, with that model as its own index.

    Args:
        model: The model, which gives the index.
        tokenizer: Its tokenizer.
        template: Its chat template.
        weights: Its checkpoint's fingerprint.
        home: Evermini's home folder, where the index lives.
        max_bytes: Cap on the index on disk.
        max_prompt_tokens: Longer prompts are refused.
    """

    def __init__(
        self,
        model: IndexModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        weights: str,
        home: Path,
        max_bytes: int | None = None,
        max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    ) -> None:
        self.model = model
        self.weights = weights
        self.max_prompt_tokens = max_prompt_tokens
        self._tokenizer, self._template = tokenizer, template
        self.home = home
        self._max_bytes = max_bytes
        self._recall: Recall | None = None
        self._opening = threading.Lock()
        self._closed = threading.Event()
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._counting = threading.Lock()
        self._slow = ThreadPoolExecutor(1, "evermini-ingest", initializer=_step_back)
        self._quick = ThreadPoolExecutor(2, "evermini-recall")

    async def read(
        self, request: ChatRequest, *, window: int, progress: OnProgress | None
    ) -> Recalled | None:
        """Return a prompt for the request that fits the window, or ``None`` if it fits anyway or has no long text.

        Cancelled, an ingest ends after the chunk in work.

        Args:
            request: The conversation.
            window: Tokens the engine takes, the answer's included.
            progress: Told, from a thread, how reading new text goes.

        Raises:
            ContextLengthError: The prompt is too long, or what must stay whole is.
            RecallDiskError: Its index does not fit under the cap.
            EngineStoppedError: The reader was closed.
        """
        plan = await self._in(self._quick, self._plan, request, window)
        if plan is None:
            return None
        began = time.monotonic()
        new = await self._ingest(plan.segments, progress)
        ingested = time.monotonic()
        recalled = await self._in(self._quick, self._answer, request, plan)
        return replace(
            recalled,
            cached_tokens=sum(map(self._count, plan.segments)) - new,
            ingest_seconds=ingested - began,
        )

    def close(self) -> None:
        """End what runs after the chunk in work; nothing is accepted any more."""
        self._closed.set()
        for pool in (self._slow, self._quick):
            pool.shutdown(cancel_futures=True)

    # Planning

    def _plan(self, request: ChatRequest, window: int) -> _Plan | None:
        room = request.max_output or default_room(window)
        skeleton = budget = 0
        for tier in TIERS:
            cut_up = split(request.messages, tier)
            if not cut_up.long:
                continue
            parts = cut_up
            skeleton = len(self._encode(request, parts, [""] * len(parts.long)))
            budget = min(EXCERPT_TOKENS, window - room - skeleton)
            if budget >= MIN_EXCERPT_TOKENS:
                break
        if not skeleton:
            return None
        pieces = [cut(piece.text, piece.name) for piece in parts.long]
        full = skeleton + sum(self._count(segment) for found in pieces for segment in found)
        if full > self.max_prompt_tokens:
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_prompt_tokens} tokens. However, your messages "
                f"resulted in {full} tokens. Please reduce the length of the messages.",
                param="messages",
            )
        if (
            request.reading == "auto"
            and full + (request.max_output or least_room(window)) <= window
        ):
            return None
        if budget < MIN_EXCERPT_TOKENS:
            raise ContextLengthError(
                f"This model's native window is {window} tokens; it reads longer prompts ({full} tokens) in excerpts. "
                f"However, what stays whole (instructions, short messages, the question: {skeleton} tokens) and the "
                f"completion ({room} tokens) leave less than {MIN_EXCERPT_TOKENS} tokens for them. Please reduce the "
                "length of these messages or of the completion.",
                param="messages",
            )
        return _Plan(parts, pieces, full, budget)

    def _count(self, segment: Segment) -> int:
        """Return a segment's tokens, from memory or the index where it is known."""
        with self._counting:
            if (count := self._counts.get(segment.digest)) is not None:
                self._counts.move_to_end(segment.digest)
                return count
        indexed = self._recall.store.open(segment.digest) if self._recall else None
        count = len(indexed.ids if indexed else self._tokenizer.encode(segment.text))
        with self._counting:
            self._counts[segment.digest] = count
            while len(self._counts) > _COUNTS_KEPT:
                self._counts.popitem(last=False)
        return count

    def _encode(self, request: ChatRequest, parts: Parts, readings: Sequence[str]) -> list[int]:
        """Return the prompt with the long pieces replaced by ``readings``."""
        texts = [""] * len(request.messages)
        found = iter(readings)
        for piece in parts.pieces:
            texts[piece.message] += next(found) if piece.is_long else piece.text
        messages = [
            message.for_template(text)
            for message, text in zip(request.messages, texts, strict=True)
        ]
        return self._template.encode_chat(messages)

    # Reading

    async def _ingest(self, segments: Sequence[Segment], progress: OnProgress | None) -> int:
        """Index what is not indexed yet and return how many tokens that were."""
        if await self._in(self._quick, self._is_known, segments):
            return 0
        left = threading.Event()

        def work() -> int:
            done = self._open().ingest(
                segments,
                progress=progress,
                cancelled=lambda: left.is_set() or self._closed.is_set(),
            )
            return done.num_new_tokens

        try:
            new = await self._in(self._slow, work)
        finally:
            left.set()
        if self._closed.is_set():
            raise _stopped()
        return new

    def _is_known(self, segments: Sequence[Segment]) -> bool:
        return self._recall is not None and self._recall.missing_tokens(segments) == 0

    def _answer(self, request: ChatRequest, plan: _Plan) -> Recalled:
        """Find what the question needs and write the prompt."""
        question = plan.parts.question or request.messages[-1].text()[-QUESTION_CHARS:]
        policy = Policy(max_tokens=min(Policy().max_tokens, plan.budget * 2 // 3))
        selection = self._open().ask(plan.segments, question, policy)
        readings, included = self._readings(plan, selection.spans)
        owners = [
            piece for piece, found in zip(plan.parts.long, plan.pieces, strict=True) for _ in found
        ]
        return Recalled(
            prompt=self._encode(request, plan.parts, readings),
            full_tokens=plan.full_tokens,
            cached_tokens=0,
            question=question,
            passages=tuple(
                _passage(span, owners[span.segment], span in included) for span in selection.spans
            ),
            selection=selection,
            ingest_seconds=0.0,
        )

    def _readings(self, plan: _Plan, spans: Iterable[Span]) -> tuple[list[str], set[Span]]:
        """Return what stands in each long piece's place, and the spans that are in it.

        Documents that follow each other in a message share one text, written in the place of the first. Texts with the
        best spans get room first; each keeps enough to say what is missing.
        """
        groups = _groups(plan.parts)
        readings = [""] * len(plan.pieces)
        firsts = [0]
        for found in plan.pieces:
            firsts.append(firsts[-1] + len(found))
        ranges = [(firsts[group[0]], firsts[group[-1] + 1]) for group in groups]
        by_group = [[span for span in spans if a <= span.segment < b] for a, b in ranges]
        ranked = sorted(
            range(len(groups)), key=lambda g: -max((s.score for s in by_group[g]), default=0.0)
        )
        budget, included = plan.budget, set[Span]()
        for done, number in enumerate(ranked, start=1):
            first, last = ranges[number]
            own = {replace(span, segment=span.segment - first): span for span in by_group[number]}
            result = excerpts(
                plan.segments[first:last],
                list(own),
                lambda text: len(self._tokenizer.encode(text)),
                budget - MARK_TOKENS * (len(ranked) - done),
            )
            readings[groups[number][0]] = result.text
            included |= {own[span] for span in result.included}
            budget -= result.num_tokens
        return readings, included

    def _open(self) -> Recall:
        """Return recall; an unknown model is calibrated first, which takes a minute or more."""
        with self._opening:
            if self._recall is None:
                self._recall = open_recall(
                    self.model,
                    self._tokenizer,
                    self.weights,
                    self.home,
                    max_bytes=self._max_bytes,
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


def least_room(window: int) -> int:
    """Return the tokens left for an answer of no stated length, from which on a prompt counts as fitting."""
    return min(256, window // 32)


def default_room(window: int) -> int:
    """Return the tokens left for an answer of no stated length."""
    return min(DEFAULT_ROOM, window // 8)


def _groups(parts: Parts) -> list[list[int]]:
    """Group the long pieces by number: those of one message with nothing but white space between them."""
    keys: list[int] = []
    key, message = 0, -1
    for piece in parts.pieces:
        if piece.message != message or (not piece.is_long and piece.text.strip()):
            key, message = key + 1, piece.message
        if piece.is_long:
            keys.append(key)
    return [
        [number for number, _ in group]
        for _, group in groupby(enumerate(keys), key=lambda item: item[1])
    ]


def _passage(span: Span, piece: Piece, is_included: bool) -> Passage:
    start, end = span.chars
    first, last = span.lines
    shift = piece.first_line - 1
    return Passage(
        score=span.score,
        source=piece.name,
        message=piece.message,
        part=piece.part,
        characters=(piece.first_char + start, piece.first_char + end),
        lines=(shift + first, shift + last),
        is_included=is_included,
    )


def _step_back() -> None:
    """Lower this thread's priority (Linux: of one thread); helper threads it starts inherit that."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
