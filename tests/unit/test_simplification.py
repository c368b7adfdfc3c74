"""Scores of simplified texts, against published values where there are any."""

from __future__ import annotations

import pytest

from evermini.evals.simplification import bleu, compression, fkgl, sari, tokens_13a
from tests.conftest import data_file

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def test_sari_of_a_published_system() -> None:
    folder = data_file("asset-turk/turkcorpus")
    sources = (folder / "test.truecase.detok.orig").read_text().splitlines()
    people = [(folder / f"test.truecase.detok.simp.{n}").read_text().splitlines() for n in range(8)]
    answers = data_file("asset-turk/system_outputs/turkcorpus_test.ACCESS").read_text().splitlines()
    assert sari(sources, answers, list(zip(*people, strict=True))) == pytest.approx(
        41.381013, abs=1e-4
    )


def test_sari_knows_better_from_worse() -> None:
    good = sari([SOURCE], ["About 95 species are now accepted ."], [REFERENCES])
    copied = sari([SOURCE], [SOURCE], [REFERENCES])
    assert good > copied > sari([SOURCE], ["Bananas"], [REFERENCES])
    assert sari(["a b c d e"], ["a b c d f"], [["a b c d f"]]) == pytest.approx(100.0)


def test_bleu() -> None:
    assert bleu(REFERENCES[:1], [REFERENCES]) == pytest.approx(100.0)
    assert bleu(["Bananas"], [REFERENCES]) == 0.0
    # by hand: precisions 5/6, 4/5, 3/4, 2/3; no brevity penalty
    found = bleu(["the cat sat on the rug"], [["the cat sat on the mat"]])
    assert found == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # a zero is smoothed to 1/2 of its count, the next to 1/4; brevity exp(1 - 6/4)
    short = bleu(["the cat rug sat"], [["the cat sat on the mat"]])
    assert short == pytest.approx(
        100 * 2.718281828 ** (-0.5) * (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    )


def test_tokens() -> None:
    assert tokens_13a('It costs 3,000.50, "he" said (2-3).') == [
        *("It", "costs", "3,000.50", ",", '"', "he", '"', "said", "(", "2", "-", "3", ")", "."),
    ]


def test_reading_level_and_length() -> None:
    hard = "Multidisciplinary palliative interventions demonstrated heterogeneous effectiveness."
    assert fkgl([hard]) > fkgl(["The cat sat. It was warm."])
    # 6 words, 2 sentences, 6 syllables
    assert fkgl(["The cat sat. It was warm."]) == pytest.approx(0.39 * 3 + 11.8 - 15.59)
    assert compression(["abcd", "ab"], ["ab", "ab"]) == pytest.approx(0.75)
