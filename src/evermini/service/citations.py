"""Where in the documents an answer's words stand: found by comparing, after the fact, so no place is invented.

    answer      "Total current liabilities were $4,476 million, as of 2023."
    excerpts    report.pdf, page 52: "Total current liabilities 4,476 5,103"
    citations   characters 0-35 of the answer: report.pdf, page 52, line 2034

A citation says that a run of the answer's words stands in an excerpt that the model read, word for word but for case,
spaces and punctuation. It is made for runs that tell something and are not in the question: a number of three digits or
more that is no year, a name that stands in few places, or several words. It does not say that the answer is right.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from evermini.recall.segment import Segment
from evermini.service.messages import Message
from evermini.service.parts import TIERS, split
from evermini.service.places import Place

_TOKEN = re.compile(r"\d(?:[\d.,]*\d)?|[^\W\d_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_YEAR = re.compile(r"(?:19|20)\d\d")
_NUMBER, _NAME, _WORD = 3.0, 1.5, 1.0
"""What a number, a word with a capital letter and another word of four letters or more tell."""
_TELLING = 3.0
"""A run that tells less is not cited: such words stand together anywhere."""
_FEW = 3
"""A name that stands in at most so many places tells enough by itself."""
_AROUND = 16
"""Words of an excerpt, before and after a run, that are compared with the answer's sentence: which of equal runs?"""
_BEFORE = " \t\"'(\u201c\u2018*-"
"""What may stand between a sentence's end and the first word of the next."""
_MAX_CHARACTERS = 20_000
"""Of an answer; the rest is not compared."""


@dataclass(frozen=True, repr=False)
class Citation(Place):
    """A run of words that an answer shares with a document, and the place where they stand there.

    Attributes:
        start: Its first character in the answer.
        end: And the one past its end.
    """

    start: int
    end: int

    @property
    def quote(self) -> str:
        """The same words in the document."""
        return self.text


@dataclass(frozen=True)
class _Token:
    """A word or number.

    Attributes:
        text: In lower case, without separators of thousands.
        start: Its first character.
        end: And the one past its end.
        is_capital: It is written with a capital letter.
        is_name: And not since it begins a sentence or line.
        tells: How much it tells.
    """

    text: str
    start: int
    end: int
    is_capital: bool
    is_name: bool
    tells: float = 0.0


def whole_documents(messages: Sequence[Message]) -> tuple[tuple[Place, ...], str]:
    """Return the documents of a conversation that is read whole, and its question."""
    parts = split(messages, TIERS[0])
    shown = []
    for piece in parts.long:
        if piece.name is not None:
            segment = Segment(piece.text, piece.name)
            shown.append(Place(segment, 0, len(segment.text), piece))
    return tuple(shown), parts.question


def cite(answer: str, shown: Sequence[Place], question: str) -> list[Citation]:
    """Return where words of an answer stand in what the model read of the documents, in the answer's order.

    Args:
        answer: The answer.
        shown: What was read.
        question: What was asked: words that are repeated from it tell nothing.
    """
    answer = answer[:_MAX_CHARACTERS]
    about = _tokens(question)
    asked = {token.text for token in about}
    read = [_tokens(one.text) for one in shown]
    places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, tokens in enumerate(read):
        for at, token in enumerate(tokens):
            places[token.text].append((number, at))
    named = {token.text for tokens in read for token in tokens if token.is_name}
    plain = {token.text for tokens in read for token in tokens if not token.is_capital}
    names = {name for name in named - plain if len(places[name]) <= _FEW}
    said = [replace(token, tells=_told(token, asked, names)) for token in _tokens(answer)]
    wanted = [words | _telling(about) for words in _sentences(answer, said)]
    found: list[Citation] = []
    at = 0
    while at < len(said):
        runs = [(_length(said, at, read[n], place), n, place) for n, place in places[said[at].text]]
        longest = max((length for length, _, _ in runs), default=0)
        telling = [n for n, token in enumerate(said[at : at + longest]) if token.tells]
        if sum(said[at + n].tells for n in telling) < _TELLING:
            at += 1
            continue
        equal = [(n, place) for length, n, place in runs if length == longest]
        n, place = max(equal, key=lambda one: _shared(read[one[0]], one[1], longest, wanted[at]))
        first, last = telling[0], telling[-1]  # small words at either end are no part of it
        found.append(
            Citation(
                shown[n].segment,
                shown[n].begin + read[n][place + first].start,
                shown[n].begin + read[n][place + last].end,
                shown[n].piece,
                start=said[at + first].start,
                end=said[at + last].end,
            )
        )
        at += longest
    return found


def _tokens(text: str) -> list[_Token]:
    """Return a text's words and numbers."""
    found: list[_Token] = []
    for match in _TOKEN.finditer(text):
        is_capital = match[0][0].isalpha() and not match[0].islower()
        is_name = is_capital and not _begins(text, match.start())
        found.append(
            _Token(
                match[0].replace(",", "").casefold(),
                match.start(),
                match.end(),
                is_capital,
                is_name,
            )
        )
    return found


def _begins(text: str, at: int) -> bool:
    """Return whether a sentence or line begins with the word at ``at``."""
    while at and text[at - 1] in _BEFORE:
        at -= 1
    return not at or text[at - 1] in ".!?:;\n|"


def _told(token: _Token, asked: Collection[str], names: Collection[str]) -> float:
    """Return how much a word of an answer tells."""
    if token.text in asked:
        return 0.0
    if token.text[0].isdigit():
        is_plain = len(token.text) < 3 or _YEAR.fullmatch(token.text)
        return 0.0 if is_plain else _NUMBER
    if len(token.text) < 4:
        return 0.0
    if token.is_capital and token.text in names:
        return _TELLING
    return _NAME if token.is_capital else _WORD


def _length(said: Sequence[_Token], at: int, read: Sequence[_Token], place: int) -> int:
    """Return how many words in a row are the same."""
    most = min(len(said) - at, len(read) - place)
    return next((n for n in range(most) if said[at + n].text != read[place + n].text), most)


def _sentences(answer: str, said: Sequence[_Token]) -> list[set[str]]:
    """Return, for each word of the answer, the telling words of its sentence."""
    ends = [match.start() for match in _SENTENCE_END.finditer(answer)]
    groups = [bisect_right(ends, token.start) for token in said]
    words: defaultdict[int, set[str]] = defaultdict(set)
    for group, token in zip(groups, said, strict=True):
        words[group] |= _telling([token])
    return [words[group] for group in groups]


def _telling(tokens: Iterable[_Token]) -> set[str]:
    """Return the words that tell something by themselves, whether they are known or not."""
    return {token.text for token in tokens if token.text[0].isdigit() or len(token.text) > 3}


def _shared(read: Sequence[_Token], place: int, length: int, wanted: Collection[str]) -> int:
    """Return how many different words of a sentence stand around a run."""
    around = read[max(0, place - _AROUND) : place + length + _AROUND]
    return len({token.text for token in around}.intersection(wanted))
