"""Asks every question of every system, and keeps each result on disk at once.

    FOLDER/config.json      what is run; a folder belongs to one configuration
    FOLDER/results.jsonl    one line per answer, written as it comes, and one per finished case
    FOLDER/report.json      configuration, machine and all results
    FOLDER/report.md, *.png tables and heat maps

Run again, it goes on after the last answer.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from evermini import __version__
from evermini.errors import InvalidRequestError
from evermini.evals.cases import Case, CasePlan, Question
from evermini.evals.score import score
from evermini.evals.systems import Reply, System, SystemName, open_system

if TYPE_CHECKING:
    from evermini.llm import LLM
    from evermini.service.reading import OnProgress

Row = dict[str, Any]

_RESULTS = "results.jsonl"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Step:
    """One answer was given; ``done`` of ``total`` answers of this case and system."""

    case: str
    system: str
    done: int
    total: int
    row: Row


class Results:
    """The results in a folder.

    Args:
        folder: Made if it is not there.
        config: What is run. What depends on the time or the machine does not belong in it.

    Raises:
        InvalidRequestError: The folder holds results of something else.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, dict(config)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _CONFIG
        wanted = json.loads(json.dumps(self.config))
        if path.exists():
            if (present := json.loads(path.read_text())) != wanted:
                names = [k for k in {*present, *wanted} if present.get(k) != wanted.get(k)]
                raise InvalidRequestError(
                    f"{folder} holds results of another run: it differs in {', '.join(sorted(names))}. "
                    "Name another --out folder, or delete this one."
                )
        else:
            path.write_text(json.dumps(wanted, indent=1) + "\n")
        self.rows: list[Row] = []
        self._finished: set[str] = set()
        for item in _lines(folder / _RESULTS):
            if "finished" in item:
                self._finished.add(item["finished"])
            else:
                self.rows.append(item)
        self._done = {(row["case"], row["system"], row["question"]) for row in self.rows}

    def is_finished(self, case: str) -> bool:
        """Whether every answer of a case is there."""
        return case in self._finished

    def has(self, case: str, system: str, question: str) -> bool:
        """Whether an answer is there."""
        return (case, system, question) in self._done

    def add(self, row: Row) -> None:
        """Keep an answer."""
        self._append(row)
        self.rows.append(row)

    def finish(self, case: str) -> None:
        """Mark a case as finished."""
        self._append({"finished": case})
        self._finished.add(case)

    def _append(self, item: Row) -> None:
        with (self.folder / _RESULTS).open("a") as file:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[Row]:
    """Yield the lines of a file; one cut short by a kill is cut off."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    for line in whole.splitlines():
        yield json.loads(line)


def run_cases(
    llm: LLM,
    plans: Iterable[CasePlan],
    results: Results,
    *,
    systems: Sequence[SystemName],
    tail_tokens: int,
    dense_tokens: int | None = None,
    workers: int = 4,
    progress: Callable[[Step], None] = lambda step: None,
    reading: OnProgress | None = None,
) -> None:
    """Answer what is not answered yet.

    Args:
        llm: The model.
        plans: The cases; finished ones are not made.
        results: Where answers are kept.
        systems: Who answers.
        tail_tokens: What the system ``window`` reads.
        dense_tokens: What the system ``dense`` reads at most; default: the model's window.
        workers: Questions at a time, once the text is read.
        progress: Told after each answer.
        reading: Told how the first reading of a text goes.
    """
    for plan in plans:
        if results.is_finished(plan.id):
            continue
        case = plan.build()
        for name in systems:
            if all(results.has(plan.id, name, question.id) for question in case.questions):
                continue
            system = open_system(
                name,
                llm,
                case,
                tail_tokens=tail_tokens,
                dense_tokens=dense_tokens,
                progress=reading,
            )
            if system is not None:
                _ask_all(system, name, plan, case, results, workers, progress)
        results.finish(plan.id)


def _ask_all(
    system: System,
    name: SystemName,
    plan: CasePlan,
    case: Case,
    results: Results,
    workers: int,
    progress: Callable[[Step], None],
) -> None:
    missing = [q for q in case.questions if not results.has(plan.id, name, q.id)]

    def keep(question: Question, reply: Reply, is_first: bool) -> None:
        row = {
            "case": plan.id,
            "system": name,
            "question": question.id,
            **plan.labels,
            **question.labels,
            **judge(question, reply),
            "num_tokens": case.num_tokens,
            "is_first": is_first,
        }
        results.add(row)
        progress(Step(plan.id, name, len(case.questions) - len(missing), len(case.questions), row))

    # The first one alone: it reads the text, the others find that done.
    first = missing.pop(0)
    keep(first, system.ask(first), True)
    pool = ThreadPoolExecutor(workers)
    try:
        asked = {pool.submit(system.ask, question): question for question in missing}
        for future in as_completed(asked):
            missing.remove(asked[future])
            keep(asked[future], future.result(), False)
    finally:  # interrupted, what has not begun is not done
        pool.shutdown(cancel_futures=True)


def judge(question: Question, reply: Reply) -> Row:
    """Return what is kept of an answer.

    ``found`` is the share of the gold passages that stand, word for word, in what the model read; ``None`` if the
    question has none.
    """
    value = score(reply.text, question.answers, question.scorer, question.wrong)
    found = [_flat(passage) in _flat(reply.read) for passage in question.gold]
    row: Row = {
        "asked": question.text,
        "wanted": question.answers,
        "answer": reply.text,
        "score": value,
        "found": sum(found) / len(found) if found else None,
        "read_tokens": reply.read_tokens,
        "seconds": round(reply.seconds, 3),
        "finish_reason": reply.finish_reason,
    }
    if value < 1 and reply.read_tokens <= 4096:
        row["read"] = reply.read
    return row


def _flat(text: str) -> str:
    return " ".join(text.split())


def machine() -> dict[str, Any]:
    """Return what the results' times depend on."""
    return {
        "evermini": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
