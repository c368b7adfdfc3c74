"""Runs the choices of one request on an engine and merges what they write into one stream.

The one path behind chat and text completions, streamed or not. Free of HTTP; the caller only has to finish or close
the iteration (`Generation.deltas`), which is what frees the engine's memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import operator
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from evermini.engine.adapters import Lease
from evermini.engine.request import (
    BATCH,
    INTERACTIVE,
    Embedded,
    Emphasis,
    Finished,
    PromptDone,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from evermini.engine.worker import EngineWorker, Submission
from evermini.errors import EngineError, EngineStoppedError, GrammarLimitError, OverloadedError
from evermini.service.caller import current_caller
from evermini.service.decode import ChoiceDecoder, Piece, ScoredToken
from evermini.service.metrics import RequestTimer
from evermini.text.tokenizer import Tokenizer
from evermini.text.tools.parser import CallParser, CallPiece

MAX_IN_FLIGHT = 64
"""Choices of one request inside the engine at once; the others follow as these end."""

FinishReason = Literal["stop", "length"]

RETRY_SECONDS = 0.05
"""Pause before a full engine is asked again by a request that it has already begun to serve."""


@dataclass(frozen=True)
class Candidate:
    """One choice to generate: ``prompt`` is the number of its prompt."""

    index: int
    prompt: int
    params: SamplingParams


@dataclass(frozen=True)
class Delta:
    """What choice ``index`` gained; the last delta of a choice has its finish reason."""

    index: int
    text: str = ""
    logprobs: tuple[ScoredToken, ...] = ()
    finish_reason: FinishReason | None = None
    calls: tuple[CallPiece, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. Each prompt counts once, however many choices share it.

    Tokens of a prediction that did not appear in the output count as completion tokens, as the contract has it.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    image_tokens: int = 0
    """Of the prompt's tokens, those that its images count as."""

    def __add__(self, other: Usage) -> Usage:
        """Return the tokens of both."""
        return Usage(*map(operator.add, astuple(self), astuple(other)))


class Generation:
    """The choices of one request in flight.

    Args:
        worker: The engine that runs them.
        tokenizer: Decodes its tokens.
        prompts: Token ids of each prompt.
        candidates: What to generate, by ascending index.
        stops: Stop strings.
        timer: Told of every token and every end.
        end_ids: Tokens that end a choice and are listed among its log-probabilities; the parameters' own
            ``stop_token_ids`` end it unseen.
        new_parser: Makes what reads tool calls out of a choice's text; ``None``: all of it is text.
        lease: Of the adapter to run with; released when the generation ends.
        embedded: The images in the prompt, of which there is one then.
        emphasis: Tokens of the prompt that weigh more, likewise.
    """

    def __init__(
        self,
        worker: EngineWorker,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Candidate],
        stops: Sequence[str],
        timer: RequestTimer,
        *,
        end_ids: frozenset[int] = frozenset(),
        new_parser: Callable[[], CallParser] | None = None,
        lease: Lease | None = None,
        embedded: Embedded | None = None,
        emphasis: Emphasis | None = None,
    ) -> None:
        self.prompts = prompts
        self.prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}
        self._worker = worker
        self._tokenizer = tokenizer
        self._candidates = candidates
        self._stops = stops
        self._timer = timer
        self._end_ids = end_ids
        self._new_parser = new_parser
        self._lease = lease
        self._embedded, self._emphasis = embedded, emphasis
        self._places = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._news: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._submissions: dict[int, Submission] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._open = {candidate.index for candidate in candidates}
        self._num_generated = 0
        self._num_predicted = 0
        self._num_cached: dict[int, int] = {}

    def start(self) -> None:
        """Admit the request: submit its first choice now, and see to the others.

        Raises:
            OverloadedError: The engine's queue is full.
            ContextLengthError: The prompt and output cannot fit.
            EngineStoppedError: The engine is stopped.
        """
        try:
            self._submit(self._candidates[0])
        except BaseException:
            if self._lease is not None:
                self._lease.release()
            raise
        self._timer.submitted()
        self._tasks = [asyncio.create_task(self._run(candidate)) for candidate in self._candidates]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the choices' deltas as they come; leaving early ends the request in the engine.

        Raises:
            EngineError: The engine failed or stopped before the last choice ended.
            GrammarLimitError: A choice's grammar cannot be followed any further.
        """
        try:
            while self._open:
                news = await self._news.get()
                if isinstance(news, Exception):
                    raise news
                if news.finish_reason is not None:
                    self._open.remove(news.index)
                    self._timer.choice_ended(news.finish_reason)
                yield news
            self._timer.completed()
        except (EngineError, GrammarLimitError):
            self._end_open("error")
            raise
        finally:
            self.abort()

    def abort(self) -> None:
        """End what still runs and free its memory; does nothing the second time."""
        for task in self._tasks:
            task.cancel()
        for submission in self._submissions.values():
            submission.abort()
        self._submissions.clear()
        if self._lease is not None:
            self._lease.release()
        self._end_open("abort")
        self._timer.ended(self._num_generated)

    @property
    def has_begun(self) -> bool:
        """A prompt has been computed, so there is something to pay for."""
        return bool(self._num_cached)

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the deltas are exhausted."""
        accepted = self._num_predicted
        rejected = sum(len(one.params.prediction) for one in self._candidates) - accepted
        return Usage(
            prompt_tokens=sum(len(prompt) for prompt in self.prompts),
            completion_tokens=self._num_generated + rejected,
            cached_tokens=sum(self._num_cached.values()),
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=rejected,
        )

    def _end_open(self, reason: str) -> None:
        for _ in self._open:
            self._timer.choice_ended(reason)
        self._open.clear()

    def _submit(self, candidate: Candidate) -> Submission:
        prompt = self.prompts[candidate.prompt]
        priority = BATCH if current_caller.get().is_batch else INTERACTIVE
        adapter = None if self._lease is None else self._lease.adapter
        submission = self._worker.submit(
            prompt,
            candidate.params,
            priority=priority,
            adapter=adapter,
            embedded=self._embedded,
            emphasis=self._emphasis,
        )
        self._submissions[candidate.index] = submission
        return submission

    async def _run(self, candidate: Candidate) -> None:
        """Bring one choice through the engine; whatever goes wrong reaches the reader of `deltas`."""
        try:
            async with self._places:
                submission = self._submissions.get(candidate.index)
                while submission is None:
                    try:
                        submission = self._submit(candidate)
                    except OverloadedError:  # refusing is for new requests; this one is under way
                        await asyncio.sleep(RETRY_SECONDS)
                await self._read(candidate, submission)
                self._submissions.pop(candidate.index, None)
        except Exception as error:
            self._news.put_nowait(error)

    async def _read(self, candidate: Candidate, submission: Submission) -> None:
        parser = self._new_parser() if self._new_parser else None
        decoder = ChoiceDecoder(self._tokenizer, self._stops, parser)
        async for event in submission:
            match event:
                case TokenOutput(token_id=token_id) if token_id in self._end_ids:
                    submission.abort()
                    self._tell(candidate.index, decoder.finish(event.logprob), "stop")
                    return
                case TokenOutput():
                    self._num_generated += 1
                    self._num_predicted += event.is_predicted
                    self._timer.token(candidate.index)
                    piece = decoder.push(event)
                    if piece.stopped:
                        submission.abort()  # tokens it may have run ahead are not the caller's
                        self._tell(candidate.index, piece, "stop")
                        return
                    if piece.text or piece.logprobs or piece.calls:
                        self._tell(candidate.index, piece, None)
                case PromptDone():
                    if not self._num_cached:
                        prompt = self.prompts[candidate.prompt]
                        self._timer.prompt_done(len(prompt), event.cached_tokens)
                    # The first choice to submit a prompt pays for it; the others find it in the cache.
                    self._num_cached.setdefault(candidate.prompt, event.cached_tokens)
                    if event.prompt_logprobs is not None:
                        self.prompt_logprobs[candidate.prompt] = event.prompt_logprobs
                case Finished(reason="stop" | "length" as reason):
                    piece = decoder.finish()
                    self._tell(candidate.index, piece, "stop" if piece.stopped else reason)
                    return
                case Finished(reason="error"):
                    raise EngineError(event.message)
                case Finished(reason="grammar"):
                    raise GrammarLimitError(event.message)
                case Finished():
                    raise EngineStoppedError(
                        "The engine was stopped before this request was complete. Send it again."
                    )

    def _tell(self, index: int, piece: Piece, reason: FinishReason | None) -> None:
        self._news.put_nowait(Delta(index, piece.text, piece.logprobs, reason, piece.calls))


class Generated:
    """What the engine of this process writes, for whoever shows it: all but the deltas of `Answering` and `Completing`.

    Args:
        generation: The request's choices in the engine.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the deltas are exhausted."""
        return self._generation.usage

    @property
    def has_begun(self) -> bool:
        """A prompt has been computed, so there is something to pay for."""
        return self._generation.has_begun

    def abort(self) -> None:
        """End the request in the engine if it still runs."""
        self._generation.abort()


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Return the seed of a request's n-th choice: the request's own for the first, unrelated ones for the others.

    ``seed + choice`` would make ``seed=1, n=2`` and ``seed=2, n=2`` share an answer.
    """
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
