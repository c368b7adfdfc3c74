"""Interactive clients with and without a batch running beside: ``scripts/bench soak``.

    python benchmarks/soak.py --minutes 10            64 clients on nano, 10 minutes without, 10 minutes with a batch

Starts a server of its own. Each client streams one chat after the other, without a pause, so the machine is full from
the beginning; what the batch may take then is what the clients leave. Prints, for both, the time to the first token
(p50, p95, worst; also by the prompt's length), tokens per second, and how many requests failed; goals: no errors, and a
p95 that hardly differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx
import openai

from evermini.config import default_home

BATCH_LINES = 2000
WORDS = (5, 20, 80)
"""Words in the clients' prompts; three tokens each, and some 30 around them."""
ENDPOINT = "/v1/chat/completions"


@dataclass
class Side:
    """What the clients saw in one phase."""

    first: dict[int, list[float]] = field(default_factory=lambda: {words: [] for words in WORDS})
    errors: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    batch_lines: int = 0
    batch_failed: int = 0

    def line(self, name: str) -> str:
        """Return a row of the table, and below it one for each length of prompts."""
        whole = (
            f"{_latencies(name, [one for times in self.first.values() for one in times])} "
            f"{self.tokens / self.seconds:>9.0f} {self.batch_lines / self.seconds:>12.1f} {self.batch_failed:>12} "
            f"{sum(self.errors.values()):>7} {dict(self.errors) or ''}"
        )
        parts = [_latencies(f"  {words} words", times) for words, times in self.first.items()]
        return "\n".join([whole, *parts])


def _latencies(name: str, times: list[float]) -> str:
    cuts = quantiles(times, n=100) if len(times) > 1 else [float("nan")] * 99
    return (
        f"{name:<14} {len(times):>8} {1000 * cuts[49]:>8.0f} {1000 * cuts[94]:>8.0f} "
        f"{1000 * max(times, default=float('nan')):>8.0f}"
    )


HEADING = (
    f"{'':<14} {'requests':>8} {'p50 ms':>8} {'p95 ms':>8} {'worst':>8} {'tokens/s':>9} "
    f"{'batch line/s':>12} {'batch failed':>12} {'errors':>7}"
)


async def client(api: openai.AsyncOpenAI, model: str, rng: random.Random, side: Side) -> None:
    """Stream one chat after the other until cancelled."""
    while True:
        num_words = rng.choice(WORDS)
        words = " ".join(f"word{rng.randrange(1000)}" for _ in range(num_words))
        began = time.perf_counter()
        is_first = True
        try:
            stream = await api.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": f"Tell me a story with these: {words}"}],
                max_completion_tokens=rng.choice([16, 32, 64]),
                stream=True,
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    side.tokens += 1
                    if is_first:
                        side.first[num_words].append(time.perf_counter() - began)
                        is_first = False
        except openai.APIError as error:
            side.errors[type(error).__name__] += 1
            await asyncio.sleep(0.1)


async def keep_batch(api: openai.AsyncOpenAI, model: str, side: Side) -> None:
    """Have a batch in work until cancelled, and count its lines."""
    total = Counter[str]()
    while True:
        lines = [
            json.dumps(
                {
                    "custom_id": str(number),
                    "method": "POST",
                    "url": ENDPOINT,
                    "body": {
                        "model": model,
                        "messages": [{"role": "user", "content": f"Tell me of {number}."}],
                        "max_tokens": 32,
                    },
                }
            )
            for number in range(BATCH_LINES)
        ]
        file = await api.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = await api.batches.create(
            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
        )
        while batch.completed_at is None:
            await asyncio.sleep(1)
            batch = await api.batches.retrieve(batch.id)
            assert batch.request_counts
            side.batch_lines = total["done"] + batch.request_counts.completed
            side.batch_failed = total["failed"] + batch.request_counts.failed
        total["done"], total["failed"] = side.batch_lines, side.batch_failed


async def phase(url: str, options: argparse.Namespace, *, with_batch: bool) -> Side:
    """Run the clients for the time given."""
    side = Side()
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(limits=limits, timeout=600) as http,
        openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, http_client=http) as api,
    ):
        work = [
            client(api, options.served, random.Random(number), side)
            for number in range(options.clients)
        ]
        if with_batch:
            work.append(keep_batch(api, options.served, side))
        tasks = [asyncio.create_task(one) for one in work]
        began = time.perf_counter()
        done, _ = await asyncio.wait(
            tasks, timeout=60 * options.minutes, return_when=asyncio.FIRST_EXCEPTION
        )
        side.seconds = time.perf_counter() - began
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
    return side


def start(home: Path, model: str, port: int) -> subprocess.Popen[bytes]:
    """Start a server with the weights of the real home folder, and storage of its own."""
    for name in ("models", "packed", "kernels"):
        (home / name).symlink_to(default_home() / name)
    command = [sys.executable, "-m", "evermini", "serve", "-m", model, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--log-level", "warning"], env={**os.environ, "EVERMINI_HOME": str(home)}
    )
    while process.poll() is None:
        with suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/readyz").raise_for_status()
            return process
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for each of the two phases")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()
    options.served = f"gpt-4.1-{options.model}"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        process = start(Path(name), options.model, port)
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-") as api:
                api.completions.create(model=options.served, prompt="warm " * 200, max_tokens=64)
            print(f"{options.clients} clients, {options.model}, {options.minutes:g} minutes each")
            print(HEADING)
            num_errors = 0
            for with_batch in (False, True):
                side = asyncio.run(
                    phase(f"http://127.0.0.1:{port}/v1", options, with_batch=with_batch)
                )
                print(side.line("with a batch" if with_batch else "without"), flush=True)
                num_errors += sum(side.errors.values()) + side.batch_failed
        finally:
            process.terminate()
            process.wait(60)
    sys.exit(num_errors > 0)


if __name__ == "__main__":
    main()
