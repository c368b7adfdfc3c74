"""The way "note": notes on each window, tidied, without repeats, and as short as there is room."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from evermini.service.questions import has_shape, wants_summary
from evermini.service.sweep import prompts
from evermini.service.sweep.asking import all_of
from evermini.service.sweep.notes import (
    Note,
    NoteTaker,
    beginning,
    is_nothing,
    one_each,
    opening,
    sentences,
    tidy,
    whole_sentences,
    without_repeats,
)
from evermini.service.sweep.reader import WindowReader
from evermini.service.sweep.result import Found
from evermini.service.sweep.windows import Part, Window

NOTE_TOKENS = 2048
"""Window for notes."""
_MAX_NOTE = 160
_MAX_SENTENCES = 3
"""Of a note that was to have two."""
_MAX_PARTS = 100
"""Of more documents than these, an answer need not name each."""


async def take_notes(reader: WindowReader) -> Found:
    """Take notes on all windows, as many and as long as there is room for.

    Raises:
        EverminiError: As `Asker.ask`.
    """
    cut = await asyncio.to_thread(_parts, reader)
    reader.begin([window for _, window in cut])
    question = reader.question
    is_summary = wants_summary(question)
    notes: list[Note] = []
    num_empty = num_dropped = 0
    for (number, window), written in zip(cut, await _write(reader, cut, is_summary), strict=True):
        text = reader.shown(window)
        kept = tidy(written, text)
        num_dropped += len(sentences(written)) - len(sentences(kept))
        if is_nothing(written) or not kept:
            if not is_summary:
                num_empty += 1
                continue
            kept = opening(text)
        notes.append(Note(_place(reader, number, window), number, beginning(kept, _MAX_SENTENCES)))
    taker = NoteTaker(reader.asker, question, reader.count, reader.fitting(NOTE_TOKENS) // 2)
    head = f"[This text was read as a whole, in {len(cut)} parts; these are notes on each, in its order]"
    room = reader.plan.budget - reader.count(head) - 64
    kept_notes = one_each(without_repeats(await taker.shorten(without_repeats(notes), room)))
    fits = sum(reader.count(note.line) + 1 for note in kept_notes) <= room
    if not kept_notes:
        head = f"[This text was read as a whole, in {len(cut)} parts; it says nothing that helps to answer]"
    return Found(
        "note", question, len(cut), head, tuple(note.line for note in kept_notes),
        num_empty=num_empty, num_dropped=num_dropped, num_rounds=taker.num_rounds,
        parts=_named(reader, kept_notes) if is_summary and fits and not has_shape(question) else (),
    )  # fmt: skip


def _named(reader: WindowReader, notes: Sequence[Note]) -> tuple[tuple[str, int], ...]:
    """Return the documents and how long the note on each is, if there are several and each has one."""
    is_each = [note.place for note in notes] == [piece.name for piece in reader.pieces]
    if not is_each or not 1 < len(notes) <= _MAX_PARTS:
        return ()
    return tuple((note.place, len(note.text)) for note in notes)


def _parts(reader: WindowReader) -> list[tuple[int, Window]]:
    """Return windows that each are of one text, with its number; those of one text are of about one length."""
    most, found = reader.fitting(NOTE_TOKENS), list[tuple[int, Window]]()
    for number, text in enumerate(reader.texts):
        total = reader.count(text)
        even = math.ceil(total / max(1, math.ceil(total / most)))
        size = min(most, even * 9 // 8)  # cuts are between paragraphs, not where they are even
        cut = reader.windows(size, ranges=[Part(number, 0, len(text))])
        found += [(number, window) for window in cut]
    return found


async def _write(
    reader: WindowReader, cut: Sequence[tuple[int, Window]], is_summary: bool
) -> list[str]:
    """Return what the model writes of each window."""

    async def write(window: Window) -> str:
        text = reader.shown(window)
        asked = prompts.digest(text) if is_summary else prompts.note(text, reader.question)
        return whole_sentences(*await reader.read(window, asked, _MAX_NOTE))

    return await all_of(write(window) for _, window in cut)


def _place(reader: WindowReader, number: int, window: Window) -> str:
    """Return what a window is called in the notes: its document's name, or its lines."""
    name = reader.pieces[number].name
    if len(reader.pieces) > 1:
        return name if name is not None else f"text {number + 1}"
    first = (reader.plan.heads[number] or reader.pieces[number]).first_line
    text, part = reader.texts[number], window.parts[0]
    begin = first + text.count("\n", 0, part.start)
    end = begin + text[part.start : part.end].rstrip("\n").count("\n")
    return f"lines {begin}-{end}"
