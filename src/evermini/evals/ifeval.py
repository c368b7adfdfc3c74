"""IFEval: does an answer follow instructions that a program can check (Zhou et al. 2023, arXiv 2311.07911).

Strict: as the answer stands. Loose: some variant of it does, without its first line, its last line, or asterisks.
An instruction counts for itself; a prompt counts if all its instructions are followed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermini.errors import ConfigError
from evermini.evals.instructions import is_followed
from evermini.evals.report import percent, table
from evermini.evals.run import Results, Row, machine

if TYPE_CHECKING:
    from evermini.llm import LLM

FILE = "ifeval/input_data.jsonl"


@dataclass(frozen=True)
class Task:
    """A prompt and its instructions: (id, arguments) each."""

    key: str
    prompt: str
    instructions: tuple[tuple[str, dict[str, Any]], ...]


def read_tasks(data: Path) -> list[Task]:
    """Read the 541 prompts.

    Raises:
        ConfigError: They are not in the folder.
    """
    path = data / FILE
    if not path.is_file():
        raise ConfigError(
            f"{path} is not there. Put IFEval's input_data.jsonl (github.com/google-research/google-research, "
            "instruction_following_eval/data) into the folder and name that with --data."
        )
    tasks = []
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        given = [{k: v for k, v in args.items() if v is not None} for args in item["kwargs"]]
        pairs = tuple(zip(item["instruction_id_list"], given, strict=True))
        tasks.append(Task(str(item["key"]), item["prompt"], pairs))
    return tasks


def judge(task: Task, answer: str) -> Row:
    """Return for each instruction whether ``answer`` follows it, strictly and loosely; an empty one follows none."""
    variants = loose_variants(answer)
    strict, loose = [], []
    for name, arguments in task.instructions:
        strict.append(bool(answer.strip()) and is_followed(name, arguments, answer))
        loose.append(any(v.strip() and is_followed(name, arguments, v) for v in variants))
    return {
        "instructions": [name for name, _ in task.instructions],
        "strict": strict,
        "loose": loose,
    }


def loose_variants(answer: str) -> list[str]:
    """Return the answer with and without its first and its last line, each with and without asterisks."""
    lines = answer.split("\n")
    cuts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = [answer, *("\n".join(cut).strip() for cut in cuts[1:])]
    return texts + [text.replace("*", "") for text in texts]


def run_tasks(
    llm: LLM,
    tasks: Sequence[Task],
    results: Results,
    *,
    max_tokens: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Answer greedily what is not answered yet, ``workers`` prompts at a time.

    Args:
        llm: The model.
        tasks: What to ask.
        results: Where answers are kept, each at once.
        max_tokens: Of an answer.
        workers: Prompts in the engine at once.
        progress: Told how many answers of how many are there.
    """

    def ask(task: Task) -> Row:
        messages = [{"role": "user", "content": task.prompt}]
        answer = llm.chat(messages, temperature=0, max_completion_tokens=max_tokens)
        return {
            "case": task.key,
            "system": "model",
            "question": task.key,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "tokens": answer.usage.completion_tokens,
            **judge(task, answer.text),
        }

    missing = [task for task in tasks if not results.has(task.key, "model", task.key)]
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(ask, task) for task in missing]):
            results.add(future.result())
            progress(len(results.rows), len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def accuracies(rows: Sequence[Row]) -> dict[str, float]:
    """Return the four accuracies and their mean."""
    found = {
        f"{level}, {mode}": statistics.mean(
            (all(row[mode]) for row in rows)
            if level == "prompt"
            else (followed for row in rows for followed in row[mode])
        )
        for level in ("prompt", "instruction")
        for mode in ("strict", "loose")
    }
    return found | {"mean": statistics.mean(found.values())}


def by_instruction(rows: Sequence[Row]) -> list[tuple[str, int, float, float]]:
    """Return (instruction, how often asked, strict, loose), in order of names."""
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for row in rows:
        for name, strict, loose in zip(
            row["instructions"], row["strict"], row["loose"], strict=True
        ):
            groups.setdefault(name, []).append((strict, loose))
    return [
        (name, len(seen), statistics.mean(s for s, _ in seen), statistics.mean(v for _, v in seen))
        for name, seen in sorted(groups.items())
    ]


def write_ifeval_report(results: Results) -> Path:
    """Write ``report.md`` and ``report.json`` beside the results; return the first one's path."""
    rows = results.rows
    facts, found = machine(), accuracies(rows)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    lines = [
        [name, count, percent(strict), percent(loose)]
        for name, count, strict, loose in by_instruction(rows)
    ]
    parts = [
        "# IFEval",
        f"{len(rows)} prompts, answered greedily; {cut} answers were cut off at the limit.",
        table(list(found), [[percent(value) for value in found.values()]]),
        "## By instruction",
        table(["instruction", "asked", "strict", "loose"], lines),
        "## How it was run",
        "\n".join(f"- {key}: {value}" for key, value in (results.config | facts).items()),
    ]
    report = {"config": results.config, "machine": facts, "accuracies": found, "rows": rows}
    (results.folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1))
    path = results.folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path
