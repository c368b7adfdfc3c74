"""What several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
