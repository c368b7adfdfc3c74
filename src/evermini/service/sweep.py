"""Answers to questions about the whole of a long text: all of it is read, in windows, each with the question.

    swept = await Sweep(asker, reader, request, plan, progress).run()
    swept.prompt            # the conversation, with what was found in the long texts' places; fits the window

Who reads is the asker's matter: the engine of this process, or one behind an URL.

The question's words choose one of four ways:

tally     "which words are most common", "how often is Anna mentioned": counted in code, without a model
check     "how many reviews are negative", "which emails complain", of a text that is a list: each record is asked about
          by itself, with two possible answers, and the answers are counted in code
collect   "list every person", "how many cities are named": each window gives the items it has; code joins and counts
note      anything else: each window gives notes; notes that are too long together are shortened (`sweep_notes`)

A small model can read one record, or copy what it sees; it can neither count nor keep a list over a long text. So these
are done in code. Every character is read exactly once (`windows`), and a window that fails fails the request.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.service import sweep_prompts as prompts
from evermini.service.assembly import Plan, texts
from evermini.service.mapping import Asker, Messages, all_of
from evermini.service.questions import (
    DOCUMENT_NOUNS,
    RECORD_NOUNS,
    has_shape,
    wanted,
    wants_summary,
)
from evermini.service.reading import LongReader, OnProgress
from evermini.service.schemas import ChatRequest
from evermini.service.sweep_forms import (
    MOST_ITEMS,
    Choice,
    Form,
    Items,
    Question,
    QuestionWithAnswers,
)
from evermini.service.sweep_notes import (
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
from evermini.service.swept import SweepProgress, Swept, Task
from evermini.service.tally import Tally, tally_of
from evermini.service.windows import Part, Window, records, windows

CHECK_TOKENS = 1536
"""A record beyond this is checked in several windows; it counts if one of them does."""
COLLECT_TOKENS = 640
"""Window for collecting: a small model lists few items completely, many it does not."""
NOTE_TOKENS = 2048
"""Window for notes."""
_MAX_COLLECTED = 200
_MAX_NOTE = 160
_SMALLEST_WINDOW = 128
"""A window is not halved below this when its items exceed a reply."""
_SHOWN_CHARS = 80
_MAX_SENTENCES = 3
"""Of a note that was to have two."""
_MAX_PARTS = 100
"""Of more documents than these, an answer need not name each."""


@dataclass(frozen=True)
class _Found:
    """What the windows gave; ``lines`` say it to the model, the first ones what must not be left out."""

    task: Task
    question: str
    num_windows: int
    head: str
    lines: tuple[str, ...]
    counts: dict[str, int] | None = None
    items: tuple[str, ...] | None = None
    num_empty: int = 0
    num_dropped: int = 0
    num_rounds: int = 0
    figures: tuple[int, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()


class Sweep:
    """One reading of all long texts of a request.

    Args:
        asker: Asks the model that reads.
        reader: Whose tokenizer counts, and whose template writes the prompt.
        request: The conversation.
        plan: How it is taken apart.
        progress: Told after each window.
    """

    def __init__(
        self,
        asker: Asker,
        reader: LongReader,
        request: ChatRequest,
        plan: Plan,
        progress: OnProgress | None,
    ) -> None:
        self._asker, self._request, self._plan = asker, request, plan
        self._assembler, self._tokenizer = reader.assembler, reader.tokenizer
        self._progress = progress
        self._pieces = plan.parts.long
        self._texts = [
            head.text + piece.text if head is not None else piece.text
            for head, piece in zip(plan.heads, self._pieces, strict=True)
        ]
        self._began = time.monotonic()
        self._done = self._total = 0

    async def run(self) -> Swept:
        """Read everything and return the prompt that says what was found. Cancelled, it ends at once.

        Raises:
            EverminiError: What `Asker.ask` says: a window could not be read.
        """
        tally = tally_of(self._plan.question)
        found_records = await asyncio.to_thread(self._records) if tally is None else None
        asked = wanted(self._plan.question)
        if tally is not None:
            found = await asyncio.to_thread(self._tally, tally)
        elif found_records is not None:
            found = await self._check(found_records, asked.is_count)
        elif asked.is_count or asked.is_list:
            found = await self._collect()
        else:
            found = await self._note()
        written, prompt = await asyncio.to_thread(self._write, found)
        return Swept(
            prompt=prompt,
            texts=written,
            full_tokens=self._plan.full_tokens,
            task=found.task,
            question=found.question,
            num_windows=found.num_windows,
            counts=found.counts,
            items=found.items,
            num_empty=found.num_empty,
            num_dropped=found.num_dropped,
            num_rounds=found.num_rounds,
            tokens_read=self._asker.tokens_read,
            tokens_written=self._asker.tokens_written,
            seconds=time.monotonic() - self._began,
            parts=found.parts,
            figures=found.figures if not any(map(str.isdigit, "".join(found.lines))) else (),
        )

    # Words

    def _tally(self, tally: Tally) -> _Found:
        counted = tally.count(self._texts)
        return _Found(
            "tally", self._plan.question, 0, counted.head, counted.lines, counts=counted.counts,
            figures=() if tally.kind == "frequent" else tuple(counted.counts.values()),
        )  # fmt: skip

    # Records

    def _records(self) -> list[list[Window]] | None:
        """Return the records that the question is about, each as its windows; ``None`` if it is about none."""
        asked = wanted(self._plan.question)
        nouns = asked.nouns[::-1]
        whole = [Part(number, 0, len(text)) for number, text in enumerate(self._texts)]
        named = sum(piece.name is not None for piece in self._pieces)
        found: list[Part] = []
        if named > 1 and any(noun in DOCUMENT_NOUNS for noun in nouns):
            found = whole
        elif asked.is_count and not nouns:
            found = self._cut(None)
        else:
            for noun in nouns:
                found = self._cut(noun)
                if found:
                    break
        if not found:
            return None
        size = self._size(CHECK_TOKENS)
        return [windows(self._texts, self._count, size, ranges=[part]) for part in found]

    def _cut(self, noun: str | None) -> list[Part]:
        """Return the records called ``noun`` of all texts, or nothing if one of them is no list of such."""
        found: list[Part] = []
        for number, text in enumerate(self._texts):
            ranges = records(text, noun, must_label=noun is None or noun not in RECORD_NOUNS)
            if ranges is None:
                return []
            found += [Part(number, start, end) for start, end in ranges]
        return found

    async def _check(self, found: list[list[Window]], is_count: bool) -> _Found:
        self._start([window for record in found for window in record])
        reply = await self._asker.ask(
            prompts.about_one(self._plan.question),
            max_tokens=80,
            form=QuestionWithAnswers(),
        )
        question, answers = _question_of(reply.text)
        form = Choice([word for answer in answers for word in (answer, answer.capitalize())])

        async def has(record: list[Window]) -> bool:
            replies = await all_of(
                self._read(window, prompts.check(self._text(window), question, answers), 24, form)
                for window in record
            )
            return any(text.lower() == answers[0].lower() for text, _ in replies)

        verdicts = await all_of(has(record) for record in found)
        names = [self._name(record[0]) for record in found]
        chosen = tuple(name for name, verdict in zip(names, verdicts, strict=True) if verdict)
        counts = {answers[0]: len(chosen), answers[1]: len(found) - len(chosen)}
        counted = (
            f"Counted is the answer: {answers[0]}"
            if is_count
            else f"Listed are those with {answers[0]}"
        )
        head = (
            f"[All of this text was read and counted for you. The result: {len(chosen)}\n"
            f"({len(found)} entries; asked of each: {question} {counted})]"
        )
        return _Found(
            "check",
            f"{question} ({answers[0]}/{answers[1]})",
            sum(map(len, found)),
            head,
            () if is_count else tuple(f"- {name}" for name in chosen),
            counts=counts,
            items=chosen,
            figures=(len(chosen), len(found), len(found) - len(chosen)) if is_count else (),
        )

    def _name(self, window: Window) -> str:
        """Return what a record is called in a list: its document's name, or how it begins."""
        part = window.parts[0]
        piece = self._pieces[part.text]
        if piece.name is not None and (part.start, part.end) == (0, len(self._texts[part.text])):
            return piece.name
        text = " ".join(self._texts[part.text][part.start : part.end].split())
        return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS].rsplit(" ", 1)[0] + " ..."

    # Items

    async def _collect(self) -> _Found:
        cut = await asyncio.to_thread(windows, self._texts, self._count, self._size(COLLECT_TOKENS))
        self._start(cut)
        form = Items()
        num_windows = len(cut)

        async def items_of(window: Window) -> list[str]:
            nonlocal num_windows
            message = prompts.collect(self._text(window), self._plan.question)
            text, is_cut = await self._read(window, message, _MAX_COLLECTED, form)
            lines = [
                line.removeprefix("- ").strip()
                for line in text.splitlines(keepends=True)
                if line.endswith("\n")
            ]
            is_loop = len({_key(line) for line in lines}) < 0.6 * len(lines)
            has_more = is_cut or len(lines) >= MOST_ITEMS
            if has_more and not is_loop and window.num_tokens > _SMALLEST_WINDOW:
                halves = windows(
                    self._texts, self._count, window.num_tokens * 2 // 3, ranges=window.parts
                )
                num_windows += len(halves)
                self._done -= window.num_tokens
                parts = await all_of(items_of(half) for half in halves)
                return [item for part in parts for item in part]
            return lines

        found = await all_of(items_of(window) for window in cut)
        items: dict[str, str] = {}
        num_dropped = 0
        for window, lines in zip(cut, found, strict=True):
            words = set(_words(self._text(window)))
            for line in lines:
                if not _is_grounded(line, words):
                    num_dropped += 1
                elif (key := _key(line)) and key != "none":
                    items.setdefault(key, line)
        question, chosen = await self._sift(list(items.values()))
        num_dropped += len(items) - len(chosen)
        head = (
            "[All of this text was read, and what it has for the list was collected and counted for you. "
            f"The result: {len(chosen)} items]"
        )
        return _Found(
            "collect", question, num_windows, head, tuple(f"- {item}" for item in chosen),
            items=chosen, num_empty=sum(not lines for lines in found), num_dropped=num_dropped,
        )  # fmt: skip

    async def _sift(self, items: list[str]) -> tuple[str, tuple[str, ...]]:
        """Return the question that tells whether an item belongs into the list, and those for which it says so."""
        if not items:
            return self._plan.question, ()
        reply = await self._asker.ask(
            prompts.about_item(self._plan.question),
            max_tokens=40,
            form=Question(),
        )
        form = Choice(("Yes", "No"))
        verdicts = await all_of(
            self._asker.ask(prompts.check(item, reply.text, ("yes", "no")), max_tokens=4, form=form)
            for item in items
        )
        kept = (
            item for item, verdict in zip(items, verdicts, strict=True) if verdict.text == "Yes"
        )
        return reply.text, tuple(kept)

    # Notes

    async def _note(self) -> _Found:
        cut = await asyncio.to_thread(self._parts)
        self._start([window for _, window in cut])
        question = self._plan.question
        is_summary = wants_summary(question)
        notes: list[Note] = []
        num_empty = num_dropped = 0
        for (number, window), text, note in zip(
            cut,
            map(self._text, (window for _, window in cut)),
            await self._notes(cut, is_summary),
            strict=True,
        ):
            written = note
            kept = tidy(written, text)
            num_dropped += len(sentences(written)) - len(sentences(kept))
            if is_nothing(written) or not kept:
                if not is_summary:
                    num_empty += 1
                    continue
                kept = opening(text)
            notes.append(Note(self._place(number, window), number, beginning(kept, _MAX_SENTENCES)))
        taker = NoteTaker(self._asker, question, self._count, self._size(NOTE_TOKENS) // 2)
        head = f"[This text was read as a whole, in {len(cut)} parts; these are notes on each, in its order]"
        room = self._plan.budget - self._count(head) - 64
        kept_notes = one_each(without_repeats(await taker.shorten(without_repeats(notes), room)))
        fits = sum(self._count(note.line) + 1 for note in kept_notes) <= room
        if not kept_notes:
            head = f"[This text was read as a whole, in {len(cut)} parts; it says nothing that helps to answer]"
        return _Found(
            "note", question, len(cut), head, tuple(note.line for note in kept_notes),
            num_empty=num_empty, num_dropped=num_dropped, num_rounds=taker.num_rounds,
            parts=self._named(kept_notes) if is_summary and fits and not has_shape(question) else (),
        )  # fmt: skip

    def _named(self, notes: Sequence[Note]) -> tuple[tuple[str, int], ...]:
        """Return the documents and how long the note on each is, if there are several and each has one."""
        is_each = [note.place for note in notes] == [piece.name for piece in self._pieces]
        if not is_each or not 1 < len(notes) <= _MAX_PARTS:
            return ()
        return tuple((note.place, len(note.text)) for note in notes)

    def _parts(self) -> list[tuple[int, Window]]:
        """Return windows that each are of one text, with its number; those of one text are of about one length."""
        most, found = self._size(NOTE_TOKENS), list[tuple[int, Window]]()
        for number, text in enumerate(self._texts):
            total = self._count(text)
            even = math.ceil(total / max(1, math.ceil(total / most)))
            size = min(
                most, even * 9 // 8
            )  # cuts are between paragraphs, not where they would be even
            cut = windows(self._texts, self._count, size, ranges=[Part(number, 0, len(text))])
            found += [(number, window) for window in cut]
        return found

    async def _notes(self, cut: Sequence[tuple[int, Window]], is_summary: bool) -> list[str]:
        """Return what the model writes of each window."""

        async def write(window: Window) -> str:
            text = self._text(window)
            asked = prompts.digest(text) if is_summary else prompts.note(text, self._plan.question)
            return whole_sentences(*await self._read(window, asked, _MAX_NOTE, None))

        return await all_of(write(window) for _, window in cut)

    def _place(self, number: int, window: Window) -> str:
        """Return what a window is called in the notes: its document's name, or its lines."""
        name = self._pieces[number].name
        if len(self._pieces) > 1:
            return name if name is not None else f"text {number + 1}"
        first = (self._plan.heads[number] or self._pieces[number]).first_line
        text, part = self._texts[number], window.parts[0]
        begin = first + text.count("\n", 0, part.start)
        end = begin + text[part.start : part.end].rstrip("\n").count("\n")
        return f"lines {begin}-{end}"

    # All of them

    def _start(self, cut: Sequence[Window]) -> None:
        self._total = sum(window.num_tokens for window in cut)

    async def _read(
        self, window: Window, messages: Messages, max_tokens: int, form: Form | None
    ) -> tuple[str, bool]:
        reply = await self._asker.ask(messages, max_tokens=max_tokens, form=form)
        self._done += window.num_tokens
        if self._progress is not None:
            seconds = time.monotonic() - self._began
            rate = self._done / seconds if seconds > 0 else 0.0
            eta = (self._total - self._done) / rate if rate else None
            self._progress(SweepProgress(self._done, self._total, seconds, rate, eta))
        return reply.text.strip(" "), reply.is_cut

    def _text(self, window: Window) -> str:
        """Return a window's text, each document's under its name."""
        shown = []
        for part in window.parts:
            name = self._pieces[part.text].name
            text = self._texts[part.text][part.start : part.end].strip("\n")
            shown.append(
                f"[{name}]\n{text}" if name is not None and len(self._pieces) > 1 else text
            )
        return "\n\n".join(shown)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _size(self, tokens: int) -> int:
        """Return the largest window up to ``tokens``, small enough for the model's own."""
        return min(tokens, self._asker.window // 3)

    def _write(self, found: _Found) -> tuple[Sequence[str], Sequence[int]]:
        """Return the conversation with what was found in the place of the last long text, as texts and as a prompt."""
        readings = [""] * len(self._pieces)
        groups = self._plan.groups
        for group in groups[:-1]:
            length = sum(len(self._texts[number]) for number in group)
            readings[group[0]] = (
                f"[A text of {length:,} characters stood here; what it says is told below]\n"
            )
        budget = self._plan.budget - sum(map(self._count, readings)) - self._count(found.head) - 32
        lines: list[str] = []
        for line in found.lines:
            budget -= self._count(line) + 1
            if budget < 0:
                break
            lines.append(line)
        if left := len(found.lines) - len(lines):
            lines.append(f"[{left} more have no room here]")
        readings[groups[-1][0]] = "\n".join([found.head, *lines, ""])
        pieces = self._plan.parts.pieces
        if (
            found.task == "check"
        ):  # an entry that stayed whole would be told twice; instructions would not be entries
            heads = [
                head for head in self._plan.heads if head and not head.text.rstrip().endswith(":")
            ]
            pieces = tuple(piece for piece in pieces if not any(piece is head for head in heads))
        parts = replace(self._plan.parts, pieces=pieces)
        return texts(self._request, parts, readings), self._assembler.encode(
            self._request, parts, readings
        )


def _question_of(reply: str) -> tuple[str, tuple[str, str]]:
    """Return the question about one thing and its two answers."""
    question, wanted_answer, other = (part.strip() for part in reply.split("|"))
    if wanted_answer.lower() == other.lower() or not (wanted_answer and other):
        return question, ("yes", "no")
    return question, (wanted_answer, other)


def _key(item: str) -> str:
    """Return what makes an item the same as another."""
    return " ".join(word for word in _words(item) if word not in ("a", "an", "the"))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _is_grounded(item: str, words: set[str]) -> bool:
    """Return whether at least half of an item's words stand in the window it is said to come from."""
    own = _words(item)
    return bool(own) and 2 * sum(word in words for word in own) >= len(own)
