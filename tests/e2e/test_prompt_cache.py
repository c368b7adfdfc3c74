"""Computed prompts outlive ``kill -9``, and serve every server of a home."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from evermini.engine.prompt_disk import MIN_TOKENS
from evermini.engine.prompt_store import FOLDER
from evermini.models.batch import BLOCK_SIZE
from tests.processes import Server, new_home
from tests.serving import wait_for

WORDS = " ".join(f"Line {number}: the {number * 7 % 101}th lamp is lit." for number in range(75))
QUESTION = [{"role": "user", "content": f"{WORDS}\n\nWhich lamp is lit in line 12?"}]


def ask(server: Server, **more: Any) -> tuple[str, int, int]:
    """Return the answer, the prompt's tokens, and how many of them were cached."""
    with server.client() as client:
        done = client.chat.completions.create(
            **{
                "model": "gpt-4.1-nano",
                "messages": QUESTION,
                "temperature": 0,
                "max_tokens": 24,
                **more,
            }
        )
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    cached = done.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    return done.choices[0].message.content or "", done.usage.prompt_tokens, cached


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.root}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"evermini_{name}{{"))


def test_prompts_outlive_servers_and_are_shared_by_those_of_one_home(
    tmp_path: Path, nano_path: Path
):
    home = new_home(tmp_path / "home")
    written = "prefix_cache_disk_written_blocks_total"
    servers = [Server(home, "--no-recall") for _ in range(2)]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        one, other = servers
        one.wait()
        unkept = [{"role": "user", "content": f"Other lines.\n{WORDS}"}]
        ask(one, messages=unkept, max_tokens=1, extra_body={"prompt_cache_retention": "in_memory"})
        assert metric(one, written) == 0
        answer, num_tokens, cached = ask(one)
        full = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert cached == 0
        assert full > MIN_TOKENS
        wait_for(lambda: metric(one, written) >= full / BLOCK_SIZE)
        assert metric(one, "prefix_cache_disk_bytes") > full * 20_000  # 22.5 KiB a token
        one.kill()

        other.wait()
        assert ask(other) == (answer, num_tokens, full)
        assert metric(other, "prefix_cache_restored_tokens_total") == full
        assert metric(other, "prefix_cache_hit_tokens_total") == full
        assert ask(other) == (answer, num_tokens, full)
        assert metric(other, "prefix_cache_restored_tokens_total") == full  # it is in memory now

        records = sorted((home / FOLDER).glob("*/*/*.kv"))
        records[5].write_bytes(records[5].read_bytes()[:-1])
        one.start()
        one.wait()
        again, _, cached = ask(one)
        assert again == answer
        assert cached < full
        assert f"{records[5].name} is damaged" in one.log.read_text()
        assert metric(one, "prefix_cache_disk_damaged_blocks_total") == 1
        assert one.stop() == 0
        assert other.stop() == 0
