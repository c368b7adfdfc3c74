"""Keeps the text of messages from turning into special tokens when a chat template is rendered.

A rendered prompt is one string in which the template's ``<|im_end|>`` and a user's look alike. So wherever a user's
text holds a special token, a mark (a character that occurs nowhere else) is put behind its first character before
rendering; the special tokens found afterwards are the template's, and then the marks are taken out. A text that ends
with the beginning of a special token is marked too, since the template may put another text right behind it. Text
without such places, that is nearly all text, is not touched: templates that look into messages see them as they are.
(Into a marked text a template looks too; one that prints its length counts the marks.)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable

# DEL first: it is the one that JSON never escapes.
_MARKS = ("\x7f", *map(chr, range(0xF0000, 0xFFFFE)))


class SpecialGuard:
    """Breaks special tokens in text.

    Upper and lower case are not told apart, in case a template changes them.

    Args:
        special_texts: The texts to break, each of two characters or more.
    """

    def __init__(self, special_texts: Collection[str]) -> None:
        texts = {text.lower() for text in special_texts}
        # Only the first character is consumed, so that overlapping occurrences are found as well.
        rests: dict[str, list[str]] = {}
        for text in sorted(texts):
            rests.setdefault(text[0], []).append(re.escape(text[1:]))
        whole = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        self._whole = re.compile("|".join(whole) or r"(?!)", re.IGNORECASE)
        self._beginnings = {text[:length] for text in texts for length in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def find_mark(self, texts: Iterable[str]) -> str:
        """Return a mark for these texts, or ``""`` if none of them has to be protected."""
        texts = list(texts)
        if not any(self._places(text) for text in texts):
            return ""
        return next(mark for mark in _MARKS if not any(mark in text for text in texts))

    def protect(self, text: str, mark: str) -> str:
        """Return the text with a mark behind the first character of each special token, or beginning of one, in it."""
        places = self._places(text)
        if not places:
            return text
        edges = [0, *places, len(text)]
        return mark.join(text[a:b] for a, b in itertools.pairwise(edges))

    def _places(self, text: str) -> list[int]:
        places = {match.end() for match in self._whole.finditer(text)}
        for end in {len(text), len(text.rstrip())}:  # templates strip what they are given
            for start in range(max(0, end - self._longest), end):
                if text[start:end].lower() in self._beginnings:
                    places.add(start + 1)
        return sorted(places)
