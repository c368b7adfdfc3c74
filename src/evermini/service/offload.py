"""Work whose time grows with the prompt, kept off the event loop where it would be felt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

INLINE_CHARACTERS = 4096
"""Up to here tokenising takes a millisecond or two: less than a thread may have to wait for its turn."""


async def tokenise(
    num_characters: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Return ``work(...)``, done here for a short prompt and in a thread for a long one."""
    if num_characters <= INLINE_CHARACTERS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
