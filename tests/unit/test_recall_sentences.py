"""Where sentences and definitions end, and which of them are shown once more after the excerpts."""

from __future__ import annotations

import itertools
import re

import pytest

from evermini.recall.prompt import Span, excerpts
from evermini.recall.segment import Segment
from evermini.recall.select import Policy
from evermini.recall.sentences import hashes, sentences, weight_of
from tests.recall_fakes import fake_recall, filler


def cut(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in sentences(text)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("  \n\n ", []),
        ("Anna left. Bob stayed! Why? Nobody knows", ["Anna left.", "Bob stayed!", "Why?", "Nobody knows"]),
        ("He said “go.” She\nwent home.", ["He said “go.”", "She\nwent home."]),
        ("Mr. Smith of the U.S. army, e.g. him, met J. Doe. Yes.",
         ["Mr. Smith of the U.S. army, e.g. him, met J. Doe.", "Yes."]),
        ("A title\n\nA sentence of 3.5 words", ["A title", "A sentence of 3.5 words"]),
        ("def a(x):\n    x += 1\n    return x\n\ndef b(x):\n    return 2\nc = 3\n",
         ["def a(x):\n    x += 1\n    return x", "def b(x):\n    return 2", "c = 3"]),
        ("09:01 door open\n09:02 door shut\n[09:03] alarm\n", ["09:01 door open", "09:02 door shut", "[09:03] alarm"]),
        ("It was a long and cold winter for the people of\nNantes. They had no wood\nleft",
         ["It was a long and cold winter for the people of\nNantes.", "They had no wood\nleft"]),
        ("It was a long winter for all the people of the town.\nVAR A = 3\nThey had no wood at all and cold.",
         ["It was a long winter for all the people of the town.", "VAR A = 3", "They had no wood at all and cold."]),
        ("Traceback (most recent call last):\n  He owes it to boots. File one\nKeyError: x",
         ["Traceback (most recent call last):", "He owes it to boots.", "File one", "KeyError: x"]),
        ("def a(x):\n    # Add one. Or two.\n    x += 1\n", ["def a(x):\n    # Add one. Or two.\n    x += 1"]),
        ("彼は来た。彼女は帰った。", ["彼は来た。", "彼女は帰った。"]),
    ],
)  # fmt: skip
def test_sentences(text, wanted):
    assert cut(text) == wanted


def test_sentences_are_in_order_and_hold_all_that_is_not_blank():
    text = filler(400, 3) + "\n\nclass A:\n    pass\n\n  Indented. Text?! \n" + filler(90, 4)
    places = sentences(text)
    assert places == sorted(places)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    assert "".join("".join(text[a:b].split()) for a, b in places) == "".join(text.split())


def test_a_sentence_weighs_what_it_has_of_the_wanted_words():
    wanted = dict.fromkeys(hashes("zebra password"), 2.0)
    assert weight_of("The ZEBRA sleeps; a zebra does.", wanted) == 2.0
    assert weight_of("password of the zebra", wanted) == 4.0
    assert weight_of("nothing", wanted) == 0


MILL = (
    "The mill stands by the river. The baker of Orsova is called Ilona Fekete. He sings.\n\n"
    "Nobody knows why. Ilona Fekete keeps bees on the roof. It rains.\n"
)


def shown(
    question_words: str, *more: str, text: str = MILL, budget: int = 10_000, parts: int = 1
) -> str:
    segment = Segment(text)
    size = len(text) // parts
    spans = [
        Span(0, None, (i, i + 1), (i * size, (i + 1) * size), (1, 3), float(parts - i), 1)
        for i in range(parts)
    ]
    hops = [dict.fromkeys(hashes(words, least=3), 1.0) for words in (question_words, *more)]
    count = lambda text: len(text.split())  # noqa: E731
    result = excerpts([segment], spans, count, budget, mark_end=True, hops=hops)
    assert result.num_tokens == count(result.text) <= budget
    return result.text[result.text.index("\n[End") :]


def test_the_sentence_with_the_questions_words_stands_once_more_at_the_end():
    assert shown("baker Orsova bees") == (
        "\n[End of the excerpts. Closest to the question:]\n> The baker of Orsova is called Ilona Fekete.\n\n"
    )


@pytest.mark.parametrize("mark_end", [True, False])
def test_what_is_closest_is_emphasised_where_it_stands_and_at_the_end(mark_end):
    text = "\n\n" + MILL.replace("Orsova is", "Orsova\nis")
    segment = Segment(text + "\ndef bake(bread):\n    return bread + 1\n", "mill.txt")
    span = Span(0, None, (0, 1), (0, len(segment.text)), (1, 9), 1.0, 1)
    hops = [dict.fromkeys(hashes("baker Orsova", least=3), 1.0)]
    result = excerpts(
        [segment], [span], len, 10_000, "Does bake ask Orsova?", mark_end=mark_end, hops=hops
    )
    defined = "def bake is defined in mill.txt on line 8 and returns bread + 1"
    assert [result.text[start:end] for start, end in result.emphasis] == [
        defined,
        "The baker of Orsova\nis called Ilona Fekete.",
        *["The baker of Orsova is called Ilona Fekete.", defined] * mark_end,
    ]
    assert result.closeness == 1


@pytest.mark.parametrize(
    ("question", "files"),
    [
        ("What is the concurrent.futures class Future?", ["concurrent/futures/base.py"]),
        ("What is asyncio's Future?", ["asyncio/futures.py"]),
        ("What is a Future?", ["asyncio/futures.py", "concurrent/futures/base.py"]),
        ("What is a Queue?", []),
    ],
)
def test_of_several_definitions_the_one_is_named_whose_file_the_question_names(question, files):
    paths = ["asyncio/futures.py", "concurrent/futures/base.py"]
    segments = [Segment("import os\n\n\nclass Future:\n    pass\n", path) for path in paths]
    spans = [
        Span(number, path, (0, 9), (0, 30), (1, 5), 1.0, 1) for number, path in enumerate(paths)
    ]
    result = excerpts(segments, spans, len, 10_000, question, mark_end=True)
    end = result.text[result.text.index("\n[End") :]
    assert re.findall(r"^> class Future is defined in (.*) on line 4$", end, re.M) == files
    assert all(f"[{path}, lines 1-5 of 6" in result.text for path in paths)


def test_so_does_the_one_that_it_leads_to():
    assert shown("baker Orsova", "bees roof").splitlines()[2:4] == [
        "> The baker of Orsova is called Ilona Fekete.",
        "> Ilona Fekete keeps bees on the roof.",
    ]


SHIPS = (
    "The captain of the Petrel is Sebald Mortensen. Anselm Ibarra was brought up by an aunt in Gdansk.\n\n"
    "Sebald Mortensen was brought up by an aunt in Leeds.\n"
)
LONG = (
    "Since then they have brought the ships of that company, which was the largest on the whole coast, up the river, "
    "past the mills and the Mortensen works, as often as the water was high enough for it and the wind was fair.\n"
)


def test_a_look_alike_of_what_it_leads_to_is_not_shown():
    lines = shown("captain Petrel brought up", "Sebald Mortensen", text=SHIPS).splitlines()
    assert lines[2:-1] == [
        "> The captain of the Petrel is Sebald Mortensen.",
        "> Sebald Mortensen was brought up by an aunt in Leeds.",
    ]


def test_of_two_with_as_many_words_the_long_one_is_not_shown():
    lines = shown(
        "captain Petrel ships company", text=SHIPS.split(". ")[0] + ".\n\n" + LONG
    ).splitlines()
    assert lines[2:-1] == ["> The captain of the Petrel is Sebald Mortensen."]


def test_nor_is_one_that_a_name_leads_to_by_the_way():
    lines = shown(
        "captain Petrel aunt", "Mortensen", text=SHIPS.splitlines()[0] + "\n\n" + LONG
    ).splitlines()
    assert lines[2:-1] == ["> The captain of the Petrel is Sebald Mortensen."]


def test_a_chain_is_shown_whose_links_have_nothing_else_of_the_question():
    text = "VAR ABCDE = 73697\nVAR FGHIJ = VAR ABCDE\nVAR KLMNO = 5\n"
    lines = shown("variables value 73697", "ABCDE", "FGHIJ", text=text).splitlines()
    assert lines[2:-1] == ["> VAR ABCDE = 73697", "> VAR FGHIJ = VAR ABCDE"]


def test_none_does_if_no_sentence_has_a_fair_part_of_the_question():
    assert shown("river zebra giraffe antelope elephant ostrich") == "\n[End of the excerpts]\n\n"


def test_a_sentence_that_has_no_room_in_the_excerpts_is_not_shown_either():
    whole = shown("bees roof", parts=2)
    assert "keeps bees" in whole
    cut_off = shown("bees roof", budget=52, parts=2)
    assert cut_off == "\n[End of the excerpts]\n\n"


def test_a_chain_of_four_facts_is_followed_to_its_end(tmp_path):
    lines = [
        re.sub(r"\d", lambda digit: "qrstvwxyzk"[int(digit[0])], line) + "."
        for line in filler(20_000).split("\n")
    ]
    names = ["QZARA", "BLOMI", "VETCH", "NURGO", "PIXEW"]
    lines[20] = f"VAR {names[0]} = 73697"
    for number, (old, new) in enumerate(itertools.pairwise(names)):
        lines[300 * (number + 1)] = f"VAR {new} = VAR {old}"
    text = "\n".join(lines)
    recall = fake_recall(tmp_path)

    def reached(max_hops: int) -> list[str]:
        policy = Policy(min_passages=1, max_hops=max_hops)
        selection = recall.ask([Segment(text)], "Which variables come from 73697", policy)
        read = " ".join(text[slice(*span.chars)] for span in selection.spans)
        return [name for name in names if f"VAR {name} =" in read]

    assert reached(3) == names[:4]
    assert len(reached(1)) < 4
