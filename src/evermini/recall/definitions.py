"""Where code defines what a question names, as in "what does asyncio.Queue.qsize return?".

A common name is used in many files and defined in few; heads and words prefer the places that use it most. So lines
that define a name of the question are looked up in the text itself. Of equal names, those count whose path the question
speaks of (``asyncio.Queue``: asyncio/queues.py) and that contain the other names (the class with that method).

Only names that look like code are looked up, and only real definitions found: prose is read as without this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.recall.segment import Segment

DEFINITION = re.compile(
    r"^[ \t]*(?:(?:export|default|pub|public|private|protected|static|abstract|final|async|unsafe|inline)[ \t]+)*"
    r"(class|def|function|fn|func|struct|interface|enum|trait|impl)[ \t]+(\w+)"
    r"(?=[ \t]*(?:[(:{<\[;=]|$)|[ \t]+(?:extends|implements|for|struct|interface)\b)",
    re.MULTILINE,
)
"""A line that defines something: its kind and its name."""

_HEAD_CHARS = 400
"""What is read of a class of which a method is asked for."""
_BODY_CHARS = 800
"""What is read of any other definition."""
_MAX_TIED = 3
"""A name with more definitions that are equally likely is left to the ranking."""
_MAX_FOUND = 6
_MAX_NAMES = 24
"""Names of a question that are looked up; one with more quotes code rather than asking for a place in it."""

_MAX_RETURNS = 3
"""Of a function with more different ones, none is told."""
_MAX_RETURN = 160
"""Characters of an expression."""
_RETURN = re.compile(r"^[ \t]*return\b[ \t]*(?P<value>[^\n]*)$", re.MULTILINE)
_PROSE = re.compile(
    r"(?!(?:not|await|new|lambda|typeof|yield|void|mut|async|function|func|fn|struct|move)\b)[^\W\d]\w*[ \t]+"
    r"(?!(?:if|unless|else|and|or|in|is|not|for|as|instanceof|xor|shl|shr|mod|div)\b)[^\W\d]"
)
"""Two words beside each other that no operator joins: a line of a comment that begins with "return"."""
_VARIABLE = re.compile(r"(?!(?:true|false|null|nil|none|self|this)$)_*[a-z]\w*")

_CONTAINERS = frozenset({"class", "struct", "interface", "enum", "trait", "impl"})
_JOINT = r"(?:\.|::|\#|->)"
_KEYWORD = r"(?:class|def|function|method|fn|func|struct|interface|enum|trait|impl|constructor)\b"
_NAMES = re.compile(
    r"`(?P<quoted>[^`\n]{1,80})`"
    rf"|(?P<dotted>[^\W\d]\w*(?:{_JOINT}[^\W\d]\w*)+)"
    rf"|\b{_KEYWORD}[ \t]+(?=[\"']?(?P<after>[^\W\d]\w*\b(?!{_JOINT}\w)))"
    rf"|\b(?P<before>[^\W\d]\w*)(?=[\"']?[ \t]+{_KEYWORD})"
    r"|\b(?P<called>[^\W\d]\w*)\("
    r"|\b(?P<shaped>\w*[a-z0-9][A-Z]\w*|[A-Z]{2,}[a-z]\w*|_+[^\W_]\w*|[^\W_]\w*_\w*)\b"
)
_WORD = re.compile(r"[^\W\d]\w*")
_PLAIN = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be by can class code constant def defined defines definition did do does enum file
        for from function get had has have how if in interface into is it its line lines method module name named
        no not of on or package return returned returns set struct that the this to trait type was were what when
        where which who whose why will with would you""",
    )
)
"""Words that are no names and say nothing of a path, even where code has them."""


@dataclass(frozen=True)
class Definition:
    """Where something is defined.

    Attributes:
        segment: Which segment, from 0.
        kind: Its keyword, such as ``class``.
        name: What is defined.
        start: The character of `Segment.text` at which its first line begins.
        end: Where what is to be read of it ends.
    """

    segment: int
    kind: str
    name: str
    start: int
    end: int


def asked_names(question: str) -> dict[str, bool]:
    """Return the names of code in a question, in its order, and whether each is only what another one is in.

    Names are in backquotes, dotted, called, in CamelCase or snake_case, or beside a word such as "class" or "method".
    ``asyncio.Queue.qsize`` names ``qsize``, in the class ``Queue``, in something that may be a class, ``asyncio``.
    """
    names: dict[str, bool] = {}
    for match in _NAMES.finditer(question):
        *outer, last = _WORD.findall(match[match.lastgroup or 0]) or [""]
        for name in outer:
            names.setdefault(name, True)
        if last and (match.lastgroup not in ("after", "before") or last not in _PLAIN):
            names[last] = False
    return names


def find_definitions(segments: Sequence[Segment], question: str) -> list[Definition]:
    """Return the few definitions that a question asks for, the best first; none if it names none.

    Args:
        segments: The context.
        question: What is asked.
    """
    found: dict[str, list[Definition]] = {}
    for name, is_outer in list(asked_names(question).items())[:_MAX_NAMES]:
        places = [
            place
            for number, segment in enumerate(segments)
            for place in _defined_in(segment, number, name)
            if place.kind in _CONTAINERS or not is_outer
        ]
        if places:
            found[name] = places
    said = {word.lower() for word in set(_WORD.findall(question)) - found.keys()} - _PLAIN
    by_rarity = sorted(found, key=lambda name: len(found[name]))
    result: list[Definition] = []
    done: set[str] = set()
    for name in by_rarity:
        holders = [place for place in found[name] if place.kind in _CONTAINERS]
        inside = {
            place: [d for other in found if other != name for d in found[other] if _has(place, d)]
            for place in holders
        }
        for place in _likeliest(segments, holders, said, inside):
            of = inside[place]
            limit = _HEAD_CHARS if of else _BODY_CHARS
            result += [replace(place, end=min(place.end, place.start + limit))]
            result += [replace(d, end=min(d.end, d.start + _BODY_CHARS)) for d in of]
            done.update([name, *(d.name for d in of)])
    for name in by_rarity:
        functions = [place for place in found[name] if place.kind not in _CONTAINERS]
        if name not in done:
            result += [
                replace(place, end=min(place.end, place.start + _BODY_CHARS))
                for place in _likeliest(segments, functions, said, {})
            ]
    return list(dict.fromkeys(result))[:_MAX_FOUND]


def returned(text: str, match: re.Match[str]) -> list[str]:
    """Return what a function's ``return`` statements give, word for word and each once.

    Nothing of functions inside it. Nothing at all where that would be half of the truth: where an expression goes on
    beyond its line or is a variable, where there are many, and of what is no function.

    Args:
        text: The text it is defined in.
        match: Of `DEFINITION`, where.
    """
    if match[1] in _CONTAINERS:
        return []
    end = _end(text, match)
    inner = [(m.start(), _end(text, m)) for m in DEFINITION.finditer(text, match.end(), end)]
    values: dict[str, None] = {}
    for found in _RETURN.finditer(text, match.end(), end):
        value = found["value"].strip().removesuffix(";").rstrip()
        if (
            not value
            or _PROSE.match(value)
            or any(first <= found.start() < past for first, past in inner)
        ):
            continue
        if len(value) > _MAX_RETURN or not _is_whole(value) or _VARIABLE.fullmatch(value):
            return []
        values[value] = None
    return list(values) if len(values) <= _MAX_RETURNS else []


def _is_whole(expression: str) -> bool:
    """Return whether all brackets are closed and no operator waits for more."""
    depths = (expression.count(a) - expression.count(b) for a, b in ("()", "[]", "{}"))
    return not any(depths) and not re.search(
        r"[-+*/%&|^=<>,.?:\\]$|\b(?:and|or|not|in|is)$", expression
    )


def _defined_in(segment: Segment, number: int, name: str) -> list[Definition]:
    """Find a name, then look at its line: many times faster than looking at all lines."""
    text, places = segment.text, []
    at = text.find(name)
    while at >= 0:
        if at and text[at - 1] in " \t":
            start = text.rfind("\n", 0, at) + 1
            match = DEFINITION.match(text, start)
            if match is not None and match.span(2) == (at, at + len(name)):
                places.append(Definition(number, match[1], name, start, _end(text, match)))
        at = text.find(name, at + len(name))
    return places


def _end(text: str, match: re.Match[str]) -> int:
    """Return where what a line defines ends: at the next line that is not indented deeper."""
    start = match.start()
    indent = len(match[0]) - len(match[0].lstrip(" \t"))
    closing = re.compile(rf"^[ \t]{{0,{indent}}}(?![ \t\r\n)\]{{#]|\Z)", re.MULTILINE)
    line_end = text.find("\n", match.end())
    if line_end < 0:
        return len(text)
    after = closing.search(text, max(start, line_end + 1))
    if after is None:
        return len(text)
    if text.startswith("}", after.end()):
        line_end = text.find("\n", after.end())
        return line_end + 1 if line_end >= 0 else len(text)
    return after.start()


def _has(outer: Definition, inner: Definition) -> bool:
    return outer.segment == inner.segment and outer.start < inner.start < outer.end


def _likeliest(
    segments: Sequence[Segment],
    places: Sequence[Definition],
    said: set[str],
    inside: dict[Definition, list[Definition]],
) -> list[Definition]:
    """Return the places that agree best with the question; none if too many do."""
    scores = []
    for place in places:
        path = set(re.findall(r"[^\W_]+", (segments[place.segment].name or "").lower()))
        own = place.name.lower().rstrip("s")
        parts = {d.name for d in inside.get(place, ())}
        scores.append(
            len(path & said) + len(parts) + 0.5 * any(part.rstrip("s") == own for part in path)
        )
    best = [place for place, score in zip(places, scores, strict=True) if score == max(scores)]
    return best if len(best) <= _MAX_TIED else []
