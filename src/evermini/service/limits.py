"""How much a request may generate, and its sampling parameters: what depends on both the request and the model."""

from __future__ import annotations

from collections.abc import Mapping

from evermini.engine.constraint import Constraint
from evermini.engine.request import SamplingParams
from evermini.errors import ContextLengthError, InvalidRequestError
from evermini.service.schemas import (
    MAX_OUTPUT_TOKENS,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
)

DEFAULT_COMPLETION_TOKENS = 16


def output_limit(window: int, num_prompt: int, request: ChatRequest) -> int:
    """Return the tokens a chat request may generate: what it asks for, or all that fits.

    Raises:
        ContextLengthError: The prompt leaves no room for it, with both counts. Nothing is ever cut.
    """
    wanted = request.max_output
    if num_prompt >= window:
        raise ContextLengthError(
            f"This model's maximum context length is {window} tokens. However, your messages resulted in "
            f"{num_prompt} tokens. Please reduce the length of the messages.",
            param="messages",
        )
    if wanted is None:
        return min(MAX_OUTPUT_TOKENS, window - num_prompt)
    if num_prompt + wanted > window:
        raise ContextLengthError(
            f"This model's maximum context length is {window} tokens. However, you requested {num_prompt + wanted} "
            f"tokens ({num_prompt} in the messages, {wanted} in the completion). Please reduce the length of the "
            "messages or completion.",
            param="messages",
        )
    return wanted


def check_output(request: ChatRequest) -> None:
    """Check what a chat request asks to be generated against the contract's limit.

    Raises:
        InvalidRequestError: It is more.
    """
    if request.max_output is not None:
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        _check_output_cap(request.max_output, field)


def completion_limit(window: int, num_prompt: int, request: CompletionRequest) -> int:
    """Return the tokens a text completion may generate per choice.

    Raises:
        ContextLengthError: Prompt and output do not fit, with both counts.
        InvalidRequestError: It asks for more than the contract's output limit.
    """
    wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    _check_output_cap(wanted, "max_tokens")
    if num_prompt + wanted > window:
        raise ContextLengthError(
            f"This model's maximum context length is {window} tokens. However, you requested {num_prompt + wanted} "
            f"tokens ({num_prompt} in your prompt; {wanted} for the completion). Please reduce your prompt or "
            "completion length.",
            param="prompt",
        )
    return wanted


def _check_output_cap(wanted: int, field: str) -> None:
    if wanted > MAX_OUTPUT_TOKENS:
        raise InvalidRequestError(
            f"{field} is too large: {wanted}. This model supports at most {MAX_OUTPUT_TOKENS} completion tokens, "
            f"whereas you provided {wanted}.",
            param=field,
            code="invalid_value",
        )


def sampling_params(
    request: SamplingRequest,
    *,
    max_tokens: int,
    logit_bias: Mapping[int, float],
    seed: int | None,
    stop_token_ids: frozenset[int],
    top_logprobs: int | None,
    prompt_logprobs: int | None = None,
    constraint: Constraint | None = None,
    prediction: tuple[int, ...] = (),
    is_kept: bool = True,
) -> SamplingParams:
    """Return the engine's parameters; the contract's defaults are filled in here."""
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    if top_p == 0:  # an empty nucleus means its limit: only the most likely token
        temperature, top_p = 0.0, 1.0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        seed=seed,
        stop_token_ids=stop_token_ids,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        constraint=constraint,
        prediction=prediction,
        is_kept=is_kept,
    )
