"""HTML to text: what a reader sees, block by block, tables as rows."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HIDDEN = frozenset({"script", "style", "template", "noscript", "svg", "head"})
_BLOCKS = frozenset(
    {
        *("address", "article", "aside", "blockquote", "body", "caption", "dd", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"),
        *("header", "hr", "html", "li", "main", "nav", "ol", "p", "pre", "section", "table"),
        *("tbody", "tfoot", "thead", "tr", "ul", "option", "title", "summary", "details"),
    }
)
_CELLS = frozenset({"td", "th"})


def read_html(text: str) -> str:
    """Return the readable text of a page: title, headings, paragraphs, lists, rows of tables, texts of images."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._hidden: list[str] = []
        self._pre = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self._in_title = True
        elif tag in _HIDDEN:
            self._hidden.append(tag)
        if tag == "body":
            self._hidden.clear()  # the head's end tag may be left out
        if self._hidden:
            return
        if tag == "br":
            self._pieces.append("\n")
        elif tag == "img":
            described = dict(attrs).get("alt")
            self._pieces.append(f"[image: {described}]" if described else "")
        elif tag in _CELLS:
            self._pieces.append(" | ")
        elif tag in _BLOCKS:
            self._pieces.append("\n")
            if re.fullmatch(r"h[1-6]", tag):
                self._pieces.append("#" * int(tag[1]) + " ")
            elif tag == "li":
                self._pieces.append("- ")
            elif tag == "pre":
                self._pre += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
            self._pieces.append("\n\n")
        elif tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif not self._hidden and tag in _BLOCKS:
            self._pieces.append("\n")
            if tag == "pre":
                self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if self._in_title or not self._hidden:
            self._pieces.append(data if self._pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        lines = [
            re.sub(r"^\s*\| ", "", line.rstrip()) for line in "".join(self._pieces).split("\n")
        ]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
