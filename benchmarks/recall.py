"""Long prompts on this machine: how fast they are read, what the index takes, and how soon an answer begins.

    python benchmarks/recall.py --data FOLDER                       # everything, mini: half an hour on 2 cores
    python benchmarks/recall.py --data FOLDER --parts ingest --lengths 8k,32k,128k
    python benchmarks/recall.py --data FOLDER --parts server llamacpp --json results.json

Parts:

    ingest     tokens/s by length, each text fresh and read once in one process; bytes of index per token
    server     `evermini serve` with the longest prompt: first token warm, after a restart, after a restart with the
               index's pages dropped from the page cache; decode speed against a short prompt, with and without
               speculation (what it gains depends on what is written, not on the prompt's length); peak memory
    llamacpp   llama.cpp's dense prefill (build_llamacpp.py) at --dense lengths, and what it would take beyond

llama.cpp's time for a prompt of n tokens is taken as a*n + b*n^2 (matrices, attention), with a and b from the two
longest prompts measured; that is how its figures beyond are extrapolated. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from build_llamacpp import VERSION, cpu_name, ensure_built, ensure_quantised
from sides import SERVER_RSS, Workload, llamacpp, prefill
from sides.client import running
from sides.llamacpp import Variant

from evermini import LLM, __version__
from evermini.cli.eval import parse_lengths
from evermini.errors import EverminiError
from evermini.evals.cases import INSTRUCTION, user_message
from evermini.evals.corpus import DataFolder, Haystacks, Hidden
from evermini.evals.needles import CITIES
from evermini.models.catalogue import find
from evermini.models.checkpoint import open_checkpoint
from evermini.models.pull import ensure
from evermini.recall.segment import cut
from evermini.text.tokenizer import Tokenizer

PARTS = ("ingest", "server", "llamacpp")
_QUESTIONS = 8
_DECODED = 64
_TURNS = 5
_AROUND = 200
"""Tokens of a prompt beside its text, at most."""


@dataclass(frozen=True)
class First:
    """How an answer came: seconds to its first token and tokens per second after that."""

    seconds: float
    rate: float


def make_text(llm: LLM, data: Path, length: int, seed: int) -> tuple[str, list[str]]:
    """Return a text with codes of cities in it, and the cities, in random order."""
    cities = random.Random(seed).sample(CITIES, _QUESTIONS)
    hidden = [
        Hidden(f"The secret code for {city} is AMBER-{1000 + number}.", (number + 0.5) / _QUESTIONS)
        for number, city in enumerate(cities)
    ]
    hay = Haystacks(DataFolder(data).documents("prose"), llm.count_tokens)
    return hay.fill(seed, length - _AROUND, hidden).text, cities


def measure_ingest(model: str, data: Path, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Read a fresh text of each length; delete its index again."""
    rows = []
    with LLM(model, prompt_disk=0) as llm:
        recall = llm.recall
        assert recall is not None
        for length in lengths:
            # The seed is the time: the text was never read before.
            segments = cut(make_text(llm, data, length, time.time_ns())[0])
            done = recall.ingest(segments)
            assert done.num_new_tokens == done.num_tokens
            files = [path for s in segments for path in recall.store.folder.glob(f"{s.digest}.*")]
            size = sum(path.stat().st_size for path in files)
            for segment in segments:
                recall.store.remove(recall.calibration.fingerprint, segment.digest)
            row = {
                "length": length,
                "tokens": done.num_tokens,
                "seconds": done.seconds,
                "rate": done.num_tokens / done.seconds,
                "bytes_per_token": size / done.num_tokens,
            }
            say(f"ingest {length:,}: {done.seconds:.1f} s, {row['rate']:,.0f} tokens/s")
            rows.append(row)
    return rows


def measure_server(model: str, data: Path, length: int, threads: int, log: Path) -> dict[str, Any]:
    """Ask a server about a long text: the first time, warm, after a restart, with cold pages."""
    with LLM(model, prompt_disk=0) as llm:
        recall = llm.recall
        assert recall is not None
        text, cities = make_text(llm, data, length, time.time_ns())
        short, short_cities = make_text(llm, data, 1024, time.time_ns())
        digests = [segment.digest for segment in cut(f"{text}\n\n")]
        folder = recall.store.folder
    program = "from evermini.cli import main; main()"
    eos_ids = Tokenizer(open_checkpoint(ensure(model)).tokenizer).eos_ids
    bias = {str(token): -100 for token in eos_ids}  # answers have the length asked for
    command: list[str | Path] = [
        sys.executable, "-c", program, "serve", "--model", model, "--port", "{port}", "--threads", str(threads),
        "--prompt-disk", "0",
    ]  # fmt: skip
    found: dict[str, Any] = {"length": length}
    client = httpx.Client(
        timeout=3600
    )  # made once: its certificates take longer to load than nano to answer

    def ask(facts: dict[str, float], body: str, city: str, tokens: int = 16) -> First:
        url = f"http://127.0.0.1:{facts['port']}/v1/chat/completions"
        content = user_message(INSTRUCTION, body, f"What is the secret code for {city}?")
        return stream(client, url, {"model": model, "logit_bias": bias}, content, tokens)

    def decode(facts: dict[str, float]) -> dict[str, list[float]]:
        rates: dict[str, list[float]] = {"short": [], "long": []}
        for turn in range(_TURNS):
            rates["short"].append(ask(facts, short, short_cities[turn], _DECODED).rate)
            rates["long"].append(ask(facts, text, cities[turn], _DECODED).rate)
        return rates

    with running(command, "/healthz", log) as facts:
        ask(facts, short, short_cities[0])
        found["first"] = ask(facts, text, cities[0]).seconds
        found["warm"] = [ask(facts, text, city).seconds for city in cities[1:]]
        found["decode"] = decode(facts)
    found["peak_rss"] = facts[SERVER_RSS]
    with running(command, "/healthz", log) as facts:
        found["restarted"] = ask(facts, text, cities[1]).seconds
    drop_pages(path for digest in digests for path in folder.glob(f"{digest}.*"))
    with running(command, "/healthz", log) as facts:
        found["cold"] = ask(facts, text, cities[2]).seconds
    with running([*command, "--speculation", "off"], "/healthz", log) as facts:
        ask(facts, text, cities[0])
        found["plain_decode"] = decode(facts)
    return found


def stream(
    client: httpx.Client, url: str, extra: dict[str, Any], content: str, tokens: int
) -> First:
    """Ask for ``tokens`` tokens and time them, from the request's first byte on."""
    body = {
        **extra,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    raw = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    began = time.perf_counter()
    first = last = 0.0
    count = 0
    with client.stream("POST", url, content=raw, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.read()!r}")
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data in (line, "[DONE]"):
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    last = time.perf_counter()
                    first = first or last
            if usage := chunk.get("usage"):
                count = usage["completion_tokens"]
    if count != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {count}")
    return First(first - began, (count - 1) / (last - first))


def drop_pages(paths: Iterator[Path]) -> None:
    """Drop files from the page cache; nobody may have them mapped."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure_llamacpp(model: str, lengths: Sequence[int], threads: int) -> dict[int, float]:
    """Return llama.cpp's seconds to prefill prompts of each length, with its fastest settings."""
    entry = find(model)
    assert entry is not None
    llama = ensure_built()
    variant = Variant("Q4_0", ensure_quantised(llama, entry, "Q4_0"), flash_attention=True)
    work = Workload(tuple(lengths), 1, 0, 1, 1, 1, 1, 1, 1, threads)
    sample = llamacpp.engine_sample(llama, variant, work, {prefill(n) for n in lengths})
    return {n: n / sample[prefill(n)] for n in lengths}


def extrapolate(seconds: dict[int, float], length: int) -> float:
    """Return a*n + b*n^2 for ``n = length``, with a and b from the two longest prompts."""
    (n, s), (m, t) = sorted(seconds.items())[-2:]
    b = (t / m - s / n) / (m - n)
    a = s / n - b * n
    return a * length + b * length**2


def ingest_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: speeds by length, against the fastest."""
    lines = [
        "| tokens | seconds | tokens/s | of the fastest | index bytes/token |",
        "|---|---|---|---|---|",
    ]
    best = max(row["rate"] for row in rows)
    lines += [
        f"| {row['tokens']:,} | {row['seconds']:.1f} | {row['rate']:,.0f} | {row['rate'] / best:.2f} | "
        f"{row['bytes_per_token']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def server_table(found: dict[str, Any]) -> str:
    """Return Markdown: what a client of the server saw."""
    rows = [
        ("first question, the text is read", f"{found['first']:.1f} s"),
        (
            "first token of further questions, median",
            f"{statistics.median(found['warm']) * 1000:.0f} ms",
        ),
        ("the slowest of them", f"{max(found['warm']) * 1000:.0f} ms"),
        ("first token after a restart", f"{found['restarted'] * 1000:.0f} ms"),
        ("the same, index not in the page cache", f"{found['cold'] * 1000:.0f} ms"),
        ("decode, against a prompt of 1k", ratio(found["decode"])),
        ("the same without speculation", ratio(found["plain_decode"])),
        ("peak memory of the server", f"{found['peak_rss']:,.0f} MB"),
    ]
    return "\n".join(
        [f"| {found['length']:,} tokens | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    )


def ratio(rates: dict[str, list[float]]) -> str:
    """Return the median speeds with a long and a short prompt, and the one over the other."""
    long, short = (statistics.median(rates[kind]) for kind in ("long", "short"))
    return f"{long:.0f} / {short:.0f} tok/s = {long / short:.2f}"


def llamacpp_table(seconds: dict[int, float], lengths: Sequence[int]) -> str:
    """Return Markdown: measured and extrapolated times of a dense prefill."""
    lines = ["| tokens | llama.cpp, dense prefill | |", "|---|---|---|"]
    for length in sorted({*seconds, *lengths}):
        if length in seconds:
            lines.append(f"| {length:,} | {seconds[length]:,.0f} s | measured |")
        elif len(seconds) > 1 and length > max(seconds):
            lines.append(f"| {length:,} | {extrapolate(seconds, length):,.0f} s | a*n + b*n^2 |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with prose/*.txt.gz")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", default="8k,32k,128k,512k,1M")
    parser.add_argument("--dense", default="8k,32k", help="lengths that llama.cpp reads")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    options = parser.parse_args()
    lengths = sorted(parse_lengths(options.lengths))
    if (load := os.getloadavg()[0]) > 0.5:
        say(f"Warning: the machine is busy (load {load:.1f}); the figures will suffer.")
    report: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"evermini": __version__, "llama.cpp": VERSION},
        "model": options.model,
    }
    if options.json and options.json.exists():
        report |= json.loads(options.json.read_text())

    def keep(name: str, value: object, text: str) -> None:
        print(f"\n{text}\n", flush=True)
        report[name] = value
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))

    if "ingest" in options.parts:
        rows = measure_ingest(options.model, options.data, lengths)
        keep("ingest", rows, ingest_table(rows))
    if "server" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "server.log"
            found = measure_server(options.model, options.data, lengths[-1], options.threads, log)
        keep("server", found, server_table(found))
    if "llamacpp" in options.parts:
        seconds = measure_llamacpp(options.model, parse_lengths(options.dense), options.threads)
        keep("llamacpp", seconds, llamacpp_table(seconds, lengths))


if __name__ == "__main__":
    try:
        main()
    except (EverminiError, RuntimeError) as error:
        sys.exit(f"Error: {error}")
