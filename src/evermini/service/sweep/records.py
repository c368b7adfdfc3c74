"""The way "check": a text that is a list, each of its records asked about by itself, with two possible answers."""

from __future__ import annotations

from evermini.service.questions import DOCUMENT_NOUNS, RECORD_NOUNS, wanted
from evermini.service.sweep import prompts
from evermini.service.sweep.asking import all_of
from evermini.service.sweep.forms import Choice, QuestionWithAnswers
from evermini.service.sweep.reader import WindowReader
from evermini.service.sweep.result import Found
from evermini.service.sweep.windows import Part, Window, records

CHECK_TOKENS = 1536
"""A record beyond this is checked in several windows; it counts if one of them does."""
_SHOWN_CHARS = 80


def records_of(reader: WindowReader) -> list[list[Window]] | None:
    """Return the records that the question is about, each as its windows; ``None`` if it is about none."""
    asked = wanted(reader.question)
    nouns = asked.nouns[::-1]
    whole = [Part(number, 0, len(text)) for number, text in enumerate(reader.texts)]
    named = sum(piece.name is not None for piece in reader.pieces)
    found: list[Part] = []
    if named > 1 and any(noun in DOCUMENT_NOUNS for noun in nouns):
        found = whole
    elif asked.is_count and not nouns:
        found = _cut(reader, None)
    else:
        for noun in nouns:
            found = _cut(reader, noun)
            if found:
                break
    if not found:
        return None
    size = reader.fitting(CHECK_TOKENS)
    return [reader.windows(size, ranges=[part]) for part in found]


def _cut(reader: WindowReader, noun: str | None) -> list[Part]:
    """Return the records called ``noun`` of all texts, or nothing if one of them is no list of such."""
    found: list[Part] = []
    for number, text in enumerate(reader.texts):
        ranges = records(text, noun, must_label=noun is None or noun not in RECORD_NOUNS)
        if ranges is None:
            return []
        found += [Part(number, start, end) for start, end in ranges]
    return found


async def check(reader: WindowReader, found: list[list[Window]], is_count: bool) -> Found:
    """Ask the question about each record; with ``is_count`` what is wanted is their number.

    Raises:
        EverminiError: As `Asker.ask`.
    """
    reader.begin([window for record in found for window in record])
    asking = prompts.about_one(reader.question)
    reply = await reader.asker.ask(asking, max_tokens=80, form=QuestionWithAnswers())
    question, answers = _question_of(reply.text)
    form = Choice([word for answer in answers for word in (answer, answer.capitalize())])

    async def has(record: list[Window]) -> bool:
        replies = await all_of(
            reader.read(window, prompts.check(reader.shown(window), question, answers), 24, form)
            for window in record
        )
        return any(text.lower() == answers[0].lower() for text, _ in replies)

    verdicts = await all_of(has(record) for record in found)
    names = [_name(reader, record[0]) for record in found]
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
    return Found(
        "check",
        f"{question} ({answers[0]}/{answers[1]})",
        sum(map(len, found)),
        head,
        () if is_count else tuple(f"- {name}" for name in chosen),
        counts=counts,
        items=chosen,
        figures=(len(chosen), len(found), len(found) - len(chosen)) if is_count else (),
    )


def _name(reader: WindowReader, window: Window) -> str:
    """Return what a record is called in a list: its document's name, or how it begins."""
    part = window.parts[0]
    piece = reader.pieces[part.text]
    if piece.name is not None and (part.start, part.end) == (0, len(reader.texts[part.text])):
        return piece.name
    text = " ".join(reader.texts[part.text][part.start : part.end].split())
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS].rsplit(" ", 1)[0] + " ..."


def _question_of(reply: str) -> tuple[str, tuple[str, str]]:
    """Return the question about one thing and its two answers."""
    question, wanted_answer, other = (part.strip() for part in reply.split("|"))
    if wanted_answer.lower() == other.lower() or not (wanted_answer and other):
        return question, ("yes", "no")
    return question, (wanted_answer, other)
