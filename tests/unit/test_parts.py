"""Which texts of a conversation are long, and what is asked about them."""

from __future__ import annotations

import time

import pytest

from evermini.service.parts import TIERS, split, wrap_document
from evermini.service.schemas import parse_chat

LONG = "\n\n".join(
    f"Paragraph {i} tells of nothing in particular, at some length." for i in range(200)
)


def pieces(*messages, tier=TIERS[0]):
    parsed = parse_chat({"model": "m", "messages": list(messages)}).messages
    found = split(parsed, tier)
    for number, message in enumerate(parsed):
        own = [p for p in found.pieces if p.message == number]
        if not any(p.name for p in own):
            assert "".join(p.text for p in own) == message.text()
    return found


def user(content):
    return {"role": "user", "content": content}


def test_one_message_is_instructions_text_and_question():
    found = pieces(user(f"Read this.\n\n{LONG}\n\nWho did it?\n"))
    assert [p.is_long for p in found.pieces] == [False, True, False]
    assert found.pieces[0].text == "Read this.\n\n"
    assert found.question == "Who did it?"
    assert found.long[0].first_char == 12
    assert found.long[0].first_line == 3


@pytest.mark.parametrize(
    ("content", "question"),
    [
        (f"{LONG}\nWho did it?", "Who did it?"),
        (f"{LONG}\n\nQuestion: Who did it?\n\nAnswer:", "Question: Who did it?\n\nAnswer:"),
        (f"Who did it?\n\n{LONG}", "Who did it?"),
        ("word " * 2000 + "\n\nList every name.", "List every name."),
        ([{"type": "text", "text": LONG}, {"type": "text", "text": "Who did it?"}], "Who did it?"),
    ],
)
def test_the_question_is_the_end_or_where_the_question_mark_is(content, question):
    assert pieces(user(content)).question == question


@pytest.mark.parametrize("text", ["word " * 2000, "x" * 9000, "Words. " * 2000, "x\n" * 9000])
def test_a_text_without_a_question_has_a_short_end(text):
    found = pieces(user(text))
    assert len(found.question) <= 2000
    assert sum(len(p.text) for p in found.long) > 5000


def test_an_earlier_text_is_long_and_later_turns_stay_whole():
    found = pieces(
        {"role": "system", "content": LONG},
        user(LONG),
        {"role": "assistant", "content": "I have read it."},
        user("Who did it?"),
    )
    assert [p.message for p in found.long] == [1]
    assert found.question == "Who did it?"


def test_documents_are_long_whatever_their_size_and_keep_their_places():
    text = (
        'Two files:\n<document name="a.py">\nx = 1\ny = 2\n</document>\n\n'
        '<document name="b/c.py">\nz\n</document>\n\nWhat is x?'
    )
    found = pieces(user(text))
    assert [(p.name, p.text, p.first_line) for p in found.long] == [
        ("a.py", "x = 1\ny = 2", 1),
        ("b/c.py", "z", 1),
    ]
    assert found.question == "What is x?"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "x = 1"),
        ('odd "name"\n.txt', '<document name="inner">\nnot one\n</document>\nstill the first'),
        ("b.xml", "</document>"),
        ("c.xml", '<document>\n</document>\n</document end="1">\n<a/>'),
    ],
)
def test_wrapped_documents_come_back_as_they_were(name, text):
    found = pieces(
        user(wrap_document(name, text) + "\n" + wrap_document("z", "last") + "\nWhat is x?")
    )
    assert [(p.name, p.text) for p in found.long] == [(name, text), ("z", "last")]
    assert found.question == "What is x?"


def test_later_tiers_take_smaller_texts_and_instructions():
    messages = [{"role": "system", "content": LONG}, user(LONG[:1500]), user("Who did it?")]
    assert [[p.message for p in pieces(*messages, tier=tier).long] for tier in TIERS] == [
        [],
        [1],
        [0, 1],
        [0, 1],
    ]


def test_a_tag_within_a_line_opens_no_document():
    text = 'say <document name="a">\nx\n</document>\n<document name="b">\ny\n</document>\n\nWhat?'
    assert [piece.name for piece in pieces(user(text)).long] == ["b"]


def test_unclosed_documents_cost_linear_time():
    began = time.monotonic()
    pieces(user('<document name="x">\n' * 100_000))
    pieces(user('<document name="x">\n</document>\n' * 50_000))
    assert time.monotonic() - began < 5
