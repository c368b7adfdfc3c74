"""Passages to find, of five kinds, each with a question to it; and look-alikes, of which one is asked for.

    value        "The locker combination of the Bergen depot is PEWTER-HERON-52."
    paraphrase   a fact that is asked for in other words
    number       "The mill at Otley ground 48,213 sacks of barley that year."
    two_hop      two passages far apart: the question names the first one's subject, the second one has the answer
    code         a function, and what it returns

The facts and sentences are not those of `evermini.recall.synthetic`, which retrieval heads are chosen on. Paraphrased
facts are ones that mini can answer from the sentence alone: what is measured is the long text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from evermini.evals.cases import INSTRUCTION, Case, CasePlan, Question, user_message
from evermini.evals.corpus import CountTokens, Haystacks, Hidden

T = TypeVar("T")

Kind = Literal["value", "paraphrase", "number", "two_hop", "code"]
KINDS: tuple[Kind, ...] = ("value", "paraphrase", "number", "two_hop", "code")

DEPTHS = tuple(number / 10 for number in range(11))
LENGTHS = (8_192, 32_768, 131_072, 524_288, 1_047_576)
ANSWER_TOKENS = 48
TEMPLATE_TOKENS = 40
"""Room for what a chat template adds."""


def _words(text: str) -> list[str]:
    return text.split()


_METALS = _words(
    "pewter cobalt bronze nickel chrome titanium tungsten zinc radium osmium iridium bismuth"
)
_BIRDS = _words(
    "heron magpie osprey plover puffin kestrel bittern curlew dunnock goldcrest lapwing nightjar"
)
CITIES = _words(
    "Lisbon Osaka Quito Tbilisi Nairobi Bergen Valencia Hanoi Tallinn Montevideo Adelaide Krakow Dakar Winnipeg "
    "Izmir Cardiff Lahore Santiago Gdansk Perth Marseille Kumasi Bologna Utrecht Medan Tromso Cordoba Riga Accra Leeds"
)
_DEPOTS = _words(
    "Ashgrove Bickley Corvane Dunstow Elmhurst Farleigh Gorsedale Hexworth Ivinghoe Kelbrook Lowick Mardale "
    "Nunthorpe Otley Pickering Ruswarp Settle Thirsk Ulverston Wetherby"
)
_GIVEN = _words(
    "Anselm Bridget Cosima Desmond Eudora Fergus Greta Horatio Imogen Jasper Kirsten Lambert Mirabel Nigel Odette "
    "Percival Rowena Sebald Tamsin Wendell"
)
_FAMILY = _words(
    "Achterberg Blomquist Castellan Drummond Eisner Fairweather Grabowski Hathersage Ibarra Jankowski Kilbride "
    "Lonsdale Mortensen Novotny Ostrander Pellegrino Ravenscroft Stavros Trevelyan Whitcombe"
)

_PARAPHRASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("{name} tunes church bells for money", "How does {name} earn a living?", ("bells", "bell")),
    ("{name} swells up after eating walnuts", "Which food is {name} allergic to?", ("walnuts", "walnut")),
    ("{name} shares a flat with nobody but an old parrot", "Which animal does {name} live with?", ("parrot",)),
    ("{name} speaks Basque to the children", "Which language is spoken in the family of {name}?", ("basque",)),
    ("{name} would rather drown than look down from a tower", "What is {name} afraid of?", ("heights", "tower")),
    ("{name} cannot stand the smell of cinnamon", "Which spice does {name} dislike?", ("cinnamon",)),
    ("{name} fell to the ground from a balloon and was buried there", "How did {name} die?", ("balloon",)),
    ("{name} owes a fortune to rubber boots", "How did {name} become rich?", ("boots",)),
)  # fmt: skip
_GOODS = (
    "sacks of barley", "crates of oranges", "barrels of herring", "bales of wool", "jars of honey", "tons of slate",
    "rolls of linoleum", "kegs of nails",
)  # fmt: skip
_SHIPS = (
    "Marigold", "Intrepid", "Seven Sisters", "Petrel", "Lady Constance", "Halcyon", "Northern Star", "Brave Tinker",
)  # fmt: skip
_FUNCTIONS = _words("prune amend refold unspool bisect annul tally graft splice defrost")
_THINGS = _words(
    "quota_table beacon_list lease_book tariff_map chimney_log orbit_plan kiosk_menu sluice_state"
)


@dataclass(frozen=True)
class Needle:
    """Passages to find, one or (two hops) two, and the question that needs them."""

    kind: Kind
    passages: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


def make_needles(kinds: Sequence[Kind], rng: random.Random) -> list[Needle]:
    """Return a needle of each kind asked for; no two are about the same thing. At most eight of a kind."""
    towns, depots = _shuffled(CITIES, rng), _shuffled(_DEPOTS, rng)
    names = (
        f"{a} {b}" for a, b in zip(_shuffled(_GIVEN, rng), _shuffled(_FAMILY, rng), strict=True)
    )
    facts, goods, ships = (
        _shuffled(_PARAPHRASES, rng),
        _shuffled(_GOODS, rng),
        _shuffled(_SHIPS, rng),
    )
    functions = _shuffled([f"{verb}_{noun}" for verb in _FUNCTIONS for noun in _THINGS], rng)
    needles: list[Needle] = []
    for kind in kinds:
        if kind == "value":
            town, code = next(towns), _code(rng)
            text = f"The locker combination of the {town} depot is {code}."
            question = f"What is the locker combination of the {town} depot?"
            needles.append(Needle(kind, (text,), question, (code,)))
        elif kind == "paraphrase":
            (says, asks, answers), name = next(facts), next(names)
            needles.append(
                Needle(kind, (says.format(name=name) + ".",), asks.format(name=name), answers)
            )
        elif kind == "number":
            place, what, number = next(depots), next(goods), rng.randrange(10_000, 99_999)
            text = f"The mill at {place} took in {number:,} {what} that year."
            question = f"How many {what} did the mill at {place} take in?"
            needles.append(Needle(kind, (text,), question, (str(number),)))
        elif kind == "two_hop":
            ship, name, town = next(ships), next(names), next(towns)
            texts = (
                f"The captain of the steamer {ship} is {name}.",
                f"{name} was brought up by an aunt in {town}.",
            )
            question = f"In which city was the captain of the steamer {ship} brought up?"
            needles.append(Needle(kind, texts, question, (town,)))
        else:
            function, number = next(functions), rng.randrange(1_000, 10_000)
            text = f"def {function}(entries):\n    entries.sort(key=len)\n    return {number} + len(entries)"
            question = f"What does the function {function} return?"
            needles.append(Needle(kind, (text,), question, (str(number),)))
    return needles


def needle_plans(
    hay: Haystacks,
    count: CountTokens,
    *,
    lengths: Sequence[int] = LENGTHS,
    kinds: Sequence[Kind] = KINDS,
    depths: Sequence[float] = DEPTHS,
    repeats: int = 1,
    seed: int,
) -> Iterator[CasePlan]:
    """Yield the cases of a grid: of each length ``repeats`` texts, each with a needle at every depth.

    The kinds take turns over the depths, and begin with another one in each text.

    Args:
        hay: Where the texts come from.
        count: Tokens of a text.
        lengths: Tokens of a prompt with its answer.
        kinds: Which needles.
        depths: Where they go, 0 to 1.
        repeats: Texts of each length.
        seed: Equal seeds give equal cases.
    """
    for length in lengths:
        for repeat in range(repeats):
            rng_seed = f"needle {seed} {length} {repeat}"
            chosen = [kinds[(i + repeat) % len(kinds)] for i in range(len(depths))]
            yield CasePlan(
                id=f"needle-{length}-{repeat}",
                labels={"length": length, "repeat": repeat},
                build=partial(_needle_case, hay, count, length, chosen, tuple(depths), rng_seed),
            )


def _needle_case(
    hay: Haystacks,
    count: CountTokens,
    length: int,
    kinds: Sequence[Kind],
    depths: Sequence[float],
    seed: str,
) -> Case:
    rng = random.Random(seed)
    needles = make_needles(kinds, rng)
    hidden: list[Hidden] = []
    questions: list[Question] = []
    for number, (needle, depth) in enumerate(zip(needles, depths, strict=True)):
        hidden.append(Hidden(needle.passages[0], depth))
        # The second passage is far from the first: a third of the text further on, or before.
        hidden += [Hidden(text, (depth + 0.35) % 1) for text in needle.passages[1:]]
        questions.append(
            Question(
                id=f"{number}",
                text=needle.question,
                answers=(needle.answers,),
                gold=needle.passages,
                max_tokens=ANSWER_TOKENS,
                labels={"depth": round(100 * depth), "kind": needle.kind},
            )
        )
    return make_case(hay, count, length, hidden, questions, rng.randrange(1 << 32))


def multikey_plans(
    hay: Haystacks,
    count: CountTokens,
    *,
    lengths: Sequence[int] = (32_768, 262_144),
    num_keys: int = 20,
    repeats: int = 1,
    seed: int,
) -> Iterator[CasePlan]:
    """Yield texts with ``num_keys`` sentences that differ in a city and its code only; each city is asked for.

    Args:
        hay: Where the texts come from.
        count: Tokens of a text.
        lengths: Tokens of a prompt with its answer.
        num_keys: Look-alikes in a text, at most 30.
        repeats: Texts of each length.
        seed: Equal seeds give equal cases.
    """
    assert num_keys <= len(CITIES)
    for length in lengths:
        for repeat in range(repeats):
            yield CasePlan(
                id=f"multikey-{length}-{repeat}",
                labels={"length": length, "repeat": repeat},
                build=partial(
                    _multikey_case,
                    hay,
                    count,
                    length,
                    num_keys,
                    f"multikey {seed} {length} {repeat}",
                ),
            )


def _multikey_case(
    hay: Haystacks, count: CountTokens, length: int, num_keys: int, seed: str
) -> Case:
    rng = random.Random(seed)
    cities = rng.sample(CITIES, num_keys)
    codes: list[str] = []
    while len(codes) < num_keys:
        if (code := _code(rng)) not in codes:
            codes.append(code)
    depths = [(i + rng.random()) / num_keys for i in range(num_keys)]
    texts = [
        f"The secret code for {city} is {code}." for city, code in zip(cities, codes, strict=True)
    ]
    questions = [
        Question(
            id=city,
            text=f"What is the secret code for {city}?",
            answers=((code,),),
            gold=(text,),
            wrong=tuple(other for other in codes if other != code),
            max_tokens=ANSWER_TOKENS,
            labels={"depth": round(100 * depth), "kind": "lookalike"},
        )
        for city, code, text, depth in zip(cities, codes, texts, depths, strict=True)
    ]
    hidden = [Hidden(text, depth) for text, depth in zip(texts, depths, strict=True)]
    return make_case(hay, count, length, hidden, questions, rng.randrange(1 << 32))


def make_case(
    hay: Haystacks,
    count: CountTokens,
    length: int,
    hidden: Sequence[Hidden],
    questions: Sequence[Question],
    seed: int,
    instruction: str = INSTRUCTION,
) -> Case:
    """Return a case whose longest prompt has, with its answer, ``length`` tokens.

    Raises:
        InvalidRequestError: The passages do not fit, or there is not enough text.
    """
    around = max(count(user_message(instruction, "", q.text)) + q.max_tokens for q in questions)
    filled = hay.fill(seed, length - around - TEMPLATE_TOKENS, hidden)
    for passage in hidden:
        assert filled.text.count(passage.text) == 1, passage
    return Case(instruction, filled.text, tuple(questions), filled.num_tokens, length)


def _code(rng: random.Random) -> str:
    return f"{rng.choice(_METALS)}-{rng.choice(_BIRDS)}-{rng.randrange(10, 100)}".upper()


def _shuffled(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    return iter(rng.sample(items, len(items)))
