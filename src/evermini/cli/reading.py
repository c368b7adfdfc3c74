"""How reading a long text goes, and what of it was read, for people."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermini.llm import AnswerStream
    from evermini.recall.recall import Progress
    from evermini.service.swept import Swept


@contextlib.contextmanager
def reading_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a progress callback for `evermini.LLM.chat`; the first progress draws a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from evermini.service.swept import SweepProgress

    bars = Bars(
        TextColumn("{task.fields[stage]}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bars.add_task("", total=1, rate=0.0, stage="")

    def report(now: Progress) -> None:
        bars.start()
        bars.update(
            task,
            total=now.total_tokens,
            completed=now.done_tokens,
            rate=now.tokens_per_second,
            stage="Sweeping" if isinstance(now, SweepProgress) else "Reading",
        )

    try:
        yield report
    finally:
        if bars.live.is_started:  # stopping would print an empty line
            bars.stop()


def why_lines(answer: AnswerStream[Any]) -> list[str]:
    """Return what was read of a long text: a line for each excerpt (score, place), or what a sweep found."""
    recalled = answer.recalled
    if answer.swept is not None:
        return _sweep_lines(answer.swept)
    if recalled is None:
        return ["Everything was read: it fits into the model's window."]
    lines = [
        f"Read {len(recalled.prompt):,} of {recalled.full_tokens:,} tokens, looking for: "
        f"{' '.join(recalled.question.split())[:100]}"
    ]
    if recalled.note is not None:
        lines.append(recalled.note)
    for passage in sorted(recalled.passages, key=lambda passage: -passage.score):
        first, last = passage.lines
        source = passage.source or f"message {passage.message + 1}"
        page = "" if passage.pages is None else f"  page {_range(*passage.pages)}"
        note = "" if passage.is_included else "  (left out: no room)"
        lines.append(f"{passage.score:7.3f}  {source}:{_range(first, last)}{page}{note}")
    return lines


def cited_lines(answer: AnswerStream[Any]) -> list[str]:
    """Return a line for each run of the finished answer's words that stands in what was read of documents."""
    lines = ["Words of the answer that stand in what was read:"] if answer.citations else []
    for one in answer.citations:
        page = "" if one.pages is None else f"  page {_range(*one.pages)}"
        quote = " ".join(one.quote.split())
        source = one.source or f"message {one.message + 1}"
        lines.append(f"         {source}:{_range(*one.lines)}{page}  {quote[:80]}")
    return lines


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _sweep_lines(swept: Swept) -> list[str]:
    lines = [
        f"Read all of {swept.full_tokens:,} tokens in {swept.num_windows} windows in {swept.seconds:.0f} s, asking: "
        f"{' '.join(swept.question.split())[:100]}"
    ]
    if swept.counts is not None:
        lines += [f"{number:7}  {answer}" for answer, number in swept.counts.items()]
    if swept.items is not None:
        lines += [f"         {item}" for item in swept.items]
    if swept.num_dropped:
        lines.append(f"{swept.num_dropped:7}  items left out: the text does not have them")
    return lines
