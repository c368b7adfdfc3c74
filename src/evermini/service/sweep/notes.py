"""Notes on every part of a long text, few enough to answer from: what a sweep makes of a question about the whole.

    kept = await NoteTaker(asker, question, count, size).shorten(notes, room)

A note says which part it is on: a document's name, else the text's lines. Small models write of what they have not
read, and leave out what they have. So a note's sentences stay only if the names and numbers in them stand in its part,
what has been said is not said twice, and no part is left out of a summary for having "nothing" to say.

Notes that are too long together are shortened from the inside out: those on one document first, then each to its first
sentence, and only then are neighbours put together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from evermini.service.sweep import prompts
from evermini.service.sweep.asking import Asker, all_of

_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
_NAME = re.compile(
    r"(?<=[a-z0-9,;:'\"(] )[A-Z][\w'-]+|(?<=[a-z0-9,;:'\"(])[A-Z][\w'-]+|\d+(?:[.,]\d+)*"
)
_OPENER = re.compile(
    r"^(?:the|this) (?:main point of (?:this|the) )?(?:text|part|passage|essay|article|excerpt|author)"
    r"(?:'s main point)? "
    r"(?:also |then )?(?:is|says|mentions|states|notes|argues|explains|suggests) that (?=\w)",
    re.IGNORECASE,
)
"""How small models begin a sentence that would do without."""
_ALIKE = 0.7
"""Share of words in common from which on a sentence is a repeat."""
_OPENING = 240
"""Characters of how a part begins."""
_LEAST_TOKENS = 48
"""A note is not asked to be shorter than this."""


@dataclass(frozen=True)
class Note:
    """What a part of a text says.

    Attributes:
        place: Which part: a document's name, or lines.
        document: Number of its document; notes on one are put together first.
        text: The note.
    """

    place: str
    document: int
    text: str

    @property
    def line(self) -> str:
        """The note as it is shown."""
        return f"- {self.place}: {self.text}" if self.place else f"- {self.text}"


class NoteTaker:
    """Shortens notes until they fit.

    Args:
        asker: Asks the model.
        question: What is asked about the whole.
        count: Tokens of a text.
        size: Tokens of notes that are shortened at a time.

    Attributes:
        num_rounds: Rounds so far.
    """

    def __init__(self, asker: Asker, question: str, count: Callable[[str], int], size: int) -> None:
        self.num_rounds = 0
        self._asker = asker
        self._question = question
        self._count = count
        self._size = size

    async def shorten(self, notes: Sequence[Note], room: int) -> list[Note]:
        """Return notes on the same parts that take at most ``room`` tokens, as far as that can be done."""
        kept = list(notes)
        if self._total(kept) > room and len({note.document for note in kept}) > 1:
            kept = await self._joined(_by_document(kept))
        if self._total(kept) > room and len(kept) > 1:
            first = [replace(note, text=sentences(note.text)[0]) for note in kept]
            share = room // len(first)
            kept = [
                short if self._count(note.line) > share else note
                for note, short in zip(kept, first, strict=True)
            ]
        while self._total(kept) > room and len(kept) > 1:
            before = self._total(kept)
            kept = await self._joined(self._neighbours(kept))
            if self._total(kept) >= before:
                break
        return kept

    async def _joined(self, groups: Sequence[Sequence[Note]]) -> list[Note]:
        self.num_rounds += 1
        return await all_of(self._join(group) for group in groups)

    async def _join(self, notes: Sequence[Note]) -> Note:
        """Return one note for several."""
        if len(notes) == 1:
            return notes[0]
        text = "\n".join(note.text for note in notes)
        limit = max(_LEAST_TOKENS, self._count(text) // 2)
        reply = await self._asker.ask(prompts.condense(text, self._question), max_tokens=limit)
        written = tidy(whole_sentences(reply.text, reply.is_cut), text)
        first, last = notes[0], notes[-1]
        place = first.place if first.place == last.place else _span(first.place, last.place)
        return Note(place, first.document, written or sentences(text)[0])

    def _neighbours(self, notes: Sequence[Note]) -> list[list[Note]]:
        """Return the notes in groups of at most `size` tokens, at least two in each."""
        groups: list[list[Note]] = [[]]
        total = 0
        for note in notes:
            tokens = self._count(note.line)
            if len(groups[-1]) >= 2 and total + tokens > self._size:
                groups.append([])
                total = 0
            groups[-1].append(note)
            total += tokens
        return groups

    def _total(self, notes: Sequence[Note]) -> int:
        return sum(self._count(note.line) + 1 for note in notes)


def tidy(note: str, text: str) -> str:
    """Return a note without the sentences whose names or numbers its part does not have, and without "it says that"."""
    known = text.lower()
    return " ".join(
        _plain(sentence)
        for sentence in sentences(note)
        if all(name.lower().removesuffix("'s") in known for name in _NAME.findall(sentence))
    )


def _plain(sentence: str) -> str:
    said = _OPENER.sub("", sentence)
    return said[:1].upper() + said[1:]


def without_repeats(notes: Iterable[Note]) -> list[Note]:
    """Return the notes without sentences that say what one before said; the first sentence of a document stays."""
    said: list[set[str]] = []
    kept: list[Note] = []
    seen: set[int] = set()
    for note in notes:
        fresh = []
        for sentence in sentences(note.text):
            words = set(re.findall(r"\w+", sentence.lower()))
            is_repeat = any(len(words & old) >= _ALIKE * len(words | old) for old in said)
            if not is_repeat or note.document not in seen:
                fresh.append(sentence)
            seen.add(note.document)
            said.append(words)
        if fresh:
            kept.append(replace(note, text=" ".join(fresh)))
    return kept


def one_each(notes: Sequence[Note]) -> list[Note]:
    """Return the notes, those with one place after the other as one."""
    kept: list[Note] = []
    for note in notes:
        if kept and note.place == kept[-1].place:
            kept[-1] = replace(note, text=f"{kept[-1].text} {note.text}")
        else:
            kept.append(note)
    return kept


def sentences(text: str) -> list[str]:
    """Return the sentences of a note, list marks taken off; at least one, which may be empty."""
    found = [
        re.sub(r"^\s*(?:[-*\u2022#]+|\d{1,2}[.)])\s+", "", one).strip()
        for one in _SENTENCE.split(text)
    ]
    return [one for one in found if one] or [""]


def beginning(note: str, most: int) -> str:
    """Return a note's first sentences, of which the first follows none."""
    first, *others = sentences(note)[:most]
    return " ".join([re.sub(r"^(It|The \w+) also ", r"\1 ", first), *others])


def opening(text: str) -> str:
    """Return how a part begins, as its note where the model has written none that holds."""
    first = sentences(" ".join(text.split()))[0]
    return first if len(first) <= _OPENING else first[:_OPENING].rsplit(" ", 1)[0] + " ..."


def whole_sentences(text: str, is_cut: bool) -> str:
    """Return a note without the sentence that was cut, unless it is the only one."""
    text = text.strip()
    if not is_cut:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\n", text)]
    return text[: ends[-1]].strip() if ends else text


def is_nothing(note: str) -> bool:
    """Return whether a note says that there is nothing to note."""
    return (
        re.match(rf"\W*({prompts.NOTHING}|none|n/a)\b.{{0,60}}$", note, re.I | re.S) is not None
        or not note.strip()
    )


def _by_document(notes: Sequence[Note]) -> list[list[Note]]:
    groups: dict[int, list[Note]] = {}
    for note in notes:
        groups.setdefault(note.document, []).append(note)
    return list(groups.values())


def _span(first: str, last: str) -> str:
    """Return the place of neighbours: ``lines 1-50`` and ``lines 51-99`` are ``lines 1-99``."""
    lines = r"lines (\d+)-(\d+)"
    one, other = re.fullmatch(lines, first), re.fullmatch(lines, last)
    if one and other:
        return f"lines {one[1]}-{other[2]}"
    head, tail = first.partition(" to ")[0], last.rpartition(" to ")[2]
    return f"{head} to {tail}"
