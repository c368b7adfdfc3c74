"""A prompt that fits the window, from one that does not: what stays whole, and what stands in the long texts' places.

    plan = assembler.plan(request, window=8192)
    readings, included = assembler.excerpts(plan, selection.spans)
    prompt = assembler.encode(request, plan.parts, [reading.text for reading in readings])
    emphasis = assembler.emphasis(prompt, readings, bias=1.0)

Computes and tokenises, so it belongs off the event loop; safe to use from several threads.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from unicodedata import normalize

from evermini.engine.request import Emphasis
from evermini.errors import ContextLengthError
from evermini.recall.prompt import Span, excerpts, shown_ranges
from evermini.recall.segment import Segment, SegmentCache, cut
from evermini.service.parts import QUESTION_CHARS, TIERS, Parts, Piece, split
from evermini.service.places import Place
from evermini.service.questions import follows_up
from evermini.service.rendering import encode
from evermini.service.schemas import ChatRequest
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer

MAX_PROMPT_TOKENS = 1_047_576
"""Longest prompt of a chat completion (gpt-4.1's published window)."""
EXCERPT_TOKENS = 3072
"""What is read of the long texts at most, marks included: it is computed anew for each question."""
MIN_EXCERPT_TOKENS = 512
"""With less room than this, no answer is tried."""
MARK_TOKENS = 48
"""Room for the mark of a place nothing was taken from."""
DEFAULT_ROOM = 1024
"""Tokens left for the answer if the request names no limit; an eighth of a small window."""
_COUNTS_KEPT = 1 << 16


@dataclass(frozen=True, repr=False)
class Passage(Place):
    """A span that was chosen, and where the caller finds it.

    Attributes:
        score: Its vote; comparable within one question.
        is_included: It is in the prompt; false: there was no room.
    """

    score: float
    is_included: bool


@dataclass(frozen=True)
class Reading:
    """What stands in a long text's place.

    Attributes:
        text: Excerpts with their marks; empty where the document before has this one's.
        emphasis: Ranges of characters in it that are closest to the question.
        closeness: How close, from 0 to 1.
    """

    text: str = ""
    emphasis: tuple[tuple[int, int], ...] = ()
    closeness: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How a long prompt is taken apart.

    Attributes:
        parts: Its pieces.
        question: What is asked of the long ones.
        query: What to look for in them: the question, and what it follows up.
        pieces: The segments of each long piece.
        full_tokens: Tokens that were sent.
        budget: Tokens that may stand in the long pieces' places, all together.
    """

    parts: Parts
    question: str
    query: str
    pieces: list[list[Segment]]
    full_tokens: int
    budget: int

    @property
    def segments(self) -> list[Segment]:
        """All segments, in order."""
        return [segment for segments in self.pieces for segment in segments]

    @property
    def groups(self) -> list[list[int]]:
        """The numbers of long pieces that share one place: of one message, with only white space between them."""
        return _groups(self.parts)

    @property
    def heads(self) -> list[Piece | None]:
        """The paragraph before each long piece that stays whole for being instructions.

        It may as well be a part of the text: the first review of many. Not if it is the question.
        """
        found: list[Piece | None] = []
        for before, piece in pairwise((None, *self.parts.pieces)):
            if piece is None or not piece.is_long:
                continue
            is_head = (
                before is not None
                and not before.is_long
                and (before.message, before.part) == (piece.message, piece.part)
                and piece.name is None
                and before.text.strip() != self.question.strip()
            )
            found.append(before if is_head else None)
        return found

    @property
    def owners(self) -> list[Piece]:
        """The long piece of each segment."""
        return [
            piece for piece, found in zip(self.parts.long, self.pieces, strict=True) for _ in found
        ]

    def shown(self, included: Iterable[Span]) -> tuple[Place, ...]:
        """Return what the prompt has of the documents."""
        segments, owners = self.segments, self.owners
        ranges = shown_ranges(segments, list(included))
        return tuple(Place(segments[n], start, end, owners[n]) for n, start, end in ranges)

    def passages(self, spans: Sequence[Span], included: set[Span]) -> tuple[Passage, ...]:
        """Return where the caller finds the spans that were chosen."""
        owners, segments = self.owners, self.segments
        found = []
        for span in spans:
            segment, owner = segments[span.segment], owners[span.segment]
            begin, past = (char - segment.first_char for char in span.chars)
            found.append(
                Passage(segment, begin, past, owner, score=span.score, is_included=span in included)
            )
        return tuple(found)


class Assembler:
    """Takes long prompts apart and writes short ones, for one model.

    Args:
        tokenizer: The model's tokenizer.
        template: Its chat template.
        known: Returns the tokens of a segment that was tokenised before, by its digest, or ``None``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        known: Callable[[str], int | None] = lambda digest: None,
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._known = known
        self._segments = SegmentCache()
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._counting = threading.Lock()

    def plan(
        self, request: ChatRequest, *, window: int, limit: int, counted: int | None = None
    ) -> Plan | None:
        """Take a prompt apart, or return ``None`` if it fits anyway (and may be read whole) or has no long text.

        Args:
            request: The conversation.
            window: Tokens the engine takes, the answer's included.
            limit: Longest prompt that is accepted, in tokens.
            counted: Tokens of the prompt, if it was tokenised as a whole: the sum of its parts' is another by a few.

        Raises:
            ContextLengthError: The prompt is too long, or what must stay whole is.
        """
        room = request.max_output or default_room(window)
        skeleton = budget = 0
        for tier in TIERS:
            cut_up = split(request.messages, tier)
            if not cut_up.long:
                continue
            parts = cut_up
            skeleton = len(self.encode(request, parts, [""] * len(parts.long)))
            budget = min(EXCERPT_TOKENS, window - room - skeleton)
            if budget >= MIN_EXCERPT_TOKENS:
                break
        if not skeleton:
            return None
        pieces = [cut(piece.text, piece.name, known=self._segments.known) for piece in parts.long]
        lengths = [sum(map(self.count, found)) for found in pieces]
        marks = sum(self.count(Segment(piece.marks)) for piece in parts.long if piece.marks)
        full = skeleton + sum(lengths) + marks if counted is None else counted
        if full > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, your messages "
                f"resulted in {full} tokens. Please reduce the length of the messages.",
                param="messages",
                documents={
                    piece.name: length
                    for piece, length in zip(parts.long, lengths, strict=True)
                    if piece.name is not None
                },
            )
        if (
            request.reading == "auto"
            and full + (request.max_output or least_room(window)) <= window
        ):
            return None
        if budget < MIN_EXCERPT_TOKENS:
            raise ContextLengthError(
                f"This model's native window is {window} tokens; it reads longer prompts ({full} tokens) in excerpts. "
                f"However, what stays whole (instructions, short messages, the question: {skeleton} tokens) and the "
                f"completion ({room} tokens) leave less than {MIN_EXCERPT_TOKENS} tokens for them. Please reduce the "
                "length of these messages or of the completion.",
                param="messages",
            )
        question = parts.question or request.messages[-1].text()[-QUESTION_CHARS:]
        query = question
        if parts.earlier and follows_up(question):
            query = f"{parts.earlier}\n{question}"
        return Plan(parts, question, query, pieces, full, budget)

    def count(self, segment: Segment) -> int:
        """Return a segment's tokens, from memory where it is known."""
        with self._counting:
            if (count := self._counts.get(segment.digest)) is not None:
                self._counts.move_to_end(segment.digest)
                return count
        count = self._known(segment.digest)
        if count is None:
            count = len(self._tokenizer.encode(segment.text))
        with self._counting:
            self._counts[segment.digest] = count
            while len(self._counts) > _COUNTS_KEPT:
                self._counts.popitem(last=False)
        return count

    def encode(self, request: ChatRequest, parts: Parts, readings: Sequence[str]) -> list[int]:
        """Return the prompt with the long pieces replaced by ``readings``."""
        return encode(self._template, request, texts(request, parts, readings))

    def emphasis(
        self, prompt: Sequence[int], readings: Sequence[Reading], bias: float
    ) -> Emphasis | None:
        """Return which tokens of ``prompt`` are closest to the question, with up to ``bias`` nats; ``None``: none are.

        The closer, the more: what has but a part of the question must not keep the model from reading the rest. Found
        by the texts' bytes: a template that does not write a reading as it is (quoted as JSON, say) has none.
        """
        pieces = [self._tokenizer.token_bytes(token) for token in prompt]
        ends, data = list(accumulate(map(len, pieces))), b"".join(pieces)
        ranges: list[tuple[int, int, float]] = []
        at = 0
        for reading in readings:
            strength = bias * reading.closeness
            if not strength or (found := _find(data, reading.text, at)) is None:
                continue
            at, size = found
            for first, last in reading.emphasis:
                start = bisect_right(ends, at + size(reading.text[:first]))
                end = bisect_left(ends, at + size(reading.text[:last])) + 1
                if ranges:
                    start = max(start, ranges[-1][1])
                if start < end:
                    ranges.append((start, end, strength))
        return Emphasis(tuple(ranges)) if ranges else None

    def measure(self, request: ChatRequest, message_texts: Sequence[str]) -> int:
        """Return the tokens of a prompt with these texts of its messages."""
        return len(encode(self._template, request, message_texts))

    def excerpts(
        self,
        plan: Plan,
        spans: Iterable[Span],
        *,
        mark_end: bool = False,
        hops: Sequence[Mapping[int, float]] = (),
    ) -> tuple[list[Reading], set[Span]]:
        """Return what stands in each long piece's place, and the spans that are in it.

        Documents that follow each other in a message share one text, written in the place of the first. Texts with the
        best spans get room first; each keeps enough to say what is missing. ``mark_end``: say where each ends;
        ``hops``: and show the sentences once more that have what is looked for.
        """
        groups = plan.groups
        readings = [Reading()] * len(plan.pieces)
        firsts = [0]
        for found in plan.pieces:
            firsts.append(firsts[-1] + len(found))
        ranges = [(firsts[group[0]], firsts[group[-1] + 1]) for group in groups]
        by_group = [[span for span in spans if a <= span.segment < b] for a, b in ranges]
        ranked = sorted(
            range(len(groups)), key=lambda g: -max((s.score for s in by_group[g]), default=0.0)
        )
        budget, included = plan.budget, set[Span]()
        for done, number in enumerate(ranked, start=1):
            first, last = ranges[number]
            own = {replace(span, segment=span.segment - first): span for span in by_group[number]}
            result = excerpts(
                plan.segments[first:last],
                list(own),
                lambda text: len(self._tokenizer.encode(text)),
                budget - MARK_TOKENS * (len(ranked) - done),
                plan.question,
                mark_end=mark_end,
                hops=hops,
            )
            readings[groups[number][0]] = Reading(result.text, result.emphasis, result.closeness)
            included |= {own[span] for span in result.included}
            budget -= result.num_tokens
        return readings, included


def texts(request: ChatRequest, parts: Parts, readings: Sequence[str]) -> list[str]:
    """Return each message's text with the long pieces replaced by ``readings``."""
    written = [""] * len(request.messages)
    found = iter(readings)
    for piece in parts.pieces:
        written[piece.message] += next(found) if piece.is_long else piece.text
    return written


def least_room(window: int) -> int:
    """Return the tokens left for an answer of no stated length, from which on a prompt counts as fitting."""
    return min(256, window // 32)


def default_room(window: int) -> int:
    """Return the tokens left for an answer of no stated length."""
    return min(DEFAULT_ROOM, window // 8)


def _groups(parts: Parts) -> list[list[int]]:
    """Group the long pieces by number: those of one message with nothing but white space between them."""
    keys: list[int] = []
    key, message = 0, -1
    for piece in parts.pieces:
        if piece.message != message or (not piece.is_long and piece.text.strip()):
            key, message = key + 1, piece.message
        if piece.is_long:
            keys.append(key)
    return [
        [number for number, _ in group]
        for _, group in groupby(enumerate(keys), key=lambda item: item[1])
    ]


def _find(data: bytes, text: str, at: int) -> tuple[int, Callable[[str], int]] | None:
    """Return where a text that begins with no white space stands in a prompt, and what tells its parts' bytes there."""
    for form in (str, partial(normalize, "NFC")):  # some tokenizers normalise
        wanted = form(text).rstrip().encode()
        if wanted and (found := data.find(wanted, at)) >= 0:
            return found, lambda part, form=form: len(form(part).encode())
    return None
