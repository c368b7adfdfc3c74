"""``kill -9`` in the middle of ``evermini ingest``, at random, and what is left of it.

    python benchmarks/kill_ingest.py --text FILE.txt --model mini --kills 10

The text is cut to ``--tokens`` tokens or so. Every run must go on after the last full chunk of the one before;
at the end the index must be clean, byte for byte an undisturbed run's, and lead to the same passages and, word for
word, the same greedy answers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evermini.config import default_home

QUESTIONS = [
    "Who is speaking in the first chapter?",
    "What is said about money?",
    "Which animal is mentioned, and where?",
    "How does it end?",
    "Who gives advice, and what is it?",
    "Where does a journey begin?",
    "What is somebody afraid of?",
    "Which colour has the dress?",
    "When does the quarrel happen?",
    "What is written in the letter?",
]
_STEP = 0.005

ANSWER = """
import json, sys
from pathlib import Path
from evermini import LLM
from evermini.cli.ask import build_prompt
from evermini.documents import read_file
document = read_file(Path(sys.argv[2]))
with LLM(sys.argv[1], threads=int(sys.argv[3])) as llm:
    for question in sys.argv[4:]:
        prompt = build_prompt([document], question)
        answer = llm.chat([{"role": "user", "content": prompt}], temperature=0, max_completion_tokens=40)
        read = answer.recalled
        assert answer.usage.cached_tokens > 0.99 * read.full_tokens
        print(json.dumps({"tokens": read.full_tokens, "read": list(read.prompt), "answer": answer.text}))
"""


def new_home(folder: Path) -> Path:
    """Return a home folder with the weights and kernels of the real one, and an index of its own."""
    folder.mkdir()
    for name in ("models", "packed", "kernels"):
        (folder / name).symlink_to(default_home() / name)
    return folder


def start(home: Path, model: str, text: Path, threads: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "evermini",
            "ingest",
            "-m",
            model,
            "--threads",
            str(threads),
            str(text),
        ],
        env={**os.environ, "EVERMINI_HOME": str(home)},
        stderr=subprocess.DEVNULL,
    )


def keys_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "recall").glob("*/*.keys"))


def index_files(home: Path) -> dict[str, bytes]:
    paths = [path for path in (home / "recall").glob("*/*") if path.suffix in (".keys", ".tokens")]
    return {path.name: path.read_bytes() for path in paths}


def read_text(path: Path, num_tokens: int) -> str:
    """Return about the first ``num_tokens`` tokens of a text; English prose has 4.5 characters a token."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return text[: num_tokens * 9 // 2]


def answers(home: Path, model: str, text: Path, threads: int) -> list[dict[str, Any]]:
    """Return what is read for the questions and what is answered, from an index that must be complete."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, model, str(text), str(threads), *QUESTIONS],
        env={**os.environ, "EVERMINI_HOME": str(home)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    choose = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(read_text(options.text, options.tokens), encoding="utf-8")
        calm = new_home(folder / "calm")
        assert start(calm, options.model, text, options.threads).wait() == 0
        total = keys_bytes(calm)
        home = new_home(folder / "killed")
        marks = sorted(choose.uniform(0.02, 0.95) * total for _ in range(options.kills))
        before = 0
        for number, mark in enumerate(marks, start=1):
            process = start(home, options.model, text, options.threads)
            while process.poll() is None and keys_bytes(home) < mark:
                time.sleep(_STEP)
            time.sleep(choose.uniform(0, 0.2))
            process.kill()
            process.wait()
            now = keys_bytes(home)
            assert now >= before, "what was done is lost"
            print(f"kill {number}: {now / total:.1%} done", flush=True)
            before = now
        assert start(home, options.model, text, options.threads).wait() == 0
        verify = subprocess.run(
            [sys.executable, "-m", "evermini", "contexts", "verify"],
            env={**os.environ, "EVERMINI_HOME": str(home)},
            check=False,
        )
        same_bytes = index_files(home) == index_files(calm)
        ours = answers(home, options.model, text, options.threads)
        theirs = answers(calm, options.model, text, options.threads)
        same_answers = ours == theirs
        clean = verify.returncode == 0
        for question, given in zip(QUESTIONS, ours, strict=True):
            print(f"{question} -> {given['answer']}")
        print(
            f"{ours[0]['tokens']} tokens, {len(marks)} kills, {len(ours)} questions; verify clean: {clean}; "
            f"index equal: {same_bytes}; passages and answers equal: {same_answers}"
        )
        sys.exit(not (clean and same_bytes and same_answers))


if __name__ == "__main__":
    main()
