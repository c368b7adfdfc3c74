"""What a page is called counts for every passage on it, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest

from evermini.recall.segment import Segment
from evermini.recall.titles import PageTitles
from evermini.recall.words import word_hash, words

RUNNING = "The consolidated balance sheets of the company are explained here at length, and so is the rest of it. "
REPORT = f"""Annual report

[page 1]
Acme plc and Subsidiaries
Consolidated Balance Sheets
in millions
2023 2022
Cash 12 13
Total liabilities 4 5
[page 2]
Acme plc and Subsidiaries
Statements of Cash Flows
in millions
2023 2022
Dividends paid 3 2
[page 3]
{RUNNING * 2}
"""


def asked(question: str) -> dict[int, float]:
    return {word_hash(word): 1.0 for _, _, word in words(question)}


def scores(question: str, texts: tuple[str, ...] = (REPORT,)) -> list[list[float]]:
    """What each line of each text gets."""
    segments = [Segment(text) for text in texts]
    ends = [np.cumsum([len(x) + 1 for x in text.split("\n")]).astype(np.uint32) for text in texts]
    found = PageTitles(segments, ends).score(asked(question))
    assert found is not None
    cuts = np.cumsum([len(end) for end in ends])[:-1]
    return [part.tolist() for part in np.split(found, cuts)]


def line(name: str) -> int:
    return next(n for n, text in enumerate(REPORT.split("\n")) if text.startswith(name))


def test_every_passage_of_a_page_gets_what_its_title_gets():
    (found,) = scores("What does the balance sheet say of dividends?")
    assert found[line("Cash 12")] == found[line("Total")] > 0.5
    assert found[line("Dividends")] < found[line("Total")]
    assert found[line("Annual")] == 0  # on no page


def test_running_text_is_no_title():
    (found,) = scores("the balance sheets of the company explained at length")
    assert found[line("The consolidated")] < found[line("Cash 12")]


def test_a_title_with_little_of_the_question_counts_little():
    (found,) = scores(
        "which one among the many dogs that barked loudly was seen near Acme by nine old men walking home?"
    )
    assert 0 < max(found) < 0.7


def test_plurals_are_the_same_word():
    assert scores("cash flow statement") == scores("cash flows statements")


@pytest.mark.parametrize(
    ("text", "question"), [("No pages here.\nNone.", "cash flows"), (REPORT, "zebra"), (REPORT, "")]
)
def test_without_titles_or_a_match_nothing_is_added(text, question):
    ends = [np.array([len(text)], np.uint32)]
    assert PageTitles([Segment(text)], ends).score(asked(question)) is None


def test_a_page_that_was_cut_keeps_its_title():
    at, end = REPORT.index("Dividends"), REPORT.index("[page 3]")
    segments = [Segment(REPORT[:at]), Segment(REPORT[at:end], first_char=at, first_page=2)]
    ends = [np.array([len(segment.text)], np.uint32) for segment in segments]
    found = PageTitles(segments, ends).score(asked("cash flows"))
    assert found is not None
    assert found[0] == found[1] == 1.0
    (whole, alone) = scores("cash flows", (REPORT[:at], REPORT[at:end]))
    assert (max(whole), alone[0]) == (1.0, 0.0)


def test_each_segment_has_its_own_pages():
    first, second = scores("cash flows", (REPORT, REPORT.replace("Cash Flows", "Income")))
    assert max(first) == 1.0
    assert max(second) < 1.0
