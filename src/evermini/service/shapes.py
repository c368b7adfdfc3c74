"""What answers look like: the objects of the contract, for the API's description. Every key they have stands here.

Keys that are not `NotRequired` are always there, even when null. The shapes of responses, batches and fine-tuning stand
in those packages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

EXACT = ConfigDict(extra="forbid")

Metadata = dict[str, str]


@with_config(EXACT)
class ErrorBody(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


@with_config(EXACT)
class ErrorAnswer(TypedDict):
    """Every failure, in the middle of a stream too."""

    error: ErrorBody


@with_config(EXACT)
class PromptDetails(TypedDict):
    """Of a prompt's tokens, those that were not computed anew, and those of images."""

    cached_tokens: int
    audio_tokens: int
    image_tokens: int


@with_config(EXACT)
class CompletionDetails(TypedDict):
    """Of an answer's tokens, those of a prediction that are in it, and those that are not."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


@with_config(EXACT)
class TokenUsage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


@with_config(EXACT)
class CalledFunction(TypedDict):
    """A function's name and its arguments, JSON text."""

    name: str
    arguments: str


@with_config(EXACT)
class CalledCustom(TypedDict):
    """A custom tool's name and its input."""

    name: str
    input: str


@with_config(EXACT)
class CallOfFunction(TypedDict):
    """A function that is to be called."""

    id: str
    type: Literal["function"]
    function: CalledFunction


@with_config(EXACT)
class CallOfCustom(TypedDict):
    """A custom tool that is to be called."""

    id: str
    type: Literal["custom"]
    custom: CalledCustom


@with_config(EXACT)
class AnswerMessage(TypedDict):
    """What the model says or calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: NotRequired[list[CallOfFunction | CallOfCustom]]
    function_call: NotRequired[CalledFunction]


@with_config(EXACT)
class Score(TypedDict):
    """A token and its log-probability; -9999 stands for impossible."""

    token: str
    bytes: list[int]
    logprob: float


@with_config(EXACT)
class TokenScore(TypedDict):
    """A token of an answer, its log-probability, and the likeliest ones in its place."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[Score]


@with_config(EXACT)
class ChatLogprobs(TypedDict):
    """Log-probabilities of an answer's text."""

    content: list[TokenScore]
    refusal: None


@with_config(EXACT)
class AnswerChoice(TypedDict):
    """One of the ``n`` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


@with_config(EXACT)
class ChatAnswer(TypedDict):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[AnswerChoice]
    usage: TokenUsage
    metadata: NotRequired[Metadata]
    x_evermini: NotRequired[dict[str, Any]]


@with_config(EXACT)
class ChunkChoice(TypedDict):
    """What one of the answers gained."""

    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"] | None


@with_config(EXACT)
class ChatChunk(TypedDict):
    """An event of a streamed chat completion; after the last one comes ``data: [DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: NotRequired[Literal["default"]]
    system_fingerprint: NotRequired[str]
    choices: list[ChunkChoice]
    usage: NotRequired[TokenUsage | None]
    x_evermini: NotRequired[dict[str, Any]]


@with_config(EXACT)
class StoredMessage(TypedDict):
    """A message that a stored completion answered."""

    id: str
    role: str
    content: str | None
    refusal: str | None
    content_parts: list[dict[str, Any]] | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    function_call: NotRequired[dict[str, Any]]
    tool_call_id: NotRequired[str]


@with_config(EXACT)
class TextLogprobs(TypedDict):
    """Log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


@with_config(EXACT)
class TextChoice(TypedDict):
    """One of the texts."""

    text: str
    index: int
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


@with_config(EXACT)
class TextAnswer(TypedDict):
    """A text completion, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[TokenUsage | None]


@with_config(EXACT)
class Embedding(TypedDict):
    """The embedding of one input: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@with_config(EXACT)
class EmbeddingUsage(TypedDict):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


@with_config(EXACT)
class EmbeddingsAnswer(TypedDict):
    """The embeddings of a request's inputs, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@with_config(EXACT)
class ModelAnswer(TypedDict):
    """A model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_window: int | None
    input_modalities: list[Literal["text", "image"]]


@with_config(EXACT)
class ModelList(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[ModelAnswer]


@with_config(EXACT)
class IngestAnswer(TypedDict):
    """How far a file is indexed before anybody asks."""

    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    tokens: int | None
    tokens_done: int
    error: str | None


@with_config(EXACT)
class FileExtensions(TypedDict):
    """What a file has beyond the contract."""

    ingest: IngestAnswer


@with_config(EXACT)
class FileAnswer(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    x_evermini: NotRequired[FileExtensions]


@with_config(EXACT)
class UploadAnswer(TypedDict):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    expires_at: int
    file: FileAnswer | None


@with_config(EXACT)
class UploadPartAnswer(TypedDict):
    """A part of such a file."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


@with_config(EXACT)
class UsageBucket(TypedDict):
    """What was used in a stretch of time, a result for each group."""

    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[dict[str, Any]]


@with_config(EXACT)
class UsagePage(TypedDict):
    """Stretches of time, the oldest first."""

    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None


@with_config(EXACT)
class Deleted(TypedDict):
    """What was deleted."""

    id: str
    object: str
    deleted: Annotated[bool, Field(json_schema_extra={"const": True})]
