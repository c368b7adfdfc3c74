"""Citations: words of an answer that stand in what was read, and nothing else."""

from __future__ import annotations

import pytest

from evermini.recall.segment import Segment
from evermini.service.citations import Citation, cite
from evermini.service.parts import Piece
from evermini.service.places import Place

REPORT = """[page 51]
The year 2023 was a year of change.

[page 52]
Total current assets 5,308 5,853
Total current liabilities 4,476 5,103

[page 60]
These are the notes to what was said before, in the order in which it was said, by those who said it there.
Other liabilities 4,476 12
In fiscal 2022 we acquired Current Health Ltd. and Two Peaks, LLC.
"""


def shown(text: str = REPORT) -> list[Place]:
    document = Piece(text, is_long=True, message=0, part=1, name="report.pdf")
    return [Place(Segment(text, "report.pdf"), 0, len(text), document)]


def only(answer: str, question: str = "") -> Citation:
    found = cite(answer, shown(), question)
    assert len(found) == 1
    return found[0]


def test_a_citation_says_where_the_words_stand():
    answer = "They were $4,476 million (total current liabilities)."
    found = cite(answer, shown(), "How large were the debts?")
    assert [answer[one.start : one.end] for one in found] == ["4,476", "total current liabilities"]
    assert [one.quote for one in found] == ["4,476", "Total current liabilities"]
    for one in found:
        assert REPORT[slice(*one.characters)] == one.quote
        assert (one.pages, one.lines, one.source) == ((52, 52), (6, 6), "report.pdf")


def test_of_equal_runs_the_one_that_stands_among_the_sentences_words_is_cited():
    assert only("Current ones are 4476.").pages == (52, 52)
    assert only("Other ones are 4476.").pages == (60, 60)


def test_names_and_runs_of_words_are_cited_whatever_their_case():
    assert only("It bought CURRENT HEALTH in May.").quote == "Current Health"


def test_a_name_that_stands_in_few_places_is_enough():
    text = "However, the parrot was seen.\nIts name is Biscuit. The ship is the Tern."
    found = cite("However, it was Biscuit.", shown(text), "What is the parrot called?")
    assert [one.quote for one in found] == ["Biscuit"]
    assert (
        cite("Biscuit", shown(text.replace("Biscuit", "Biscuit, Biscuit, Biscuit, Biscuit")), "")
        == []
    )


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("It was in 2023.", ""),  # a year stands anywhere
        ("There were 12 of them.", ""),
        ("It was a year of", ""),
        ("Total current assets", "What are the total current assets?"),
        ("They were 9,999.", ""),
        ("", ""),
    ],
)
def test_what_tells_nothing_or_stands_nowhere_is_not_cited(answer, question):
    assert cite(answer, shown(), question) == []


def test_places_count_from_where_the_piece_begins():
    begun = Segment(REPORT, None, first_line=101, first_char=5000, first_page=9)
    piece = Piece("", is_long=True, message=2, part=0, first_char=30, first_line=4)
    (found,) = cite("5,308", [Place(begun, 10, 200, piece)], "")
    start = 5030 + REPORT.index("5,308")
    assert (found.characters, found.lines) == ((start, start + 5), (108, 108))
    assert (found.message, found.part, found.pages) == (2, 0, (52, 52))
