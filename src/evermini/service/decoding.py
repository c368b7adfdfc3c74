"""JSON from strangers: decoded in full or refused, and never at a hundred times its size."""

from __future__ import annotations

from pydantic_core import from_json

from evermini.errors import InvalidRequestError

MAX_OPENINGS = 2_000_000
"""Brackets and braces that open. Each may become an object of 60 bytes and more, whatever little it holds."""
MAX_COMMAS = 16_000_000
"""Commas: numbers in a list, say. The contract's longest prompt as token ids has a million."""


class JsonError(InvalidRequestError):
    """What was sent is no JSON, or more of it than is decoded; its message is a clause without a full stop."""


def decode_json(raw: bytes) -> object:
    """Return what ``raw`` says. Nesting is limited, too, and numbers are finite.

    Raises:
        JsonError: It is no JSON, or has too many values.
    """
    if len(raw) > MAX_OPENINGS:
        if raw.count(b"[") + raw.count(b"{") > MAX_OPENINGS:
            raise JsonError(f"it has more than {MAX_OPENINGS} arrays and objects")
        if raw.count(b",") > MAX_COMMAS:
            raise JsonError(f"it has more than {MAX_COMMAS} values")
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise JsonError(str(error)) from None
