"""Many small questions to a model at once: what a sweep is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from evermini.engine.request import Finished, PromptDone, SamplingParams, TokenOutput
from evermini.errors import EngineError, EngineStoppedError, OverloadedError
from evermini.service.generation import RETRY_SECONDS
from evermini.service.offload import tokenise
from evermini.service.runtime import ServedModel
from evermini.service.sweep.forms import Form

T = TypeVar("T")

IN_FLIGHT = 16
"""Questions of one sweep in the engine at once: enough to fill its batches, few enough to leave room for others."""
ATTEMPTS = 2
"""How often a question is asked if the engine fails over it."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """What the model says; ``is_cut``: it had more to say."""

    text: str
    is_cut: bool


class Asker(Protocol):
    """Puts questions to a model, some at a time, each answered with the likeliest words.

    Attributes:
        window: Tokens of prompt and reply together that the model takes.
        tokens_read: Tokens of all prompts...
        tokens_cached: ...of which did not have to be computed.
        tokens_written: Tokens of all replies.
    """

    window: int
    tokens_read: int
    tokens_cached: int
    tokens_written: int

    async def ask(self, messages: Messages, *, max_tokens: int, form: Form | None = None) -> Reply:
        """Return the model's reply.

        Args:
            messages: The conversation.
            max_tokens: Where the reply is cut.
            form: What the reply looks like; if it was cut, as far as it goes.

        Raises:
            EverminiError: Whoever runs the model failed over it, more than once, or is stopped.
        """


class EngineAsker:
    """Asks a model that runs in this process: see `Asker`.

    Args:
        served: The model.
    """

    def __init__(self, served: ServedModel) -> None:
        self.window = served.worker.max_model_len
        self.tokens_read = self.tokens_cached = self.tokens_written = 0
        self._served = served
        self._places = asyncio.Semaphore(IN_FLIGHT)

    async def ask(self, messages: Messages, *, max_tokens: int, form: Form | None = None) -> Reply:
        """See `Asker`.

        Raises:
            EngineError: The engine failed over it, more than once.
            EngineStoppedError: The engine is stopped.
        """
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            stop_token_ids=self._served.tokenizer.eos_ids,
            constraint=None if form is None else self._served.grammars.regex(form.regex),
        )
        async with self._places:
            length = sum(len(message["content"]) for message in messages)
            prompt = await tokenise(length, self._served.template.encode_chat, messages)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return await self._ask(prompt, params)
                except EngineStoppedError:
                    raise
                except EngineError:
                    if attempt == ATTEMPTS:
                        raise
            raise AssertionError("unreachable")

    async def _ask(self, prompt: Sequence[int], params: SamplingParams) -> Reply:
        while True:
            try:
                submission = self._served.worker.submit(prompt, params)
                break
            except OverloadedError:  # refusing is for new requests; this one is under way
                await asyncio.sleep(RETRY_SECONDS)
        ids: list[int] = []
        async with submission:
            async for event in submission:
                match event:
                    case PromptDone():
                        self.tokens_read += len(prompt)
                        self.tokens_cached += event.cached_tokens
                    case TokenOutput():
                        ids.append(event.token_id)
                        self.tokens_written += 1
                    case Finished(reason="stop" | "length" as reason):
                        return Reply(self._served.tokenizer.decode(ids), reason == "length")
                    case Finished(reason="error" | "grammar"):
                        raise EngineError(event.message)
                    case Finished():
                        break
        raise EngineStoppedError(
            "The engine was stopped before this request was complete. Send it again."
        )


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results, in order; the first failure, or the caller's leaving, ends the rest."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
