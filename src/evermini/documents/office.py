"""DOCX and PPTX to text: paragraphs, headings, lists, tables, notes; slides are pages.

Both are ZIP archives of XML. Only the parts with text are opened, each bounded in length however little of the
archive it takes, and XML that declares entities is refused: office programs write none.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Iterable, Iterator
from xml.etree import ElementTree

from evermini.errors import DocumentError

MAX_PART_BYTES = 64 << 20
"""Longest part of an archive that is unpacked."""
MAX_ALL_BYTES = 256 << 20
"""All parts together."""
MAX_SLIDES = 5000

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_P = "{http://schemas.openxmlformats.org/presentationml/2006/main}"
_R = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_NOTES = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/notesSlide"

Element = ElementTree.Element


class _Archive:
    """The parts of an office file, unpacked within bounds."""

    def __init__(self, data: bytes, name: str) -> None:
        self._name = name
        self._left = MAX_ALL_BYTES
        self._zip = zipfile.ZipFile(io.BytesIO(data))
        self._names = set(self._zip.namelist())

    def part(self, path: str) -> Element | None:
        """Return a part's root, or ``None`` if there is no such part.

        Raises:
            DocumentError: It is too long, damaged, or declares entities.
        """
        if path not in self._names:
            return None
        limit = min(MAX_PART_BYTES, self._left)
        try:
            with self._zip.open(path) as file:
                data = file.read(limit + 1)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
            raise _damaged(self._name, f"{path}: {error}") from error
        if len(data) > limit:
            raise DocumentError(
                f"{self._name} unpacks to more than {limit >> 20} MiB of text ({path}). Split it.",
                reason="too large when unpacked",
            )
        self._left -= len(data)
        if b"<!DOCTYPE" in data[:4096] or b"<!ENTITY" in data:
            raise _damaged(self._name, f"{path} declares entities")
        try:
            return ElementTree.fromstring(data)
        except ElementTree.ParseError as error:
            raise _damaged(self._name, f"{path}: {error}") from error

    def relations(self, path: str) -> list[tuple[str, str, str]]:
        """Return (id, type, path) of what a part refers to inside the archive."""
        folder, base = posixpath.split(path)
        root = self.part(f"{folder}/_rels/{base}.rels")
        return [
            (
                item.get("Id", ""),
                item.get("Type", ""),
                posixpath.normpath(posixpath.join("/", folder, item.get("Target", "")))[1:],
            )
            for item in (() if root is None else root)
            if item.get("TargetMode") != "External"
        ]


def read_docx(data: bytes, name: str) -> str:
    """Return a Word document's text.

    Raises:
        DocumentError: It is damaged, or too large when unpacked.
    """
    archive = _open(data, name)
    root = archive.part("word/document.xml")
    body = None if root is None else root.find(f"{_W}body")
    if body is None:
        raise _damaged(name, "no body")
    blocks = list(_word_blocks(body))
    for part, title in (("footnotes", "Footnotes"), ("endnotes", "Endnotes")):
        notes = archive.part(f"word/{part}.xml")
        texts = [] if notes is None else [t for note in notes for t in _word_blocks(note)]
        if texts:
            blocks += [f"{title}:", *texts]
    return "\n\n".join(blocks)


def read_pptx(data: bytes, name: str) -> list[str]:
    """Return the text of each slide of a presentation, in order, speaker's notes at its end.

    Raises:
        DocumentError: It is damaged, or too large when unpacked.
    """
    archive = _open(data, name)
    root = archive.part("ppt/presentation.xml")
    listed = None if root is None else root.find(f"{_P}sldIdLst")
    if listed is None:
        raise _damaged(name, "no slides")
    if len(listed) > MAX_SLIDES:
        raise DocumentError(
            f"{name} has {len(listed)} slides, more than {MAX_SLIDES}. Split it.",
            reason="too many slides",
        )
    paths = {found: path for found, _, path in archive.relations("ppt/presentation.xml")}
    return [_slide(archive, paths.get(item.get(f"{_R}id", ""), "")) for item in listed]


def _slide(archive: _Archive, path: str) -> str:
    root = archive.part(path)
    if root is None:
        return ""
    blocks = list(_drawn_blocks(root))
    for _, kind, target in archive.relations(path):
        notes = archive.part(target) if kind == _NOTES else None
        if notes is not None:
            texts = [text for shape in notes.iter(f"{_P}sp") for text in _note_texts(shape)]
            if texts:
                blocks.append("Notes: " + "\n".join(texts))
    return "\n".join(blocks)


def _note_texts(shape: Element) -> Iterator[str]:
    """Yield the paragraphs of a notes page's body; its other shapes are the slide's number and picture."""
    place = shape.find(f".//{_P}nvPr/{_P}ph")
    if place is not None and place.get("type") == "body":
        yield from _drawn_blocks(shape)


def _open(data: bytes, name: str) -> _Archive:
    try:
        return _Archive(data, name)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(name, str(error)) from error


def _damaged(name: str, why: str) -> DocumentError:
    return DocumentError(
        f"{name} is a damaged office file ({why}). Open it in an office program and save it anew.",
        reason="damaged office file",
    )


def _word_blocks(parent: Element) -> Iterator[str]:
    """Yield the paragraphs and tables of a body, cell or note."""
    for child in parent:
        if child.tag == f"{_W}p":
            if text := _word_paragraph(child):
                yield text
        elif child.tag == f"{_W}tbl":
            if rows := [_row(map(_word_cell, row.iter(f"{_W}tc"))) for row in _rows(child)]:
                yield "\n".join(rows)
        elif child.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}ins", f"{_W}customXml"):
            yield from _word_blocks(child)


def _rows(table: Element) -> Iterator[Element]:
    """Yield a table's own rows, not those of tables inside its cells."""
    for child in table:
        if child.tag == f"{_W}tr":
            yield child
        elif child.tag in (f"{_W}sdt", f"{_W}sdtContent"):
            yield from _rows(child)


def _word_cell(cell: Element) -> str:
    return " ".join(_word_blocks(cell))


def _word_paragraph(paragraph: Element) -> str:
    pieces: list[str] = []
    _word_runs(paragraph, pieces)
    text = "".join(pieces).strip()
    style = paragraph.find(f"{_W}pPr/{_W}pStyle")
    heading = re.fullmatch(
        r"[Hh]eading\s?(\d)|(Title)", style.get(f"{_W}val", "") if style is not None else ""
    )
    if text and heading:
        return "#" * int(heading[1] or 1) + f" {text}"
    if text and paragraph.find(f"{_W}pPr/{_W}numPr") is not None:
        return f"- {text}"
    return text


def _word_runs(element: Element, pieces: list[str]) -> None:
    for child in element:
        if child.tag == f"{_W}t":
            pieces.append(child.text or "")
        elif child.tag == f"{_W}tab":
            pieces.append("\t")
        elif child.tag in (f"{_W}br", f"{_W}cr"):
            pieces.append("\n")
        elif child.tag not in (f"{_W}pPr", f"{_W}rPr", _FALLBACK):
            _word_runs(child, pieces)


def _drawn_blocks(element: Element) -> Iterator[str]:
    """Yield the paragraphs and tables of a slide, in the order of its shapes."""
    for child in element:
        if child.tag == f"{_A}p":
            if text := _drawn_text(child):
                yield text
        elif child.tag == f"{_A}tbl":
            for row in child.iter(f"{_A}tr"):
                yield _row(" ".join(_drawn_blocks(cell)) for cell in row.iter(f"{_A}tc"))
        elif child.tag != _FALLBACK:
            yield from _drawn_blocks(child)


def _drawn_text(paragraph: Element) -> str:
    pieces = []
    for child in paragraph.iter():
        if child.tag == f"{_A}t":
            pieces.append(child.text or "")
        elif child.tag == f"{_A}br":
            pieces.append("\n")
    return "".join(pieces).strip()


def _row(cells: Iterable[str]) -> str:
    return " | ".join(" ".join(cell.split()) for cell in cells)
