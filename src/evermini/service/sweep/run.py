"""Answers to questions about the whole of a long text: all of it is read, in windows, each with the question.

    swept = await Sweep(asker, reader, request, plan, progress).run()
    swept.prompt            # the conversation, with what was found in the long texts' places; fits the window

Who reads is the asker's matter: the engine of this process, or one behind an URL.

The question's words choose one of four ways:

tally     "which words are most common", "how often is Anna mentioned": counted in code, without a model
check     "how many reviews are negative", "which emails complain", of a text that is a list: each record is asked about
          by itself, with two possible answers, and the answers are counted in code
collect   "list every person", "how many cities are named": each window gives the items it has; code joins and counts
note      anything else: each window gives notes; notes that are too long together are shortened (`notes`)

A small model can read one record, or copy what it sees; it can neither count nor keep a list over a long text. So these
are done in code. Every character is read exactly once (`windows`), and a window that fails fails the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from evermini.service.assembly import Plan, texts
from evermini.service.questions import wanted
from evermini.service.reading import LongReader, OnProgress
from evermini.service.schemas import ChatRequest
from evermini.service.sweep.asking import Asker
from evermini.service.sweep.digests import take_notes
from evermini.service.sweep.items import collect
from evermini.service.sweep.reader import WindowReader
from evermini.service.sweep.records import check, records_of
from evermini.service.sweep.result import Found, Swept
from evermini.service.sweep.tally import Tally, tally_of


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
        self._request, self._plan, self._assembler = request, plan, reader.assembler
        self._reader = WindowReader(asker, reader.tokenizer, plan, progress)

    async def run(self) -> Swept:
        """Read everything and return the prompt that says what was found. Cancelled, it ends at once.

        Raises:
            EverminiError: What `Asker.ask` says: a window could not be read.
        """
        reader = self._reader
        tally = tally_of(reader.question)
        found_records = await asyncio.to_thread(records_of, reader) if tally is None else None
        asked = wanted(reader.question)
        if tally is not None:
            found = await asyncio.to_thread(self._tally, tally)
        elif found_records is not None:
            found = await check(reader, found_records, asked.is_count)
        elif asked.is_count or asked.is_list:
            found = await collect(reader)
        else:
            found = await take_notes(reader)
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
            tokens_read=reader.asker.tokens_read,
            tokens_written=reader.asker.tokens_written,
            seconds=reader.seconds,
            parts=found.parts,
            figures=found.figures if not any(map(str.isdigit, "".join(found.lines))) else (),
        )

    def _tally(self, tally: Tally) -> Found:
        counted = tally.count(self._reader.texts)
        return Found(
            "tally", self._reader.question, 0, counted.head, counted.lines, counts=counted.counts,
            figures=() if tally.kind == "frequent" else tuple(counted.counts.values()),
        )  # fmt: skip

    def _write(self, found: Found) -> tuple[Sequence[str], Sequence[int]]:
        """Return the conversation with what was found in the place of the last long text, as texts and as a prompt."""
        reader, groups = self._reader, self._plan.groups
        readings = [""] * len(reader.pieces)
        for group in groups[:-1]:
            length = sum(len(reader.texts[number]) for number in group)
            readings[group[0]] = (
                f"[A text of {length:,} characters stood here; what it says is told below]\n"
            )
        budget = (
            self._plan.budget - sum(map(reader.count, readings)) - reader.count(found.head) - 32
        )
        lines: list[str] = []
        for line in found.lines:
            budget -= reader.count(line) + 1
            if budget < 0:
                break
            lines.append(line)
        if left := len(found.lines) - len(lines):
            lines.append(f"[{left} more have no room here]")
        readings[groups[-1][0]] = "\n".join([found.head, *lines, ""])
        pieces = self._plan.parts.pieces
        if found.task == "check":
            # An entry that stayed whole would be told twice; instructions would not be entries.
            heads = [
                head for head in self._plan.heads if head and not head.text.rstrip().endswith(":")
            ]
            pieces = tuple(piece for piece in pieces if not any(piece is head for head in heads))
        parts = replace(self._plan.parts, pieces=pieces)
        prompt = self._assembler.encode(self._request, parts, readings)
        return texts(self._request, parts, readings), prompt
