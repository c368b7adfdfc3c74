"""Questions that are counted without a model: which words are most common, how often one occurs, how long a text is.

    tally = tally_of("Which ten words are used most often in this book?")      # None for any other question
    counted = tally.count(["the text ..."])
    counted.head, counted.lines         # what to tell the model that answers

Exact, at millions of words a second. English questions; words of any language that puts spaces between them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from evermini.service.questions import words_of

_DEFAULT_MOST = 20
_NUMBERS = {
    word: number
    for number, word in enumerate(
        [
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ],
        start=1,
    )
} | {"fifteen": 15, "twenty": 20, "thirty": 30, "fifty": 50, "hundred": 100}
_N = rf"(?P<n>\d{{1,3}}|{'|'.join(_NUMBERS)})"
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_RANK = r"(?P<rank>most|least)"
_HOW = r"(?:common(?:ly)?|frequent(?:ly)?|often|used|repeated|widespread|popular)"
_THIS = r"(?:this|the|these|those|my|our|your|all of (?:the|this)|all|it)"
_TEXT = (
    r"(?:(?:whole|entire|attached|following|above|given)\s+)?(?:texts?|documents?|books?|files?|articles?|stor(?:y|ies)|"
    r"novels?|plays?|poems?|reports?|essays?|logs?|letters?|lists?|speech(?:es)?|transcripts?|pages?|collections?)"
)
_MANY = r"(?:how (?:often|many times|frequently)|number of (?:times|occurrences|mentions)|count (?:how often|the))"
_TERM = r"(?:words?|terms?|names?|phrases?|expressions?|strings?)"
_QUOTED = r"(?<!\w)[\"\u201c\u2018'`](?P<quoted>[^\"\u201d\u201c\u2019'`\n]{1,60})[\"\u201d\u2019'`](?!\w)"
_OCCURS = r"(?:mentioned|named|used|occurs?|appears?|comes? up|repeated|written|found|there|said)"

_FREQUENT = [
    # the ten most common words; the words that are used most often
    rf"\b{_RANK} (?:{_HOW}[\s-]){{1,2}}(?:\w+[ -]){{0,2}}?words?\b(?! (?:for|that means|meaning)\b)",
    rf"\bwords?\b[^.?!;]{{0,80}}?\b{_RANK} {_HOW}\b(?! for\b)",
    rf"\b(?:which|what|the)\b[^.?!;]{{0,40}}\bwords\b[^.?!;]{{0,60}}?\b(?:use[sd]?|occurs?|appears?|"
    rf"repeats?|comes? up|repeated|recur)\b[^.?!;]{{0,24}}?\b(?:the )?{_RANK}(?=\s*(?:[.?!]|$|in\b|of all\b))",
    r"\b(?P<rank>commonest|rarest) words?\b",
    r"\bword (?:frequency|frequencies|counts)\b",
]
_OCCURRENCES = [
    rf"\b{_MANY}\b[^.?!]{{0,40}}?\b{_TERM} {_QUOTED}",
    rf"\b{_MANY} (?:is|are|was|were|does|do|did) {_QUOTED} {_OCCURS}\b",
    rf"\b(?:occurrences|mentions|instances) of (?:(?:the )?{_TERM} )?{_QUOTED}",
    rf"\b{_MANY} (?:is|are|was|were|does|do|did) (?:the )?{_TERM} (?P<term>\w[\w'-]*) {_OCCURS}\b",
    rf"\b{_MANY} (?:is|are|was|were) (?:the )?(?P<term>[A-Z][\w'-]*(?: [A-Z][\w'-]*){{0,3}}) (?:mentioned|named)\b",
    rf"\b(?:occurrences|mentions|instances) of (?:the )?{_TERM} (?P<term>\w[\w'-]*)",
    rf"\bcount how often (?:the )?{_TERM} (?P<term>\w[\w'-]*)",
    r"\b(?:occurrences|mentions) of (?:the )?(?P<term>[A-Z][\w'-]*(?: [A-Z][\w'-]*){0,3})",
]
_AMOUNT = [
    rf"^\W*(?:please )?(?:tell me )?how many (?P<unit>words|lines|paragraphs) (?:are (?:there )?in|does|do|has|"
    rf"have|is)\b(?: {_THIS})?(?: {_TEXT})?(?: have| contain| has| long| in total| altogether)*\s*\??$",
    rf"\b(?P<unit>word|line|paragraph) count of {_THIS} {_TEXT}\b",
    r"^\W*(?:what is|what's) the (?P<unit>word|line|paragraph) count\b",
    rf"^\W*(?:please )?count (?:all )?(?:the )?(?P<unit>words|lines|paragraphs)(?: (?:in|of) {_THIS} {_TEXT})?\W*$",
]
_FREQUENT_RE = [re.compile(sign, re.IGNORECASE) for sign in _FREQUENT]
# The case of a name counts: "how often is Anna mentioned", but not "how often is a death mentioned".
_OCCURRENCES_RE = [
    re.compile(re.sub(r"\[A-Z\]", "(?-i:[A-Z])", sign), re.IGNORECASE) for sign in _OCCURRENCES
]
_AMOUNT_RE = [re.compile(sign, re.IGNORECASE) for sign in _AMOUNT]

_FUNCTION_WORDS = words_of(
    "a about above after again against all also am an and any are as at be because been before being below",
    "between both but by can could did do does doing down during each few for from further had has have having",
    "he her here hers him his how i if in into is it it's its just let me more most my no nor not now of off",
    "on once only or other our out over own same shall she should so some such than that the thee their them",
    "then there these they this those thou through thy to too under until unto up upon us very was we were",
    "what when where which while who whom why will with would ye you your yours",
)


@dataclass(frozen=True)
class Counted:
    """What was counted; ``head`` and ``lines`` tell it, ``counts`` has the figures by name."""

    head: str
    lines: tuple[str, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class Tally:
    """What to count.

    Attributes:
        kind: The most (or least) frequent words, the occurrences of a term, or the text's length.
        most: How many words are wanted, if the question says so.
        is_least: The rarest words, not the most common ones.
        term: What occurs.
        unit: What a length is counted in: words, lines or paragraphs.
    """

    kind: Literal["frequent", "term", "length"]
    most: int | None = None
    is_least: bool = False
    term: str = ""
    unit: str = ""

    def count(self, texts: Sequence[str]) -> Counted:
        """Count in texts that belong together."""
        if self.kind == "frequent":
            return self._frequent(texts)
        if self.kind == "term":
            return self._occurrences(texts)
        sizes = {"words": _words, "lines": _lines, "paragraphs": _paragraphs}
        number = sum(1 for text in texts for _ in sizes[self.unit](text))
        return Counted(
            f"[All of this text was counted for you. It has {number:,} {self.unit}.]",
            (),
            {self.unit: number},
        )

    def _frequent(self, texts: Sequence[str]) -> Counted:
        found = Counter(word.lower() for text in texts for word in _words(text))
        ranked = found.most_common()
        if self.is_least:
            ranked.sort(key=lambda item: (item[1], item[0]))
        most = self.most or _DEFAULT_MOST
        chosen = ranked[:most]
        what = "least" if self.is_least else "most"
        lines = [
            f"{rank}. {word}: {number:,} times" for rank, (word, number) in enumerate(chosen, 1)
        ]
        tied = sum(number == chosen[-1][1] for _, number in ranked[most:]) if chosen else 0
        if tied:
            lines.append(f"[{tied:,} more words occur as often as the last one]")
        if not self.is_least and any(word in _FUNCTION_WORDS for word, _ in chosen):
            content = [item for item in ranked if item[0] not in _FUNCTION_WORDS][:most]
            listed = ", ".join(f"{word} ({number:,})" for word, number in content)
            lines.append(f"Without words such as the, of, and: {listed}")
        head = (
            f"[All words of this text were counted for you: {sum(found.values()):,} words, {len(found):,} different "
            f"ones. The {len(chosen)} {what} common:]"
        )
        return Counted(head, tuple(lines), dict(chosen))

    def _occurrences(self, texts: Sequence[str]) -> Counted:
        words = r"\s+".join(map(re.escape, self.term.split()))
        pattern = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
        number = sum(1 for text in texts for _ in pattern.finditer(text))
        times = "once" if number == 1 else f"{number:,} times"
        return Counted(
            f'[All of this text was searched for you. "{self.term}" occurs {times} in it.]',
            (),
            {self.term: number},
        )


def tally_of(question: str) -> Tally | None:
    """Return what a question wants counted, or ``None`` if code alone cannot count it."""
    text = " ".join(question.split())
    for sentence in re.split(r"(?<=[.?!])\s+", text):
        for sign in _AMOUNT_RE:
            if match := sign.search(sentence):
                return Tally("length", unit=match["unit"].lower().removesuffix("s") + "s")
        for sign in _OCCURRENCES_RE:
            if match := sign.search(sentence):
                groups = match.groupdict()
                return Tally(
                    "term", term=(groups.get("quoted") or groups.get("term") or "").strip()
                )
        for sign in _FREQUENT_RE:
            if match := sign.search(sentence):
                rank = (match.groupdict().get("rank") or "most").lower()
                return Tally("frequent", most=_number(text), is_least=rank in ("least", "rarest"))
    return None


def _number(question: str) -> int | None:
    """Return how many words a question asks for."""
    match = re.search(
        rf"\b{_N}\b(?=[^.?!]{{0,40}}?\b(?:words|most|least|commonest|rarest)\b)",
        question,
        re.IGNORECASE,
    )
    if match is None:
        return None
    found = match["n"].lower()
    return _NUMBERS.get(found) or int(found) or None


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in _WORD.finditer(text))


def _lines(text: str) -> Iterable[str]:
    return (line for line in text.splitlines() if line.strip())


def _paragraphs(text: str) -> Iterable[str]:
    return (part for part in re.split(r"\n[ \t]*\n", text) if part.strip())
