"""From what a user names to documents: paths, folders and globs, in the order given, each file once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evermini.documents.read import Document, PageReader, read_document
from evermini.documents.sizes import advice
from evermini.documents.sniff import is_pdf
from evermini.documents.walk import Found, is_glob, walk, walk_glob
from evermini.errors import DocumentError, InvalidRequestError

STDIN = "-"
STDIN_NAME = "standard input"
_MAX_PDF_BYTES = 256 << 20
_HEADER_BYTES = 2048


@dataclass(frozen=True)
class Limits:
    """How much is taken.

    Attributes:
        max_file_bytes: A larger text in a folder is skipped; one that is named itself is taken.
        max_total_bytes: All texts together; more is an error, since no prompt holds it.
    """

    max_file_bytes: int = 2 << 20
    max_total_bytes: int = 64 << 20


@dataclass(frozen=True)
class Skipped:
    """A file of a folder that was left out: ``reason`` says why, in a word or two."""

    name: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """What was found.

    Attributes:
        documents: In the order named; of a folder, by path.
        skipped: Files in folders that are not among them, ignored and hidden ones apart.
    """

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def collect(
    arguments: Sequence[str],
    *,
    stdin: bytes = b"",
    exclude: Sequence[str] = (),
    limits: Limits | None = None,
    read_page: PageReader | None = None,
) -> Collection:
    """Read what the arguments name.

    Args:
        arguments: Paths of files and folders, globs, and ``-`` for standard input.
        stdin: What ``-`` stands for.
        exclude: Patterns of what to leave out in folders, as in a ``.gitignore``.
        limits: How much is taken; default `Limits`.
        read_page: Reads scanned pages of PDFs that are named themselves.

    Raises:
        InvalidRequestError: Something that was named does not exist or cannot be read, a folder or glob has nothing
            to read in it, or it is all too much; names the largest folders then.
    """
    collector = _Collector(exclude, limits or Limits(), read_page)
    for argument in arguments:
        if argument == STDIN:
            collector.add_stdin(stdin)
        elif is_glob(argument) or Path(argument).is_dir():
            collector.add_folder(argument)
        else:
            collector.add_file(Path(argument))
    return collector.result()


class _Collector:
    """What was found so far."""

    def __init__(
        self, exclude: Sequence[str], limits: Limits, read_page: PageReader | None
    ) -> None:
        self._exclude, self._limits, self._read_page = exclude, limits, read_page
        self._documents: list[Document] = []
        self._skipped: list[Skipped] = []
        self._sizes: dict[str, int] = {}
        self._total = 0
        self._seen: set[str] = set()

    def add(self, document: Document) -> None:
        self._documents.append(document)
        self._count(document.name, len(document.text))

    def add_stdin(self, data: bytes) -> None:
        if not data.strip():
            raise InvalidRequestError(
                "Nothing is piped in for '-'. Pipe a text or PDF in, or leave '-' out."
            )
        self.add(read_document(data, STDIN_NAME, read_page=self._read_page))

    def add_file(self, path: Path) -> None:
        if not self._is_new(path):
            return
        document = read_file(path, read_page=self._read_page)
        if document.text:
            self.add(document)
        else:
            self._skipped.append(Skipped(document.name, "empty"))

    def add_folder(self, argument: str) -> None:
        """Add what a folder or glob holds; what is in it and was named before counts as found."""
        first_skipped, found_any = len(self._skipped), False
        for found in _search(argument, self._exclude):
            name = found.path.as_posix()
            if found.is_link:
                self._skipped.append(Skipped(name, "symbolic link"))
            elif not self._is_new(found.path):
                found_any = True
            elif self._total > self._limits.max_total_bytes:  # it only matters how much it all is
                self._count(name, found.path.stat().st_size)
            else:
                document = _read_found(found.path, name, self._limits)
                if isinstance(document, Skipped):
                    self._skipped.append(document)
                else:
                    found_any = True
                    self.add(document)
        if not found_any:
            raise InvalidRequestError(_nothing(argument, self._skipped[first_skipped:]))

    def result(self) -> Collection:
        if self._total > (most := self._limits.max_total_bytes):
            raise InvalidRequestError(
                f"{len(self._sizes):,} files with {self._total / 1e6:,.0f} MB are more than a prompt can hold "
                f"({most / 1e6:,.0f} MB). {advice(self._sizes, 'bytes')}"
            )
        if self._skipped and not self._documents:
            names = ", ".join(item.name for item in self._skipped[:3])
            raise InvalidRequestError(_nothing(names, self._skipped))
        return Collection(tuple(self._documents), tuple(self._skipped))

    def _count(self, name: str, size: int) -> None:
        self._sizes[name] = size
        self._total += size

    def _is_new(self, path: Path) -> bool:
        real = os.path.realpath(path)
        is_new = real not in self._seen
        self._seen.add(real)
        return is_new


def _search(argument: str, exclude: Sequence[str]) -> Iterator[Found]:
    try:
        if is_glob(argument):
            yield from walk_glob(argument, exclude)
        else:
            yield from walk(Path(argument), exclude)
    except OSError as error:
        raise InvalidRequestError(
            f"{error.filename or argument} cannot be listed: {error.strerror}."
        ) from error


def _read_found(path: Path, name: str, limits: Limits) -> Document | Skipped:
    """Read a file of a folder, or say why not."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
            largest = _MAX_PDF_BYTES if is_pdf(head) else limits.max_file_bytes
            if size > largest:
                is_binary = b"\0" in head and not is_pdf(head)
                return Skipped(name, "binary" if is_binary else f"over {largest / 1e6:.1f} MB")
            document = read_document(head + file.read(), name)
    except OSError as error:
        return Skipped(name, (error.strerror or "unreadable").lower())
    except DocumentError as error:
        return Skipped(name, error.reason)
    if not document.text:
        return Skipped(name, "empty")
    if len(document.text) > limits.max_file_bytes:
        return Skipped(name, f"over {limits.max_file_bytes / 1e6:.1f} MB")
    return document


def read_file(path: Path, *, read_page: PageReader | None = None) -> Document:
    """Read one file; its name is its path.

    Args:
        path: The file.
        read_page: As in `read_document`.

    Raises:
        InvalidRequestError: It cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from error
    return read_document(data, path.as_posix(), read_page=read_page)


def _nothing(argument: str, skipped: Iterable[Skipped]) -> str:
    reasons = Counter(item.reason for item in skipped)
    if not reasons:
        return (
            f"No file to read in {argument}: nothing is there, or all of it is hidden or ignored (.gitignore, .ignore, "
            "--exclude). Name files themselves to read them in any case."
        )
    shown = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"No file to read in {argument}: {shown}. Name text files or PDFs."
