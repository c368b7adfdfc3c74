"""What text completions are made of, whoever writes them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import fmean
from typing import Protocol

from evermini.service.generation import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token as it is shown.

    Attributes:
        text: Its text; bytes that are no text by themselves are written as escapes.
        offset: Where it starts, in characters from the start of the prompt.
        logprob: Its log-probability; ``None`` for the first token of an echoed prompt.
        top: The likeliest tokens at its place, and itself, by text; ``None`` likewise.
    """

    text: str
    offset: int
    logprob: float | None
    top: Mapping[str, float] | None


@dataclass(frozen=True)
class TextDelta:
    """What choice ``index`` gained; ``echoed`` are the prompt's tokens, in the first delta only."""

    index: int
    text: str
    echoed: Sequence[TextToken]
    tokens: Sequence[TextToken]
    finish_reason: FinishReason | None


@dataclass
class TextChoice:
    """One finished completion; ``text`` and ``tokens`` begin with the prompt if it is echoed."""

    index: int
    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    scores: list[float] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens; a completion without any ranks last."""
        return fmean(self.scores) if self.scores else -inf


class Completing(Protocol):
    """Completions in the making: iterate `deltas`, and `abort` if they are not read to the end."""

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the deltas are exhausted."""

    @property
    def has_begun(self) -> bool:
        """A prompt has been computed, so there is something to pay for."""

    def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Yield the candidates' deltas; with ``echo``, the first of each begins with its prompt."""

    def abort(self) -> None:
        """End what still runs; does nothing the second time."""
