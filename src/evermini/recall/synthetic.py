"""Synthetic long documents with questions whose place of answer is known; what calibration measures heads on.

Four kinds of question, because heads differ in what they find:

    lookalike   one of many sentences that differ in a name and a value only
    paraphrase  a fact asked for in other words
    two_hop     the question names a thing, a second sentence elsewhere tells more about what the first one says
    code        a symbol and its definition

All text is made here from small word lists and a seed: the same on every machine, no data needed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["lookalike", "paraphrase", "two_hop", "code"]
KINDS: tuple[Kind, ...] = ("lookalike", "paraphrase", "two_hop", "code")


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "amber ancient bitter blue brisk calm clever copper crooked damp distant early eastern faded fierce fragile gentle "
    "gilded green hollow humble icy lively lonely marble mellow misty narrow northern pale patient plain proud quiet "
    "rapid restless rough rusty sandy secret silent silver simple slender solemn steady stout sudden tidy velvet warm "
    "weary western wooden young"
)
_NOUNS = _words(
    "anchor archive attic bakery balcony barge barrel bell bridge canal candle castle cellar chapel chart chimney "
    "cottage crane curtain desk engine falcon ferry field forest fountain garden gate glacier granary harbour hedge "
    "island kettle ladder lamp lantern letter library lighthouse map market meadow mill mirror monastery museum "
    "orchard organ painting parcel pier plough quarry raft railway ribbon river saddle sail school ship shore statue "
    "stove street telescope tower tunnel valley violin wagon wall warehouse well wharf window workshop"
)
_VERBS = _words(
    "admired bought carried cleaned copied counted crossed described drew examined followed guarded inherited "
    "left measured mended missed moved noticed opened painted passed praised rebuilt remembered repaired sketched sold "
    "studied surveyed visited watched"
)
_PEOPLE = _words(
    "farmer clerk sailor painter teacher doctor baker soldier widow miller captain gardener student"
)
_FIRST = _words(
    "Agnes Albert Beatrix Bruno Clara Conrad Dagmar Edmund Elsa Felix Frieda Gustav Hanna Hugo Ilse Ivan Jonas Judith "
    "Karla Leo Lydia Magnus Marta Nadia Oscar Paula Quentin Rosa Simon Tessa Ulrich Vera Viktor Wilma Xenia Yannick"
)
_LAST = _words(
    "Abbott Bergman Carver Dorsey Ekström Falk Garrow Hollis Ingram Jansen Keller Lindqvist Marlow Norling Okafor "
    "Petrov Quist Rademaker Sorensen Thorne Ulman Vance Weller Yardley Zeman"
)
_PLACES = _words(
    "Aldermoor Brackwater Calderby Dunmere Eastholt Fernleigh Grimsdale Harrowgate Inverlay Jarrowby Kettlewick "
    "Langmere Midvale Netherby Oakhampton Penrose Quarrington Ravensdon Saltmarsh Thornbury Underhill Veldham Westerly "
    "Yarmfield Zelborough"
)
_TRADES = (
    ("mends clocks for a living", "What does {name} do for work?"),
    ("earns her bread by binding books", "What is the occupation of {name}?"),
    ("has settled in a small house in {place}", "Where does {name} live?"),
    ("was brought into the world in {place}", "What is the birthplace of {name}?"),
    ("lost everything when the {noun} burned down", "How did {name} become poor?"),
    ("married a {person} from {place}", "Who is the spouse of {name}?"),
    ("cannot stand the smell of the {noun}", "What does {name} dislike?"),
    ("died of a fever in {place}", "What was the cause of death of {name}?"),
)
_BELONGINGS = (
    "keeps a spare key under the {noun}", "travels every autumn to {place}", "hired a {person} in {place}",
    "painted the door of the house {adjective}", "writes each week to a {person} in {place}",
)  # fmt: skip
_CODE_VERBS = _words(
    "load parse merge rotate encode flush resolve validate schedule compress index archive"
)
_CODE_NOUNS = _words(
    "ledger packet token shard cursor manifest buffer ticket voucher session route palette"
)


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        kind: Which of the four kinds it is.
        text: The question.
        gold: Character ranges of the passages that answer it: one, or two for ``two_hop`` in the order of reasoning.
    """

    kind: Kind
    text: str
    gold: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Document:
    """A generated text and its questions."""

    text: str
    questions: tuple[Question, ...]


def generate(seed: int, num_chars: int, questions_per_kind: int = 6) -> Document:
    """Make a document of about ``num_chars`` characters.

    Args:
        seed: Equal seeds give equal documents.
        num_chars: Wanted length; the passages that answer questions are spread over all of it.
        questions_per_kind: Questions of each kind; at most 12, as more passages would repeat their names.
    """
    assert 1 <= questions_per_kind <= 12
    rng = random.Random(seed)
    facts = [fact for kind in KINDS for fact in _facts(kind, questions_per_kind, rng)]
    passages = [
        (index, hop, text) for index, fact in enumerate(facts) for hop, text in enumerate(fact[2])
    ]
    rng.shuffle(passages)
    gap = num_chars / (len(passages) + 1)
    parts: list[str] = []
    length = 0
    places: dict[tuple[int, int], tuple[int, int]] = {}

    def append(text: str) -> None:
        nonlocal length
        parts.append(text)
        length += len(text)

    for number, (index, hop, text) in enumerate(passages, start=1):
        while length < number * gap:
            append(_filler(rng))
        places[index, hop] = (length, length + len(text))
        append(text + "\n")
    while length < num_chars:
        append(_filler(rng))
    questions = tuple(
        Question(kind, question, tuple(places[index, hop] for hop in range(len(texts))))
        for index, (kind, question, texts) in enumerate(facts)
    )
    return Document("".join(parts), questions)


_Fact = tuple[Kind, str, tuple[str, ...]]


def _facts(kind: Kind, count: int, rng: random.Random) -> list[_Fact]:
    places, names = rng.sample(_PLACES, count), _names(count, rng)
    pairs = rng.sample([(a, n) for a in _ADJECTIVES for n in _NOUNS], 2 * count)
    symbols = rng.sample([(v, n) for v in _CODE_VERBS for n in _CODE_NOUNS], count)
    facts: list[_Fact] = []
    for i in range(count):
        (adjective, noun), (other, thing) = pairs[2 * i], pairs[2 * i + 1]
        words = {
            "name": names[i], "place": rng.choice(_PLACES), "noun": noun, "adjective": adjective,
            "person": rng.choice(_PEOPLE),
        }  # fmt: skip
        if kind == "lookalike":
            value = f"{adjective}-{noun}-{rng.randrange(10, 100)}"
            facts.append(
                (
                    kind,
                    f"What is the pass phrase of {places[i]}?",
                    (f"The pass phrase of {places[i]} is {value}.",),
                )
            )
        elif kind == "paraphrase":
            says, asks = _TRADES[i % len(_TRADES)]
            facts.append((kind, asks.format(**words), (f"{names[i]} {says.format(**words)}.",)))
        elif kind == "two_hop":
            second = _BELONGINGS[i % len(_BELONGINGS)].format(**words)
            owned = f"{other} {thing} of {places[i]}"
            question = f"What do we know about the owner of the {owned}?"
            facts.append(
                (
                    kind,
                    question,
                    (f"The {owned} belongs to {names[i]}.", f"{names[i]} {second}."),
                )
            )
        else:
            symbol = "_".join(symbols[i])
            body = _function(symbol, rng)
            facts.append((kind, f"What does the function {symbol} return?", (body,)))
    return facts


def _names(count: int, rng: random.Random) -> list[str]:
    return [
        f"{a} {b}" for a, b in zip(rng.sample(_FIRST, count), rng.sample(_LAST, count), strict=True)
    ]


def _function(symbol: str, rng: random.Random) -> str:
    a, b, c = rng.sample(_NOUNS, 3)
    return (
        f"def {symbol}({a}, {b}=None):\n    if {b} is None:\n        {b} = {rng.randrange(100)}\n"
        f"    {c} = {a} {rng.choice('+-*')} {b}\n    return {c} {rng.choice('+-*')} {rng.randrange(1000)}\n"
    )


def _filler(rng: random.Random) -> str:
    """A paragraph about nothing in particular; one in five is code."""
    if rng.random() < 0.2:
        return (
            _function(f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}_{rng.randrange(1000)}", rng)
            + "\n"
        )
    return " ".join(_sentence(rng) for _ in range(rng.randrange(3, 8))) + "\n\n"


def _sentence(rng: random.Random) -> str:
    adjective, noun = rng.choice(_ADJECTIVES), rng.choice(_NOUNS)
    person, verb, other = rng.choice(_PEOPLE), rng.choice(_VERBS), rng.choice(_NOUNS)
    return rng.choice((
        f"In the {rng.choice(('spring', 'summer', 'autumn', 'winter'))} the {person} {verb} the {adjective} {noun}.",
        f"A {adjective} {noun} stood behind the {other}, and nobody {verb} it.",
        f"After {rng.randrange(2, 40)} years the {person} still {verb} every {noun} near the {other}.",
        f"It was said that the {noun} had once been {adjective}, before the {person} {verb} it.",
        f"The {person} of {rng.choice(_PLACES)} {verb} a {noun} and two {other}s.",
        f"{rng.choice(_FIRST)} {verb} the {noun}; the {person} did not.",
        f"From the {noun} one could see the {adjective} {other} of {rng.choice(_PLACES)}.",
    ))  # fmt: skip
