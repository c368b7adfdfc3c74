"""Passages: where they begin and end, which words stand in them, and BM25 over them."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from evermini.recall.passages import MAX_TOKENS, MIN_TOKENS, block_starts, passage_starts
from evermini.recall.scan import BLOCK
from evermini.recall.segment import Segment, tokenize
from evermini.recall.select import token_weights
from evermini.recall.words import K1, B, PassageWords, WordIndex, index_words, word_hash, words
from tests.recall_fakes import WordTokenizer, filler


def cut_up(text: str) -> list[str]:
    _, chars = tokenize(WordTokenizer(), Segment(text))
    starts = passage_starts(text, chars)
    edges = [*chars[starts].tolist(), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def sentence(n: int, words: int = 11) -> str:
    return " ".join(f"w{n}x{i}" for i in range(words)) + "."


def paragraph(n: int, sentences: int) -> str:
    return " ".join(sentence(100 * n + i) for i in range(sentences))


def test_paragraphs_are_passages():
    text = "\n\n".join(paragraph(n, 5) for n in range(4))
    assert [p.strip() for p in cut_up(text)] == [paragraph(n, 5) for n in range(4)]


def test_a_heading_goes_with_what_follows():
    text = f"First title\n\n{paragraph(1, 5)}\n\nSecond title\n\n{paragraph(2, 5)}\n"
    first, second = cut_up(text)
    assert first.startswith("First title")
    assert second.startswith("Second title")


def test_long_paragraphs_end_with_a_sentence():
    passages = cut_up(paragraph(1, 60))
    assert len(passages) > 4
    assert all(p.rstrip().endswith(".") for p in passages)
    assert all(len(WordTokenizer().encode(p)) <= MAX_TOKENS for p in passages)


def test_code_ends_with_a_line():
    passages = cut_up("\n".join(f"    call_{i}(a, b)" for i in range(300)))
    assert all(p.endswith("\n") for p in passages[:-1])


@pytest.mark.parametrize(
    "text",
    ["", "x", "\n\n\n", "a b " * 2000, "word. " * 500, "\n".join("ab" * 1000), "e.g. this\n\n" * 300, "日本。" * 400],
)  # fmt: skip
def test_passages_and_blocks_cover_everything(text):
    ids, chars = tokenize(WordTokenizer(), Segment(text))
    starts = passage_starts(text, chars)
    assert (len(starts) > 0) == (len(ids) > 0)
    edges = [*starts.tolist(), len(ids)]
    assert edges[0] == 0
    assert all(0 < b - a <= MAX_TOKENS for a, b in itertools.pairwise(edges))
    for chunk in (64, 2048):
        blocks = [*block_starts(starts, len(ids), chunk).tolist(), len(ids)]
        assert all(0 < b - a <= BLOCK for a, b in itertools.pairwise(blocks))
        assert {*starts.tolist(), *range(0, len(ids), chunk)} <= {*blocks}


def test_few_passages_are_short():
    lengths = [
        len(WordTokenizer().encode(p))
        for p in cut_up("\n\n".join(filler(20, n) for n in range(200)))
    ]
    assert min(lengths[:-1]) >= MIN_TOKENS


# Words


def found(text: str) -> list[str]:
    return [word for _, _, word in words(text)]


def test_words():
    assert found("Houses, house; HOUSE") == ["house", "house", "house"]
    assert found("information informative") == ["inform", "inform"]
    assert found("parse_known_args") == ["parse_known_args", "parse", "known", "arg"]
    assert found("ArgumentParser") == ["argume", "argume", "parser"]
    assert found("3.11 x86_64") == ["3", "11", "x86_64", "86", "64"]
    assert found("東京都") == ["東京", "京都"]
    assert found("") == []


def test_places_of_words():
    text = "see HTTPServer naïve_2 ok"
    for start, end, word in words(text):
        assert text[start:end].lower().startswith(word)


def test_the_index_of_words_survives_the_disk():
    text = "\n\n".join(paragraph(n % 3, 4) for n in range(8))
    _, chars = tokenize(WordTokenizer(), Segment(text))
    index = index_words(text, chars[passage_starts(text, chars)])
    copy = WordIndex.from_bytes(index.to_bytes())
    for name in ("hashes", "firsts", "passages", "counts", "lengths"):
        assert np.array_equal(getattr(copy, name), getattr(index, name))


def bm25(documents: list[list[str]], query: list[str]) -> list[float]:
    """The textbook's formula, slowly."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in set(query):
            n = sum(word in other for other in documents)
            rarity = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            norm = counts[word] + K1 * (1 - B + B * len(document) / mean)
            score += rarity * counts[word] * (K1 + 1) / norm
        scores.append(score)
    return scores


def test_bm25_follows_the_formula():
    texts = [" ".join(f"v{(i * i + n) % (7 + n)}" for i in range(20 + 9 * n)) for n in range(6)]
    query = "v1 v2 v2 v9 absent"
    documents = [found(text) for text in texts]
    one = index_words("\n".join(texts[:4]), np.cumsum([0, *(len(t) + 1 for t in texts[:3])]))
    two = index_words("\n".join(texts[4:]), np.array([0, len(texts[4]) + 1]))
    empty = index_words("", np.zeros(0, np.int64))
    scores = PassageWords([one, empty, two]).score({word_hash(word): 1.0 for word in found(query)})
    assert scores == pytest.approx(bm25(documents, found(query)), rel=1e-5)


def test_tokens_count_as_much_as_their_words_are_rare():
    question = "Who is Zebulon?"
    common, rare = {word_hash("who"), word_hash("is")}, word_hash("zebulo")
    pieces = re.findall(r" ?[A-Za-z]{1,4}|\?", question)  # Zebulon is two tokens
    ends = list(itertools.accumulate(map(len, pieces)))
    weights = token_weights(
        question, ends, lambda word: 6.0 if word == rare else 0.6 if word in common else 0
    )
    assert weights.tolist() == pytest.approx([1 / 22, 1 / 22, 10 / 22, 10 / 22, 0])
    assert token_weights("?!", [1, 2], lambda _: 1.0).tolist() == [0.5, 0.5]
    assert torch.equal(token_weights("a b", [1, 3], lambda _: 0.0), torch.tensor([0.5, 0.5]))
