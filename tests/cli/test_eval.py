"""``evermini eval`` on the real nano model: small, but all the way."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from evermini import LLM
from tests.cli.conftest import Result

Run = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with 60,000 characters of prose."""
    rng = random.Random(0)
    nouns = ["river", "mountain", "baker", "train", "letter", "garden", "window", "harbour", "song"]
    verbs = ["crossed", "painted", "remembered", "followed", "repaired", "watched", "counted"]
    paragraphs = [
        " ".join(
            f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}."
            for _ in range(9)
        )
        for _ in range(220)
    ]
    (tmp_path / "data" / "prose").mkdir(parents=True)
    path = tmp_path / "data" / "prose" / "a.txt.gz"
    path.write_bytes(gzip.compress("\n\n".join(paragraphs).encode()))
    return tmp_path / "data"


@pytest.fixture
def lent(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations get the model that is loaded already; and it survives them."""

    class Lent:
        def __getattr__(self, name: str):
            return getattr(llm, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc: object) -> None:
            pass

    monkeypatch.setattr("evermini.cli.talk.open_llm", lambda settings: Lent())


@pytest.mark.usefixtures("lent")
def test_needles_are_hidden_asked_for_and_reported(evermini: Run, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [
        "eval", "needle", "-m", "nano", "--data", data, "--out", out, "--lengths", "2k", "--depths", "3",
        "--kinds", "value", "--tail", "600", "--seed", "11",
    ]  # fmt: skip
    result = evermini(*command)
    assert result.code == 0, result.err
    assert "| 2,048 | recall | 3 |" in result.out
    report = json.loads((out / "report.json").read_text())
    rows = report["rows"]
    assert {row["system"] for row in rows} == {"recall", "dense", "bm25", "window"}
    found = {(row["system"], row["depth"]): row["found"] for row in rows}
    assert all(found[name, depth] == 1 for name in ("bm25", "dense") for depth in (0, 50, 100))
    assert sum(found["recall", depth] for depth in (0, 50, 100)) >= 1  # nano's heads miss some
    assert (found["window", 0], found["window", 100]) == (0, 1)
    assert report["config"]["weights"] == report["config"]["weights"].lower() != ""
    assert (out / "recall.png").exists()

    again = evermini(*command)
    assert again.code == 0
    assert "recall 1/3" not in again.err  # nothing is asked twice
    other = evermini(*command[:-1], "12")
    assert (other.code, "differs in seed" in other.err) == (1, True)


def test_a_missing_data_folder_says_what_to_do(
    evermini: Run, tmp_path: Path, lent: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EVERMINI_EVAL_DATA", str(tmp_path))
    result = evermini("eval", "multikey", "-m", "nano", "--out", tmp_path / "o")
    assert result.code == 1
    assert "EVERMINI_EVAL_DATA" in result.err


def test_unknown_choices_are_named(evermini: Run, tmp_path: Path, lent: None):
    for flag, value in (("--systems", "telepathy"), ("--hay", "straw"), ("--lengths", "long")):
        result = evermini("eval", "multikey", "--out", tmp_path / "o", flag, value)
        assert (result.code, value in result.err) == (1, True), result.err
