"""Annual reports: does Recall read the page that a question needs? Nothing is answered.

    python benchmarks/report_pages.py --data shared/data --model mini

FinanceBench's questions about other reports are asked of the two whose PDFs are at hand (company and years replaced),
if each page of their evidence is a balance sheet, income statement or cash flow statement: the same statement of
these reports is what they need. Its own 7 questions about the two are held out, and those that resemble one of them are
left out. Recall's constants for pages were chosen on the former (docs/log.md); the latter are printed beside them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evermini import LLM
from evermini.documents import read_document
from evermini.recall.prompt import Span
from evermini.recall.recall import Recall
from evermini.recall.segment import Segment, cut

STATEMENTS = {
    "cash": r"statements? of cash ?flow",
    "balance": r"balance sheet|financial position",
    "income": r"statements? of (consolidated )?(income|operations|earnings)|income statement",
}
PAGES = {
    "AMCOR_2023_10K": {"income": 50, "balance": 52, "cash": 53},
    "BESTBUY_2023_10K": {"balance": 39, "income": 40, "cash": 42},
}
NAMES = {"AMCOR_2023_10K": "Amcor", "BESTBUY_2023_10K": "Best Buy"}
YEAR = 2023
LEFT_OUT = re.compile(
    "gross margin|quick ratio|Among operations|major acquisitions|derivative instruments|legal battles|formerly known|"
    "stock repurchases|merchandise inv|standard business op|Q[1-4]"
)
"""What resembles a held-out question, or is about something that these reports do not have."""
SHORT_NAMES = ("JnJ", "Coca Cola", "AES Corporation", "Activision Blizzard", "General Mills")


@dataclass(frozen=True)
class Question:
    """A question to a report, and the pages that have its answer, from 1."""

    text: str
    pages: frozenset[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="mini", help="the index model")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    folder = given.data / "financebench"
    listed = (folder / "financebench_open_source.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in listed]
    with LLM(given.model, threads=given.threads) as llm:
        recall = llm.recall
        assert recall is not None
        for name, pages in PAGES.items():
            path = folder / "pdfs" / f"{name}.pdf"
            segments = cut(read_document(path.read_bytes(), path.name).text, path.name)
            for kind, questions in (
                ("other reports' questions", adapted(rows, NAMES[name], pages)),
                ("held out", own(rows, name)),
            ):
                print(f"{path.name}, {kind}: {measure(recall, segments, questions)}", flush=True)


def own(rows: Iterable[dict[str, Any]], name: str) -> list[Question]:
    """Return a report's own questions."""
    return [
        Question(row["question"], frozenset(e["evidence_page_num"] + 1 for e in row["evidence"]))
        for row in rows
        if row["doc_name"] == name
    ]


def adapted(rows: Iterable[dict[str, Any]], company: str, pages: dict[str, int]) -> list[Question]:
    """Return the questions about other reports, as if they were about this one."""
    found = []
    for row in rows:
        text = row["question"]
        years = [int(year) for year in re.findall(r"(?:FY|\b)(20[12]\d)\b", text)]
        years += [2000 + int(year) for year in re.findall(r"FY(\d\d)\b", text)]
        kinds = [kind_of(evidence["evidence_text_full_page"]) for evidence in row["evidence"]]
        num_pages = len({evidence["evidence_page_num"] for evidence in row["evidence"]})
        is_fit = None not in kinds and len(set(kinds)) == num_pages
        if row["doc_name"] in PAGES or not years or not is_fit or LEFT_OUT.search(text):
            continue
        shift = YEAR - max(years)
        for year in sorted(set(years), reverse=shift > 0):  # none is replaced twice
            text = re.sub(rf"(FY|\b){year}\b", rf"\g<1>{year + shift}", text)
            text = re.sub(rf"FY{year - 2000}\b", f"FY{year + shift - 2000}", text)
        own_name = row["company"]
        names = {own_name, own_name.split()[0], own_name.title(), own_name.upper(), *SHORT_NAMES}
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", company, text)
        found.append(Question(text, frozenset(pages[kind] for kind in kinds if kind)))
    return found


def kind_of(page: str) -> str | None:
    """Return which statement stands on a page."""
    head = page[:500].lower()
    return next((kind for kind, form in STATEMENTS.items() if re.search(form, head)), None)


def measure(recall: Recall, segments: list[Segment], questions: list[Question]) -> dict[str, Any]:
    """Return how often a needed page, and all of them, were read, and how much of them."""
    sums: Counter[str] = Counter()
    for question in questions:
        spans = recall.ask(segments, question.text).spans
        read = sum((characters(segments[span.segment], span) for span in spans), Counter[int]())
        sums["read"] += bool(question.pages & read.keys())
        sums["all_read"] += question.pages <= read.keys()
        sums["characters"] += sum(read[page] for page in question.pages) // len(question.pages)
    number = len(questions)
    return {
        "questions": number,
        "a needed page read": sums["read"],
        "all read": sums["all_read"],
        "characters of a needed page": sums["characters"] // number,
    }


def characters(segment: Segment, span: Span) -> Counter[int]:
    """Return how many characters of each page are in a span."""
    start, end = (char - segment.first_char for char in span.chars)
    edges = [start, *(at for at in segment.page_starts if start < at < end), end]
    found: Counter[int] = Counter()
    for first, last in pairwise(edges):
        page = segment.page_of(first)
        if page is not None:
            found[page] += last - first
    return found


if __name__ == "__main__":
    main()
