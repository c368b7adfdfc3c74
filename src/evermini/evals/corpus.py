"""Texts to hide passages in, of a stated length in tokens, in which nothing is repeated."""

from __future__ import annotations

import gzip
import json
import random
import re
import tarfile
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from evermini.errors import InvalidRequestError

CountTokens = Callable[[str], int]
Hay = Literal["prose", "essays", "code"]

_SECTION = 24_000
_PASSES = 6
_SENTENCE_END = re.compile(r"(?<=[.?!;:])\s+(?=[A-Z\d\"'(])")


@dataclass(frozen=True)
class DataFolder:
    """Public data sets that are not part of the package.

        prose/*.txt.gz                    long prose
        pg_essays/*.txt                   essays
        code_haystack/*.tar.gz            source code
        hotpotqa/*.jsonl                  questions with ten paragraphs each
        xquad/xquad.en.json               questions to paragraphs, in SQuAD's format
        ruler_words/{noun,adjective,verb}list.txt

    Only what a task needs has to be there.
    """

    path: Path

    def _files(self, pattern: str, what: str) -> list[Path]:
        found = sorted(self.path.glob(pattern))
        if not found:
            raise InvalidRequestError(
                f"{self.path / pattern}: there is no such file, and this evaluation takes its {what} from there. "
                "Say with --data (or EVERMINI_EVAL_DATA) which folder has the data sets; docs/evaluation.md lists them."
            )
        return found

    def documents(self, hay: Hay) -> list[str]:
        """Return the texts of one kind of haystack."""
        if hay == "prose":
            return [
                gzip.decompress(path.read_bytes()).decode()
                for path in self._files("prose/*.txt.gz", "prose")
            ]
        if hay == "essays":
            files = self._files("pg_essays/*.txt", "essays")
            return [path.read_text() for path in files if path.name != "SOURCE.txt"]
        return [
            f"# {name}\n\n{text}"
            for path in self._files("code_haystack/*.tar.gz", "source code")
            for name, text in _members(path)
        ]

    def hotpot(self) -> list[dict[str, Any]]:
        """Return HotpotQA's questions (distractor setting)."""
        path = self._files("hotpotqa/*.jsonl", "questions")[0]
        return [json.loads(line) for line in path.read_text().splitlines()]

    def squad(self) -> list[dict[str, Any]]:
        """Return paragraphs with questions, in SQuAD's format: ``context`` and ``qas``."""
        path = self._files("xquad/xquad.en.json", "questions")[0]
        articles = json.loads(path.read_text())["data"]
        return [paragraph for article in articles for paragraph in article["paragraphs"]]

    def words(self) -> list[str]:
        """Return English words: nouns, adjectives and verbs, lower case, each once."""
        files = self._files("ruler_words/*list.txt", "words")
        words = {word for path in files for word in path.read_text().split()}
        return sorted(word for word in words if re.fullmatch("[a-z]{3,12}", word))


def _members(path: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            try:
                yield member.name, file.read().decode()
            except UnicodeDecodeError:
                continue


@dataclass(frozen=True)
class Hidden:
    """A passage and where it goes: ``depth`` 0 is the text's beginning, 1 its end."""

    text: str
    depth: float


@dataclass(frozen=True)
class Filled:
    """A text with its passages in it; ``places`` are their first characters, in the order they were given."""

    text: str
    num_tokens: int
    places: tuple[int, ...]


class Haystacks:
    """Texts of any length from a collection of documents.

    Args:
        documents: What to take them from.
        count: Tokens of a text.
    """

    def __init__(self, documents: Sequence[str], count: CountTokens) -> None:
        self._documents = documents
        self._count = count
        self._sizes: dict[str, int] = {}

    @cached_property
    def _sections(self) -> list[list[str]]:
        """The documents, cut into runs of paragraphs; a paragraph that was there before is left out."""
        seen: set[str] = set()
        sections: list[list[str]] = []
        for document in self._documents:
            section: list[str] = []
            length = 0
            for paragraph in re.split(r"\n\s*\n", unicodedata.normalize("NFC", document)):
                if not paragraph.strip() or (len(paragraph) > 40 and paragraph in seen):
                    continue
                seen.add(paragraph)
                section.append(paragraph)
                length += len(paragraph)
                if length >= _SECTION:
                    sections.append(section)
                    section, length = [], 0
            if section:
                sections.append(section)
        return sections

    def paragraphs(self, least: int, most: int) -> list[str]:
        """Return all paragraphs of ``least`` to ``most`` characters, each once."""
        whole = (text for section in self._sections for text in section)
        return [text for text in whole if least <= len(text) <= most]

    def fill(self, seed: int, num_tokens: int, hidden: Sequence[Hidden] = ()) -> Filled:
        """Return a text of at most ``num_tokens`` tokens, and hardly fewer, with passages hidden in it.

        A passage of one line stands between two sentences, a longer one between two paragraphs.

        Args:
            seed: Other seeds give other texts.
            num_tokens: Length of the whole, the passages included.
            hidden: The passages; those of equal depth follow each other in the order given.

        Raises:
            InvalidRequestError: The documents are too short, or the passages too long.
        """
        wanted = num_tokens - sum(self._count(item.text) + 2 for item in hidden)
        if wanted < 0:
            raise InvalidRequestError(
                f"The passages alone have more than {num_tokens} tokens. Take a longer text or fewer passages."
            )
        near = max(8, num_tokens // 250)
        best: Filled | None = None
        for _ in range(_PASSES):
            paragraphs, sizes = self._take(random.Random(seed), wanted)
            filled = self._insert(paragraphs, sizes, hidden)
            missing = num_tokens - filled.num_tokens
            if missing >= 0 and (best is None or filled.num_tokens > best.num_tokens):
                best = filled
            if 0 <= missing <= near:
                break
            # Tokens of the paragraphs do not quite add up to those of the text. Rather too short than too long.
            wanted = max(0, wanted + missing - near // 2)
        if best is None:
            raise InvalidRequestError(f"The passages alone have more than {num_tokens} tokens.")
        return best

    def _take(self, rng: random.Random, wanted: int) -> tuple[list[str], list[int]]:
        order = rng.sample(range(len(self._sections)), len(self._sections))
        paragraphs: list[str] = []
        sizes: list[int] = []
        total = 0
        for number in order:
            for paragraph in self._sections[number]:
                size = self._size(paragraph) + 1
                if total + size > wanted:
                    if last := self._trim(paragraph, wanted - total):
                        paragraphs.append(last)
                        sizes.append(self._count(last) + 1)
                    return paragraphs, sizes
                paragraphs.append(paragraph)
                sizes.append(size)
                total += size
        raise InvalidRequestError(
            f"The documents have only {total:,} tokens that do not repeat; {wanted:,} are wanted. Add documents to the "
            "data folder, or ask for a shorter text."
        )

    def _size(self, paragraph: str) -> int:
        if (size := self._sizes.get(paragraph)) is None:
            size = self._sizes[paragraph] = self._count(paragraph)
        return size

    def _trim(self, paragraph: str, room: int) -> str:
        """Return the paragraph's longest beginning of whole words with fewer than ``room`` tokens."""
        ends = [match.start() for match in re.finditer(r"\s+", paragraph)] + [len(paragraph)]
        fits = bisect_left(ends, room, key=lambda end: self._count(paragraph[:end]) + 1)
        return paragraph[: ends[fits - 1]].rstrip() if fits else ""

    def _insert(
        self, paragraphs: Sequence[str], sizes: Sequence[int], hidden: Sequence[Hidden]
    ) -> Filled:
        ends = [0, *accumulate(sizes)]
        lengths = [0, *accumulate(len(text) + 2 for text in paragraphs)]
        body = "\n\n".join(paragraphs)
        cuts: list[tuple[int, int]] = []
        for number, item in enumerate(hidden):
            at = item.depth * ends[-1]
            index = max(bisect_left(ends, at) - 1, 0)
            place = 0
            if paragraphs and at:
                share = (at - ends[index]) / sizes[index]
                stops = [0, len(paragraphs[index])]
                if "\n" not in item.text:
                    stops += [m.end() for m in _SENTENCE_END.finditer(paragraphs[index])]
                aim = share * len(paragraphs[index])
                place = lengths[index] + min(stops, key=lambda stop: abs(stop - aim))
            cuts.append((place, number))
        parts: list[str] = []
        places = [0] * len(hidden)
        length = at_char = 0
        for place, number in sorted(cuts):
            text = hidden[number].text
            mark = "\n\n" if "\n" in text else " "
            before, after = body[at_char:place], body[place:]
            head = mark if (before or parts) and not (before or parts[-1])[-1].isspace() else ""
            tail = mark if after and not (mark == " " and after[0].isspace()) else ""
            parts += [before, head, text, tail]
            places[number] = length + len(before) + len(head)
            length += len(before) + len(head) + len(text) + len(tail)
            at_char = place
            parts = [part for part in parts if part]
        text = "".join([*parts, body[at_char:]])
        return Filled(text, self._count(text), tuple(places))
