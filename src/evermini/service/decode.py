"""One choice's tokens → text that may be shown, with the log-probabilities of exactly the tokens behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from evermini.engine.request import TokenLogprob, TokenOutput
from evermini.text.detokenize import IncrementalDetokenizer
from evermini.text.stops import StopMatcher
from evermini.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's log-probability and where the token starts in the choice's text, in characters."""

    start: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token (or the end) releases.

    Attributes:
        text: Complete characters that cannot belong to a stop string any more.
        logprobs: The tokens whose text starts in what was released so far; empty if none were asked for.
        stopped: A stop string was found; nothing follows.
    """

    text: str
    logprobs: tuple[ScoredToken, ...]
    stopped: bool


class ChoiceDecoder:
    """Decodes the tokens of one choice in order.

    Invariant: after every piece, the released tokens are those whose first character lies before the end of the
    released text. So a token is released together with its (first) character, a token held back as the possible start
    of a stop string is released with the text, and tokens of a stop string are never released.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopMatcher(stops)
        self._held: deque[ScoredToken] = deque()
        self._num_decoded = 0
        self._num_released = 0

    def push(self, output: TokenOutput) -> Piece:
        """Take the next token."""
        start = self._num_decoded
        text = self._detokenizer.push(output.token_id)
        if output.logprob is not None:
            self._held.append(ScoredToken(start, output.logprob))
        return self._release(*self._match(text))

    def finish(self, end: TokenLogprob | None = None) -> Piece:
        """Release what was held back, for the model has ended.

        Args:
            end: The token it ended with, to be listed after the others; it has no text.
        """
        text, stopped = self._match(self._detokenizer.finish())
        if stopped:
            return self._release(text, stopped=True)
        text += self._stops.finish()
        if end is not None:
            self._held.append(ScoredToken(self._num_decoded, end))
        released = self._release(text, stopped=False).logprobs
        rest = tuple(self._held)  # tokens without text at the very end
        self._held.clear()
        return Piece(text, released + rest, stopped=False)

    def _match(self, text: str) -> tuple[str, bool]:
        self._num_decoded += len(text)
        return self._stops.push(text)

    def _release(self, text: str, stopped: bool) -> Piece:
        self._num_released += len(text)
        released = []
        while self._held and self._held[0].start < self._num_released:
            released.append(self._held.popleft())
        return Piece(text, tuple(released), stopped)
