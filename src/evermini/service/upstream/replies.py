"""What upstream engines answer: chunks of a stream and whole answers, read as far as they are of use here."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from evermini.backends.client import not_compatible
from evermini.service.answer import ScoredText, TokenScore
from evermini.service.generation import Usage

ReplyT = TypeVar("ReplyT", bound=BaseModel)


class _CalledFunction(BaseModel):
    name: str | None = None
    arguments: str | None = None


class _CalledCustom(BaseModel):
    name: str | None = None
    input: str | None = None


class CallPiece(BaseModel):
    """A call, or a piece of one."""

    index: int | None = None
    id: str | None = None
    function: _CalledFunction | None = None
    custom: _CalledCustom | None = None

    @property
    def kind(self) -> Literal["function", "custom"]:
        """Of the tool."""
        return "function" if self.custom is None else "custom"

    @property
    def name(self) -> str | None:
        """Of the tool, where it stands."""
        called = self.custom or self.function
        return called.name if called else None

    @property
    def arguments(self) -> str:
        """What is added to them."""
        if self.custom is not None:
            return self.custom.input or ""
        return (self.function.arguments if self.function else None) or ""


class _Score(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None

    def shown(self) -> TokenScore:
        return TokenScore(self.token, _raw(self.bytes), self.logprob)


class _ScoredToken(_Score):
    top_logprobs: list[_Score] | None = None


class ChatLogprobs(BaseModel):
    """Log-probabilities as chat completions have them."""

    content: list[_ScoredToken] | None = None

    def tokens(self) -> tuple[ScoredText, ...]:
        """Return the tokens."""
        return tuple(
            ScoredText(
                token.token,
                _raw(token.bytes),
                token.logprob,
                tuple(best.shown() for best in token.top_logprobs or ()),
            )
            for token in self.content or ()
        )


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChatPart(BaseModel):
    """What a choice gained; in a whole answer, all of it."""

    index: int = 0
    message: _Message = Field(
        default_factory=_Message, validation_alias=AliasChoices("delta", "message")
    )
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None
    image_tokens: int | None = None


class UsageReply(BaseModel):
    """Tokens."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None

    def tokens(self) -> Usage:
        """Return them as they are counted here."""
        details = self.prompt_tokens_details
        cached = (details.cached_tokens if details else None) or 0
        images = (details.image_tokens if details else None) or 0
        return Usage(self.prompt_tokens, self.completion_tokens or 0, cached, image_tokens=images)


class ChatReply(BaseModel):
    """A chunk, or a whole answer; ``x_evermini``: how another Evermini has read the prompt."""

    choices: list[ChatPart] = []
    usage: UsageReply | None = None
    x_evermini: dict[str, Any] | None = None


class TextLogprobs(BaseModel):
    """Log-probabilities as text completions have them, or, from llama-server, as chats do."""

    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None
    content: list[_ScoredToken] | None = None


class TextPart(BaseModel):
    """What a completion gained; in a whole answer, all of it."""

    index: int = 0
    text: str = ""
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class TextReply(BaseModel):
    """A chunk, or a whole answer."""

    choices: list[TextPart] = []
    usage: UsageReply | None = None


class _Vector(BaseModel):
    index: int
    embedding: list[float]


class EmbeddingsReply(BaseModel):
    """Embeddings."""

    data: list[_Vector]
    usage: UsageReply | None = None


def read(kind: type[ReplyT], body: dict[str, Any], url: str) -> ReplyT:
    """Return a reply that came from ``url``.

    Raises:
        UpstreamError: It is not of that kind.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise not_compatible(url) from error


def _raw(values: list[int] | None) -> bytes | None:
    if values is None or not all(0 <= value < 256 for value in values):
        return None
    return bytes(values)
