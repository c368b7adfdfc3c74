"""What a question asks for, told by its words: things that can be told in code need no model.

The rules know English. Another language, or a question they do not recognise, is one about the whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


def words_of(*lines: str) -> frozenset[str]:
    """Return the words of some lines."""
    return frozenset(word for line in lines for word in line.split())


DOCUMENT_NOUNS = words_of(
    "article chapter contract doc document essay file module page paper report script story"
)
"""What people call a whole document among several."""
RECORD_NOUNS = words_of(
    "abstract answer bullet case chat comment complaint conversation customer email entry event excerpt feedback",
    "headline incident item joke letter line log mail meeting message note opinion order paragraph poem post product",
    "question quote recipe record reply request response result review row section snippet statement step submission",
    "task testimonial text ticket transaction tweet",
)
"""What people call one entry of a list that is the text."""
_COUNT = re.compile(
    r"\b(?:how many|how often|count|number of|(?:what|which) (?:share|percentage|proportion|fraction) of)\b", re.I
)  # fmt: skip
_LIST = re.compile(r"\b(?:list|enumerate|all|every|each)\b", re.I)
_WHICH = re.compile(r"\b(?:which|what)\b", re.I)
_SKIPPED = words_of(
    "of the these those all different distinct my our your such out up me us a an every each"
)
_ENDS = words_of(
    "about above across am are at be been by can contain contained contains did do does express expresses for from had",
    "has have in into is it mention mentioned mentions named on say says should show that their there they this to use",
    "was we were where which who whose will with you",
)
_MAX_WORDS = 6


@dataclass(frozen=True)
class Wanted:
    """What a question asks for.

    Attributes:
        is_count: A number.
        is_list: Everything of a kind.
        nouns: What may be the name of that kind, in the singular, the likeliest last.
    """

    is_count: bool
    is_list: bool
    nouns: tuple[str, ...]


def wanted(question: str) -> Wanted:
    """Return what the question asks for."""
    counts, lists = _COUNT.search(question), _LIST.search(question)
    marker = counts or lists or _WHICH.search(question)
    return Wanted(
        is_count=counts is not None,
        is_list=counts is None and lists is not None,
        nouns=_nouns(question[marker.end() :]) if marker else (),
    )


def _nouns(rest: str) -> tuple[str, ...]:
    found: list[str] = []
    for match in re.findall(r"[^\W\d_]+|[.?!,;:]", rest)[: 2 * _MAX_WORDS]:
        word = match.lower()
        if word in _SKIPPED:
            continue
        if word in _ENDS or not word[0].isalpha() or len(found) == _MAX_WORDS:
            break
        found.append(singular(word))
    return tuple(found)


def singular(word: str) -> str:
    """Return an English noun's singular, as far as three rules tell it."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


_SUMMARY = re.compile(
    r"\b(?:summar\w*|synopsis|overview|outline|abstract|recap|digest|gist|tl;?\s?dr|in a nutshell|sum up|condense|"
    r"shorten|abridge|key points|main (?:points|ideas))\b|\b(?:short|brief|condensed|abridged)(?:er)? version\b|"
    r"\bwhat (?:is|are|'s) (?:this|these|the|it|they)\b[^?]*\babout\b",
    re.I,
)


_SHAPED = re.compile(
    r"\b(?:sentences?|paragraphs?|words?|lines?|bullet\w*|points?|table|json|yaml|xml|csv|list|markdown|haiku|poem|"
    r"tweet|e?mail|letter|headline|title|abstract|briefly|short(?:er|ly)?|brief|nutshell|tl;?\s?dr|as an?|"
    r"in the (?:style|form))\b",
    re.I,
)


def has_shape(question: str) -> bool:
    """Return whether a question says what the answer looks like."""
    return _SHAPED.search(question) is not None


def wants_summary(question: str) -> bool:
    """Return whether a question wants to know what a text says: every part of it then has something to add."""
    return _SUMMARY.search(question) is not None


_FOLLOW_UP = re.compile(
    r"^\W*(?:and|but|or|so|then|also|what about|how about|why|when|where|which one|who else|what else)\b|"
    r"\b(?:he|she|it|they|him|her|them|his|hers|its|their|theirs|ones|else|former|latter)\b|"
    r"\b(?:this|that|these|those|there|then|one)\W*$",
    re.I,
)
_MAX_FOLLOW_UP_WORDS = 16
_SURELY_FOLLOWS_WORDS = 3


def follows_up(question: str) -> bool:
    """Return whether a question cannot be understood without the one before it: it is short and points back."""
    num_words = len(re.findall(r"\w+", question))
    if num_words <= _SURELY_FOLLOWS_WORDS:
        return True
    return num_words <= _MAX_FOLLOW_UP_WORDS and _FOLLOW_UP.search(question) is not None
