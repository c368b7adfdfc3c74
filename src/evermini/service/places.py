r"""Places: where in what the caller sent a run of characters stands that was read in pieces.

the caller's part   "Read this.\n\n<40,000 lines>\n\nWho did it?"      characters and lines count here,
a long piece of it             "<40,000 lines>"                     in a document in its own text
its segments                   "<2,000 lines>" "<2,000 lines>" ...  recall chooses runs of these
"""

from __future__ import annotations

from dataclasses import dataclass

from evermini.recall.segment import Segment
from evermini.service.parts import Piece


@dataclass(frozen=True, repr=False)
class Place:
    """A run of characters of a segment that was cut from a piece; all else follows from these four.

    Attributes:
        segment: What it is cut from.
        begin: Its first character in the segment's text.
        past: And the one past its end.
        piece: The piece of the conversation that the segment is cut from.
    """

    segment: Segment
    begin: int
    past: int
    piece: Piece

    @property
    def text(self) -> str:
        """The characters."""
        return self.segment.text[self.begin : self.past]

    @property
    def source(self) -> str | None:
        """The document's name, if it has one."""
        return self.piece.name

    @property
    def message(self) -> int:
        """Number of the message."""
        return self.piece.message

    @property
    def part(self) -> int:
        """Number of the content part."""
        return self.piece.part

    @property
    def characters(self) -> tuple[int, int]:
        """First and past-the-end character, in the document or else in the part."""
        before = self.piece.first_char + self.segment.first_char
        return before + self.begin, before + self.past

    @property
    def lines(self) -> tuple[int, int]:
        """First and last line, from 1, likewise."""
        shift = self.piece.first_line - 1
        return shift + self.segment.line_of(self.begin), shift + self.segment.line_of(self._last)

    @property
    def pages(self) -> tuple[int, int] | None:
        """First and last page, in a text of pages."""
        first, last = self.segment.page_of(self.begin), self.segment.page_of(self._last)
        return None if last is None else (first or last, last)

    @property
    def _last(self) -> int:
        return max(self.begin, self.past - 1)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} source={self.source!r} message={self.message} part={self.part} "
            f"characters={self.characters} lines={self.lines} pages={self.pages}>"
        )
