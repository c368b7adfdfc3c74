r"""Long texts cut into windows or records, so that a sweep reads every character exactly once.

    windows(["a\n\nb\n\nc", "d"], count, max_tokens=512)     as few as fit, cut between paragraphs if possible
    records("Review 1: good\nReview 2: bad", "review")       the reviews, one by one

Both return ranges of characters that follow each other without gap or overlap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_MARKS = ("\n\n", "\n", ". ", " ")
"""Where a text is cut, the best place first; a text without any is cut in the middle of a word."""
_MIN_RECORDS = 3
_LINES = ("line", "row")

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Characters ``start`` to ``end`` of the text with number ``text``."""

    text: int
    start: int
    end: int


@dataclass(frozen=True)
class Window:
    """What is read at a time; ``num_tokens`` is the sum over what it was put together from."""

    parts: tuple[Part, ...]
    num_tokens: int


def windows(
    texts: Sequence[str],
    count: Callable[[str], int],
    max_tokens: int,
    *,
    ranges: Sequence[Part] | None = None,
) -> list[Window]:
    """Cut texts into windows.

    Args:
        texts: The texts.
        count: Tokens of a text.
        max_tokens: Tokens of a window at most, if a single character has not more.
        ranges: Cut only these parts of the texts; default: all of each.
    """
    if ranges is None:
        ranges = [Part(number, 0, len(text)) for number, text in enumerate(texts) if text]
    found: list[Window] = []
    parts: list[Part] = []
    total = 0
    for whole in ranges:
        for start, end, tokens in _atoms(
            texts[whole.text], whole.start, whole.end, count, max_tokens, _MARKS
        ):
            if parts and total + tokens > max_tokens:
                found.append(Window(tuple(parts), total))
                parts, total = [], 0
            if parts and parts[-1].text == whole.text and parts[-1].end == start:
                parts[-1] = Part(whole.text, parts[-1].start, end)
            else:
                parts.append(Part(whole.text, start, end))
            total += tokens
    if parts:
        found.append(Window(tuple(parts), total))
    return found


def _atoms(
    text: str, start: int, end: int, count: Callable[[str], int], max_tokens: int, marks: tuple[str, ...]
) -> Iterator[tuple[int, int, int]]:  # fmt: skip
    """Yield (start, end, tokens) of the largest pieces between marks that are not too long."""
    for first, last in _cut_at(text, start, end, marks[0]) if marks else _halves(start, end):
        tokens = count(text[first:last])
        if tokens <= max_tokens or last - first == 1:
            yield first, last, tokens
        else:
            yield from _atoms(text, first, last, count, max_tokens, marks[1:])


def _cut_at(text: str, start: int, end: int, mark: str) -> Iterator[Range]:
    """Cut after each mark, or after a run of them."""
    at = start
    for match in re.finditer(f"(?:{re.escape(mark)})+", text[start:end]):
        yield at, start + match.end()
        at = start + match.end()
    if at < end:
        yield at, end


def _halves(start: int, end: int) -> list[Range]:
    middle = (start + end) // 2
    return [(start, middle), (middle, end)] if middle > start else [(start, end)]


def records(text: str, noun: str | None, *, must_label: bool) -> list[Range] | None:
    """Cut a text that is a list into its records, or return ``None`` if it does not look like one.

    Records begin where a line begins with ``noun`` and a number or colon ("Review 12"); without such lines, they are
    the paragraphs between empty lines or, if there are none, the lines. What stands before the first labelled one
    belongs to it, as does a first line that ends with a colon.

    Args:
        text: The text.
        noun: What one record is called, in the singular; ``None``: any word with a number.
        must_label: Only lines that begin with the noun tell that it is a list of such.
    """
    label = (
        rf"^[^\w\n]{{0,4}}{re.escape(noun)}\b[ \t]*(?:[#:]|\d|no\.)"
        if noun
        else r"^[^\w\n]{0,4}[^\W\d]+[ #:.]*\d"
    )
    labelled = [match.start() for match in re.finditer(label, text, re.MULTILINE | re.IGNORECASE)]
    if len(labelled) >= _MIN_RECORDS:
        return _between(text, labelled[1:])
    if must_label:
        return None
    line, paragraph = r"\n\s*", r"\n[ \t]*\n\s*"
    for boundary in (line,) if noun in _LINES else (paragraph, line):
        cuts = [match.end() for match in re.finditer(rf"{boundary}(?=\S)", text)]
        if len(cuts) + 1 >= _MIN_RECORDS:
            return _between(text, cuts[1:] if text[: cuts[0]].rstrip().endswith(":") else cuts)
    return None


def _between(text: str, cuts: list[int]) -> list[Range]:
    cuts = [at for at in cuts if text[:at].strip()]
    return list(zip([0, *cuts], [*cuts, len(text)], strict=True))
