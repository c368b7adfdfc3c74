"""Predicted outputs and prompt lookup against plain decoding, on one edit of a 300-line file.

    python benchmarks/prediction.py                 # mini, 3 rounds
    python benchmarks/prediction.py --model nano --rounds 1

One name in the file is to be changed, and the whole file written again. Compared in each round, one after the other:
neither prediction nor lookup; lookup alone; a prediction (the file before the edit). All write the same tokens, which
is checked. Then the cost of looking for repeats where there are few: prose, sampled. Ratios above 1 mean faster than
plain decoding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evermini.config import default_home
from evermini.engine.engine import Engine
from evermini.engine.request import Finished, PromptDone, SamplingParams
from evermini.models import pull
from evermini.models.checkpoint import open_checkpoint
from evermini.models.load import load_model
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer

SOURCE = Path(__file__).parent.parent / "src/evermini/engine/engine.py"
OLD, NEW = "_report_prompt", "_announce_prompt"
TASK = f"Rename the method {OLD} to {NEW}. Answer with the whole file and nothing else.\n\n"
PROSE = "Write a long story about a lighthouse keeper and a brass key."


@dataclass
class Sample:
    """Tokens written, decode steps they took, and seconds."""

    tokens: list[int]
    steps: int
    seconds: float
    drafted: int
    accepted: int


def measure(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Sample:
    """Run one request; time and steps count from the end of its prompt."""
    engine.add("only", prompt, params)
    tokens: list[int] = []
    started = before = None
    while engine.has_work:
        for _, event in engine.step():
            if isinstance(event, PromptDone):
                started, before = time.perf_counter(), engine.stats()
            elif not isinstance(event, Finished):
                tokens.append(event.token_id)
    assert started is not None
    assert before is not None
    seconds, after = time.perf_counter() - started, engine.stats()
    return Sample(
        tokens,
        after.steps - before.steps,
        seconds,
        after.drafted_tokens - before.drafted_tokens,
        after.accepted_tokens - before.accepted_tokens,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, default=300, help="of the file, from its end")
    parser.add_argument("--prose-tokens", type=int, default=300)
    options = parser.parse_args()
    home = default_home()
    checkpoint = open_checkpoint(pull.ensure(options.model, home=home))
    tokenizer = Tokenizer(checkpoint.tokenizer)
    template = ChatTemplate(tokenizer)
    model = load_model(checkpoint, device="cpu", precision="int8", home=home)

    def engine(speculation: bool) -> Engine:
        return Engine(
            model, num_blocks=400, max_batch_tokens=512, max_num_seqs=8, max_waiting=8, speculation=speculation
        )  # fmt: skip

    file = "\n".join(SOURCE.read_text().splitlines()[-options.lines :])
    prompt = template.encode_chat([{"role": "user", "content": TASK + file}])
    assert OLD in file
    before = tuple(tokenizer.encode(file))
    params = SamplingParams(
        max_tokens=len(before) + 64, temperature=0.0, stop_token_ids=tokenizer.eos_ids
    )
    predicted = replace(params, prediction=before)
    story = template.encode_chat([{"role": "user", "content": PROSE}])
    prose = SamplingParams(max_tokens=options.prose_tokens, seed=1)

    plain, guessing = engine(False), engine(True)
    ways = {
        "edit, plain": lambda: measure(plain, prompt, params),
        "edit, prompt lookup": lambda: measure(guessing, prompt, params),
        "edit, prediction": lambda: measure(guessing, prompt, predicted),
        "prose, plain": lambda: measure(plain, story, prose),
        "prose, prompt lookup": lambda: measure(guessing, story, prose),
    }
    measure(plain, prompt, SamplingParams(max_tokens=1))  # both know the prompt from here on
    measure(guessing, prompt, SamplingParams(max_tokens=1))
    samples: dict[str, list[Sample]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            samples[way].append(run())
            plainly = samples[f"{way.partition(',')[0]}, plain"][-1]
            assert samples[way][-1].tokens == plainly.tokens, f"{way}: other tokens than plain"
            print(f"{way}: {samples[way][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    print(
        f"{options.model}, {options.lines} lines, {torch.get_num_threads()} threads, medians of {options.rounds}\n"
    )
    print("| | tokens | steps | seconds | guessed | right | times faster |")
    print("|---|---|---|---|---|---|---|")
    for way, found in samples.items():
        base = samples[f"{way.partition(',')[0]}, plain"]
        ratio = statistics.median(b.seconds / s.seconds for b, s in zip(base, found, strict=True))
        one = found[0]
        seconds = statistics.median(s.seconds for s in found)
        cells = (way, len(one.tokens), one.steps, f"{seconds:.2f}", one.drafted, one.accepted)
        print(f"| {' | '.join(map(str, cells))} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
