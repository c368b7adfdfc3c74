"""One choice's tokens → text and tool calls to show, and the log-probabilities of exactly the text's tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.engine.request import TokenLogprob, TokenOutput
from evermini.text.detokenize import IncrementalDetokenizer
from evermini.text.stops import StopMatcher
from evermini.text.tokenizer import Tokenizer
from evermini.text.tools.parser import CallParser, CallPiece


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's log-probability and where the token starts in the choice's text, in characters."""

    start: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token (or the end) releases.

    Attributes:
        text: Complete characters that cannot belong to a stop string or a tool call any more.
        logprobs: The tokens whose text starts in what was released so far; empty if none were asked for.
        stopped: A stop string or a repeated call was found; nothing follows.
        calls: What tool calls gained.
    """

    text: str
    logprobs: tuple[ScoredToken, ...]
    stopped: bool
    calls: tuple[CallPiece, ...] = ()


class ChoiceDecoder:
    """Decodes the tokens of one choice in order.

    Invariant: after every piece, the released tokens are those whose first character lies before the end of the
    released text. So a token is released together with its (first) character, a token held back as the possible start
    of a stop string is released with the text, and tokens of a stop string are never released.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], calls: CallParser | None = None
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopMatcher(stops)
        self._calls = calls
        self._held: deque[ScoredToken] = deque()
        self._num_decoded = 0
        self._num_released = 0

    def push(self, output: TokenOutput) -> Piece:
        """Take the next token."""
        start = self._num_decoded
        text = self._detokenizer.push(output.token_id)
        self._num_decoded += len(text)
        if output.logprob is not None:
            self._held.append(ScoredToken(start, output.logprob))
        if self._calls is None:
            return self._release(*self._stops.push(text))
        had_called = self._calls.has_called
        return self._match(*self._calls.push(text), had_called)

    def finish(self, end: TokenLogprob | None = None) -> Piece:
        """Release what was held back, for the model has ended.

        Args:
            end: The token it ended with, to be listed after the others; it has no text.
        """
        text = self._detokenizer.finish()
        self._num_decoded += len(text)
        if self._calls is None:
            piece = self._release(*self._stops.push(text))
        else:
            had_called = self._calls.has_called
            text, calls = self._calls.push(text)
            held, more = self._calls.finish()
            piece = self._match(text + held, calls + more, had_called)
        if piece.stopped:
            return piece
        if self._calls is not None and self._calls.has_called:
            self._held.clear()  # the rest of the tokens wrote calls
            return piece
        text = piece.text + self._stops.finish()
        if end is not None:
            self._held.append(ScoredToken(self._num_decoded, end))
        released = piece.logprobs + self._release(text[len(piece.text) :], stopped=False).logprobs
        rest = tuple(self._held)  # tokens without text at the very end
        self._held.clear()
        return Piece(text, released + rest, stopped=False)

    def _match(self, text: str, calls: Sequence[CallPiece], had_called: bool) -> Piece:
        """Release text and calls; stop strings are looked for in text alone, which ends where calls begin."""
        assert self._calls is not None, "calls are read"
        shown, stopped = self._stops.push(text)
        if stopped:
            return self._release(shown, stopped=True)
        if calls and not had_called:
            shown += self._stops.finish()
        piece = self._release(shown, stopped=False)
        return replace(piece, calls=tuple(calls), stopped=self._calls.has_ended)

    def _release(self, text: str, stopped: bool) -> Piece:
        self._num_released += len(text)
        released = []
        while self._held and self._held[0].start < self._num_released:
            released.append(self._held.popleft())
        return Piece(text, tuple(released), stopped)
