"""Work that takes long, kept out of the way: off the event loop, or behind the engine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

INLINE_CHARACTERS = 4096
"""Up to here tokenising takes a millisecond or two: less than a thread may have to wait for its turn."""
_NICENESS = 10


async def tokenise(
    num_characters: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Return ``work(...)``, done here for a short prompt and in a thread for a long one."""
    if num_characters <= INLINE_CHARACTERS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def step_back() -> None:
    """Lower this thread's priority (Linux: of one thread); helper threads that it starts inherit that.

    The engine's threads then come first wherever both want a core: a stream slows down by what memory and caches are
    shared, not by half.
    """
    with suppress(AttributeError, OSError):
        thread = threading.get_native_id()
        own = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, own + _NICENESS)
