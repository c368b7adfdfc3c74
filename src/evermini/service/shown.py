"""Tokens with their log-probabilities as clients see them: as text and bytes."""

from __future__ import annotations

from evermini.engine.request import TokenLogprob
from evermini.service.answer import ScoredText, TokenScore
from evermini.text.tokenizer import Tokenizer


def token_text(raw: bytes, prefix: str = "") -> str:
    r"""Return a token as text; bytes that are no text by themselves are written ``\xe2\x82``, after ``prefix``."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def shown_token(tokenizer: Tokenizer, scored: TokenLogprob) -> ScoredText:
    """Return a token of an answer as it is shown."""
    own = _score(tokenizer, scored.token_id, scored.logprob)
    top = tuple(_score(tokenizer, *best) for best in scored.top)
    return ScoredText(own.text, own.raw, own.logprob, top)


def _score(tokenizer: Tokenizer, token_id: int, logprob: float) -> TokenScore:
    raw = tokenizer.token_bytes(token_id)
    return TokenScore(token_text(raw), raw, logprob)
