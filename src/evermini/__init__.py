"""Evermini: the gpt-4.1-mini API contract on open weights, on your own machine."""

__version__ = "0.1.0"
