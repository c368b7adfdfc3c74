"""Measures a server through the API both sides speak: streamed ``/v1/completions``."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sides import ALONE, SERVER_RSS, TTFT, Sample, Workload

START_TIMEOUT = 300.0
_WORDS = (  # one token each
    "time people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father"
)


@contextmanager
def running(command: Sequence[str | Path], health: str, log: Path) -> Iterator[dict[str, float]]:
    """Run a server until the block ends; the mapping then holds its peak memory in MB.

    Args:
        command: Program and arguments, with ``{port}`` where the port goes.
        health: Path that answers 200 once the model is loaded.
        log: Receives the server's output.
    """
    port = _free_port()
    facts: dict[str, float] = {"port": port}
    with log.open("wb") as output:
        arguments = [str(part).format(port=port) for part in command]
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}{health}", log)
            yield facts
        finally:
            process.send_signal(signal.SIGTERM)
            facts[SERVER_RSS] = wait_for_peak(process)


def wait_for_peak(process: subprocess.Popen[Any]) -> float:
    """Wait for a process and return its peak resident memory in MB."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024 / 1e6


def measure(base_url: str, model: str, workload: Workload, extra: dict[str, Any]) -> Sample:
    """Return time to first token and throughput of a server that is otherwise idle."""
    return asyncio.run(_measure(base_url, model, workload, extra))


async def _measure(base_url: str, model: str, workload: Workload, extra: dict[str, Any]) -> Sample:
    body = {"model": model, "temperature": 0, "stream": True, **extra}
    body["stream_options"] = {"include_usage": True}
    # A connection for each request: a server may close an idle one at any moment.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits) as client:

        async def one(words: int, output: int) -> tuple[float, int]:
            return await _complete(client, body | {"prompt": _prompt(words), "max_tokens": output})

        await one(workload.ttft_prompt, 4)  # first use: threads, allocations
        firsts = [(await one(workload.ttft_prompt, 1))[0] for _ in range(workload.ttft_repeats)]
        size = (workload.parallel_prompt, workload.parallel_output)
        began = time.perf_counter()
        _, tokens = await one(*size)
        alone = tokens / (time.perf_counter() - began)
        began = time.perf_counter()
        results = await asyncio.gather(*(one(*size) for _ in range(workload.parallel)))
        together = sum(tokens for _, tokens in results) / (time.perf_counter() - began)
    return {
        TTFT: statistics.median(firsts) * 1000,
        ALONE: alone,
        workload.together: together,
    }


async def _complete(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, int]:
    """Return the seconds to the first token and the number of tokens generated."""
    began = time.perf_counter()
    first: float | None = None
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {await response.aread()!r}")
        async for chunk in _chunks(response):
            for choice in chunk["choices"]:
                # A token that ends inside a character shows only later, at the latest when the text ends.
                if first is None and (choice["text"] or choice["finish_reason"]):
                    first = time.perf_counter() - began
            if usage := chunk.get("usage"):
                tokens = usage["completion_tokens"]
    if first is None or tokens != body["max_tokens"]:
        raise RuntimeError(f"asked for {body['max_tokens']} tokens, got {tokens}")
    return first, tokens


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            yield chunk


def _prompt(words: int) -> str:
    """Return a prompt that was never sent before, so that no cache helps."""
    return " ".join(["The", *random.choices(_WORDS.split(), k=words - 1)])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            raise RuntimeError(f"the server ended ({process.returncode}):\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server is not ready after {START_TIMEOUT} s:\n{_tail(log)}")
        time.sleep(0.2)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
