"""Oracles and fast paths are compared as users run them: on several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    """Kernels share their work out also where this process was told to keep to one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
