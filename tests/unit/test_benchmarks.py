"""The arithmetic of `benchmarks/engine.py`: which variant is the best, and which way a ratio points."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import engine

    return engine


def test_best_variant_and_ratio_per_metric(engine: ModuleType) -> None:
    results = engine.Results("mini", engine.FULL)
    assert results.best("decode") is None
    assert results.rows() == []
    results.note("Q4_0", 0, {"decode": 20.0, "time to first token": 100.0})
    results.note("Q8_0", 0, {"decode": 10.0})
    results.note("Q8_0", 0, {"time to first token": 50.0})
    assert results.best("decode") == "Q4_0"
    assert results.best("time to first token") == "Q8_0"
    assert results.wanted("Q8_0") == {"time to first token"}

    # Scouting decides which variant runs, not what is compared.
    for turn, (ours, theirs) in enumerate([(30.0, 10.0), (40.0, 20.0), (50.0, 20.0)], start=1):
        results.ours.append({"decode": ours, "time to first token": 25.0})
        results.note("Q4_0", turn, {"decode": theirs})
        results.note("Q8_0", turn, {"time to first token": 50.0})
    speed, delay = results.rows()
    assert speed["ratio"] == 2.5  # of 3, 2 and 2.5: higher is better
    assert speed["llama.cpp"] == 20.0
    assert speed["variant"] == "Q4_0"
    assert delay["ratio"] == 2.0  # half the time is twice as good
    assert "| decode | 40 tok/s | 20 tok/s (Q4_0) | 2.50 |" in engine.table(results)


def test_gain_of_parallel_requests_is_shown_for_both(engine: ModuleType) -> None:
    results = engine.Results("mini", engine.FULL)
    for turn in (0, 1):
        results.note("Q4_0", turn, {"one request alone": 10.0, "8 requests at once": 20.0})
    results.ours.append({"one request alone": 15.0, "8 requests at once": 60.0})
    assert "| 8 requests at once / alone | 4.00x | 2.00x | |" in engine.table(results)


def test_every_metric_has_a_unit(engine: ModuleType) -> None:
    units = engine.FULL.units()
    assert len(units) == 9
    assert engine.server_metrics(engine.FULL) < set(units)


@pytest.fixture
def long_prompts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import recall

    return recall


def test_a_dense_prefill_is_extrapolated_by_matrices_and_attention(
    long_prompts: ModuleType,
) -> None:
    def seconds(n: int) -> float:
        return 0.002 * n + 3e-8 * n**2

    measured = {n: seconds(n) for n in (1_000, 8_000, 32_000)}
    measured[1_000] *= 2  # the shortest does not count
    assert long_prompts.extrapolate(measured, 1_000_000) == pytest.approx(seconds(1_000_000))
    text = long_prompts.llamacpp_table(measured, [8_000, 64_000])
    assert "| 8,000 | 18 s | measured |" in text
    assert f"| 64,000 | {seconds(64_000):,.0f} s | a*n + b*n^2 |" in text


def test_tables_of_long_prompts(long_prompts: ModuleType) -> None:
    rows = [
        {"tokens": 8_000, "seconds": 2.0, "rate": 4_000.0, "bytes_per_token": 144.0},
        {"tokens": 30_000, "seconds": 10.0, "rate": 3_000.0, "bytes_per_token": 144.0},
    ]
    assert "| 30,000 | 10.0 | 3,000 | 0.75 | 144 |" in long_prompts.ingest_table(rows)
    found = {
        "length": 100_000, "first": 30.0, "warm": [0.5, 0.7, 0.6], "restarted": 0.9, "cold": 1.5, "peak_rss": 1500.0,
        "decode": {"short": [50.0, 60.0, 40.0], "long": [45.0, 44.0, 46.0]},
        "plain_decode": {"short": [30.0], "long": [29.0]},
    }  # fmt: skip
    text = long_prompts.server_table(found)
    assert "| first token of further questions, median | 600 ms |" in text
    assert "| 45 / 50 tok/s = 0.90 |" in text
    assert "| the same without speculation | 29 / 30 tok/s = 0.97 |" in text


def test_stages_of_a_question_are_medians_and_add_up(long_prompts: ModuleType) -> None:
    import recall_stages

    def stages(*seconds: float) -> recall_stages.Stages:
        made = recall_stages.Stages()
        made.time("JSON", lambda: None)
        for name, wall in zip(("JSON", "  of these parsing", "prefill"), seconds, strict=True):
            made.spent[name] = recall_stages.Spent(wall, wall / 2)
        return made

    text = recall_stages.table(
        stages(1.0, 0.4, 2.0), [stages(0.1, 0.05, 0.2), stages(0.3, 0.1, 0.4), stages(0.2, 0.1, 9)]
    )
    assert "| JSON | 1000.0 | 200.0 | 100.0 |" in text
    assert "| prefill | 2000.0 | 400.0 | 200.0 |" in text
    assert text.endswith("| **all** | 3000.0 | 600.0 | 300.0 |")


def test_cold_pages_leave_the_file_alone(long_prompts: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"x" * 100_000)
    long_prompts.drop_pages(iter([path]))
    assert path.read_bytes() == b"x" * 100_000
