"""Chat completions: messages in, deltas out.

run = await chat.start(served, request)
async for delta in run.deltas(): ...          # streaming
choices = await run.collect()                 # or all at once, through the same path
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from evermini.service.decode import ScoredToken
from evermini.service.generation import (
    Candidate,
    Delta,
    FinishReason,
    Generation,
    Usage,
    seed_of_choice,
)
from evermini.service.limits import output_limit, sampling_params
from evermini.service.metrics import Metrics, RequestTimer
from evermini.service.offload import tokenise
from evermini.service.runtime import ServedModel
from evermini.service.schemas import ChatRequest, Message


@dataclass
class ChatChoice:
    """One finished answer."""

    index: int
    text: str = ""
    logprobs: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class ChatRun:
    """A chat completion in flight: iterate `deltas` or await `collect`, and `abort` if neither is finished."""

    def __init__(self, served: ServedModel, request: ChatRequest, generation: Generation) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.served = served
        self.request = request
        self._generation = generation

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the choices' deltas; see `Generation.deltas`."""
        return self._generation.deltas()

    async def collect(self) -> list[ChatChoice]:
        """Return the finished choices by index.

        Raises:
            EngineError: The engine failed or stopped.
        """
        choices = [ChatChoice(index) for index in range(self.request.num_choices)]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choice = choices[delta.index]
                choice.text += delta.text
                choice.logprobs += delta.logprobs
                choice.finish_reason = delta.finish_reason
        return choices

    @property
    def usage(self) -> Usage:
        """Tokens; final once every delta was read."""
        return self._generation.usage

    def abort(self) -> None:
        """End the request in the engine if it still runs."""
        self._generation.abort()


async def start(
    served: ServedModel,
    request: ChatRequest,
    *,
    metrics: Metrics | None = None,
    arrived: float | None = None,
) -> ChatRun:
    """Tokenise, check the window, and hand the request to the engine.

    Args:
        served: The model to ask.
        request: What to ask.
        metrics: Where to report latencies.
        arrived: ``time.perf_counter()`` when the request came in; default now.

    Raises:
        ContextLengthError: The prompt (plus the requested output) does not fit.
        InvalidRequestError: A token id in ``logit_bias`` is not one of the model's, or the chat template refuses the
            order of the messages.
        OverloadedError: The engine's queue is full.
        EngineStoppedError: The engine is stopped.
    """
    timer = RequestTimer(
        metrics, served.info.id, time.perf_counter() if arrived is None else arrived
    )
    bias = request.bias_by_id(served.tokenizer.vocab_size)
    messages = [_for_template(message) for message in request.messages]
    num_characters = sum(len(message["content"]) for message in messages)
    prompt = await tokenise(num_characters, served.template.encode_chat, messages)
    limit = output_limit(served.info.context_window, len(prompt), request)
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
            ),
        )
        for index in range(request.num_choices)
    ]
    generation = Generation(
        served.worker, served.tokenizer, [prompt], candidates, request.stop or [], timer
    )
    generation.start()
    return ChatRun(served, request, generation)


def _for_template(message: Message) -> dict[str, str]:
    """Return the message as chat templates expect it.

    Open models know no developer role, and their templates do not show participants' names. A name in front of the
    text tells participants apart, as the contract asks. Not for the assistant: it would copy the habit.
    """
    role = "system" if message.role == "developer" else message.role
    text = message.text()
    if message.name is None:
        return {"role": role, "content": text}
    if role != "assistant":
        text = f"{message.name}: {text}"
    return {"role": role, "content": text, "name": message.name}
