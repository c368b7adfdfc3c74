"""What `ask` and `ingest` share: documents from paths, and what a person is told of those that were left out."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evermini.errors import ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from evermini.config import Settings
    from evermini.documents import Collection, Document

ExcludeFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="Leave out what this pattern (as in a .gitignore) matches in folders; may be repeated.",
        metavar="PATTERN",
    ),
]


def piped_input() -> bytes:
    """Return what is piped in, or nothing if standard input is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    return sys.stdin.buffer.read()


def split_images(paths: Sequence[str], piped: bytes) -> tuple[list[str], dict[str, bytes]]:
    """Return the paths that are no images, and of the images that are named themselves the bytes.

    Args:
        paths: Files, folders, globs, and ``-`` for ``piped``.
        piped: What was piped in.

    Raises:
        InvalidRequestError: An image cannot be read.
    """
    from evermini.documents import STDIN, is_image

    others: list[str] = []
    images: dict[str, bytes] = {}
    for path in paths:
        data = piped if path == STDIN else _image_bytes(Path(path))
        if is_image(data):
            images[path] = data
        else:
            others.append(path)
    return others, images


def _image_bytes(path: Path) -> bytes:
    """Return an image's bytes; nothing for what is no image, or no file."""
    from evermini.documents import is_image

    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            head = file.read(16)
            return head + file.read() if is_image(head) else b""
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from error


def collect_documents(
    paths: Sequence[str],
    piped: bytes,
    exclude: Sequence[str] | None,
    *,
    settings: Settings,
    verbose: bool,
) -> tuple[Document, ...]:
    """Read what the paths name, and say on stderr what was left out.

    Args:
        paths: Files, folders, globs, and ``-`` for ``piped``.
        piped: What was piped in.
        exclude: As in `evermini.documents.collect`.
        settings: For text recognition on scanned pages.
        verbose: Name every file that was left out.

    Raises:
        InvalidRequestError: As in `evermini.documents.collect`.
    """
    from evermini.documents import collect

    read_page = None
    if paths:
        from evermini.service.documents import page_reader

        read_page = page_reader(settings)
    collection = collect(paths, stdin=piped, exclude=exclude or (), read_page=read_page)
    for line in [*_skipped_lines(collection, every=verbose), *_blank_lines(collection)]:
        print(line, file=sys.stderr)
    return collection.documents


@contextmanager
def too_long_by_folder() -> Iterator[None]:
    """Let a prompt that is too long say which folders it comes from."""
    from evermini.documents.sizes import advice

    try:
        yield
    except ContextLengthError as error:
        if len(error.documents) < 2:
            raise
        raise ContextLengthError(
            f"{error} {len(error.documents):,} files are in it. {advice(error.documents, 'tokens')}",
            param=error.param,
        ) from error


@contextmanager
def naming_images(names: Sequence[str]) -> Iterator[None]:
    """Let what is wrong with an image say which one it is; they are the first parts of the only message."""
    try:
        yield
    except InvalidRequestError as error:
        match = re.search(r"\.content\[(\d+)\]\.image_url", error.param or "")
        if match is None:
            raise
        name = names[int(match[1])]
        raise InvalidRequestError(f"{name}: {error}", param=error.param, code=error.code) from error


def _skipped_lines(collection: Collection, *, every: bool) -> list[str]:
    """Return what to say of files that were left out: all names, or the first few."""
    if not (skipped := collection.skipped):
        return []
    reasons = Counter(item.reason for item in skipped).most_common()
    shown = ", ".join(f"{count} {reason}" for reason, count in reasons)
    total = len(skipped) + len(collection.documents)
    line = f"Skipped {len(skipped):,} of {total:,} files: {shown}"
    if every:
        return [line, *(f"  {item.name}: {item.reason}" for item in skipped)]
    # An empty file is no loss, so those are named last.
    first = sorted(skipped, key=lambda item: item.reason == "empty")[:3]
    names = ", ".join(item.name for item in first)
    more = ", ..." if len(skipped) > len(first) else ""
    return [f"{line} ({names}{more}; --verbose lists all)"]


def _blank_lines(collection: Collection) -> list[str]:
    """Return what to say of pages without text."""
    lines = []
    for document in collection.documents:
        if blank := document.blank_pages:
            numbers = ", ".join(map(str, blank[:10])) + (", ..." if len(blank) > 10 else "")
            lines.append(
                f"{document.name}: no text on {len(blank)} of {document.num_pages} pages ({numbers}); they may be scans"
            )
    return lines
