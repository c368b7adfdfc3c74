"""Lines of text to a page: rows from top to bottom, what is side by side on one row, columns of prose one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from evermini.vision.reading import Line

COLUMN = " | "
"""Stands between texts of one row that are far apart: the cells of a table."""
_FAR = 1.3
"""Texts with a gap of more than so many times their height are far apart."""
_PARAGRAPH = 1.2
"""Rows with more than so many line heights between them are paragraphs."""
_MIN_COLUMN_ROWS = 5
_PROSE = 0.55
"""Share of a column's width that its median line takes if it is prose; cells of tables are shorter."""
_UNSURE = 0.6


def lay_out(lines: Sequence[Line]) -> str:
    """Return the lines as text, in the order they are read in; one that may well be misread ends in ``(?)``."""
    marked = [
        replace(line, text=f"{line.text} (?)") if line.score < _UNSURE else line for line in lines
    ]
    return "\n\n".join(_block(block) for block in _blocks(marked)).strip()


def _blocks(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """Yield runs of lines to be read row by row: columns of prose apart, everything else together.

    A page is split at its widest gutter if there is prose on both sides of it. What lies across the gutter (a
    headline) splits the page into what is above and below.
    """
    if len(lines) < 2 * _MIN_COLUMN_ROWS:
        yield list(lines)
        return
    gutter = _gutter(lines)
    if gutter is None:
        yield list(lines)
        return
    across = sorted(
        (line for line in lines if line.left < gutter < line.right), key=lambda line: line.top
    )
    rest = [line for line in lines if not line.left < gutter < line.right]
    above = float("-inf")
    for line in [*across, None]:
        below = float("inf") if line is None else line.top
        between = [one for one in rest if above <= _middle(one) < below]
        left = [one for one in between if one.right <= gutter]
        right = [one for one in between if one.left >= gutter]
        if _is_prose(left) and _is_prose(right):
            yield from _blocks(left)
            yield from _blocks(right)
        elif between:
            yield between
        if line is not None:
            yield [line]
            above = line.top


def _gutter(lines: Sequence[Line]) -> float | None:
    """Return the middle of an upright gap that few lines cross and that has prose on both sides."""
    height = median(line.height for line in lines)
    edges = sorted({line.right for line in lines})
    best: tuple[int, float] | None = None
    for edge in edges:
        place = edge + height * 0.4
        crossing = [line for line in lines if line.left < place < line.right]
        left = [line for line in lines if line.right <= place]
        right = [line for line in lines if line.left >= place]
        if len(crossing) > len(lines) // 5 or not (_is_prose(left) and _is_prose(right)):
            continue
        gap = min(line.left for line in right) - max(line.right for line in left)
        if gap >= height * 0.5 and (best is None or len(crossing) < best[0]):
            best = (len(crossing), place)
    return None if best is None else best[1]


def _is_prose(lines: Sequence[Line]) -> bool:
    if len(lines) < _MIN_COLUMN_ROWS:
        return False
    width = max(line.right for line in lines) - min(line.left for line in lines)
    height = median(line.height for line in lines)
    taken = median(line.right - line.left for line in lines)
    return width > 6 * height and taken >= _PROSE * width


def _block(lines: Sequence[Line]) -> str:
    rows = _rows(lines)
    if not rows:
        return ""
    height = median(line.height for line in lines)
    texts = [_row(rows[0])]
    for before, row in pairwise(rows):
        gap = min(line.top for line in row) - max(line.bottom for line in before)
        texts.append(("\n" if gap > _PARAGRAPH * height else "") + _row(row))
    return "\n".join(texts)


def _rows(lines: Sequence[Line]) -> list[list[Line]]:
    """Group lines whose middles lie in each other's height; a slanted row follows its last member."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=_middle):
        for row in reversed(rows[-3:]):
            near = min(row, key=lambda one: abs(one.left - line.left))
            lower = min(near.height, line.height)
            apart = not any(
                min(one.right, line.right) - max(one.left, line.left) > lower for one in row
            )
            if apart and abs(_middle(near) - _middle(line)) < 0.5 * lower:
                row.append(line)
                break
        else:
            rows.append([line])
    return [sorted(row, key=lambda one: one.left) for row in rows]


def _row(row: Sequence[Line]) -> str:
    text = row[0].text
    for before, line in pairwise(row):
        far = line.left - before.right > _FAR * max(before.height, line.height)
        text += (COLUMN if far else " ") + line.text
    return text


def _middle(line: Line) -> float:
    return (line.top + line.bottom) / 2
