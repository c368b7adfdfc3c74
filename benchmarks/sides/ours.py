"""Evermini's side: the engine in a process of its own, and ``evermini serve``.

Run as a program it measures the engine once and prints JSON; `engine_sample` starts it that way, so that the
benchmark's own process stays small and every round starts afresh, as llama-bench does.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from sides import DECODE, RSS, SERVER_RSS, Sample, Workload, prefill
from sides.client import measure, running, wait_for_peak

if TYPE_CHECKING:
    from evermini.service.runtime import ServedModel


def engine_sample(model: str, workload: Workload) -> tuple[Sample, list[int]]:
    """Measure the engine in a fresh process; return also the ids of the model's end tokens."""
    command = [sys.executable, __file__, model, json.dumps(asdict(workload))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as stdout:
        output = stdout.read()
    peak = wait_for_peak(process)
    if process.returncode:
        raise RuntimeError(f"the engine's process failed with {process.returncode}")
    result = json.loads(output)
    return result["sample"] | {RSS: peak}, result["eos_ids"]


def server_sample(model: str, workload: Workload, eos_ids: list[int], log: Path) -> Sample:
    """Run ``evermini serve`` and measure it from outside."""
    start = "from evermini.cli import main; main()"
    options = ["--model", model, "--port", "{port}", "--threads", str(workload.threads)]
    options += ["--prompt-disk", "0"]  # every prompt is to be computed
    extra = {"logit_bias": {str(token): -100 for token in eos_ids}}
    command: list[str | Path] = [sys.executable, "-c", start, "serve", *options]
    with running(command, "/healthz", log) as facts:
        sample = measure(f"http://127.0.0.1:{facts['port']}", model, workload, extra)
    return sample | {SERVER_RSS: facts[SERVER_RSS]}


def _measure_engine(served: ServedModel, workload: Workload) -> Sample:
    """Return throughputs in tok/s, by metric. Sampling and the hand-over between threads are part of them."""
    _run(served, 32, 4)  # first use: threads, allocations
    sample: Sample = {}
    for length in sorted({*workload.prefill, workload.depth}):
        is_deep = length == workload.depth
        repeats = 1 if is_deep or length >= 2048 else workload.repeats
        outputs = 1 + (workload.decode if is_deep else 0)
        runs = [_run(served, length, outputs) for _ in range(repeats)]
        if length in workload.prefill:
            sample[prefill(length)] = statistics.mean(length / first for first, _ in runs)
        if is_deep:
            sample[workload.deep] = statistics.mean(workload.decode / rest for _, rest in runs)
    runs = [_run(served, 1, workload.decode + 1) for _ in range(workload.repeats)]
    sample[DECODE] = statistics.mean(workload.decode / rest for _, rest in runs)
    return sample


def _run(served: ServedModel, prompt: int, outputs: int) -> tuple[float, float]:
    """Return the seconds to the first token and from there to the last, for a prompt of random tokens."""
    from evermini.engine.request import SamplingParams, TokenOutput

    # Random ids: no prefix is in the cache. Special tokens sit outside this range in the catalogue's models.
    ids = [random.randrange(1000, 40_000) for _ in range(prompt)]
    times = []
    began = time.perf_counter()
    for event in served.worker.submit(ids, SamplingParams(max_tokens=outputs, temperature=0.0)):
        if isinstance(event, TokenOutput):
            times.append(time.perf_counter())
    assert len(times) == outputs, f"{len(times)} tokens instead of {outputs}"
    return times[0] - began, times[-1] - times[0]


def main() -> None:
    from evermini.config import load_settings
    from evermini.service.runtime import load_tier

    model, workload = sys.argv[1], Workload(**json.loads(sys.argv[2]))
    served = load_tier(
        model, load_settings({"threads": workload.threads, "prompt_disk": 0}).settings
    )
    try:
        sample = _measure_engine(served, workload)
    finally:
        served.close()
    print(json.dumps({"sample": sample, "eos_ids": sorted(served.tokenizer.eos_ids)}))


if __name__ == "__main__":
    main()
