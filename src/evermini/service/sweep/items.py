"""The way "collect": each window gives the items it has for a list; code joins and counts them."""

from __future__ import annotations

import asyncio
import re

from evermini.service.sweep import prompts
from evermini.service.sweep.asking import all_of
from evermini.service.sweep.forms import MOST_ITEMS, Choice, Items, Question
from evermini.service.sweep.reader import WindowReader
from evermini.service.sweep.result import Found
from evermini.service.sweep.windows import Window

COLLECT_TOKENS = 640
"""Window for collecting: a small model lists few items completely, many it does not."""
_MAX_COLLECTED = 200
_SMALLEST_WINDOW = 128
"""A window is not halved below this when its items exceed a reply."""


async def collect(reader: WindowReader) -> Found:
    """Collect what the question asks for from all windows.

    Raises:
        EverminiError: As `Asker.ask`.
    """
    cut = await asyncio.to_thread(reader.windows, reader.fitting(COLLECT_TOKENS))
    reader.begin(cut)
    form = Items()
    num_windows = len(cut)

    async def items_of(window: Window) -> list[str]:
        nonlocal num_windows
        message = prompts.collect(reader.shown(window), reader.question)
        text, is_cut = await reader.read(window, message, _MAX_COLLECTED, form)
        lines = [
            line.removeprefix("- ").strip()
            for line in text.splitlines(keepends=True)
            if line.endswith("\n")
        ]
        is_loop = len({_key(line) for line in lines}) < 0.6 * len(lines)
        has_more = is_cut or len(lines) >= MOST_ITEMS
        if has_more and not is_loop and window.num_tokens > _SMALLEST_WINDOW:
            halves = reader.windows(window.num_tokens * 2 // 3, window.parts)
            num_windows += len(halves)
            reader.again(window)
            parts = await all_of(items_of(half) for half in halves)
            return [item for part in parts for item in part]
        return lines

    found = await all_of(items_of(window) for window in cut)
    items: dict[str, str] = {}
    num_dropped = 0
    for window, lines in zip(cut, found, strict=True):
        words = set(_words(reader.shown(window)))
        for line in lines:
            if not _is_grounded(line, words):
                num_dropped += 1
            elif (key := _key(line)) and key != "none":
                items.setdefault(key, line)
    question, chosen = await _sift(reader, list(items.values()))
    num_dropped += len(items) - len(chosen)
    head = (
        "[All of this text was read, and what it has for the list was collected and counted for you. "
        f"The result: {len(chosen)} items]"
    )
    return Found(
        "collect", question, num_windows, head, tuple(f"- {item}" for item in chosen),
        items=chosen, num_empty=sum(not lines for lines in found), num_dropped=num_dropped,
    )  # fmt: skip


async def _sift(reader: WindowReader, items: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return the question that tells whether an item belongs into the list, and those for which it says so."""
    if not items:
        return reader.question, ()
    asking = prompts.about_item(reader.question)
    reply = await reader.asker.ask(asking, max_tokens=40, form=Question())
    form = Choice(("Yes", "No"))
    verdicts = await all_of(
        reader.asker.ask(prompts.check(item, reply.text, ("yes", "no")), max_tokens=4, form=form)
        for item in items
    )
    kept = (item for item, verdict in zip(items, verdicts, strict=True) if verdict.text == "Yes")
    return reply.text, tuple(kept)


def _key(item: str) -> str:
    """Return what makes an item the same as another."""
    return " ".join(word for word in _words(item) if word not in ("a", "an", "the"))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _is_grounded(item: str, words: set[str]) -> bool:
    """Return whether at least half of an item's words stand in the window it is said to come from."""
    own = _words(item)
    return bool(own) and 2 * sum(word in words for word in own) >= len(own)
