"""Token ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a `Tokenizer`."""

    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for."""
        ...


class IncrementalDetokenizer:
    """Turns a stream of tokens into a stream of text.

    Invariant: all texts returned by `push`, then `finish`, joined, are ``tokenizer.decode(ids)``. The bytes of a
    character that is not complete yet are held back; U+FFFD appears before `finish` only for bytes that no
    continuation could make valid.

    Args:
        tokenizer: The model's tokenizer.
        skip_special: Leave control tokens out of the text.
    """

    def __init__(self, tokenizer: TokenBytes, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; often its own, sometimes none."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return what is held back: nothing, or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
