"""Evermini: the gpt-4.1-mini API contract on open weights, on your own machine."""

import os
from typing import TYPE_CHECKING, Any

# OpenMP threads spin for milliseconds at every barrier unless told otherwise, which ruins decoding as soon as anything
# else wants a core (docs/log.md). Read once, when PyTorch loads the runtime: so it is set before any import of it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from evermini.llm import LLM

__all__ = ["LLM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `LLM`, and with it torch, only when it is asked for."""
    if name == "LLM":
        from evermini.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
