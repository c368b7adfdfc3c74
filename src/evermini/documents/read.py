"""Bytes to text: UTF-8, UTF-16 with a byte order mark, PDF.

What a file is, its content says, not its name. Nothing is dropped in silence: a page without text keeps its mark and
says so, and a file without any text is an error.
"""

from __future__ import annotations

import codecs
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evermini.errors import DocumentError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PDF_HEADER = b"%PDF-"
_pdfium = threading.Lock()
"""PDFium may be used by one thread at a time, whatever the document."""


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


def read_document(data: bytes, name: str) -> Document:
    """Return what a file says.

    Args:
        data: The file's bytes.
        name: What to call it.

    Raises:
        DocumentError: It is no text that can be read; says what it is instead and what to do.
    """
    if is_pdf(data):
        return _read_pdf(data, name)
    return Document(name, _decode(data, name).rstrip())


def is_pdf(data: bytes) -> bool:
    """Tell whether a file, or its beginning, is a PDF's."""
    return data[:1024].lstrip().startswith(_PDF_HEADER)


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


def _read_pdf(data: bytes, name: str) -> Document:
    pages = list(_pdf_pages(data, name))
    blank = tuple(number for number, text in enumerate(pages, start=1) if not text)
    if len(blank) == len(pages):
        raise DocumentError(
            f"{name} has no text on any of its {len(pages)} pages; they may be scans. Run text recognition (OCR) on "
            "it first.",
            reason="PDF without text",
        )
    parts = [
        f"[page {number}]\n{text or '(This page has no text. It may be a scan.)'}"
        for number, text in enumerate(pages, start=1)
    ]
    return Document(name, "\n\n".join(parts), len(pages), blank)


def _pdf_pages(data: bytes, name: str) -> Iterator[str]:
    import pypdfium2

    with _pdfium:
        try:
            pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
                raise DocumentError(
                    f"{name} is a PDF locked with a password. Save it without one first.",
                    reason="locked PDF",
                ) from error
            raise DocumentError(
                f"{name} is a damaged PDF ({error}). Repair it, or print it to a new one.",
                reason="damaged PDF",
            ) from error
        try:
            for index in range(len(pdf)):
                yield _clean(_page_text(pdf, index, name))
        finally:
            pdf.close()


def _page_text(pdf: Any, index: int, name: str) -> str:
    import pypdfium2

    try:
        page = pdf[index]
        textpage = page.get_textpage()
    except pypdfium2.PdfiumError as error:
        raise DocumentError(
            f"{name} is a damaged PDF (page {index + 1}: {error}). Repair it, or print it to a new one.",
            reason="damaged PDF",
        ) from error
    try:
        return str(textpage.get_text_bounded())
    finally:
        textpage.close()
        page.close()


def _clean(text: str) -> str:
    """Return a page's text with plain line ends; PDFium writes U+0002 or U+FFFE for a hyphen at a line's end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\x02", "-").replace("\ufffe", "-").replace("\0", "")
    return unicodedata.normalize("NFC", text).strip()
