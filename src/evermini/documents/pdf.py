"""PDFs to pages of text or images, in a process of their own with bounds of time and memory.

Files may come from anybody, and PDFium is a million lines of C++.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from evermini.errors import DocumentError

PROGRAM = Path(__file__).with_name("pdfium.py")
MAX_SECONDS = 120
"""Processor time for one PDF; a book of 1,000 pages takes a few seconds."""
MAX_MEMORY = 2 * 1024**3
"""Bytes of memory beyond the PDF's own length."""
MAX_CHARACTERS = 64 * 1024**2
"""Longest text; more than any prompt holds."""


def pdf_pages(data: bytes, name: str) -> Iterator[str]:
    """Yield the text of each page, as PDFium gives it.

    Raises:
        DocumentError: It is damaged, locked, or takes more than the bounds.
    """
    left = MAX_CHARACTERS
    with closing(_ask(data, name, "text")) as answers:
        for _, text in answers:
            left -= len(text)
            if left < 0:
                raise _too_long(name)
            yield text


def pdf_image(data: bytes, name: str, index: int, *, dpi: int, side: int) -> Any:
    """Return a page as an image of `PIL`, or ``None`` if nothing is on it.

    Args:
        data: The PDF.
        name: What to call it.
        index: The page, from 0.
        dpi: Dots per inch.
        side: Most pixels of its longer side, whatever size the page says it has.

    Raises:
        DocumentError: As `pdf_pages`.
    """
    from PIL import Image

    with closing(_ask(data, name, "image", str(index), str(dpi), str(side))) as answers:
        for _, width, height, pixels in answers:
            return Image.frombytes("RGB", (width, height), base64.b64decode(pixels))
    return None


def _ask(data: bytes, name: str, *what: str) -> Generator[list[Any], None, None]:
    """Yield what PDFium says of a PDF, errors apart; closing the iterator ends the process."""
    longest = 8 * MAX_CHARACTERS
    limits = (str(MAX_SECONDS), str(MAX_MEMORY + 4 * len(data)))
    process = subprocess.Popen(
        [sys.executable, "-P", str(PROGRAM), *limits, *what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    assert process.stdout
    too_late = threading.Timer(
        2 * MAX_SECONDS, process.kill
    )  # for waits that take no processor time
    too_late.daemon = True
    too_late.start()
    try:
        with suppress(BrokenPipeError):  # its exit status tells why
            process.stdin.write(data)
            process.stdin.close()
        while (line := process.stdout.readline(longest)).endswith(b"\n"):
            answer: list[Any] = json.loads(line)
            if answer[0] == "locked":
                raise DocumentError(
                    f"{name} is a PDF locked with a password. Save it without one first.",
                    reason="locked PDF",
                )
            if answer[0] == "damaged":
                raise DocumentError(
                    f"{name} is a damaged PDF ({answer[1]}). Repair it, or print it to a new one.",
                    reason="damaged PDF",
                )
            yield answer
        if len(line) == longest:
            raise _too_long(name)
        if process.wait() != 0:
            raise DocumentError(
                f"{name} is a PDF that takes more than {MAX_SECONDS} s or {MAX_MEMORY / 1e9:.1f} GB of memory to "
                "read, or that crashes its reader. Print it to a new one.",
                reason="PDF too costly to read",
            )
    finally:
        too_late.cancel()
        process.kill()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _too_long(name: str) -> DocumentError:
    return DocumentError(
        f"{name} has more than {MAX_CHARACTERS:,} characters of text. Split it.",
        reason="PDF with too much text",
    )
