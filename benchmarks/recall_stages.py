"""Where the time to the first token of a long prompt goes, stage by stage.

    python benchmarks/recall_stages.py --data FOLDER --model nano --length 1M

Reads a text with some facts in it once (its index stays in EVERMINI_HOME, so the next run with the same ``--seed``
begins with a question at once), then asks about one after the other in this process, without HTTP. Per stage: the
first question of the process, and the median of the further ones, by the clock and as processor time of all threads.
On a busy machine only processor time means anything.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from pydantic_core import to_json
from recall import make_text

from evermini.cli.eval import parse_lengths
from evermini.config import load_settings
from evermini.engine.request import SamplingParams, TokenOutput
from evermini.errors import EverminiError
from evermini.evals.cases import INSTRUCTION, user_message
from evermini.service.decoding import decode_json
from evermini.service.runtime import ServedModel, load_tier
from evermini.service.schemas import parse_chat

T = TypeVar("T")

_TOKENS = "(tokens of the prompt that is computed)"


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock and of the processor, all threads."""

    wall: float
    cpu: float


class Stages:
    """Times what is done for one question."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do ``work`` and note what it took."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.spent[name] = Spent(time.perf_counter() - wall, time.process_time() - cpu)
        return result


def ask(served: ServedModel, raw: bytes) -> Stages:
    """Take a request's body to its first token."""
    stages = Stages()
    reader = served.reader
    assert reader is not None
    request = stages.time("JSON, validation", lambda: parse_chat(decode_json(raw)))
    window = served.worker.max_model_len
    plan = stages.time(
        "taken apart, hashed, counted",
        lambda: reader.assembler.plan(request, window=window, limit=reader.max_prompt_tokens),
    )
    assert plan is not None
    recall = reader.recall()
    stages.time("index: is it all there?", lambda: recall.missing_tokens(plan.segments))
    stages.time("index: opened and checked", lambda: recall.ingest(plan.segments))
    selection = stages.time(
        "question, scan, ranking", lambda: recall.ask(plan.segments, plan.query, reader.policy)
    )
    stages.spent["  of these the question's pass"] = Spent(selection.query_seconds, 0)
    stages.spent["  of these scan and ranking"] = Spent(selection.scan_seconds, 0)
    mark_end, hops = reader.policy.mark_end, selection.hops
    readings, _ = stages.time(
        "excerpts",
        lambda: reader.assembler.excerpts(plan, selection.spans, mark_end=mark_end, hops=hops),
    )
    written = [reading.text for reading in readings]
    prompt = stages.time(
        "prompt encoded", lambda: reader.assembler.encode(request, plan.parts, written)
    )
    emphasis = stages.time(
        "emphasis placed",
        lambda: reader.assembler.emphasis(prompt, readings, reader.policy.emphasis),
    )

    def first() -> None:
        for event in served.worker.submit(prompt, SamplingParams(max_tokens=1), emphasis=emphasis):
            if isinstance(event, TokenOutput):
                return

    stages.time("prefill, first token", first)
    stages.spent[_TOKENS] = Spent(len(prompt) / 1000, 0)
    return stages


def table(first: Stages, further: Sequence[Stages]) -> str:
    """Return Markdown: milliseconds per stage."""
    lines = ["| ms | first question | further: wall | processor |", "|---|---|---|---|"]
    totals = [0.0, 0.0, 0.0]
    for name, spent in first.spent.items():
        walls = [stages.spent[name].wall for stages in further]
        cpus = [stages.spent[name].cpu for stages in further]
        row = [spent.wall, median(walls), median(cpus)]
        lines.append(f"| {name} | {' | '.join(f'{1000 * seconds:.1f}' for seconds in row)} |")
        if not name.startswith(" ") and name != _TOKENS:
            totals = [total + seconds for total, seconds in zip(totals, row, strict=True)]
    lines.append(f"| **all** | {' | '.join(f'{1000 * seconds:.1f}' for seconds in totals)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with prose/*.txt.gz")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--length", default="128k")
    parser.add_argument("--seed", type=int, default=1, help="of the text")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    settings = load_settings({"threads": options.threads, "prompt_disk": 0}).settings
    with ExitStack() as stack:
        served = load_tier(options.model, settings)
        stack.callback(served.close)
        (length,) = parse_lengths(options.length)
        text, cities = make_text(served, options.data, length, options.seed)
        bodies = [
            to_json(
                {
                    "model": options.model,
                    "messages": [
                        {
                            "role": "user",
                            "content": user_message(
                                INSTRUCTION, text, f"What is the secret code for {city}?"
                            ),
                        }
                    ],
                    "max_completion_tokens": 16,
                }
            )
            for city in cities
        ]
        first, *further = [ask(served, raw) for raw in bodies]
        print(f"\n{options.model}, {length:,} tokens, {len(bodies[0]):,} bytes\n")
        print(table(first, further))


if __name__ == "__main__":
    try:
        main()
    except EverminiError as error:
        sys.exit(f"Error: {error}")
