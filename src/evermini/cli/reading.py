"""How reading a long text goes, and what of it was read, for people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermini.recall.recall import Progress

_QUICK_TOKENS = 1000
"""Fewer are computed before anybody wonders."""
_STAGES = {"calibrate": "Calibrating", "index": "Reading", "sweep": "Sweeping"}


@contextlib.contextmanager
def reading_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a progress callback for `evermini.LLM.chat`; the first progress draws a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.fields[stage]}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bars.add_task("", total=1, rate=0.0, stage="")
    stage = ""

    def report(now: Progress) -> None:
        nonlocal stage
        bars.start()
        if now.stage != stage:  # what is left is guessed anew
            stage = now.stage
            bars.reset(task, total=now.total_tokens)
        bars.update(
            task,
            total=now.total_tokens,
            completed=now.done_tokens,
            rate=now.tokens_per_second,
            stage=_STAGES[now.stage],
        )

    try:
        yield report
    except KeyboardInterrupt:
        if stage == "index":
            bars.stop()
            print(
                "Interrupted. What was read is kept: the same goes on from there.", file=sys.stderr
            )
        raise
    finally:
        if bars.live.is_started:  # stopping would print an empty line
            bars.stop()


@contextlib.contextmanager
def first_word_awaited(num_tokens: int) -> Iterator[Callable[[], None]]:
    """Say on a terminal that a prompt is computed, until the callback that is yielded tells that the answer begins."""
    from rich.console import Console

    status = Console(stderr=True).status(f"Computing {num_tokens:,} tokens ...")
    if sys.stderr.isatty() and num_tokens > _QUICK_TOKENS:
        status.start()
    try:
        yield status.stop
    finally:
        status.stop()


def why_lines(why: Mapping[str, Any], num_tokens: int) -> list[str]:
    """Return what was read of a long text: a line for each excerpt (score, place), or what a sweep found.

    Args:
        why: As the API's ``x_evermini``.
        num_tokens: Tokens of the prompt as it was sent.
    """
    if (sweep := why.get("sweep")) is not None:
        return _sweep_lines(sweep, num_tokens)
    if (recall := why.get("recall")) is None:
        return ["Everything was read: it fits into the model's window."]
    lines = [
        f"Read {recall['prompt_tokens_read']:,} of {num_tokens:,} tokens, looking for: "
        f"{' '.join(recall['question'].split())[:100]}"
    ]
    if recall["note"] is not None:
        lines.append(recall["note"])
    for span in sorted(recall["spans"], key=lambda span: -span["score"]):
        note = "" if span["included"] else "  (left out: no room)"
        lines.append(f"{span['score']:7.3f}  {_place(span)}{note}")
    return lines


def cited_lines(why: Mapping[str, Any]) -> list[str]:
    """Return a line for each run of the finished answer's words that stands in what was read of documents."""
    citations = why.get("citations", ())
    lines = ["Words of the answer that stand in what was read:"] if citations else []
    for one in citations:
        lines.append(f"         {_place(one)}  {' '.join(one['quote'].split())[:80]}")
    return lines


def _place(found: Mapping[str, Any]) -> str:
    page = "" if found["pages"] is None else f"  page {_range(*found['pages'])}"
    source = found["source"] or f"message {found['message'] + 1}"
    return f"{source}:{_range(*found['lines'])}{page}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _sweep_lines(sweep: Mapping[str, Any], num_tokens: int) -> list[str]:
    lines = [
        f"Read all of {num_tokens:,} tokens in {sweep['windows']} windows in {sweep['seconds']:.0f} s, asking: "
        f"{' '.join(sweep['question'].split())[:100]}"
    ]
    if sweep["counts"] is not None:
        lines += [f"{number:7}  {answer}" for answer, number in sweep["counts"].items()]
    if sweep["items"] is not None:
        lines += [f"         {item}" for item in sweep["items"]]
    if sweep["dropped_items"]:
        lines.append(f"{sweep['dropped_items']:7}  items left out: the text does not have them")
    return lines
