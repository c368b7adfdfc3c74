"""What the answer of a chat is made of, whoever writes it: the native engine, or another server that was asked.

`Answering` is what both are to the rest of the service layer, which meters, stores, and shows what they write.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from evermini.service.citations import Citation
from evermini.service.generation import Usage
from evermini.service.tools import Toolset

FinishReason = Literal["stop", "length", "tool_calls", "function_call", "content_filter"]
ToolKind = Literal["function", "custom"]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token as it is shown.

    Attributes:
        text: Its text; bytes that are no text by themselves are written as escapes.
        raw: Its bytes, if they are known.
        logprob: Its log-probability.
    """

    text: str
    raw: bytes | None
    logprob: float


@dataclass(frozen=True, slots=True)
class ScoredText(TokenScore):
    """A token of the answer; ``top`` are the likeliest ones at its place."""

    top: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class ToolCallDelta:
    """What a tool call gained. The first delta of a call has its id and name and no arguments; the others only those.

    Attributes:
        index: Number of the call in its answer, from 0.
        type: Of the tool.
        id: ``call_...``, or what another server calls it.
        name: Of the tool.
        arguments: A piece of the function's arguments (JSON text) or of the custom tool's input.
    """

    index: int
    type: ToolKind
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class ChatDelta:
    """What choice ``index`` gained; the last delta of a choice has its finish reason."""

    index: int
    text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[ScoredText, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass
class ToolCall:
    """A call, as far as it is known: cut off by the token limit, its arguments are incomplete."""

    id: str
    type: ToolKind
    name: str
    arguments: str = ""


@dataclass
class ChatChoice:
    """One finished answer.

    Attributes:
        citations: Words of it that stand in the documents; there at its end, if the request asks ``why``.
    """

    index: int
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[ScoredText] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    citations: list[Citation] = field(default_factory=list)

    def add(self, delta: ChatDelta) -> None:
        """Take the choice's next delta."""
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        for piece in delta.tool_calls:
            if piece.index == len(self.tool_calls):
                assert piece.id is not None, "a call begins with its head"
                assert piece.name is not None, "likewise"
                self.tool_calls.append(ToolCall(piece.id, piece.type, piece.name))
            self.tool_calls[piece.index].arguments += piece.arguments


class Answering(Protocol):
    """An answer in the making: iterate `deltas`, and `abort` if they are not read to the end.

    Attributes:
        told: How another Evermini, which answers, has read the prompt, in the words of ``x_evermini``.
    """

    told: dict[str, Any] | None

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the deltas are exhausted."""

    @property
    def has_begun(self) -> bool:
        """A prompt has been computed, so there is something to pay for."""

    def deltas(self) -> AsyncGenerator[ChatDelta, None]:
        """Yield the choices' deltas as they come; leaving early ends the request.

        Raises:
            EngineError: Whoever answers failed or stopped before the last choice ended.
        """

    def abort(self) -> None:
        """End what still runs; does nothing the second time."""


def finish_reason(
    toolset: Toolset, *, has_called: bool, reason: Literal["stop", "length"]
) -> FinishReason:
    """Return the contract's reason: a call that the caller named is no reason of its own, but ``stop``."""
    if reason == "length" or not has_called or toolset.is_named:
        return reason
    return "function_call" if toolset.is_legacy else "tool_calls"
