"""llama.cpp's side: ``llama-bench`` for the engine, ``llama-server`` for what clients see."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_llamacpp import LlamaCpp

from sides import DECODE, RSS, SERVER_RSS, Sample, Workload, prefill
from sides.client import measure, running, wait_for_peak


@dataclass(frozen=True)
class Variant:
    """One way to run llama.cpp; the best one counts, for each metric by itself."""

    quantisation: str
    gguf: Path
    flash_attention: bool

    @property
    def name(self) -> str:
        """How the report calls it."""
        return f"{self.quantisation} fa={int(self.flash_attention)}"


def engine_sample(
    llama: LlamaCpp, variant: Variant, workload: Workload, wanted: Collection[str]
) -> Sample:
    """Run ``llama-bench`` for the metrics wanted, in one process per kind of test."""
    sample: Sample = {}
    short = [n for n in workload.prefill if n < 2048 and prefill(n) in wanted]
    long = [n for n in workload.prefill if n >= 2048 and prefill(n) in wanted]
    decode = workload.decode if DECODE in wanted else 0
    if short or decode:
        lengths = ["-p", ",".join(map(str, short)) or "0", "-n", str(decode)]
        found, _ = _bench(llama, variant, workload, [*lengths, "-r", str(workload.repeats)])
        sample |= found
    # A warm-up run would double these and, at this length, changes nothing.
    for n in long:
        found, _ = _bench(llama, variant, workload, ["-p", str(n), "-n", "0", *_ONCE])
        sample |= found
    if {workload.deep, RSS} & set(wanted):
        at_depth = ["-p", "0", "-n", str(workload.decode), "-d", str(workload.depth), *_ONCE]
        found, peak = _bench(llama, variant, workload, at_depth)
        sample |= found | {RSS: peak}
    return sample


_ONCE = ("-r", "1", "--no-warmup")


def _bench(
    llama: LlamaCpp, variant: Variant, workload: Workload, arguments: list[str]
) -> tuple[Sample, float]:
    """Return throughputs in tok/s by metric, and the peak memory in MB."""
    common = ["-m", str(variant.gguf), "-t", str(workload.threads), "-o", "json"]
    flash = ["-fa", "1" if variant.flash_attention else "0"]
    command = [str(llama.program("llama-bench")), *common, *flash, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout as stdout:
        output = stdout.read()
    peak = wait_for_peak(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")
    sample: Sample = {}
    for test in json.loads(output):
        if test["n_depth"]:
            sample[workload.deep] = test["avg_ts"]
        elif test["n_gen"]:
            sample[DECODE] = test["avg_ts"]
        else:
            sample[prefill(test["n_prompt"])] = test["avg_ts"]
    return sample, peak


def server_sample(llama: LlamaCpp, variant: Variant, workload: Workload, log: Path) -> Sample:
    """Run ``llama-server`` with a slot for each parallel request and measure it from outside."""
    slot = 2 * (workload.parallel_prompt + workload.parallel_output)
    command: list[str | Path] = [
        llama.program("llama-server"),
        *("--host", "127.0.0.1", "--port", "{port}", "-m", variant.gguf),
        *("-t", str(workload.threads), "-np", str(workload.parallel)),
        *("-c", str(workload.parallel * max(slot, 256))),
        *("-fa", "on" if variant.flash_attention else "off"),
    ]
    extra: dict[str, Any] = {"cache_prompt": False, "ignore_eos": True}
    with running(command, "/health", log) as facts:
        base_url = f"http://127.0.0.1:{facts['port']}"
        sample = measure(base_url, "any", workload, extra)
    return sample | {SERVER_RSS: facts[SERVER_RSS]}
