"""Ten questions about a real code base: CPython's Lib, as much of it as fits a prompt.

    python benchmarks/code_questions.py --data shared/data --model mini --out code-questions.json

Each asks where a class is defined and what one of its methods returns. The gold lines are looked up in the sources with
`ast`, never typed in. Found: a passage that the model read has the line of the method's ``def``, in the right file;
answered: the answer has the file's name and the gist of what is returned, and, apart, the line of the class.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evermini import LLM
from evermini.cli.ask import build_prompt
from evermini.documents import Document, collect

ARCHIVE = "code_haystack/cpython-3.11.2-Lib.tar.gz"
LAST = ("encodings", "pydoc_data")
"""Folders that are left out: tables and manuals."""
MAX_TOKENS = 1_047_000
"""Of documents in their tags; the rest is for the question."""


@dataclass(frozen=True)
class Question:
    """``gist``: what an answer that says what is returned must match."""

    path: str
    cls: str
    method: str
    gist: str
    hint: str = ""


QUESTIONS = [
    Question("Lib/asyncio/queues.py", "Queue", "qsize", r"number of items|len\(self\._queue", "asyncio "),
    Question("Lib/http/cookies.py", "Morsel", "isReservedKey", r"reserved"),
    Question("Lib/concurrent/futures/_base.py", "Future", "cancelled", r"cancel", "concurrent.futures "),
    Question("Lib/html/parser.py", "HTMLParser", "get_starttag_text", r"start ?tag"),
    Question("Lib/logging/handlers.py", "BufferingHandler", "shouldFlush", r"capacity"),
    Question("Lib/email/charset.py", "Charset", "get_output_charset", r"output[ _]charset|output character"),
    Question("Lib/urllib/robotparser.py", "RobotFileParser", "mtime", r"last_checked|last (fetched|checked)|time"),
    Question("Lib/multiprocessing/pool.py", "ApplyResult", "ready", r"_event|is_set|True"),
    Question("Lib/urllib/request.py", "Request", "get_method", r"POST|GET|HTTP (request )?method"),
    Question("Lib/tkinter/font.py", "Font", "measure", r"width", "tkinter "),
]  # fmt: skip


def gold_lines(source: str, question: Question) -> tuple[int, int]:
    """Return the lines of the class and of the method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == question.cls:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == question.method:
                    return node.lineno, item.lineno
    raise LookupError(f"{question.cls}.{question.method} is not in {question.path}")


def what_fits(documents: tuple[Document, ...], llm: LLM) -> list[Document]:
    """Return packages first, then single modules, as long as they fit."""
    kept, total = [], 0
    packages = [d for d in documents if d.name.count("/") > 1 and d.name.split("/")[1] not in LAST]
    for document in [*packages, *(d for d in documents if d.name.count("/") == 1)]:
        count = llm.count_tokens(build_prompt([document], ""))
        if total + count <= MAX_TOKENS:
            kept.append(document)
            total += count
    return kept


def ask(llm: LLM, documents: list[Document], question: Question) -> dict[str, Any]:
    text = (
        f"In which file and line is the {question.hint}class {question.cls} defined, and what does its method "
        f"{question.method} return?"
    )
    [source] = [document.text for document in documents if document.name == question.path]
    class_line, method_line = gold_lines(source, question)
    began = time.perf_counter()
    prompt = build_prompt(documents, text)
    stream = llm.chat(
        [{"role": "user", "content": prompt}], stream=True, temperature=0, max_completion_tokens=120
    )
    with stream:
        for _ in stream:
            pass
    recalled = stream.recalled
    assert recalled is not None
    read = [p for p in recalled.passages if p.is_included and p.source == question.path]

    def has(line: int) -> bool:
        return any(p.lines[0] <= line <= p.lines[1] for p in read)

    return {
        **asdict(question), "question": text, "answer": stream.text,
        "class_line": class_line, "method_line": method_line,
        "class_found": has(class_line), "method_found": has(method_line),
        "file_named": Path(question.path).name in stream.text,
        "line_named": bool(re.search(rf"\b{class_line}\b", stream.text)),
        "return_named": bool(re.search(question.gist, stream.text, re.IGNORECASE)),
        "ingest_seconds": recalled.ingest_seconds, "first_token_seconds": stream.first_token_seconds,
        "prompt_tokens": recalled.full_tokens, "read_tokens": len(recalled.prompt),
        "passages": [(p.source, p.lines, round(p.score, 4)) for p in recalled.passages],
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    options = parser.parse_args()
    out = options.out and options.out.absolute()
    with tempfile.TemporaryDirectory() as folder, LLM(options.model) as llm:
        with tarfile.open(options.data / ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        os.chdir(folder)
        documents = what_fits(collect(["Lib"]).documents, llm)
        results = []
        for question in QUESTIONS[: options.questions]:
            result = ask(llm, documents, question)
            results.append(result)
            marks = [name for name, value in result.items() if value is True]
            print(f"{question.cls}.{question.method}: {', '.join(marks)}", flush=True)
        if out:
            out.write_text(json.dumps(results, indent=1))
        print(f"{len(documents)} files, {results[0]['prompt_tokens']:,} tokens")
        for name in ("class_found", "method_found", "file_named", "line_named", "return_named"):
            print(f"{name:13} {sum(result[name] for result in results)} of {len(results)}")


if __name__ == "__main__":
    main()
