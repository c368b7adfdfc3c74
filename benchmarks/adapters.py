"""What adapters cost: decoding and prefill with them against the base alone, in one run.

    python benchmarks/adapters.py                 # mini, rank 16, 3 rounds: about three minutes on two cores
    python benchmarks/adapters.py --model nano --rank 8

Random adapters of all seven targets; nothing of the answers is looked at. Each round runs every variant once, one after
the other, so that a machine that slows down slows all of them; ratios are of the same round, and the median of the
rounds is printed. 1.00 is as fast as the base; 8 requests with 8 adapters share each step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evermini.config import default_home
from evermini.engine.adapters import LoadedAdapter
from evermini.engine.engine import Engine
from evermini.engine.request import PromptDone, SamplingParams
from evermini.models import pull
from evermini.models.checkpoint import open_checkpoint, parameter_shapes
from evermini.models.config import ModelConfig
from evermini.models.load import load_model
from evermini.models.lora import TARGETS, LoraFactors, LoraWeights

Adapters = Sequence[LoadedAdapter | None]


@dataclass(frozen=True)
class Variant:
    """One measurement: ``name`` against the one named ``base``; returns tokens per second."""

    name: str
    base: str | None
    run: Callable[[], float]


def random_lora(config: ModelConfig, rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    factors = {}
    for index in range(config.num_layers):
        for target in TARGETS:
            outputs, inputs = shapes[f"model.layers.{index}.{target}.weight"]
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, rank, generator=generator) * 0.05
            factors[index, target] = LoraFactors(a, b, 2.0)
    return LoraWeights(factors)


def decode(engine: Engine, adapters: Adapters, num_tokens: int) -> float:
    """Return tokens per second of all requests together, one per adapter, after their prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens + 1)
    for number, adapter in enumerate(adapters):
        engine.add(str(number), prompt_of(32, number), params, adapter=adapter)
    num_begun = 0
    while num_begun < len(adapters):
        num_begun += sum(isinstance(event, PromptDone) for _, event in engine.step())
    before, started = engine.stats().generated_tokens, time.perf_counter()
    while engine.has_work:
        engine.step()
    return (engine.stats().generated_tokens - before) / (time.perf_counter() - started)


def prefill(engine: Engine, adapters: Adapters, length: int) -> float:
    """Return prompt tokens per second, ``length`` for each adapter."""
    for number, adapter in enumerate(adapters):
        engine.add(
            str(number), prompt_of(length, number), SamplingParams(max_tokens=0), adapter=adapter
        )
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return length * len(adapters) / (time.perf_counter() - started)


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, 40_000, (length,), generator=generator).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="decoded by each request")
    options = parser.parse_args()

    checkpoint = open_checkpoint(pull.ensure(options.model, home=default_home()))
    model = load_model(checkpoint, precision=options.precision, threads=options.threads)
    engine = Engine(
        model,
        num_blocks=256,
        max_batch_tokens=512,
        max_num_seqs=16,
        max_waiting=16,
        prefix_caching=False,
        speculation=False,
    )
    started = time.perf_counter()
    loaded = [
        LoadedAdapter(
            bytes([seed + 1]), engine.load_adapter(random_lora(model.config, options.rank, seed))
        )
        for seed in range(8)
    ]
    seconds = (time.perf_counter() - started) / 8
    print(
        f"{options.model}, rank {options.rank}, {torch.get_num_threads()} threads: an adapter takes "
        f"{loaded[0].weights.num_bytes / 1e6:.1f} MB and {seconds:.2f} s to make and load"
    )

    def decoding(name: str, base: str | None, adapters: Adapters) -> Variant:
        return Variant(name, base, lambda: decode(engine, adapters, options.tokens))

    def filling(name: str, base: str | None, adapters: Adapters) -> Variant:
        return Variant(name, base, lambda: prefill(engine, adapters, 512 // len(adapters)))

    first = loaded[0]
    variants = [
        decoding("decode, 1 request, base", None, [None]),
        decoding("decode, 1 request, 1 adapter", "decode, 1 request, base", [first]),
        decoding("decode, 8 requests, base", None, [None] * 8),
        decoding("decode, 8 requests, 1 adapter", "decode, 8 requests, base", [first] * 8),
        decoding("decode, 8 requests, 8 adapters", "decode, 8 requests, base", loaded),
        filling("prefill, 512 tokens, base", None, [None]),
        filling("prefill, 512 tokens, 1 adapter", "prefill, 512 tokens, base", [first]),
        filling("prefill, 8 x 64 tokens, 8 adapters", "prefill, 512 tokens, base", loaded),
    ]
    found: dict[str, list[float]] = defaultdict(list)
    for variant in variants:
        variant.run()  # pages in what it touches
    for _ in range(options.rounds):
        for variant in variants:
            found[variant.name].append(variant.run())
    print(f"{'':36}{'tokens/s':>10}{'of base':>10}")
    for variant in variants:
        speeds = found[variant.name]
        ratio = ""
        if variant.base is not None:
            ratios = (mine / base for mine, base in zip(speeds, found[variant.base], strict=True))
            ratio = f"{statistics.median(ratios):.2f}"
        print(f"{variant.name:36}{statistics.median(speeds):10.1f}{ratio:>10}")


if __name__ == "__main__":
    main()
