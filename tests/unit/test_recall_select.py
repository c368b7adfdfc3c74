"""What was asked for is found, wherever it lies, and spans say truthfully where."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from evermini.errors import ModelError
from evermini.recall.prompt import Span, excerpts
from evermini.recall.segment import Segment, SegmentCache, cut, tokenize
from evermini.recall.select import Policy, spread
from evermini.recall.windows import Windows
from tests.recall_fakes import WordTokenizer, fake_recall, filler

NEEDLE = "the zebra password is tulip"
QUESTION = "what is the zebra password"


def place(words: int, at: int, seed: int = 0) -> str:
    lines = filler(words, seed).split(" ")
    return " ".join([*lines[:at], NEEDLE, *lines[at:]])


def found(selection, text: str) -> bool:
    at = text.index(NEEDLE)
    return any(s.chars[0] <= at and at + len(NEEDLE) <= s.chars[1] for s in selection.spans)


# Chunks are 64 tokens and blocks 32: every offset to both boundaries is among these.
@pytest.mark.parametrize("at", [0, 1, 300, *range(960, 1030, 3), 1990, 1997, 1999])
def test_a_needle_is_found_at_every_place(tmp_path, at):
    text = place(2000, at)
    selection = fake_recall(tmp_path).ask([Segment(text)], QUESTION, Policy(max_tokens=256))
    assert found(selection, text)
    assert selection.num_tokens <= 256


@pytest.mark.parametrize("words", [1, 5, 31, 40, 70, 130])
def test_short_contexts_and_last_partial_blocks(tmp_path, words):
    text = place(words, words)
    assert found(fake_recall(tmp_path).ask([Segment(text)], QUESTION), text)


def test_the_right_segment_of_many(tmp_path):
    texts = [filler(150, seed) for seed in range(50)]
    texts[37] = place(150, 75, seed=37)
    context = [Segment(text, f"doc{i}.txt") for i, text in enumerate(texts)]
    selection = fake_recall(tmp_path).ask(context, QUESTION, Policy(max_tokens=200, min_passages=1))
    best = max(selection.spans, key=lambda span: span.score)
    assert (best.segment, best.name) == (37, "doc37.txt")


def test_nothing_to_find(tmp_path):
    recall = fake_recall(tmp_path)
    assert recall.ask([], QUESTION).spans == ()
    assert recall.ask([Segment("")], QUESTION).spans == ()
    assert recall.ask([Segment(filler(100))], "").spans == ()


def test_asking_twice_and_in_other_processes_gives_the_same(tmp_path):
    context = [Segment(place(3000, 2345)), Segment(filler(500, 3))]
    one, other = fake_recall(tmp_path / "1"), fake_recall(tmp_path / "2")
    one._tokenizer.encode(context[0].text + context[1].text + QUESTION)
    other._tokenizer = one._tokenizer
    other.ingest(context[1:])  # another order
    first = one.ask(context, QUESTION)
    assert one.ask(context, QUESTION).spans == first.spans == other.ask(context, QUESTION).spans


def test_spans_are_in_order_disjoint_and_within_the_budget(tmp_path):
    text = " ".join(place(300, 150, seed) for seed in range(20))
    for budget in (0, 31, 100, 700, 100_000):
        selection = fake_recall(tmp_path).ask([Segment(text)], QUESTION, Policy(max_tokens=budget))
        ranges = [span.tokens for span in selection.spans]
        assert ranges == sorted(ranges)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert sum(end - start for start, end in ranges) == selection.num_tokens <= budget


def test_a_chain_of_facts_takes_a_second_round(tmp_path):
    lines = filler(4000).split("\n")
    lines[50] = "the red warehouse belongs to Quillon Mirabel Ostrander"
    lines[250] = "every Quillon Mirabel Ostrander hides keys inside a violin"
    text = "\n".join(lines)
    recall = fake_recall(tmp_path)
    ask = lambda follow: recall.ask(  # noqa: E731
        [Segment(text)], "the red warehouse", Policy(follow=follow, min_passages=1, falloff=0.3)
    )
    second_hop = text.index("Ostrander hides keys")
    covers = lambda s: any(span.chars[0] <= second_hop < span.chars[1] for span in s.spans)  # noqa: E731
    assert not covers(ask(0))
    assert covers(ask(0.5))
    assert ask(0.5).rounds == 2


def test_places_in_text_with_wide_characters(tmp_path):
    text = "Zoë 🦓 naïve\n" * 40 + f"β {NEEDLE} ж\n" + "日本語 текст\n" * 40
    selection = fake_recall(tmp_path).ask(
        [Segment(text)], QUESTION, Policy(max_tokens=64, min_passages=1)
    )
    (span, *_) = sorted(selection.spans, key=lambda s: -s.score)
    assert found(selection, text)
    assert span.lines[0] <= 41 <= span.lines[1]
    assert text[slice(*span.chars)].encode()


def test_a_tokenizer_that_changes_text_is_refused():
    class Lower(WordTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    assert len(tokenize(Lower(), Segment("abc"))[0]) == 1
    with pytest.raises(ModelError, match="another index model"):
        tokenize(Lower(), Segment("Abc"))


def test_tokens_partition_characters_even_inside_one():
    class Bytes:
        def encode(self, text):
            return list(text.encode())

        def token_bytes(self, token_id):
            return bytes([token_id])

    text = "aé🦓b"
    _, starts = tokenize(Bytes(), Segment(text))
    assert starts.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]


def test_unnormalised_text_is_one_segment_with_its_normal_form():
    assert Segment("cafe\u0301").digest == Segment("café").digest


def test_cutting_keeps_everything_and_depends_on_what_is_before_only():
    text = filler(9000)
    segments = cut(text, "f", max_chars=5000)
    assert "".join(s.text for s in segments) == text
    assert [s.first_char for s in segments] == [
        sum(len(t.text) for t in segments[:i]) for i in range(len(segments))
    ]
    assert all(s.line_of(0) == 1 + text.count("\n", 0, s.first_char) for s in segments)
    longer = cut(text + "\nand more\n" * 300, "f", max_chars=5000)
    assert [s.digest for s in longer[: len(segments) - 1]] == [s.digest for s in segments[:-1]]
    assert "".join(s.text for s in cut("x" * 20_000, max_chars=3000)) == "x" * 20_000


def test_what_was_cut_before_is_not_looked_at_again():
    text = "\n\n".join(
        f"[page {n}]\npage {n}: [page 7] is no mark\n" + filler(60, n) for n in range(40)
    )
    fresh = cut(text, "a.txt", max_chars=2000)
    cache = SegmentCache()
    first = cut(text, "a.txt", max_chars=2000, known=cache.known)
    grown = cut(text + "\n\nand more", "a.txt", max_chars=2000, known=cache.known)
    assert first == fresh
    assert [s.page_of(len(s.text)) for s in first] == [s.page_of(len(s.text)) for s in fresh]
    assert first[-1].page_of(len(first[-1].text)) == 39
    assert all(a is b for a, b in zip(first[:-1], grown, strict=False))
    other = cut(text, "b.txt", max_chars=2000, known=cache.known)
    assert [s.name for s in other] == ["b.txt"] * len(fresh)
    assert [s.digest for s in other] == [s.digest for s in fresh]


def test_segments_are_kept_within_a_bound():
    cache = SegmentCache(max_chars=100)
    first, second, third = (Segment(letter * 40) for letter in "abc")
    assert cache.known(first) is first
    assert cache.known(second) is second
    assert cache.known(Segment("a" * 40)) is first
    cache.known(third)  # the second goes, which was not used since
    assert cache.known(Segment("a" * 40)) is first
    assert cache.known(Segment("b" * 40)) is not second


def test_questions_to_one_context_do_not_disturb_each_other(tmp_path):
    """What is kept of a context between questions changes no answer, also when part of it was evicted."""
    text = place(2000, 700)
    context = [Segment(text), Segment(filler(300, 5))]
    recall = fake_recall(tmp_path)
    questions = [QUESTION, "where is w17", "tulip zebra", QUESTION]
    answers = [recall.ask(context, question) for question in questions]
    for question, answer in zip(questions, answers, strict=True):
        alone = fake_recall(tmp_path)
        alone._tokenizer = recall._tokenizer
        assert alone.ask(context, question).spans == answer.spans
    assert recall.remove(context[1].digest)
    assert recall.ask(context, QUESTION).spans == answers[0].spans
    assert recall.verify() == []


def test_windows_fit_and_keep_all_rows():
    windows = Windows((9001, 9002), sinks=64, window=512, chunk=2048)
    assert windows.fitted(8192) == windows
    small = windows.fitted(300)
    assert small.longest <= 300
    with pytest.raises(ModelError):
        windows.fitted(40)
    ids = np.arange(5000, dtype=np.uint32)
    rows = []
    for chunk in range(small.num_chunks(len(ids))):
        start, end = small.chunk_range(chunk, len(ids))
        passed = small.chunk_pass(ids, chunk).tolist()
        assert len(passed) <= small.longest
        assert len(set(passed)) == len(passed), "no token twice"
        rows += passed[start - end :]
    assert rows == ids.tolist()


def test_spread_tells_needles_from_summaries():
    needle = torch.zeros(1000)
    needle[5] = 1
    assert spread(needle) < 0.01
    assert spread(torch.ones(1000)) == pytest.approx(1)


# Excerpts


def count(text: str) -> int:
    return len(text.split())


def test_excerpts_mark_what_is_missing(tmp_path):
    text = place(2000, 1000)
    context = cut(text, "notes.txt", max_chars=4000)
    selection = fake_recall(tmp_path).ask(context, QUESTION, Policy(max_tokens=200))
    result = excerpts(context, selection.spans, count, 10_000)
    assert NEEDLE in result.text
    assert result.included == selection.spans
    assert result.left_out == ()
    assert f"{result.omitted_chars:,} characters" in result.text
    line = 1 + text.count("\n", 0, text.index(NEEDLE))
    total = 1 + text.count("\n")
    marks = [mark for mark in result.text.splitlines() if mark.startswith("[notes.txt, line")]
    assert marks
    assert all(mark.endswith(f"of {total}]") for mark in marks)
    assert any(first <= line <= last for first, last in map(_lines, marks))


def _lines(mark: str) -> tuple[int, int]:
    numbers = mark.split("line")[1].lstrip("s ").split(" of")[0].split("-")
    return int(numbers[0]), int(numbers[-1])


@pytest.mark.parametrize("mark_end", [False, True])
def test_excerpts_keep_the_best_within_the_budget(tmp_path, mark_end):
    text = place(4000, 3000)
    context = [Segment(text)]
    selection = fake_recall(tmp_path).ask(
        context, QUESTION, Policy(max_tokens=2000, falloff=0, min_passages=10)
    )
    assert len(selection.spans) > 3
    result = excerpts(context, selection.spans, count, 400, mark_end=mark_end)
    assert count(result.text) == result.num_tokens <= 400
    assert result.text.endswith("\n[End of the excerpts]\n\n") is mark_end
    assert NEEDLE in result.text
    assert result.left_out
    assert {*result.included, *result.left_out} == {*selection.spans}


def test_excerpts_of_everything_leave_nothing_out(tmp_path):
    text = place(60, 30)
    context = [Segment(text)]
    selection = fake_recall(tmp_path).ask(context, QUESTION, Policy(falloff=0, min_passages=10))
    result = excerpts(context, selection.spans, count, 10_000)
    assert result.omitted_chars == 0
    assert text in result.text


def test_definitions_that_the_question_names_are_on_their_lines():
    text = "import os\n\n\nclass Queue(Base):\n    def size(self):\n        return 3\n\nclass of things\n"
    segment = Segment(text, "queue.py")
    span = Span(0, "queue.py", (0, 9), (0, len(text)), (1, 8), 1.0, 1)
    question = "Where is the class Queue defined, and what does size of it return?"
    shown = excerpts([segment], [span], len, 10_000, question).text
    assert "[queue.py, lines 1-8 of 9: class Queue is defined in queue.py on line 4, " in shown
    assert ", def size is defined in queue.py on line 5 and returns 3]\n" in shown
    assert ": class" not in excerpts([segment], [span], len, 10_000).text


def test_pages_are_in_the_marks():
    text = "[page 1]\nOne.\n\n[page 2]\nTwo.\n\n[page 3]\nThree.\n"
    segments = cut(text, "r.pdf", max_chars=30)
    assert [segment.page_of(len(segment.text)) for segment in segments] == [2, 3]
    at = text.index("Two")
    span = Span(0, "r.pdf", (0, 1), (at, at + 3), (5, 5), 1.0, 1)
    assert "[r.pdf, page 2, line 5 of 9]" in excerpts(segments, [span], len, 10_000).text
