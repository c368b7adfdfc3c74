"""A segment: a content-addressed piece of a prompt (a message part, a file), and its tokens.

Character positions count in the text as it is indexed, `Segment.text`: Unicode NFC, which is canonically the same text
(several tokenizers would normalise it anyway).
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import unicodedata
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evermini.errors import ModelError

Ids = npt.NDArray[np.uint32]

_PAGE_TAG = "[page "
_PAGE = re.compile(r"^\[page (\d+)\]$", re.MULTILINE)


class TextTokenizer(Protocol):
    """What recall asks of a tokenizer; `evermini.text.tokenizer.Tokenizer` is one."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for."""
        ...


class ModelTokenizer(TextTokenizer, Protocol):
    """What calibration asks in addition."""

    @property
    def bos_id(self) -> int | None:
        """The token a text begins with, if there is one."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens a text ends with."""
        ...


@dataclass(frozen=True)
class Segment:
    """A piece of a long prompt.

    Attributes:
        source: Its text.
        name: What to call it when a span of it is shown, such as a path; not part of its identity.
        first_line: The line, from 1, that its first character lies on in the text it was cut from.
        first_char: The position of its first character in that text.
        first_page: The page that its first character lies on there; ``None`` before the first page, or if the text
            has none.
    """

    source: str
    name: str | None = None
    first_line: int = 1
    first_char: int = 0
    first_page: int | None = None

    @cached_property
    def text(self) -> str:
        """The text in Unicode NFC."""
        return unicodedata.normalize("NFC", self.source)

    @cached_property
    def digest(self) -> str:
        """Identity of the content (40 hex digits)."""
        return hashlib.blake2b(
            self.text.encode("utf-8", "surrogatepass"), digest_size=20
        ).hexdigest()

    @cached_property
    def _line_starts(self) -> list[int]:
        starts, at = [0], self.text.find("\n")
        while at >= 0:
            starts.append(at + 1)
            at = self.text.find("\n", at + 1)
        return starts

    def line_of(self, char: int) -> int:
        """Return the line, from 1, of a character of `text`, in the text it was cut from."""
        return self.first_line + bisect_right(self._line_starts, char) - 1

    @cached_property
    def _pages(self) -> list[tuple[int, int]]:
        # Finding the tag first is ten times as fast as asking the pattern at every line.
        found, at = [], self.text.find(_PAGE_TAG)
        while at >= 0:
            if match := _PAGE.match(self.text, at):
                found.append((at, int(match[1])))
            at = self.text.find(_PAGE_TAG, at + 1)
        return found

    @property
    def page_starts(self) -> list[int]:
        """The character of `text` at which each page's mark stands."""
        return [at for at, _ in self._pages]

    def page_of(self, char: int) -> int | None:
        """Return the page of a character of `text`, or ``None`` if it lies on none."""
        before = bisect_right(self._pages, (char, sys.maxsize))
        return self._pages[before - 1][1] if before else self.first_page


class SegmentCache:
    """Segments that were cut before: what was found out about them (hash, lines, pages) need not be found out again.

    Safe to use from several threads.

    Args:
        max_chars: Characters that are kept; the least recently used segments go first.
    """

    def __init__(self, max_chars: int = 1 << 24) -> None:
        self._left = max_chars
        self._kept: OrderedDict[Segment, Segment] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, segment: Segment) -> Segment:
        """Return the segment that is kept and equals this one, or else keep this one."""
        with self._lock:
            kept = self._kept.setdefault(segment, segment)
            self._kept.move_to_end(kept)
            if kept is segment:
                self._left -= len(segment.source)
                while self._left < 0:
                    old, _ = self._kept.popitem(last=False)
                    self._left += len(old.source)
            return kept


def cut(
    text: str,
    name: str | None = None,
    *,
    max_chars: int = 1 << 18,
    known: Callable[[Segment], Segment] = lambda segment: segment,
) -> list[Segment]:
    """Cut a long text into segments at ends of paragraphs, lines, sentences or words, whichever is there.

    Cuts depend on the text before them alone: a text that grew at its end shares all segments but the last.

    Args:
        text: The text.
        name: What to call it.
        max_chars: Longest segment.
        known: Returns an equal segment that may be one that was cut before, as `SegmentCache.known` does.
    """
    text = unicodedata.normalize("NFC", text)
    segments: list[Segment] = []
    start, line, page = 0, 1, None
    while start < len(text):
        end = start + max_chars
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                if (at := text.rfind(mark, start + max_chars // 2, end)) >= 0:
                    end = at + len(mark)
                    break
        segments.append(known(Segment(text[start:end], name, line, start, page)))
        line += text.count("\n", start, end)
        page = segments[-1].page_of(end - start)
        start = end
    return segments


def tokenize(tokenizer: TextTokenizer, segment: Segment) -> tuple[Ids, Ids]:
    """Return a segment's token ids (n,) and the character at which each token begins, with the end: (n + 1,).

    A token that begins inside a character begins, here, after it: ranges of tokens never share a character.

    Raises:
        ModelError: The tokenizer changes text, so places in it cannot be told.
    """
    ids = np.array(tokenizer.encode(segment.text), dtype=np.uint32)
    pieces = {int(i): tokenizer.token_bytes(int(i)) for i in np.unique(ids)}
    data = b"".join(pieces[i] for i in ids.tolist())
    lengths = np.array([len(pieces[i]) for i in ids.tolist()], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    text = segment.text.encode()
    if data != text:
        if data != b" " + text:  # SentencePiece puts a space before the text
            raise ModelError(
                "This model's tokenizer changes text, so recall cannot tell places in it. Use another index model."
            )
        data, starts = text, np.maximum(starts - 1, 0)
    begins = (
        np.frombuffer(data, dtype=np.uint8) & 0xC0
    ) != 0x80  # UTF-8: a byte that begins a character
    chars = np.concatenate([np.zeros(1, np.int64), np.cumsum(begins)])
    return ids, chars[starts].astype(np.uint32)
