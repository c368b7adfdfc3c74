"""What answers of the Responses API and of conversations look like; see `evermini.service.shapes`."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from evermini.service.shapes import EXACT, Metadata


@with_config(EXACT)
class InputDetails(TypedDict):
    """Of a response's input, what was not computed anew."""

    cached_tokens: int
    cache_write_tokens: int


@with_config(EXACT)
class OutputDetails(TypedDict):
    """Of a response's output, what is not shown."""

    reasoning_tokens: int


@with_config(EXACT)
class ResponseUsage(TypedDict):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


@with_config(EXACT)
class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


@with_config(ConfigDict(extra="allow"))
class Item(TypedDict):
    """A message, a call, or what a call returned: its other fields depend on the type."""

    id: str
    type: Literal[
        "message",
        "function_call",
        "custom_tool_call",
        "function_call_output",
        "custom_tool_call_output",
    ]
    status: Literal["in_progress", "completed", "incomplete"]


@with_config(EXACT)
class ResponseAnswer(TypedDict):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None
    conversation: dict[str, str] | None
    error: ResponseError | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: Metadata
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    x_evermini: NotRequired[dict[str, Any]]


@with_config(ConfigDict(extra="allow"))
class ResponseEvent(TypedDict):
    """An event of a streamed response; its other fields depend on the type."""

    type: str
    sequence_number: int


@with_config(EXACT)
class TokenCount(TypedDict):
    """How many tokens the model would be sent."""

    object: Literal["response.input_tokens"]
    input_tokens: int


@with_config(EXACT)
class ConversationAnswer(TypedDict):
    """A conversation."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: Metadata
