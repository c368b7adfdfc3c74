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
