"""The forms that a sweep's replies must have, for engines that follow a grammar and for those that do not.

    form = Choice(("yes", "no"))
    form.regex                     a grammar, for our own engine
    form.schema                    a JSON schema, for other engines
    form.from_json({"answer": "no"})     "no": what the grammar would have given
    form.from_text("No, it is not.")     "No", from a reply in no enforced form; None if it is not clear

So whoever asks gets the same texts, whatever the engine can enforce.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

NONE = "none"
"""How a part of a text has nothing for a list."""
MOST_ITEMS = 24
"""Items of one reply; a part that has as many is read again in smaller parts."""
_MAX_ITEM = 80
_MARK = re.compile(r"^\s*(?:[-*\u2022]|\d{1,3}[.)])\s+")
_QUESTION_WORDS = "Is|Does|Was|Did|Has|Can"


class Form(ABC):
    """What a reply looks like.

    Attributes:
        regex: Matches it from end to end.
        fields: The JSON schemas of an object's fields that say the same.
        rule: Tells a model what to write, which wrote something else.
    """

    def __init__(self, regex: str, fields: Json, rule: str) -> None:
        self.regex, self.fields, self.rule = regex, fields, rule

    @property
    def schema(self) -> Json:
        """The JSON schema of the object."""
        return {
            "type": "object",
            "properties": self.fields,
            "required": list(self.fields),
            "additionalProperties": False,
        }

    @abstractmethod
    def to_json(self, text: str) -> Json:
        """Return a text of this form as an object of the schema; examples are shown as such."""

    @abstractmethod
    def from_json(self, value: Json) -> str:
        """Return an object of the schema as a text of this form. What is no such object: any error, or another text."""

    def read(self, reply: str) -> str | None:
        """Return what a reply says, in JSON or not; ``None`` if it is not of this form and not clear."""
        try:
            text = self.from_json(json.loads(reply))
        except (ValueError, TypeError, LookupError):
            return self.from_text(reply)
        return text if self.holds(text) else None

    def holds(self, text: str) -> bool:
        """Return whether a text is of this form."""
        return re.fullmatch(self.regex, text) is not None

    @abstractmethod
    def from_text(self, text: str) -> str | None:
        """Return what a free reply says in this form; ``None`` if it is not clear."""

    def read_cut(self, reply: str) -> str | None:
        """Return what a reply says that was cut before its end; ``None`` if it is not clear."""
        return self.from_text(reply)


class Choice(Form):
    """One of some words.

    Args:
        words: All spellings that may come.
    """

    def __init__(self, words: Sequence[str]) -> None:
        words = tuple(dict.fromkeys(words))
        super().__init__(
            "|".join(map(re.escape, words)),
            {"answer": {"type": "string", "enum": list(words)}},
            f"Write one of these and nothing else: {', '.join(words)}",
        )
        self._known = {word.lower(): word for word in words}
        longest_first = "|".join(map(re.escape, sorted(self._known, key=len, reverse=True)))
        self._said = re.compile(
            rf"(?:[^\w\n]*|.{{0,80}}?\b(?:answer|verdict)\b\W*(?:is\b\W*)?)({longest_first})(?!\w)",
            re.IGNORECASE | re.DOTALL,
        )

    def to_json(self, text: str) -> Json:
        """See `Form`."""
        return {"answer": text}

    def from_json(self, value: Json) -> str:
        """See `Form`."""
        return str(value["answer"])

    def from_text(self, text: str) -> str | None:
        """See `Form`: the word that the reply begins with, or calls its answer ("The answer is: No.")."""
        match = self._said.match(text)
        return self._known[match[1].lower()] if match else None


class Items(Form):
    """A list, or that there is nothing for it: ``- one`` in each line, or ``none``."""

    def __init__(self) -> None:
        array = {"type": "array", "items": {"type": "string"}, "maxItems": MOST_ITEMS}
        super().__init__(
            rf"{NONE}|(- [^\n]{{1,{_MAX_ITEM}}}\n){{1,{MOST_ITEMS}}}",
            {"items": array},
            f'Write a list with one item in each line, each line begun with "- ", or only "{NONE}"',
        )

    def to_json(self, text: str) -> Json:
        """See `Form`."""
        return {"items": [line.removeprefix("- ") for line in text.splitlines() if line != NONE]}

    def from_json(self, value: Json) -> str:
        """See `Form`."""
        lines = [" ".join(str(item).split()) for item in value["items"]]
        return "".join(f"- {line}\n" for line in lines if line) or NONE

    def from_text(self, text: str) -> str | None:
        """See `Form`: the lines with a mark before them."""
        lines = [_MARK.sub("", line).strip() for line in text.splitlines() if _MARK.match(line)]
        lines = [line for line in lines if line and line.lower().strip(" .") != NONE]
        if lines:
            return "".join(f"- {line}\n" for line in lines)
        return NONE if re.search(rf"\b{NONE}\b", text, re.IGNORECASE) else None

    def holds(self, text: str) -> bool:
        """See `Form`: items may be longer than a grammar allows."""
        return text == NONE or text.startswith("- ")

    def read_cut(self, reply: str) -> str | None:
        """See `Form`: the items that are complete."""
        if not reply.lstrip().startswith("{"):
            complete, _, _ = reply.rpartition("\n")
            return self.from_text(complete)
        _, _, inner = reply.partition("[")
        found = re.findall(r'"(?:[^"\\\n]|\\.)*"(?=\s*[,\]])', inner)
        return self.from_json({"items": [json.loads(item, strict=False) for item in found]})


class Question(Form):
    """A question about one thing."""

    def __init__(self) -> None:
        regex = rf"({_QUESTION_WORDS}) this [^\n?]{{1,100}}\?"
        super().__init__(
            regex,
            {"question": {"type": "string", "pattern": f"^{regex}$"}},
            'Write one question, such as "Is this a city?", and nothing else',
        )

    def to_json(self, text: str) -> Json:
        """See `Form`."""
        return {"question": text}

    def from_json(self, value: Json) -> str:
        """See `Form`."""
        return str(value["question"])

    def from_text(self, text: str) -> str | None:
        """See `Form`: the first such question."""
        match = re.search(rf"\b{self.regex}", text)
        return match[0] if match else None


class QuestionWithAnswers(Form):
    """A question about one thing and its two answers, the wanted one first: ``Is this good or bad? | bad | good``."""

    def __init__(self) -> None:
        question, answer = r"[^|\n]{8,160}\?", r"[^|\n]{1,24}"
        patterns = {"question": question, "wanted_answer": answer, "other_answer": answer}
        super().__init__(
            " \\| ".join(patterns.values()),
            {name: {"type": "string", "pattern": f"^{p}$"} for name, p in patterns.items()},
            "Write one line and nothing else: the question, then the wanted answer and the other one, in a word each, "
            'with " | " between them, such as "Is this review negative or positive? | negative | positive"',
        )

    def to_json(self, text: str) -> Json:
        """See `Form`."""
        return dict(zip(self.fields, text.split(" | "), strict=True))

    def from_json(self, value: Json) -> str:
        """See `Form`."""
        return " | ".join(str(value[field]) for field in self.fields)

    def from_text(self, text: str) -> str | None:
        """See `Form`: the first line that is so."""
        for line in text.splitlines():
            tidy = re.sub(r"\s*\|\s*", " | ", line.strip(" \"'`*"))
            if re.fullmatch(self.regex, tidy):
                return tidy
        return None
