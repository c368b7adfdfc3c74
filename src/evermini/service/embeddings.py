"""Embeddings: the mean of a text's hidden states after the model's last layer, at unit length.

The texts run as prompts in the engine, beside everything else that it computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from evermini.engine.request import Finished, PromptDone, SamplingParams
from evermini.engine.worker import Submission
from evermini.errors import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    InvalidRequestError,
    OverloadedError,
)
from evermini.service import validation
from evermini.service.embedded import EmbeddingRequest, Embeddings
from evermini.service.generation import MAX_IN_FLIGHT, RETRY_SECONDS
from evermini.service.offload import tokenise
from evermini.service.runtime import Served, ServedModel
from evermini.service.upstream import embeddings as upstream
from evermini.service.upstream.model import UpstreamModel
from evermini.text.tokenizer import Tokenizer

MAX_INPUT_TOKENS = 8192
MAX_REQUEST_TOKENS = 300_000
"""Limits of the contract."""


def parse_embeddings(body: object) -> EmbeddingRequest:
    """Validate the body of a request.

    Raises:
        InvalidRequestError: Something is missing, malformed or unknown.
    """
    return validation.parse(EmbeddingRequest, body)


async def embed(served: Served, request: EmbeddingRequest) -> Embeddings:
    """Return the embeddings of a request's inputs; cancelled, it ends what it began.

    Raises:
        InvalidRequestError: An input is empty, a token id is not one of the model's, or there are too many tokens or
            dimensions.
        ContextLengthError: An input is too long.
        OverloadedError: The engine's queue is full.
        EngineError: The engine failed or stopped.
        UpstreamError: The engine that runs the model cannot be reached, or fails.
    """
    if isinstance(served, UpstreamModel):
        return await upstream.embed(served, request)
    if served.adapter is not None:
        raise InvalidRequestError(
            f"The model `{served.info.id}` is fine-tuned to write; embeddings of different models cannot be compared. "
            "Ask its base for embeddings, such as gpt-4.1-mini.",
            param="model",
        )
    width = served.worker.hidden_size
    if request.dimensions is not None and request.dimensions > width:
        raise InvalidRequestError(
            f"Invalid value for 'dimensions': this model has {width}. Ask for at most that many.",
            param="dimensions",
            code="invalid_value",
        )
    num_characters = sum(len(item) for item in request.input)
    prompts = await tokenise(num_characters, _encode, served.tokenizer, request.input)
    _check(prompts, min(MAX_INPUT_TOKENS, served.worker.max_model_len))
    pooled = await _run(served, prompts)
    vectors = np.array(pooled, np.float64)[:, : request.dimensions]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    total = sum(map(len, prompts))
    return Embeddings(served.info.id, vectors.astype(np.float32), total)


def _encode(tokenizer: Tokenizer, inputs: Sequence[str | list[int]]) -> list[list[int]]:
    def encode(item: str | list[int]) -> list[int]:
        if isinstance(item, str):
            return tokenizer.encode(item, add_bos=True) if item else []
        return item

    return [encode(item) for item in inputs]


def _check(prompts: Sequence[Sequence[int]], longest: int) -> None:
    for number, prompt in enumerate(prompts):
        param = "input" if len(prompts) == 1 else f"input[{number}]"
        if not prompt:
            raise InvalidRequestError(
                f"Invalid '{param}': input cannot be empty. Send at least one token.",
                param=param,
                code="invalid_value",
            )
        if len(prompt) > longest:
            raise ContextLengthError(
                f"This model's maximum context length for embeddings is {longest} tokens, however you requested "
                f"{len(prompt)} tokens in '{param}'. Please reduce your input.",
                param=param,
            )
    if (total := sum(map(len, prompts))) > MAX_REQUEST_TOKENS:
        raise InvalidRequestError(
            f"Requested {total} tokens, max {MAX_REQUEST_TOKENS} tokens per request. Split the request.",
            param="input",
            code="max_tokens_per_request",
        )


async def _run(served: ServedModel, prompts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    params = SamplingParams(max_tokens=0, pool=True)
    for prompt in prompts:
        served.worker.validate(prompt, params)
    first = served.worker.submit(prompts[0], params)  # a full queue refuses the request here
    places = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(prompt: Sequence[int], submission: Submission | None) -> tuple[float, ...]:
        async with places:
            while submission is None:
                try:
                    submission = served.worker.submit(prompt, params)
                except OverloadedError:  # refusing is for new requests; this one is under way
                    await asyncio.sleep(RETRY_SECONDS)
            async with submission:
                return await _pooled(submission)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(one(prompt, None if number else first))
                for number, prompt in enumerate(prompts)
            ]
    except ExceptionGroup as failed:  # the first failure has ended the others
        raise failed.exceptions[0] from None
    finally:
        first.abort()
    return [task.result() for task in tasks]


async def _pooled(submission: Submission) -> tuple[float, ...]:
    pooled: tuple[float, ...] | None = None
    async for event in submission:
        match event:
            case PromptDone():
                pooled = event.pooled
            case Finished(reason="length"):
                assert pooled is not None, "pooling was asked for"
                return pooled
            case Finished(reason="error"):
                raise EngineError(event.message)
            case _:
                break
    raise EngineStoppedError(
        "The engine was stopped before this request was complete. Send it again."
    )
