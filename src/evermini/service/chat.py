"""Chat completions: messages in, deltas out.

run = await chat.start(served, request)
async for delta in run.deltas(): ...          # streaming
choices = await run.collect()                 # or all at once, through the same path
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from evermini.service.answer import (
    Answering,
    ChatChoice,
    ChatDelta,
    ToolCallDelta,
    ToolKind,
    finish_reason,
)
from evermini.service.calling import new_parser
from evermini.service.citations import Citation, cite, whole_documents
from evermini.service.constraints import constrain, constraint_of
from evermini.service.documents import Documents
from evermini.service.generation import (
    Candidate,
    Generated,
    Generation,
    Usage,
    seed_of_choice,
)
from evermini.service.image_tokens import ImageTokens, count_images
from evermini.service.limits import check_output, output_limit, sampling_params
from evermini.service.metrics import Metrics, RequestTimer
from evermini.service.model_info import ModelInfo
from evermini.service.offload import tokenise
from evermini.service.prompting import make_prompt
from evermini.service.reading import OnProgress, Recalled
from evermini.service.runtime import Served, ServedModel
from evermini.service.schemas import ChatRequest, Prediction
from evermini.service.shown import shown_token
from evermini.service.sweep.result import Swept
from evermini.service.tools import Toolset
from evermini.service.upstream import chat as upstream
from evermini.service.upstream.model import UpstreamModel
from evermini.text.tokenizer import Tokenizer
from evermini.text.tools.parser import CallPiece


class _CallIds:
    """Gives the calls of one answer their ids."""

    def __init__(self) -> None:
        self._kinds: list[ToolKind] = []

    @property
    def has_called(self) -> bool:
        """Whether there is a call."""
        return bool(self._kinds)

    def deltas(self, pieces: Sequence[CallPiece]) -> tuple[ToolCallDelta, ...]:
        """Return what was read out of the answer as the contract has it."""
        return tuple(map(self._delta, pieces))

    def _delta(self, piece: CallPiece) -> ToolCallDelta:
        if piece.tool is None:
            kind = self._kinds[piece.index]
            return ToolCallDelta(piece.index, kind, arguments=piece.arguments)
        self._kinds.append(piece.tool.kind)
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        return ToolCallDelta(piece.index, piece.tool.kind, call_id, piece.tool.name)


class EngineAnswer(Generated):
    """What the native engine writes.

    Args:
        generation: The request's choices in the engine.
        toolset: The tools of the request.
        tokenizer: Shows tokens.
    """

    def __init__(self, generation: Generation, toolset: Toolset, tokenizer: Tokenizer) -> None:
        self.told: dict[str, Any] | None = None
        super().__init__(generation)
        self._toolset = toolset
        self._tokenizer = tokenizer
        self._call_ids: defaultdict[int, _CallIds] = defaultdict(_CallIds)

    async def deltas(self) -> AsyncGenerator[ChatDelta, None]:
        """Yield the choices' deltas as they come; leaving early ends the request in the engine."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for gained in deltas:
                calls = self._call_ids[gained.index]
                pieces = calls.deltas(gained.calls)
                reason = gained.finish_reason and finish_reason(
                    self._toolset, has_called=calls.has_called, reason=gained.finish_reason
                )
                yield ChatDelta(
                    gained.index,
                    gained.text,
                    pieces,
                    tuple(shown_token(self._tokenizer, token.logprob) for token in gained.logprobs),
                    reason,
                )


@dataclass(frozen=True)
class Ticket:
    """What a completion is known by, before it has begun.

    Attributes:
        id: ``chatcmpl-...``.
        created: Unix time.
    """

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


class ChatRun:
    """A chat completion in flight: iterate `deltas` or await `collect`, and `abort` if neither is finished.

    Attributes:
        info: The model.
        choices: What came so far, by index.
        recalled: The excerpts that a long prompt was read in, if it was...
        swept: ...or how all of it was read.
    """

    def __init__(
        self,
        info: ModelInfo,
        request: ChatRequest,
        answer: Answering,
        read: Recalled | Swept | None,
        images: ImageTokens,
        ticket: Ticket,
        timer: RequestTimer,
    ) -> None:
        self.id = ticket.id
        self.created = ticket.created
        self.info = info
        self.request = request
        self.recalled = read if isinstance(read, Recalled) else None
        self.swept = read if isinstance(read, Swept) else None
        self.choices = [ChatChoice(index) for index in range(request.num_choices)]
        self._answer = answer
        self._images = images
        self._timer = timer

    async def deltas(self) -> AsyncGenerator[ChatDelta, None]:
        """Yield the choices' deltas as they come; leaving early ends the request.

        Raises:
            EngineError: The engine failed or stopped before the last choice ended.
        """
        async with aclosing(self._answer.deltas()) as deltas:
            async for delta in deltas:
                choice = self.choices[delta.index]
                choice.add(delta)
                if delta.finish_reason is not None and self.request.wants_why:
                    choice.citations += await self._cited(choice.text)
                yield delta

    async def collect(self) -> list[ChatChoice]:
        """Return the finished choices by index.

        Raises:
            EngineError: The engine failed or stopped.
        """
        async with aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass
        return self.choices

    async def _cited(self, text: str) -> list[Citation]:
        """Return the words of an answer that stand in what was read of documents; a sweep leaves no places."""
        if self.swept is not None:
            return []
        if self.recalled is not None:
            shown, question = self.recalled.shown, self.recalled.question
        else:
            shown, question = whole_documents(self.request.messages)
        size = sum(one.past - one.begin for one in shown)
        return await tokenise(size, cite, text, shown, question)

    @property
    def told(self) -> dict[str, Any] | None:
        """How another Evermini, which answers, says that it has read the prompt."""
        return self._answer.told

    @property
    def usage(self) -> Usage:
        """Tokens; final once every delta was read. The prompt's are those that were sent, however it was read."""
        return self._images.apply(self._sent())

    def _sent(self) -> Usage:
        used = self._answer.usage
        if self.recalled is not None:
            return replace(
                used,
                prompt_tokens=self.recalled.full_tokens,
                cached_tokens=self.recalled.cached_tokens,
            )
        if self.swept is not None:
            return replace(used, prompt_tokens=self.swept.full_tokens, cached_tokens=0)
        return used

    def abort(self) -> None:
        """End the request if it still runs."""
        self._answer.abort()
        if self.swept is not None and self.swept.spent is not None:
            self._timer.used(self.swept.spent + self._answer.usage)
        elif self._answer.has_begun:
            self._timer.used(self.usage)


async def start(
    served: Served,
    request: ChatRequest,
    *,
    documents: Documents,
    metrics: Metrics | None = None,
    arrived: float | None = None,
    progress: OnProgress | None = None,
    ticket: Ticket | None = None,
) -> ChatRun:
    """Read what is attached, then what does not fit the window, and hand the request to whoever answers.

    Args:
        served: The model to ask.
        request: What to ask.
        documents: Reads the images and files of the messages.
        metrics: Where to report latencies.
        arrived: ``time.perf_counter()`` when the request came in; default now.
        progress: Told, from any thread, how reading a long text goes.
        ticket: What it will be known by; default a new one.

    Raises:
        ContextLengthError: The prompt (plus the requested output) does not fit, and recall is off or cannot help.
        UnsupportedParameterError: Recall or a sweep is asked for and recall is switched off, or the model cannot do
            what is asked.
        RecallDiskError: The index of a long text does not fit under the cap on disk space.
        InvalidRequestError: An image or file cannot be read, a token id in ``logit_bias`` is not one of the model's,
            the chat template refuses the order of the messages, or the form that the answer should have cannot be
            enforced.
        OverloadedError: The engine's queue is full.
        EngineStoppedError: The engine is stopped.
        UpstreamError: The engine that runs the model cannot be reached, or fails.
    """
    timer = RequestTimer(
        metrics, served.info.id, time.perf_counter() if arrived is None else arrived
    )
    check_output(request)
    request = await documents.read(request, served.eyes)
    images = await count_images(request, served.info.id, served.count_tokens)
    answer: Answering
    read: Recalled | Swept | None
    if isinstance(served, UpstreamModel):
        answer, read = await upstream.start(served, request, timer, progress)
    else:
        answer, read = await _start(served, request, timer, progress)
    return ChatRun(served.info, request, answer, read, images, ticket or Ticket(), timer)


async def _start(
    served: ServedModel, request: ChatRequest, timer: RequestTimer, progress: OnProgress | None
) -> tuple[EngineAnswer, Recalled | Swept | None]:
    """Tokenise, and hand the request to the engine of this process."""
    bias = request.bias_by_id(served.tokenizer.vocab_size)
    constraint = await constraint_of(request, served.template.tool_format, served.grammars, timer)
    prompt = await make_prompt(served, request, progress)
    read = prompt.read
    if constraint is None and isinstance(read, Swept) and read.stated is not None:
        constraint = await constrain(served.grammars, read.stated, timer)
    limit = output_limit(served.worker.max_model_len, len(prompt.token_ids), request)
    prediction: tuple[int, ...] = ()
    if request.prediction is not None:
        prediction = await _tokens(served, request.prediction)
    candidates = [
        Candidate(
            index=index,
            prompt=0,
            params=sampling_params(
                request,
                max_tokens=limit,
                logit_bias=bias,
                seed=seed_of_choice(request.seed, index),
                stop_token_ids=served.tokenizer.eos_ids,
                top_logprobs=request.num_top_logprobs,
                constraint=constraint,
                prediction=prediction,
                is_kept=request.is_kept,
            ),
        )
        for index in range(request.num_choices)
    ]
    generation = Generation(
        served.worker,
        served.tokenizer,
        [prompt.token_ids],
        candidates,
        request.stop or [],
        timer,
        new_parser=new_parser(request, served.template.tool_format),
        lease=await served.lease_adapter(),
        embedded=prompt.embedded,
        emphasis=prompt.emphasis,
    )
    generation.start()
    return EngineAnswer(generation, request.toolset, served.tokenizer), read


async def _tokens(served: ServedModel, prediction: Prediction) -> tuple[int, ...]:
    text = prediction.text
    return tuple(await tokenise(len(text), served.tokenizer.encode, text))
