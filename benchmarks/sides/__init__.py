"""The two sides of `benchmarks/engine.py`: what is measured, in words both sides share."""

from __future__ import annotations

from dataclasses import dataclass

Sample = dict[str, float]
"""Metric name → value, of one run."""

RSS = "peak memory"
SERVER_RSS = "peak memory, server"
TTFT = "time to first token"
ALONE = "one request alone"
DECODE = "decode"


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens, and how often each thing is done in one round.

    Attributes:
        prefill: Prompt lengths.
        decode: Tokens generated.
        depth: Prompt length before the deep decode.
        ttft_prompt: Words in the prompts whose first token is timed; about as many tokens.
        ttft_repeats: How many of them.
        parallel: Requests at a time.
        parallel_prompt: Words in their prompts.
        parallel_output: Tokens each of them generates.
        repeats: Repetitions of the short prefill and decode.
        threads: CPU threads of each side.
    """

    prefill: tuple[int, ...]
    decode: int
    depth: int
    ttft_prompt: int
    ttft_repeats: int
    parallel: int
    parallel_prompt: int
    parallel_output: int
    repeats: int
    threads: int

    @property
    def deep(self) -> str:
        """Name of the metric for decoding at depth."""
        return f"decode at {self.depth}"

    @property
    def together(self) -> str:
        """Name of the metric for parallel requests."""
        return f"{self.parallel} requests at once"

    def units(self) -> dict[str, str]:
        """Return the unit of every metric, in the order of the report; tok/s is better high, the others low."""
        return {
            **{prefill(n): "tok/s" for n in self.prefill},
            DECODE: "tok/s",
            self.deep: "tok/s",
            RSS: "MB",
            TTFT: "ms",
            ALONE: "tok/s",
            self.together: "tok/s",
            SERVER_RSS: "MB",
        }


def prefill(length: int) -> str:
    """Return the name of the metric for a prompt of ``length`` tokens."""
    return f"prefill {length}"
