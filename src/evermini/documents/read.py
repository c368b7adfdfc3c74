"""Bytes to text: UTF-8, UTF-16 with a byte order mark, PDF, DOCX, PPTX, HTML.

What a file is, its content says, not its name. Nothing is dropped in silence: a page without text keeps its mark and
says so, and a file without any text is an error.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evermini.documents.html import read_html
from evermini.documents.office import read_docx, read_pptx
from evermini.documents.pdf import pdf_image, pdf_pages
from evermini.documents.sniff import kind_of
from evermini.errors import DocumentError

PageReader = Callable[[Any, int], str]
"""(a page as an image of `PIL`, its number from 1) -> the text on it."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SCAN_CHARS = 64
"""A page with fewer letters and digits than this may be a scan with a stamp on it."""
MAX_SCANS = 1000
"""Scanned pages of one document that are read; each takes seconds."""
_SCAN_DPI = 150
_SCAN_PIXELS = 2200
"""Longest side of a page as an image: that of a sheet of A4 at 188 dots per inch."""


@dataclass(frozen=True)
class Document:
    """A text with a name.

    Attributes:
        name: What to call it, such as its path.
        text: Its text, without white space at its end. In a text of pages, each begins with a line ``[page N]``.
        num_pages: Its pages; ``None`` if it has none.
        blank_pages: Pages without text, from 1: often scans.
    """

    name: str
    text: str
    num_pages: int | None = None
    blank_pages: tuple[int, ...] = ()


def read_document(
    data: bytes, name: str, *, read_page: PageReader | None = None, render_html: bool = False
) -> Document:
    """Return what a file says.

    Args:
        data: The file's bytes.
        name: What to call it.
        read_page: Reads scanned pages of PDFs; without it they are named in `Document.blank_pages`.
        render_html: Return the text that readers of a web page see instead of its source.

    Raises:
        DocumentError: It is no text that can be read; says what it is instead and what to do.
    """
    match kind_of(data):
        case "pdf":
            return _read_pdf(data, name, read_page)
        case "docx":
            return Document(name, _clean(read_docx(data, name)))
        case "pptx":
            return _of_pages(
                name, [_clean(t) for t in read_pptx(data, name)], "slides without text"
            )
        case "image":
            raise DocumentError(
                f"{name} is an image. Give it where images are taken, or a text file or PDF.",
                reason="image",
            )
        case "archive":
            raise DocumentError(
                f"{name} is an archive, or a damaged office file. Unpack it, or save the document anew.",
                reason="archive",
            )
        case "html" if render_html:
            return Document(name, read_html(_decode(data, name)))
    return Document(name, _decode(data, name).rstrip())


def _decode(data: bytes, name: str) -> str:
    encoding = "utf-16" if data.startswith(_UTF16) else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in data:
        raise DocumentError(
            f"{name} is a binary file. Give text files or PDFs; convert others first.",
            reason="binary",
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not UTF-8 text (byte {error.start}). Give text files or PDFs; convert others first.",
            reason="not UTF-8 text",
        ) from error


def _of_pages(name: str, pages: Sequence[str], reason: str) -> Document:
    blank = tuple(number for number, text in enumerate(pages, start=1) if not text)
    if len(blank) == len(pages):
        raise DocumentError(
            f"{name} has no text on any of its {len(pages)} pages; they may be scans. Run text recognition (OCR) on "
            "it first.",
            reason=reason,
        )
    parts = [
        f"[page {number}]\n{text or '(This page has no text. It may be a scan.)'}"
        for number, text in enumerate(pages, start=1)
    ]
    return Document(name, "\n\n".join(parts), len(pages), blank)


def _read_pdf(data: bytes, name: str, read_page: PageReader | None) -> Document:
    pages = [_clean(text) for text in pdf_pages(data, name)]
    if read_page is not None:
        scans = [n for n, text in enumerate(pages) if sum(map(str.isalnum, text)) < _SCAN_CHARS]
        if len(scans) > MAX_SCANS:
            raise DocumentError(
                f"{name} has {len(scans)} pages without text, more than the {MAX_SCANS} that are read as scans. Split "
                "it.",
                reason="too many scanned pages",
            )
        for index in scans:
            image = pdf_image(data, name, index, dpi=_SCAN_DPI, side=_SCAN_PIXELS)
            if image is not None:
                pages[index] = max(pages[index], _clean(read_page(image, index + 1)), key=len)
    return _of_pages(name, pages, "PDF without text")


def _clean(text: str) -> str:
    """Return a page's text with plain line ends; PDFium writes U+0002 or U+FFFE for a hyphen at a line's end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\x02", "-").replace("\ufffe", "-").replace("\0", "")
    return unicodedata.normalize("NFC", text).strip()
