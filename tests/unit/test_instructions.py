"""IFEval's checkers: for each instruction, answers that follow it and answers that do not."""

from __future__ import annotations

import json

import pytest

from evermini.errors import InvalidRequestError
from evermini.evals.ifeval import Task, accuracies, by_instruction, judge, read_tasks
from evermini.evals.instructions import count_sentences, is_followed
from tests.conftest import data_file

CASES = {
    "keywords:existence": ({"keywords": ["War", "peace"]}, ["war and PEACE"], ["war"]),
    "keywords:frequency": (
        {"keyword": "story", "frequency": 2, "relation": "at least"},
        ["A story, a Story."],
        ["one story"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rock"]}, ["rocket"], ["Rock on", "a rock."]),
    "keywords:letter_frequency": (
        {"letter": "T", "let_frequency": 2, "let_relation": "less than"},
        ["Tea"],
        ["tt", "Total"],
    ),
    "language:response_language": (
        {"language": "de"},
        ["Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter.", "12"],
        ["This is quite an ordinary English sentence about the weather."],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        ["One. Two!", "Dr. Smith met J. Doe at 3.15 p.m. today. He left."],
        ["One. Two? Three!", "a\n. b. c. D. And so it is. Is it? Yes."],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"},
        ["one two three"],
        ["one two", ""],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b ***"],
        ["a\n\nb", "a *** *** b *** ", "a"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["First.\n\nWeekend, at last.", 'a\n\n"Weekend" it is'],
        ["Weekend.\n\nFirst.", "weekend", "a\n\nweekends", "a\n\nweekend\n\nb"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name], [address]", "[][]"],
        ["[name]", "none"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        ["Bye.\np. p. s. more", "P.P.S. more"],
        ["P.S. more", "none"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\ntext\n  - b"],
        ["* a", "** a\n* b", "* a\n* b\n* c"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes.", "So: My answer is maybe."],
        ["Yes."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a*", "**a**", "* *  * *", "a"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1", "section 1 section 2"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": 1}', "```json\n[1]\n```", "3"],
        ["{a: 1}", "Here: {}"],
    ),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<A title>", "<< >>", "<<a\nb>>"]),
    "combination:two_responses": (
        {},
        ["a ****** b", "******\na\n******\nb"],
        ["a", "a******a", "a******b******c"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it."},
        ["say it. Done."],
        ["Done. Say it."],
    ),
    "startend:end_checker": (
        {"end_phrase": "Any more?"},
        ['So. "any more?"', "any more?\n"],
        ["Any more? No."],
    ),
    "startend:quotation": ({}, ['"a"', ' "a b" '], ['"', "'a'", '"a" b']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THIS IS it", "I AM"],
        ["THIS is", "WELL-KNOWN"],
    ),
    "change_case:english_capital": (
        {},
        ["THIS IS AN ENGLISH SENTENCE ABOUT THE WEATHER."],
        ["This is English.", "DAS IST EIN DEUTSCHER SATZ ÜBER DAS WETTER UND DIE WELT."],
    ),
    "change_case:english_lowercase": (
        {},
        ["this is an english sentence about the weather."],
        [
            "This is an English sentence.",
            "das ist ein deutscher satz über das wetter und die welt.",
        ],
    ),
    "punctuation:no_comma": ({}, ["no comma"], ["a, b"]),
}


@pytest.mark.parametrize("name", CASES)
def test_instruction(name):
    arguments, right, wrong = CASES[name]
    for text in right:
        assert is_followed(name, arguments, text), text
    for text in wrong:
        assert not is_followed(name, arguments, text), text


def test_unknown_instructions_are_named():
    with pytest.raises(InvalidRequestError, match="'a:b'"):
        is_followed("a:b", {}, "x")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no full stop", 1),
        ('He said "stop." Then he left.', 2),
        ("What?! Really... yes. Version 3.11 is out.", 3),
        ("Mr. J. R. Smith, Ph.D., lives in St. Ives. e.g. there.", 1),
        ("First line\n\nSecond line.", 1),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


def test_loose_forgives_a_first_or_last_line_and_asterisks():
    task = Task("1", "", (("startend:quotation", {}), ("punctuation:no_comma", {})))
    assert judge(task, '"quite"')["strict"] == [True, True]
    row = judge(task, 'Sure, here it is:\n**"quite"**')
    assert (row["strict"], row["loose"]) == ([False, False], [True, True])
    assert judge(task, " ")["loose"] == [False, False]


def test_accuracies():
    rows = [
        {"instructions": ["a", "b"], "strict": [True, False], "loose": [True, True]},
        {"instructions": ["a"], "strict": [True], "loose": [True]},
    ]
    assert accuracies(rows) == {
        "prompt, strict": 0.5,
        "prompt, loose": 1.0,
        "instruction, strict": pytest.approx(2 / 3),
        "instruction, loose": 1.0,
        "mean": pytest.approx((0.5 + 1 + 2 / 3 + 1) / 4),
    }
    assert by_instruction(rows) == [("a", 2, 1.0, 1.0), ("b", 1, 0.0, 1.0)]


def test_every_prompt_can_be_judged():
    tasks = read_tasks(data_file("ifeval/input_data.jsonl").parent.parent)
    assert len(tasks) == 541
    assert sum(len(task.instructions) for task in tasks) == 834
    assert {name for task in tasks for name, _ in task.instructions} == CASES.keys()
    for task in tasks:
        row = judge(task, json.dumps({"answer": "Just some words. And more of them!"}))
        assert len(row["strict"]) == len(row["loose"]) == len(task.instructions)
