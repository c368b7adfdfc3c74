"""Notes on the parts of a long text: nothing invented, nothing twice, short enough, each with its place."""

from __future__ import annotations

import asyncio

import pytest

from evermini.service.questions import has_shape, wants_summary
from evermini.service.sweep.asking import Messages, Reply
from evermini.service.sweep.forms import Choice, Form, Items, Question, QuestionWithAnswers
from evermini.service.sweep.notes import Note, NoteTaker, beginning, opening, tidy, without_repeats

PART = "Anna Berg sold 12 boats in Oslo. She was glad. The boats' owner, Lee, was not."


@pytest.mark.parametrize(
    ("note", "kept"),
    [
        ("Anna sold 12 boats. She sold 13 cars.", "Anna sold 12 boats."),
        ("Boats were sold in Oslo. Later came Paul Graham.", "Boats were sold in Oslo."),
        ("The text says that boats were sold. All of Lee's.", "Boats were sold. All of Lee's."),
        ("- One was sold\n- In Rome, two", "One was sold"),
        ("The writer met Zoe.", ""),
    ],
)
def test_a_sentence_stays_if_its_part_has_its_names_and_numbers(note, kept):
    assert tidy(note, PART) == kept


def test_what_was_said_is_not_said_again_but_no_document_is_left_out():
    notes = [
        Note("a", 0, "Boats are sold in the town. It rains."),
        Note("a", 0, "It rains. Boats are sold in the town."),
        Note("b", 1, "Boats are sold in the town. Nobody buys."),
    ]
    kept = without_repeats(notes)
    assert [(note.place, note.text) for note in kept] == [
        ("a", "Boats are sold in the town. It rains."),
        ("b", "Boats are sold in the town. Nobody buys."),
    ]


class Halver:
    """Shortens to the first half of the words, and invents a name at the end."""

    window = 8192
    tokens_read = tokens_cached = tokens_written = 0

    def __init__(self) -> None:
        self.num_asked = 0

    async def ask(self, messages: Messages, *, max_tokens: int, form: Form | None = None) -> Reply:
        self.num_asked += 1
        text = messages[-1]["content"].split("text:\n\n")[1].split("\n\nWrite these")[0]
        words = text.split()
        return Reply(" ".join(words[: len(words) // 2]).rstrip(".") + ". So said Zebulon.", False)


def words_of(text: str) -> int:
    return len(text.split())


def shortened(notes: list[Note], room: int) -> tuple[list[Note], NoteTaker, Halver]:
    asker = Halver()
    taker = NoteTaker(asker, "Summarise.", words_of, 64)
    return asyncio.run(taker.shorten(notes, room)), taker, asker


def test_notes_that_fit_stay_as_they_are():
    notes = [Note(f"{i}.txt", i, "One thing. Another thing.") for i in range(5)]
    assert shortened(notes, 100)[0] == notes


def test_notes_on_one_document_are_put_together_first_and_every_document_is_named():
    notes = [
        Note(f"{i}.txt", i, f"Part {j} tells of {i} ships. They sail. It ends.")
        for i in range(4)
        for j in range(3)
    ]
    kept, taker, asker = shortened(notes, 80)
    assert [note.place for note in kept] == [f"{i}.txt" for i in range(4)]
    assert (taker.num_rounds, asker.num_asked) == (1, 4)
    assert not any("Zebulon" in note.text for note in kept)
    assert sum(words_of(note.line) + 1 for note in kept) <= 80


def test_then_each_is_its_first_sentence_before_neighbours_are_put_together():
    notes = [Note(f"{i}.txt", i, "Ships sail out. " + "It was long. " * 10) for i in range(10)]
    kept, _, asker = shortened(notes, 80)
    assert [note.place for note in kept] == [f"{i}.txt" for i in range(10)]
    assert asker.num_asked == 0
    kept, taker, _ = shortened(notes, 25)
    assert kept[0].place.startswith("0.txt to ")
    assert taker.num_rounds >= 1
    assert sum(words_of(note.line) + 1 for note in kept) <= 25


def test_neighbours_of_one_text_have_the_lines_of_both():
    notes = [Note(f"lines {10 * i + 1}-{10 * i + 10}", 0, "Ships sail. " * 8) for i in range(8)]
    kept, _, _ = shortened(notes, 60)
    assert kept[0].place.startswith("lines 1-")
    assert kept[-1].place.endswith("-80")


def test_a_note_begins_with_what_follows_nothing():
    assert (
        beginning("It also tells of ships. Then it ends. It does.", 2)
        == "It tells of ships. Then it ends."
    )
    assert opening("Ships\nsail out. They return.") == "Ships sail out."
    assert opening("word " * 100).endswith("word ...")


def test_a_summary_is_told_from_its_words_and_so_is_its_shape():
    assert wants_summary("Summarise this collection of essays.")
    assert wants_summary("What are these texts about?")
    assert not wants_summary("How does her view of money change?")
    assert has_shape("Summarise this in two sentences.")
    assert not has_shape("Summarise this collection of essays.")


@pytest.mark.parametrize(
    ("form", "reply", "means"),
    [
        (Choice(("Yes", "No")), '{"answer": "No"}', "No"),
        (Choice(("Yes", "No")), "**no**, because", "No"),
        (Choice(("Yes", "No")), "The answer is: yes.", "Yes"),
        (Choice(("Yes", "No")), '{"answer": "maybe"}', None),
        (Choice(("Yes", "No")), "Nobody knows", None),
        (Choice(("negative", "positive")), "It is not negative", None),
        (Items(), '{"items": ["a b", " c "]}', "- a b\n- c\n"),
        (Items(), '{"items": []}', "none"),
        (Items(), "Here:\n1. a\n* b", "- a\n- b\n"),
        (Items(), "None.", "none"),
        (Items(), "There are many.", None),
        (Question(), '{"question": "Is this a city?"}', "Is this a city?"),
        (Question(), "Sure: Is this a city?", "Is this a city?"),
        (Question(), '{"question": "What?"}', None),
        (QuestionWithAnswers(), "`Is this good or bad? |bad| good`", "Is this good or bad? | bad | good"),
        (QuestionWithAnswers(), '{"question": "Is this good or bad?", "wanted_answer": "bad", "other_answer": "good"}',
         "Is this good or bad? | bad | good"),
        (QuestionWithAnswers(), "Is this good?", None),
    ],
)  # fmt: skip
def test_a_reply_is_read_if_it_is_clear(form, reply, means):
    assert form.read(reply) == means


def test_an_example_reads_as_it_was_written():
    for form, text in (
        (Choice(("Yes", "No")), "Yes"),
        (Items(), "- Tom Baker\n- Ms Lee\n"),
        (Items(), "none"),
        (Question(), "Is this a date?"),
        (QuestionWithAnswers(), "Is this good or bad? | bad | good"),
    ):
        assert form.from_json(form.to_json(text)) == text


def test_a_list_that_was_cut_has_its_complete_items():
    assert Items().read_cut('{"items": ["a", "b, \\"c\\"", "d') == '- a\n- b, "c"\n'
    assert Items().read_cut("- a\n- b\n- c") == "- a\n- b\n"
