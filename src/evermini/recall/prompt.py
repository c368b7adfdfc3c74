"""From spans to what the answering model reads: excerpts in document order, with every gap marked.

    [README.md, lines 10-24 of 310]              in a text of pages: [report.pdf, page 3, lines 80-95 of 2210]
    ...
    [left out: lines 25-310]

In code, definitions of what the question names are pointed out, since a small model cannot count lines, and what
functions return, which it would describe rather than quote:
[queue.py, lines 10-50 of 310: def qsize is defined in queue.py on line 21 and returns len(self._queue)]

At the end, the sentences that are closest to the question stand once more, and these definitions:
[End of the excerpts. Closest to the question:]
> The harbour master is called Anna.

Sentences closest to the question, and definitions that are pointed out, are also named to attention, which gives them
more weight (`Excerpts.emphasis`): a small model has the right sentence before it and still follows one beside it.

Nothing is left out in silence: the marks say what is missing, and `Excerpts.left_out` lists spans that were chosen and
did not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from evermini.recall.definitions import DEFINITION, returned
from evermini.recall.segment import Segment
from evermini.recall.sentences import hashes, sentences, weight_of

_END = "\n[End of the excerpts]\n\n"
_CLOSEST = "\n[End of the excerpts. Closest to the question:]\n{sentences}\n\n"
_QUOTED = re.compile("^> (.+)$", re.MULTILINE)
_ALIKE = 0.8
"""A sentence is shown once more if it has this share of what the best one has of the question's words, by weight."""
_LEAST = 0.2
"""None is if the best one has less than this share of the question's words."""
_LINKED = 0.5
"""The same for the names that lead from one passage to another: one sentence for each step."""
_ABOUT = 0.2
"""A sentence is about a name if so many of its different words are the name's."""
_MOST_SENTENCES = 6
_MAX_SENTENCE = 480
_LONG_SENTENCE = 240
"""Characters of a sentence whose words count half."""

Range = tuple[int, int, int]
"""Number of a segment, first and past-the-end character in it."""
_REACH = 160
"""Characters by which an excerpt grows, at either end, to begin and end with a line or sentence."""


@dataclass(frozen=True)
class Span:
    """A passage chosen for a question.

    Attributes:
        segment: Which segment of the context, from 0.
        name: The segment's name, such as a path.
        tokens: Its range of the index model's tokens in the segment.
        chars: Its range of characters in the text the segment was cut from.
        lines: Its first and last line there, from 1.
        score: The vote it got; comparable within one question.
        round: 1: found by the question; 2: by following the words of the best passage.
    """

    segment: int
    name: str | None
    tokens: tuple[int, int]
    chars: tuple[int, int]
    lines: tuple[int, int]
    score: float
    round: int


@dataclass(frozen=True)
class Excerpts:
    """What is put in place of a long context.

    Attributes:
        text: The excerpts with their marks.
        num_tokens: Its length in tokens of the answering model.
        included: Spans that are in it, in document order.
        left_out: Spans that were chosen but exceed the budget, the best first.
        omitted_chars: Characters of the context that are not in ``text``.
        emphasis: Ranges of characters in ``text`` that are closest to the question, in order, without overlaps.
        closeness: How close: the share of the question's words, by weight, that the closest sentence has.
    """

    text: str
    num_tokens: int
    included: tuple[Span, ...]
    left_out: tuple[Span, ...]
    omitted_chars: int
    emphasis: tuple[tuple[int, int], ...] = ()
    closeness: float = 0.0


def excerpts(
    segments: Sequence[Segment],
    spans: Sequence[Span],
    count_tokens: Callable[[str], int],
    max_tokens: int,
    question: str = "",
    *,
    mark_end: bool = False,
    hops: Sequence[Mapping[int, float]] = (),
) -> Excerpts:
    """Write the best spans that fit, in document order.

    Args:
        segments: The context.
        spans: What was selected from it.
        count_tokens: Tokens of a text, for the model that will read it.
        max_tokens: Budget for the result, marks included.
        question: What is asked; the marks give the lines of definitions that it names.
        mark_end: Say where the excerpts end.
        hops: What is looked for (`evermini.recall.select.Ranking.hops`): sentences that have it are emphasised
            and, with ``mark_end``, shown once more.
    """
    closest, closeness = _closest(segments, spans, hops)
    names = frozenset(re.findall(r"\w+", question))
    ranked = sorted(spans, key=lambda span: -span.score)
    included, left_out = list(ranked), list[Span]()
    written = _write(segments, included, len(ranked), names)
    if mark_end and spans:
        most = [found.sentence for found in written.definitions]
        max_tokens -= count_tokens(_closing(segments, closest, most))
    tokens = count_tokens(written.text)
    if included and tokens > max_tokens:
        included = []
        written = _write(segments, (), len(ranked), names)
        tokens = count_tokens(written.text)
        for span in ranked:
            candidate = _write(segments, [*included, span], len(ranked), names)
            length = count_tokens(candidate.text)
            if length <= max_tokens:
                included.append(span)
                written, tokens = candidate, length
            else:
                left_out.append(span)
    included.sort(key=lambda span: (span.segment, span.tokens))
    text = written.text
    shown = {place: found for place in closest if (found := written.find(place))}
    emphasis = [*written.pointed, *shown.values()]
    if included and mark_end:
        closing = _closing(segments, list(shown), _asked_for(written.definitions, question))
        emphasis += [
            (len(text) + match.start(1), len(text) + match.end(1))
            for match in _QUOTED.finditer(closing)
        ]
        text += closing
        tokens = count_tokens(text)
    return Excerpts(
        text,
        tokens,
        tuple(included),
        tuple(left_out),
        written.omitted,
        _joined(emphasis),
        closeness,
    )


def _closest(
    segments: Sequence[Segment], spans: Sequence[Span], hops: Sequence[Mapping[int, float]]
) -> tuple[list[Range], float]:
    """Return the sentences of the spans that are closest to the question, in order, then those they lead to.

    With them the share of the question's words, by weight, that the closest one has.
    """
    texts = {
        (number, start + first, start + last): segments[number].text[start + first : start + last]
        for number, start, end in shown_ranges(segments, spans)
        for first, last in sentences(segments[number].text[start:end])
        if last - first <= _MAX_SENTENCE
    }
    if not hops or not texts:
        return [], 0.0
    asked, *links = hops
    weights = {place: weight_of(text, asked) for place, text in texts.items()}
    closeness = max(weights.values()) / max(sum(asked.values()), 1e-9)
    if closeness < _LEAST:
        return [], 0.0
    # Of two with the same words, the longer one says less about them.
    weights = {place: w / (1 + len(texts[place]) / _LONG_SENTENCE) for place, w in weights.items()}
    alike = sorted(texts, key=lambda place: -weights[place])[:_MOST_SENTENCES]
    alike = [place for place in alike if weights[place] >= _ALIKE * weights[alike[0]]]
    said = set().union(*(hashes(texts[place]) for place in alike[:1]))
    missing = {word: weight for word, weight in asked.items() if word not in said}
    linked: list[Range] = []
    for wanted in links:
        others = [place for place in texts if place not in (alike[0], *linked)]
        best = max(others, key=lambda place: weight_of(texts[place], wanted), default=None)
        if best is None or weight_of(texts[best], wanted) < _LINKED * sum(wanted.values()):
            break
        if _adds(texts[best], wanted, missing):
            linked.append(best)
    if linked:  # what is as close as the best one, but speaks of something else than where it leads, is a look-alike
        names = set().union(*links)
        alike = [place for place in alike if place == alike[0] or names & hashes(texts[place])]
    return list(dict.fromkeys([*sorted(alike), *linked])), closeness


def _adds(sentence: str, wanted: Mapping[int, float], missing: Mapping[int, float]) -> bool:
    """Return whether a sentence that a name leads to is about it, or has what the question asks beside."""
    own = hashes(sentence)
    about = len(own & wanted.keys()) >= _ABOUT * len(own)
    return about or weight_of(sentence, missing) >= _LEAST * sum(missing.values())


def _closing(
    segments: Sequence[Segment], closest: Sequence[Range], defined: Sequence[str] = ()
) -> str:
    """Return what stands after the excerpts: that they end, what is closest to the question, and definitions."""
    texts = (
        _on_one_line(segments[number].text[start:end].strip()) for number, start, end in closest
    )
    lines = [line for text in dict.fromkeys((*texts, *defined)) for line in text.splitlines()]
    if not lines:
        return _END
    return _CLOSEST.format(sentences="\n".join(f"> {line}" for line in lines))


def _asked_for(definitions: Sequence[_Definition], question: str) -> list[str]:
    """Return definitions as sentences; of several with one name, those whose path has most of the question's words."""
    asked = _path_words(question)
    shared = [len(asked & _path_words(found.path)) for found in definitions]
    best: dict[str, int] = {}
    for found, number in zip(definitions, shared, strict=True):
        best[found.name] = max(number, best.get(found.name, 0))
    return [
        found.sentence
        for found, number in zip(definitions, shared, strict=True)
        if number == best[found.name]
    ]


def _path_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def shown_ranges(segments: Sequence[Segment], spans: Sequence[Span]) -> list[Range]:
    """Return what `excerpts` shows of the segments for these spans: whole lines or sentences, in order, none twice."""
    return [found for group in _documents(segments) for found in _ranges(segments, group, spans)]


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ranges in order, those that overlap as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start < joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)


def _on_one_line(sentence: str) -> str:
    """Join the lines of a sentence; those of code stay."""
    return sentence if re.search(r"\n\s", sentence) else sentence.replace("\n", " ")


@dataclass(frozen=True)
class _Definition:
    """A class or function that the question names: where it is defined, as a path and as a sentence."""

    name: str
    path: str
    sentence: str


@dataclass(frozen=True)
class _Written:
    """Excerpts without what stands after them.

    Attributes:
        text: With their marks.
        omitted: Characters of the context that are not in it.
        shown: What it has of the segments, and where each piece begins in it.
        pointed: Where it points out definitions.
        definitions: Which.
    """

    text: str
    omitted: int
    shown: tuple[tuple[Range, int], ...]
    pointed: tuple[tuple[int, int], ...]
    definitions: tuple[_Definition, ...]

    def find(self, place: Range) -> tuple[int, int] | None:
        """Return where a part of a segment stands in the text, without white space around it, if it does."""
        for (segment, start, end), at in self.shown:
            if segment == place[0] and start <= place[1] and place[2] <= end:
                first, last = at + place[1] - start, at + place[2] - start
                part = self.text[first:last]
                return last - len(part.lstrip()), first + len(part.rstrip())
        return None


def _write(
    segments: Sequence[Segment], spans: Sequence[Span], num_found: int, names: Collection[str]
) -> _Written:
    parts: list[str] = []
    shown: list[tuple[Range, int]] = []
    pointed: list[tuple[int, int]] = []
    definitions: list[_Definition] = []
    omitted = length = 0  # length: of what is written, without the head
    for group in _documents(segments):
        total = segments[group[-1]].line_of(len(segments[group[-1]].text))
        ranges = _ranges(segments, group, spans)
        name = segments[group[0]].name
        label = f"{name}, " if name else ""
        at = 0
        for first, start, end in ranges:
            segment = segments[first]
            before = sum(len(segments[i].text) for i in group if i < first) + start
            if before > at:
                omitted += before - at
            lines = segment.line_of(start), segment.line_of(max(start, end - 1))
            numbers = f"line {lines[0]}" if lines[0] == lines[1] else f"lines {lines[0]}-{lines[1]}"
            place = f"[{label}{_pages(segment, start, end)}{numbers} of {total}"
            here = _definitions(segment, start, end, names)
            definitions += here
            if here:
                first_char = length + len(place) + len(": ")
                told = ", ".join(found.sentence for found in here)
                pointed.append((first_char, first_char + len(told)))
                place += f": {told}"
            mark = f"{place}]\n"
            piece = segment.text[start:end]
            body = piece.lstrip("\n")
            newlines = len(piece) - len(body)
            shown.append(((first, start, end), length + len(mark) - newlines))
            parts.append(f"{mark}{body.rstrip(chr(10))}\n")
            length += len(parts[-1]) + 1
            at = before + end - start
        omitted += sum(len(segments[i].text) for i in group) - at
    if parts:
        head = f"[Excerpts of a longer text, in its order; {omitted:,} characters are left out]\n\n"
    elif num_found:
        head = f"[A text of {omitted:,} characters is left out: none of {num_found} passages found in it fits here]\n"
    else:
        head = (
            f"[A text of {omitted:,} characters is left out: no passage of it was found relevant]\n"
        )
    shift = len(head)
    return _Written(
        head + "\n".join(parts),
        omitted,
        tuple((place, at + shift) for place, at in shown),
        tuple((start + shift, end + shift) for start, end in pointed),
        tuple(definitions),
    )


def _definitions(
    segment: Segment, start: int, end: int, names: Collection[str]
) -> list[_Definition]:
    """Say on which lines of a range the named classes and functions are defined, and what the latter return."""
    where = f"in {segment.name} " if segment.name else ""
    found: list[_Definition] = []
    for match in DEFINITION.finditer(segment.text, start, end):
        if match[2] in names:
            line = segment.line_of(match.start(1))
            sentence = f"{match[1]} {match[2]} is defined {where}on line {line}"
            if values := returned(segment.text, match):
                sentence += f" and returns {' or '.join(values)}"
            found.append(_Definition(match[2], segment.name or "", sentence))
    return found


def _pages(segment: Segment, start: int, end: int) -> str:
    first, last = segment.page_of(start), segment.page_of(max(start, end - 1))
    if last is None:
        return ""
    first = last if first is None else first
    return f"page {first}, " if first == last else f"pages {first}-{last}, "


def _documents(segments: Sequence[Segment]) -> list[list[int]]:
    """Group consecutive segments that were cut from one text."""
    groups: list[list[int]] = []
    for index, segment in enumerate(segments):
        if segment.first_char and groups:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _ranges(
    segments: Sequence[Segment], group: Sequence[int], spans: Sequence[Span]
) -> list[Range]:
    """Return (segment, start, end) in characters of the segment: grown to whole sentences, overlaps joined."""
    found: list[Range] = []
    for span in sorted(
        (s for s in spans if s.segment in group), key=lambda s: (s.segment, s.tokens)
    ):
        segment = segments[span.segment]
        offset = segment.first_char
        start, end = _whole(segment.text, span.chars[0] - offset, span.chars[1] - offset)
        if found and found[-1][0] == span.segment and start <= found[-1][2]:
            found[-1] = (span.segment, found[-1][1], max(end, found[-1][2]))
        else:
            found.append((span.segment, start, end))
    return found


def _whole(text: str, start: int, end: int) -> tuple[int, int]:
    """Grow a range to begin and end where a line or, failing that, a sentence or word does, if one is near."""
    floor, ceiling = max(0, start - _REACH), min(len(text), end + _REACH)
    for mark in ("\n", ". ", " "):
        at = text.rfind(mark, floor, start)
        if floor == 0 and at < 0:
            start = 0
            break
        if at >= 0:
            start = at + len(mark)
            break
    for mark in ("\n", ". ", " "):
        at = text.find(mark, max(end - 1, 0), ceiling)
        if ceiling == len(text) and at < 0:
            end = ceiling
            break
        if at >= 0:
            end = at + len(mark)
            break
    return start, end
