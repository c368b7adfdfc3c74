"""Makes training and test files of Cochrane-auto: medical abstracts and what was written of them for everybody.

    python examples/simpletext/data.py DATA_FOLDER OUT_FOLDER [--sentences 1500] [--documents 150]

``DATA_FOLDER`` holds ``cochraneauto_docs_train.csv.gz`` and so on (github.com/JanB100/cochrane-auto). Training
sentences are cut out of the training documents by their alignment; a document whose sentences cannot be told apart is
left out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = {
    "sentence": "Simplify the sentence for readers without medical training. Answer with the simplified text only.",
    "document": "Simplify the text for readers without medical training. Answer with the simplified text only.",
}
KEPT = ("rephrase", "split", "merge")
"""Labels of sentences that were rewritten; the others were left out, or have no counterpart."""
_ENDS = re.compile(r"(?<=[.!?])[\")\]]*\s+(?=[\"(\[]?[A-Z0-9])")
_NO_END = re.compile(
    r"(?:\b(?:e\.g|i\.e|vs|cf|Dr|Prof|St|No|Fig|al|approx|ca|[A-Z])|\betc)\.$|\b(?:Inc|Ltd|Co)\.$"
)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--document-words", type=int, default=350, help="longest, both together")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)

    docs = list(read(options.data / "cochraneauto_docs_train.csv.gz"))
    pairs = [pair for doc in docs for pair in sentence_pairs(doc)]
    short = [
        (doc["complex"], doc["simple"])
        for doc in docs
        if len(f"{doc['complex']} {doc['simple']}".split()) <= options.document_words
    ]
    print(f"train: {len(docs)} documents, {len(short)} short ones, {len(pairs)} sentence pairs")
    rows = [("sentence", pair) for pair in chance.sample(pairs, min(options.sentences, len(pairs)))]
    rows += [
        ("document", pair) for pair in chance.sample(short, min(options.documents, len(short)))
    ]
    chance.shuffle(rows)
    write(options.out / "train.jsonl", rows)

    tests = {
        "sentence": [
            (row["complex"], " ".join(ast.literal_eval(row["simple"])))
            for row in read(options.data / "cochraneauto_sents_val.csv.gz")
            if row["label"] in KEPT and row["simple"] != "[]"
        ],
        "document": [
            (row["complex"], row["simple"])
            for row in read(options.data / "cochraneauto_docs_val.csv.gz")
        ],
    }
    for level, found in tests.items():
        write(options.out / f"test_{level}.jsonl", [(level, pair) for pair in found])
        print(f"validation split, {level}: {len(found)} pairs")
    some = chance.sample(tests["sentence"], 32)
    write(options.out / "valid.jsonl", [("sentence", pair) for pair in some])


def read(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a compressed table."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def write(path: Path, rows: list[tuple[str, tuple[str, str]]]) -> None:
    """Write pairs as OpenAI's training rows."""
    with path.open("w", encoding="utf-8") as file:
        for level, (text, simple) in rows:
            messages = [
                {"role": "system", "content": INSTRUCTION[level]},
                {"role": "user", "content": text},
                {"role": "assistant", "content": simple},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def sentence_pairs(doc: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the rewritten sentences of a document and what became of them."""
    labels = ast.literal_eval(doc["label"])
    starts = ast.literal_eval(doc["simp_sent_id"])
    ours, theirs = sentences(doc["complex"]), sentences(doc["simple"])
    if len(ours) != len(labels) or starts[-1] > len(theirs):
        return
    ends = [*starts[1:], len(theirs)]
    for text, label, start, end in zip(ours, labels, starts, ends, strict=True):
        if label in KEPT and start < end:
            yield text, " ".join(theirs[start:end])


def sentences(text: str) -> list[str]:
    """Cut a text into sentences."""
    found: list[str] = []
    for paragraph in text.splitlines():
        start = 0
        for match in _ENDS.finditer(paragraph):
            if _NO_END.search(paragraph[start : match.start()]):
                continue
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
        if paragraph[start:].strip():
            found.append(paragraph[start:].strip())
    return found


if __name__ == "__main__":
    main()
