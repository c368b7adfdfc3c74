"""Evermini: the gpt-4.1-mini API contract on open weights, on your own machine."""

from typing import TYPE_CHECKING, Any

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
