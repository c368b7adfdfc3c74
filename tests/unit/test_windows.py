"""Windows and records: every character exactly once, nothing longer than it may be."""

from __future__ import annotations

import random

import pytest

from evermini.service.questions import follows_up, wanted
from evermini.service.sweep.windows import Part, records, windows


def words(text: str) -> int:
    """A tokenizer's count, roughly: four characters a token."""
    return -(-len(text) // 4)


def covered(texts: list[str], found) -> list[str]:
    """The texts, put together from the windows' parts in their order."""
    built = [""] * len(texts)
    for window in found:
        for part in window.parts:
            assert part.start == len(built[part.text]), "a gap, an overlap, or the wrong order"
            built[part.text] += texts[part.text][part.start : part.end]
    return built


@pytest.mark.parametrize("seed", range(20))
def test_every_character_is_in_exactly_one_window(seed):
    draw = random.Random(seed)
    alphabet = ["word ", "Ende. ", "\n", "\n\n", "\n\n\n", "x" * 300, "\u00e4\u4e2d", " ", "\t"]
    texts = [
        "".join(draw.choices(alphabet, k=draw.randrange(400))) for _ in range(draw.randrange(1, 5))
    ]
    limit = draw.choice([1, 7, 50, 4000])
    found = windows(texts, words, limit)
    assert covered(texts, found) == texts
    assert all(window.num_tokens <= limit for window in found)


def test_windows_end_with_paragraphs_and_hold_as_many_as_fit():
    text = "\n\n".join(f"Paragraph {i} is short." for i in range(100))
    found = windows([text], words, 60)
    assert all(text[: w.parts[-1].end].endswith("\n\n") for w in found[:-1])
    assert len(found) == -(-100 // (60 // words("Paragraph 10 is short.\n\n")))


def test_parts_of_texts_can_be_cut_alone():
    [window] = windows(["abc def", "ghi"], words, 100, ranges=[Part(0, 4, 7), Part(1, 0, 3)])
    assert window.parts == (Part(0, 4, 7), Part(1, 0, 3))


REVIEWS = [
    "Here they are:\n\nReview 1: good\nand cheap\n\n",
    "Review 2: bad\n",
    "Review 3: so-so\n",
]


@pytest.mark.parametrize(
    ("text", "noun", "expected"),
    [
        ("".join(REVIEWS), "review", REVIEWS),
        ("".join(REVIEWS), None, REVIEWS),
        ("a\nb\n\nc\n\nd", "comment", ["a\nb\n\n", "c\n\n", "d"]),
        ("Comments:\n\na\n\nb\n\nc", "comment", ["Comments:\n\na\n\n", "b\n\n", "c"]),
        ("a\nb\n\nc\n\nd", "line", ["a\n", "b\n\n", "c\n\n", "d"]),
        ("one\ntwo\nthree", "comment", ["one\n", "two\n", "three"]),
    ],
)  # fmt: skip
def test_records(text, noun, expected):
    found = records(text, noun, must_label=noun is None)
    assert [text[start:end] for start, end in found] == expected


@pytest.mark.parametrize(
    ("text", "noun", "must_label"),
    [
        ("language in use\nlanguage was\nlanguage is\n", "language", True),
        ("one two", "comment", False),
    ],
)
def test_what_is_no_list_has_no_records(text, noun, must_label):
    assert records(text, noun, must_label=must_label) is None


@pytest.mark.parametrize(
    ("question", "is_count", "is_list", "nouns"),
    [
        ("How many of these reviews are negative?", True, False, ("review",)),
        ("How many negative reviews are there?", True, False, ("negative", "review")),
        ("How many are negative?", True, False, ()),
        ("Count the log entries that are errors.", True, False, ("log", "entry")),
        ("List every person in the story.", False, True, ("person",)),
        ("Which emails complain about the price?", False, False, ("email", "complain")),
        ("Summarise this.", False, False, ()),
    ],
)
def test_what_a_question_wants(question, is_count, is_list, nouns):
    found = wanted(question)
    assert (found.is_count, found.is_list, found.nouns) == (is_count, is_list, nouns)


@pytest.mark.parametrize(
    "question",
    ["And who wrote it?", "When did he die?", "Why?", "What about the others?", "Which ones?"],
)
def test_what_points_back_follows_up(question):
    assert follows_up(question)


@pytest.mark.parametrize(
    "question",
    [
        "Who wrote the letter to the duke of Lisbon?",
        "What is the title of this book?",
        "In which year was the clock tower finished?",
    ],
)
def test_what_names_what_it_means_stands_alone(question):
    assert not follows_up(question)
