"""What is counted in code: exactly, and only where the question asks for nothing else."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from evermini.service.sweep.tally import Tally, tally_of

FREQUENT = {
    "Which ten words are the most common ones in this list? Write those ten words only.": 10,
    "Which three made-up words, dots aside, does this text use most? Write those three words only.": 3,
    "Which words are used most often?": None,
    "What are the 5 most frequently used words in the book?": 5,
    "List the ten most common words.": 10,
    "Which word does the author use most often?": None,
    "Make a table of word frequencies.": None,
}
TERMS = {
    'How often does the word "love" appear?': "love",
    "How many times is 'to be' used?": "to be",
    "How many times is Congress mentioned?": "Congress",
    "How often is the name Anna used in the book?": "Anna",
    "Count the occurrences of \u201cfoo bar\u201d.": "foo bar",
    "How many mentions of Anna Karenina are there?": "Anna Karenina",
    "Count how often the word peace occurs.": "peace",
    "How many instances of the word 'error' are in the log?": "error",
}
LENGTHS = {
    "How many words are in this text?": "words",
    "How many lines does the file have?": "lines",
    "What is the word count of this document?": "words",
    "Count the paragraphs.": "paragraphs",
}
NO_TALLY = """\
How often does the ghost appear?
How many times is Congress asked to pass a law?
How many lines does Hamlet speak?
Who is mentioned most often?
Which words does the author use to describe the most beautiful city?
Which word does Hamlet use for the king?
Summarise the text in 100 words or less.
How many paragraphs mention a king?
How many words does the constitution use for this?
How often is a death mentioned?
What is the most common word for bread?
Which customers are mentioned most?
How many times did Mary visit 'The Crown'?
How many times did Anna's friend visit Bob's house?
What are the most common mistakes in essays?
""".splitlines()


@pytest.mark.parametrize(("question", "most"), FREQUENT.items())
def test_questions_for_the_most_frequent_words(question, most):
    assert tally_of(question) == Tally("frequent", most=most)


@pytest.mark.parametrize(("question", "term"), TERMS.items())
def test_questions_how_often_a_term_occurs(question, term):
    assert tally_of(question) == Tally("term", term=term)


@pytest.mark.parametrize(("question", "unit"), LENGTHS.items())
def test_questions_for_a_texts_length(question, unit):
    assert tally_of(question) == Tally("length", unit=unit)


@pytest.mark.parametrize("question", NO_TALLY)
def test_other_questions_are_left_to_a_model(question):
    assert tally_of(question) is None


def test_the_most_frequent_words_are_those_of_a_plain_count():
    rng = random.Random(4)
    names = ["".join(rng.choices("bcdfgjkl", k=6)) for _ in range(400)]
    words = [word for rank, word in enumerate(names) for _ in range(1 + 3000 // (rank + 1))]
    rng.shuffle(words)
    text = " ... ".join(words)
    counted = Tally("frequent", most=12).count([text[:9000], text[9000:]])
    pieces = re.findall(r"[a-z]+", text[:9000]) + re.findall(r"[a-z]+", text[9000:])
    wanted = Counter(pieces).most_common(12)
    assert list(counted.counts.items()) == wanted
    assert counted.lines[0] == f"1. {wanted[0][0]}: {wanted[0][1]:,} times"
    assert f"{len(pieces):,} words" in counted.head


def test_words_of_content_are_told_beside_the_of_and_and():
    counted = Tally("frequent", most=2).count(["The cat and the dog and the bird saw the cat."])
    assert list(counted.counts) == ["the", "cat"]
    assert counted.lines[-1] == "Without words such as the, of, and: cat (2), dog (1)"


def test_ties_with_the_last_word_are_told():
    counted = Tally("frequent", most=1, is_least=True).count(["zoo zoo ant bee"])
    assert counted.counts == {"ant": 1}
    assert counted.lines[-1] == "[1 more words occur as often as the last one]"


@pytest.mark.parametrize(
    ("term", "number"), [("peace", 3), ("to be", 2), ("pea", 0), ("peace.", 1), ("war", 1)]
)
def test_terms_count_as_whole_words_in_any_case_and_across_lines(term, number):
    text = "Peace! War and PEACE, to\nbe or not to be: peace. Warfare."
    counted = Tally("term", term=term).count([text])
    assert counted.counts == {term: number}
    assert ("occurs once" in counted.head) is (number == 1)


def test_lengths():
    text = "One two three.\nFour\n\n\nFive, don't six-pack\n \nx\n"
    assert Tally("length", unit="words").count([text]).counts == {"words": 8}
    assert Tally("length", unit="lines").count([text, text]).counts == {"lines": 8}
    assert Tally("length", unit="paragraphs").count([text]).counts == {"paragraphs": 3}
    assert "1,000,001 words" in Tally("length", unit="words").count(["a " * 1_000_001]).head


def test_nothing_to_count():
    assert Tally("frequent").count([""]).counts == {}
    assert Tally("length", unit="words").count([]).counts == {"words": 0}
