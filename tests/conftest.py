"""What several test folders share, and how many processes `scripts/test` spreads the tests over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

WORKER_BYTES = 4 << 30
"""Memory for one of several processes: nano twice, a training beside it, and what was imported."""


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Threads of several processes that wait for each other by spinning get nothing done, so the cores are shared out. It is
# said here because other conftests import torch, which looks once.
if (_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // _workers)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes ``-n auto`` starts: one per core and `WORKER_BYTES`, none for a single file.

    What is chosen by marks (slow, gpu) measures, takes the whole machine or prints, and output that is not captured
    gets lost on the way: these run alone, too.
    """
    import psutil

    marks = config.option.markexpr
    if config.option.capture == "no" or "not slow" not in marks or "not gpu" not in marks:
        return 0
    files = [config.invocation_params.dir / name.partition("::")[0] for name in config.args]
    most = len(set(files)) if all(path.is_file() for path in files) else _num_cores()
    found = min(most, _num_cores(), psutil.virtual_memory().available // WORKER_BYTES)
    return found if found > 1 else 0


@pytest.fixture(scope="session")
def nano_path() -> Path:
    """The real nano model's GGUF file, from the catalogue's cache (fetched where it is absent)."""
    from evermini.models.pull import ensure

    return ensure("nano")


def data_file(name: str) -> Path:
    """A file of the public data sets; the test is skipped where they are not.

    They lie in ``$EVERMINI_TEST_DATA`` or in ``shared/data`` beside the checkout.
    """
    root = os.environ.get("EVERMINI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(root) / name
    if not path.exists():
        pytest.skip(f"no {name} under {root} (set EVERMINI_TEST_DATA)")
    return path
