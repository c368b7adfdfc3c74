"""Our requests in the words that every OpenAI-compatible engine knows.

What such engines do not share is written in terms of what they do: the developer role, participants' names, functions,
``allowed_tools``. Defaults are sent in full, since engines have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evermini.errors import UnsupportedParameterError
from evermini.service.limits import DEFAULT_COMPLETION_TOKENS
from evermini.service.schemas import ChatRequest, CompletionRequest, SamplingRequest
from evermini.service.tools import Toolset
from evermini.service.upstream.forward import images_in, with_images

Json = dict[str, Any]

_MAX_TOKEN_ID = 1 << 30
"""Bound for ``logit_bias``: the engine knows its own vocabulary."""


def chat_body(request: ChatRequest, texts: Sequence[str], model: str) -> Json:
    """Return the body for ``/chat/completions``.

    Args:
        request: What is asked.
        texts: Each message's text, which may be another one than was sent (an excerpt).
        model: The engine's name for the model.

    Raises:
        UnsupportedParameterError: The answer should have a form that engines do not have in common.
        InvalidRequestError: A key of ``logit_bias`` is no token id.
    """
    for name in ("grammar", "regex"):
        if getattr(request.x_evermini, name, None) is not None:
            raise UnsupportedParameterError(
                f"Unsupported parameter: 'x_evermini.{name}' is not supported by this model, which another engine "
                "runs. Use 'response_format'.",
                param=f"x_evermini.{name}",
            )
    body = {**_sampling(request, model), "messages": _messages(request, texts)}
    if request.max_output is not None:
        body["max_tokens"] = request.max_output
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.response_format is not None and request.response_format.type != "text":
        body["response_format"] = request.response_format.model_dump(
            by_alias=True, exclude_unset=True
        )
    return body | _tools(request.toolset, is_parallel=request.parallel_tool_calls)


def completion_body(request: CompletionRequest, model: str) -> Json:
    """Return the body for ``/completions``; the best of several are chosen here.

    Raises:
        InvalidRequestError: A key of ``logit_bias`` is no token id.
    """
    prompts = request.prompt if request.prompt is not None else [""]
    given = request.max_tokens
    body = {
        **_sampling(request, model),
        "n": request.num_candidates,
        "prompt": prompts[0] if len(prompts) == 1 else prompts,
        "max_tokens": DEFAULT_COMPLETION_TOKENS if given is None else given,
    }
    if request.echo:
        body["echo"] = True
    if request.logprobs is not None:
        body["logprobs"] = request.logprobs
    elif request.num_candidates > request.num_choices:
        body["logprobs"] = 0
    return body


def _sampling(request: SamplingRequest, model: str) -> Json:
    body: Json = {
        "model": model,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
    }
    if request.num_choices > 1:
        body["n"] = request.num_choices
    if request.stop:
        body["stop"] = request.stop
    if request.logit_bias:
        body["logit_bias"] = {
            str(key): bias for key, bias in request.bias_by_id(_MAX_TOKEN_ID).items()
        }
    for field in ("seed", "presence_penalty", "frequency_penalty"):
        if (value := getattr(request, field)) is not None:
            body[field] = value
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _messages(request: ChatRequest, texts: Sequence[str]) -> list[Json]:
    """Return the messages; calls of the older kind get an id, by which their results are theirs."""
    messages: list[Json] = []
    num_legacy = 0
    for given, text in zip(request.messages, texts, strict=True):
        message = given.for_template(text)
        if message["role"] in ("system", "user"):
            message.pop("name", None)  # it stands before the text already
        for call in message.get("tool_calls", ()):
            if "id" not in call:
                num_legacy += 1
                call["id"] = f"call_{num_legacy}"
        if given.role == "function":
            message["tool_call_id"] = f"call_{num_legacy}"
        if "tool_calls" in message and not text:
            message["content"] = None
        if images := images_in([given]):
            message["content"] = with_images(message["content"], images)
        messages.append(message)
    return messages


def _tools(toolset: Toolset, *, is_parallel: bool | None) -> Json:
    """Return the fields about tools; without a tool that may be called, the engine need not know any."""
    if toolset.mode == "none":
        return {}
    offered = toolset.tools if toolset.is_named else toolset.callable
    body: Json = {"tools": [tool.model_dump(exclude_unset=True) for tool in offered]}
    if toolset.is_named:
        named = toolset.callable[0]
        body["tool_choice"] = {"type": named.type, named.type: {"name": named.name}}
    elif toolset.mode == "required":
        body["tool_choice"] = "required"
    if toolset.is_legacy:
        body["parallel_tool_calls"] = False
    elif is_parallel is not None:
        body["parallel_tool_calls"] = is_parallel
    return body
