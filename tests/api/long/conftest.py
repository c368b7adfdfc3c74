"""Each module here serves a model of its own: its fixture ``served``."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from evermini.service.runtime import Runtime, ServedModel
from tests.serving import make_client, serving


@pytest.fixture(scope="module")
def url(served: ServedModel) -> Iterator[str]:
    """The server's root."""
    with serving(Runtime([served])) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """A client that waits for long texts to be read."""
    with make_client(url, timeout=300) as client:
        yield client
