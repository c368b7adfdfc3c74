"""How reading a long text goes, and what of it was read, for people."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evermini.recall.recall import Progress
    from evermini.service.reading import Recalled


@contextlib.contextmanager
def reading_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a progress callback for `evermini.LLM.chat`; the first progress draws a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("Reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bars.add_task("", total=1, rate=0.0)

    def report(now: Progress) -> None:
        bars.start()
        bars.update(
            task, total=now.total_tokens, completed=now.done_tokens, rate=now.tokens_per_second
        )

    try:
        yield report
    finally:
        if bars.live.is_started:  # stopping would print an empty line
            bars.stop()


def why_lines(recalled: Recalled | None) -> list[str]:
    """Return what was read of a long text, a line for each passage: score, place."""
    if recalled is None:
        return ["Everything was read: it fits into the model's window."]
    lines = [
        f"Read {len(recalled.prompt):,} of {recalled.full_tokens:,} tokens, looking for: "
        f"{' '.join(recalled.question.split())[:100]}"
    ]
    for passage in sorted(recalled.passages, key=lambda passage: -passage.score):
        first, last = passage.lines
        source = passage.source or f"message {passage.message + 1}"
        page = "" if passage.pages is None else f"  page {_range(*passage.pages)}"
        note = "" if passage.is_included else "  (left out: no room)"
        lines.append(f"{passage.score:7.3f}  {source}:{_range(first, last)}{page}{note}")
    return lines


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
