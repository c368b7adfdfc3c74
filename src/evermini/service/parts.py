r"""What of a long conversation stays whole, and what is read through recall.

    user message   "Read this.\n\n<40,000 lines>\n\nWho did it?"
    pieces         whole "Read this.\n\n" | long "<40,000 lines>" | whole "\n\nWho did it?"   asked: "Who did it?"

Texts between ``<document name="PATH">`` and ``</document>``, each on a line of its own, are long pieces with a name
(``&quot;`` and ``&#10;`` in it stand for a quote and a line end). A text that has a line ``</document>`` itself names
another end: ``<document name="PATH" end="MARK">`` ends at ``</document end="MARK">``. `wrap_document` writes them.
Another text is a long piece if it has at least `Tier.min_chars` characters; its first paragraph (instructions stand
there) stays whole, and in the last user message its end does, too: the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from evermini.service.messages import Message

HEAD_CHARS = 600
"""A first paragraph or line up to this long stays whole."""
QUESTION_CHARS = 2000
"""A last paragraph or line up to this long is the question."""
EARLIER_CHARS = 300
"""What of an earlier question helps to look up the one that follows it."""
ANSWER_CHARS = 200
"""What of its answer does."""
_SHORT_QUESTION = 24
"""A last paragraph shorter than this and without a question mark ("Answer:") takes the one before it along."""
_TAG = '<document name="'
_OPENING = re.compile(r'^<document name="([^"\n]*)"( end="[^"\n]+")?>\n', re.MULTILINE)


@dataclass(frozen=True)
class Tier:
    """How eagerly texts are taken for long ones."""

    min_chars: int
    instructions: bool


TIERS = (Tier(4000, False), Tier(1000, False), Tier(1000, True), Tier(250, True))
"""Tried in this order until what stays whole fits: small texts, then system messages, last of all."""


@dataclass(frozen=True)
class Piece:
    """A run of characters of one content part.

    Attributes:
        text: The characters.
        is_long: It is read through recall.
        message: Number of the message.
        part: Number of the content part in it.
        name: The document's name, if it is one.
        marks: The tags around it, if it is one.
        first_char: Where it begins in the part; in a document, 0.
        first_line: The line it begins on, from 1; in a document, 1.
        is_attached: It was read of an image or file, so it asks nothing.
    """

    text: str
    is_long: bool
    message: int
    part: int
    name: str | None = None
    first_char: int = 0
    first_line: int = 1
    is_attached: bool = False
    marks: str = ""


@dataclass(frozen=True)
class Parts:
    """A conversation cut into pieces.

    Attributes:
        pieces: In order; those of one message together are its text.
        question: What the last user message asks.
        earlier: What the one before it asked, and the answer, if they are short.
    """

    pieces: tuple[Piece, ...]
    question: str
    earlier: str = ""

    @property
    def long(self) -> list[Piece]:
        """The pieces to read through recall."""
        return [piece for piece in self.pieces if piece.is_long]


def split(messages: Sequence[Message], tier: Tier) -> Parts:
    """Cut a conversation into pieces.

    The question is the end of the last user message, or its beginning if there alone is a question mark.
    """
    asking = max((i for i, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        may_cut = tier.instructions or message.role not in ("system", "developer")
        texts = message.texts()
        attached = message.attached_parts()
        last = max((part for part in range(len(texts)) if part not in attached), default=-1)
        for part, text in enumerate(texts):
            is_last = number == asking and part == last
            found = _split_part(text, number, part, is_last, tier.min_chars if may_cut else None)
            pieces += [replace(p, is_attached=True) for p in found] if part in attached else found
    question = _question([p for p in pieces if p.message == asking])
    return Parts(tuple(pieces), question, _earlier(messages, pieces, asking))


def _earlier(messages: Sequence[Message], pieces: Sequence[Piece], asking: int) -> str:
    """Return the question before the last one and the beginning of its answer."""
    before = max((i for i in range(asking) if messages[i].role == "user"), default=None)
    if before is None:
        return ""
    asked = _question([p for p in pieces if p.message == before])
    answers = [
        messages[i].text() for i in range(before + 1, asking) if messages[i].role == "assistant"
    ]
    answer = " ".join(answers[-1].split())[:ANSWER_CHARS] if answers else ""
    return f"{asked[-EARLIER_CHARS:]}\n{answer}".strip()


def _question(pieces: Sequence[Piece]) -> str:
    whole = [
        piece.text.strip()
        for piece in pieces
        if not (piece.is_long or piece.is_attached) and piece.text.strip()
    ]
    if not whole:
        return ""
    if "?" not in whole[-1] and "?" in whole[0]:
        return whole[0][:QUESTION_CHARS]
    return whole[-1][-QUESTION_CHARS:]


def _split_part(
    text: str, message: int, part: int, is_last: bool, min_chars: int | None
) -> list[Piece]:
    """Cut one content part; ``min_chars`` is ``None`` where everything stays whole."""
    if min_chars is None:
        return [Piece(text, False, message, part)]
    found: list[Piece] = []
    at, line = 0, 1
    for name, start, body, end in _documents(text):
        found += _split_plain(text, at, start, line, message, part, False, min_chars)
        body_at = text.index("\n", start) + 1
        marks = text[start:body_at] + text[body_at + len(body) : end]
        found.append(Piece(body, True, message, part, name, marks=marks))
        line += text.count("\n", at, end)
        at = end
    return found + _split_plain(text, at, len(text), line, message, part, is_last, min_chars)


def _documents(text: str) -> list[tuple[str, int, str, int]]:
    """Return each document's name, start, body and end; linear in the text, whatever stands in it."""
    found: list[tuple[str, int, str, int]] = []
    at = 0
    # Finding the tag first is many times as fast as asking the pattern at every line.
    while (at := text.find(_TAG, at)) >= 0:
        match = _OPENING.match(text, at)
        if match is None:
            at += 1
            continue
        # From the line end of the opening on, so that an empty document closes, too.
        closing = f"\n</document{match[2] or ''}>"
        close = text.find(closing, match.end() - 1)
        if close < 0:
            break
        body = text[match.end() : close]
        at = close + len(closing)
        if body.strip():
            name = match[1].replace("&#10;", "\n").replace("&quot;", '"')
            found.append((name, match.start(), body, at))
    return found


def wrap_document(name: str, text: str) -> str:
    """Return a text between the tags that make it a document of a prompt."""
    name = name.replace('"', "&quot;").replace("\n", "&#10;")
    end = ""
    for number in count(1):
        if f"\n</document{end}>" not in f"\n{text}":
            break
        end = f' end="{number}"'
    return f'<document name="{name}"{end}>\n{text}\n</document{end}>\n'


def _split_plain(
    text: str,
    start: int,
    end: int,
    line: int,
    message: int,
    part: int,
    is_last: bool,
    min_chars: int,
) -> list[Piece]:
    """Cut ``text[start:end]``, which holds no document and begins on ``line``, into head, long body and question."""
    if start == end:
        return []
    first, last = start, end
    if end - start >= min_chars:
        first = _head_end(text, start, end)
        if is_last:
            last = _question_start(text, first, end)
    cuts = [(start, first, False), (first, last, end - start >= min_chars), (last, end, False)]
    return [
        Piece(text[a:b], is_long, message, part, None, a, line + text.count("\n", start, a))
        for a, b, is_long in cuts
        if a < b
    ]


def _head_end(text: str, start: int, end: int) -> int:
    for mark in ("\n\n", "\n"):
        at = text.find(mark, start, min(end, start + HEAD_CHARS))
        if at >= 0:
            return at + len(mark)
    return start


def _question_start(text: str, start: int, end: int) -> int:
    """Return where the question begins: the last line if it has a question mark, else the last paragraph.

    Where that is too long: the last line, sentence or word that is not.
    """
    stripped = len(text[start:end].rstrip()) + start
    floor = max(start, stripped - QUESTION_CHARS)
    line = text.rfind("\n", floor, stripped)
    if line >= 0 and "?" in text[line:stripped]:
        return line + 1
    for mark in ("\n\n", "\n", ". ", " "):
        at = text.rfind(mark, floor, stripped)
        if at < 0:
            continue
        if stripped - at < _SHORT_QUESTION:
            before = text.rfind(mark, max(start, at - HEAD_CHARS), at)
            at = before if before >= 0 else at
        return at + len(mark)
    return floor
