"""Text completions (the legacy endpoint): raw prompts, as text or token ids, with echo and scoring.

Evaluation harnesses score texts here with ``echo=True, logprobs=1, max_tokens=0``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from evermini.engine.request import TokenLogprob
from evermini.errors import InvalidRequestError
from evermini.service.generation import (
    Candidate,
    Generated,
    Generation,
    Usage,
    seed_of_choice,
)
from evermini.service.limits import completion_limit, sampling_params
from evermini.service.metrics import Metrics, RequestTimer
from evermini.service.model_info import ModelInfo
from evermini.service.offload import tokenise
from evermini.service.runtime import Served, ServedModel
from evermini.service.schemas import CompletionRequest
from evermini.service.shown import token_text
from evermini.service.text_answer import Completing, TextChoice, TextDelta, TextToken
from evermini.service.upstream import completions as upstream
from evermini.service.upstream.model import UpstreamModel
from evermini.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    ids: Sequence[int]


class EngineCompletion(Generated):
    """What the native engine writes.

    Args:
        request: What is asked.
        prompts: What is continued.
        generation: The candidates in the engine.
        tokenizer: Shows tokens.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[Prompt],
        generation: Generation,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(generation)
        self._request = request
        self._prompts = prompts
        self._tokenizer = tokenizer

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Yield the candidates' deltas; with ``echo``, the first of each begins with its prompt."""
        seen: set[int] = set()
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                number = delta.index // self._request.num_candidates
                prompt = self._prompts[number]
                text, echoed = delta.text, []
                if self._request.echo and delta.index not in seen:
                    seen.add(delta.index)
                    text = prompt.text + text
                    echoed = self._echoed(number)
                tokens = [
                    self._shown(
                        scored.logprob.token_id, len(prompt.text) + scored.start, scored.logprob
                    )
                    for scored in delta.logprobs
                ]
                yield TextDelta(delta.index, text, echoed, tokens, delta.finish_reason)

    def _echoed(self, number: int) -> list[TextToken]:
        scores = self._generation.prompt_logprobs.get(number)
        if scores is None:  # no log-probabilities were asked for
            return []
        ids = self._prompts[number].ids
        offsets = character_offsets(map(self._tokenizer.token_bytes, ids))
        return [
            self._shown(token_id, offset, score)
            for token_id, offset, score in zip(ids, offsets, scores, strict=True)
        ]

    def _shown(self, token_id: int, offset: int, score: TokenLogprob | None) -> TextToken:
        text = self._text(token_id)
        if score is None:
            return TextToken(text, offset, None, None)
        top: dict[str, float] = {}
        for other_id, logprob in (*score.top, (token_id, score.logprob)):
            # Different tokens can look the same; the likeliest stands for them.
            top.setdefault(self._text(other_id), logprob)
        return TextToken(text, offset, score.logprob, top)

    def _text(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id), prefix="bytes:")


class CompletionRun:
    """A text completion in flight: iterate `deltas` or await `collect`, and `abort` if neither is finished."""

    def __init__(
        self,
        info: ModelInfo,
        request: CompletionRequest,
        writing: Completing,
        timer: RequestTimer,
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.info = info
        self.request = request
        self._writing = writing
        self._timer = timer

    def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Yield the candidates' deltas; with ``echo``, the first of each begins with its prompt."""
        return self._writing.deltas()

    async def collect(self) -> list[TextChoice]:
        """Return the best ``n`` completions of each prompt, prompt by prompt.

        Raises:
            EngineError: The engine failed or stopped.
        """
        per_prompt = self.request.num_candidates
        num_prompts = 1 if self.request.prompt is None else len(self.request.prompt)
        choices = [TextChoice(index) for index in range(num_prompts * per_prompt)]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choice = choices[delta.index]
                choice.text += delta.text
                choice.tokens += [*delta.echoed, *delta.tokens]
                choice.scores += [
                    token.logprob for token in delta.tokens if token.logprob is not None
                ]
                choice.finish_reason = delta.finish_reason
        best: list[TextChoice] = []
        for first in range(0, len(choices), per_prompt):
            candidates = choices[first : first + per_prompt]
            if per_prompt > self.request.num_choices:
                candidates.sort(key=lambda choice: choice.mean_logprob, reverse=True)
            best += candidates[: self.request.num_choices]
        for index, choice in enumerate(best):
            choice.index = index
        return best

    @property
    def usage(self) -> Usage:
        """Tokens; final once every delta was read."""
        return self._writing.usage

    def abort(self) -> None:
        """End the request if it still runs."""
        self._writing.abort()
        if self._writing.has_begun:
            self._timer.used(self.usage)


async def start(
    served: Served,
    request: CompletionRequest,
    *,
    metrics: Metrics | None = None,
    arrived: float | None = None,
) -> CompletionRun:
    """Hand the request to whoever answers.

    Args:
        served: The model to ask.
        request: What to ask.
        metrics: Where to report latencies.
        arrived: ``time.perf_counter()`` when the request came in; default now.

    Raises:
        ContextLengthError: A prompt plus the requested output does not fit.
        InvalidRequestError: A token id is not one of the model's.
        OverloadedError: The engine's queue is full.
        EngineStoppedError: The engine is stopped.
        UpstreamError: The engine that runs the model cannot be reached, or fails.
    """
    timer = RequestTimer(
        metrics, served.info.id, time.perf_counter() if arrived is None else arrived
    )
    writing: Completing
    if isinstance(served, UpstreamModel):
        writing = await upstream.start(served, request, timer)
    else:
        writing = await _start(served, request, timer)
    return CompletionRun(served.info, request, writing, timer)


async def _start(
    served: ServedModel, request: CompletionRequest, timer: RequestTimer
) -> EngineCompletion:
    """Tokenise the prompts, check the window, and hand the request to the engine of this process."""
    tokenizer = served.tokenizer
    bias = request.bias_by_id(tokenizer.vocab_size)
    size = sum(len(prompt) for prompt in request.prompt or ())
    prompts = await tokenise(size, _prompts, request, tokenizer)
    ranks = request.num_candidates > request.num_choices
    # Scored answers list the token they end with, as harnesses expect that drop the last token to get the prompt's.
    lists_end = request.logprobs is not None
    candidates: list[Candidate] = []
    for number, prompt in enumerate(prompts):
        limit = completion_limit(served.worker.max_model_len, len(prompt.ids), request)
        for choice in range(request.num_candidates):
            params = sampling_params(
                request,
                max_tokens=limit,
                logit_bias=bias,
                seed=seed_of_choice(request.seed, choice),
                stop_token_ids=frozenset() if lists_end else tokenizer.eos_ids,
                top_logprobs=0 if request.logprobs is None and ranks else request.logprobs,
                prompt_logprobs=request.logprobs if request.echo else None,
            )
            candidates.append(Candidate(len(candidates), number, params))
    generation = Generation(
        served.worker,
        tokenizer,
        [prompt.ids for prompt in prompts],
        candidates,
        request.stop or [],
        timer,
        end_ids=tokenizer.eos_ids if lists_end else frozenset(),
        lease=await served.lease_adapter(),
    )
    generation.start()
    return EngineCompletion(request, prompts, generation, tokenizer)


def character_offsets(tokens: Iterable[bytes]) -> list[int]:
    """Return where each token starts, in characters; one that starts inside a character counts as that character.

    Continuation bytes of UTF-8 (10xxxxxx) start no character.
    """
    offsets, num_started = [], 0
    for token in tokens:
        continues = bool(token) and token[0] & 0xC0 == 0x80 and num_started > 0
        offsets.append(num_started - continues)
        num_started += sum(byte & 0xC0 != 0x80 for byte in token)
    return offsets


def _prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """Return the request's prompts; a missing or empty one is the token that separates documents in training."""
    prompts = []
    for number, given in enumerate(request.prompt if request.prompt is not None else [""]):
        if isinstance(given, str):
            # Raw text is the caller's whole prompt: special tokens written in it are meant.
            ids = tokenizer.encode(given, allow_special=True, add_bos=True)
            text = given
        else:
            ids = given
            for token_id in ids:
                if not 0 <= token_id < tokenizer.vocab_size:
                    raise InvalidRequestError(
                        f"Invalid token id in 'prompt': {token_id}. This model's token ids are 0 to "
                        f"{tokenizer.vocab_size - 1}.",
                        param="prompt" if len(request.prompt or ()) == 1 else f"prompt[{number}]",
                        code="invalid_value",
                    )
            text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
        if not ids:
            ids = [_document_start(tokenizer)]
        prompts.append(Prompt(text, ids))
    return prompts


def _document_start(tokenizer: Tokenizer) -> int:
    """Return the token between documents: ``<|endoftext|>`` by contract, else what the family begins texts with."""
    separator = tokenizer.id_of("<|endoftext|>")
    if separator is not None:
        return separator
    return min(tokenizer.eos_ids) if tokenizer.bos_id is None else tokenizer.bos_id
