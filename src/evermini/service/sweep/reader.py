"""How a sweep reads the long texts of a request: in windows, each with a question.

reader = WindowReader(asker, tokenizer, plan, progress)
cut = reader.windows(640)
reader.begin(cut)
reply, is_cut = await reader.read(cut[0], prompts.collect(reader.shown(cut[0]), reader.question), 200, Items())
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from evermini.service.assembly import Plan
from evermini.service.reading import OnProgress
from evermini.service.sweep.asking import Asker, Messages
from evermini.service.sweep.forms import Form
from evermini.service.sweep.result import SweepProgress
from evermini.service.sweep.windows import Part, Window, windows
from evermini.text.tokenizer import Tokenizer


class WindowReader:
    """Has one request's long texts read by a model.

    Args:
        asker: Asks the model that reads.
        tokenizer: Counts.
        plan: How the request is taken apart.
        progress: Told after each window.

    Attributes:
        asker: As above.
        plan: As above.
        pieces: The long pieces, by number...
        texts: ...and their texts, each with the paragraph before it that belongs to it.
    """

    def __init__(
        self, asker: Asker, tokenizer: Tokenizer, plan: Plan, progress: OnProgress | None
    ) -> None:
        self.asker, self.plan = asker, plan
        self.pieces = plan.parts.long
        self.texts = [
            head.text + piece.text if head is not None else piece.text
            for head, piece in zip(plan.heads, self.pieces, strict=True)
        ]
        self._tokenizer = tokenizer
        self._progress = progress
        self._began = time.monotonic()
        self._done = self._total = 0

    @property
    def question(self) -> str:
        """What is asked about all of them."""
        return self.plan.question

    @property
    def seconds(self) -> float:
        """Time since the sweep began."""
        return time.monotonic() - self._began

    def count(self, text: str) -> int:
        """Return the tokens of a text."""
        return len(self._tokenizer.encode(text))

    def fitting(self, tokens: int) -> int:
        """Return the size of the largest window up to ``tokens`` that is small enough for the model's own."""
        return min(tokens, self.asker.window // 3)

    def windows(self, max_tokens: int, ranges: Sequence[Part] | None = None) -> list[Window]:
        """Cut the texts, or ranges of them, into windows of at most ``max_tokens``."""
        return windows(self.texts, self.count, max_tokens, ranges=ranges)

    def shown(self, window: Window) -> str:
        """Return a window's text, each document's under its name."""
        shown = []
        for part in window.parts:
            name = self.pieces[part.text].name
            text = self.texts[part.text][part.start : part.end].strip("\n")
            shown.append(f"[{name}]\n{text}" if name is not None and len(self.pieces) > 1 else text)
        return "\n\n".join(shown)

    def begin(self, cut: Sequence[Window]) -> None:
        """Note which windows are to be read, for the progress."""
        self._total = sum(window.num_tokens for window in cut)

    async def read(
        self, window: Window, messages: Messages, max_tokens: int, form: Form | None = None
    ) -> tuple[str, bool]:
        """Return what the model says of a window, and whether it had more to say.

        Raises:
            EverminiError: As `Asker.ask`.
        """
        reply = await self.asker.ask(messages, max_tokens=max_tokens, form=form)
        self._done += window.num_tokens
        if self._progress is not None:
            seconds = self.seconds
            rate = self._done / seconds if seconds > 0 else 0.0
            eta = (self._total - self._done) / rate if rate else None
            self._progress(SweepProgress(self._done, self._total, seconds, rate, eta))
        return reply.text.strip(" "), reply.is_cut

    def again(self, window: Window) -> None:
        """Note that a window which was read will be read again, in smaller ones."""
        self._done -= window.num_tokens
