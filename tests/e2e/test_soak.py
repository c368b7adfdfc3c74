"""Sixteen clients, requests of mixed length and kind, a third of them abandoned: nothing may be left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator

import openai
import pytest

from evermini.config import Settings
from evermini.service.runtime import Runtime, ServedModel, load_tier
from tests.serving import serving, wait_for

NUM_REQUESTS = 200
NUM_CLIENTS = 16
MODEL = "gpt-4.1-nano"


@pytest.fixture
def served() -> Iterator[ServedModel]:
    # Memory for about 1,000 tokens, which is less than the clients together want.
    served = load_tier(
        "nano", Settings(model="nano", kv_memory=24 * 1024**2, max_num_seqs=12, prompt_disk=0)
    )
    yield served
    served.close(timeout=5)


async def test_soak(served: ServedModel) -> None:
    rng = random.Random(20250414)
    outcomes: Counter[str] = Counter()
    jobs = iter(range(NUM_REQUESTS))
    with serving(Runtime([served])) as url:
        clients = [
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=300)
            for _ in range(NUM_CLIENTS)
        ]

        async def work(client: openai.AsyncOpenAI) -> None:
            for number in jobs:
                job = request(client, random.Random(rng.random()), abandoned=number % 3 == 0)
                outcomes[await job] += 1

        await asyncio.gather(*map(work, clients))
        for client in clients:
            await client.close()
        assert outcomes["abandoned"] >= NUM_REQUESTS // 4, outcomes
        assert outcomes.total() == NUM_REQUESTS
        wait_for(lambda: served.worker.stats().running == served.worker.stats().waiting == 0)
    stats = served.worker.stats()
    assert stats.kv_blocks_used == 0
    assert stats.finished.get("error", 0) == 0
    assert stats.finished["abort"] > 0
    engine = served.worker._engine
    served.worker.stop(timeout=5)  # the engine is ours now
    engine.check_integrity()
    assert not engine.has_work
    print(dict(outcomes), stats)


async def request(client: openai.AsyncOpenAI, rng: random.Random, *, abandoned: bool) -> str:
    """Make one request; leave it at a random moment if it is to be abandoned."""
    # Half of the prompts begin alike and share memory, the others have their own.
    start = rng.choice(["Tell", f"{rng.random()}: tell"])
    content = f"{start} me {'more and ' * rng.choice([1, 10, 60, 150])} more."
    length = rng.choice([1, 4, 16, 48])
    streamed = rng.random() < 0.6
    if abandoned:
        length += 60
    common = {"model": MODEL, "temperature": rng.choice([0, 1]), "n": rng.choice([1, 1, 1, 3])}
    if rng.random() < 0.25:
        answer = client.completions.create(
            **common, prompt=content, max_tokens=length, stream=streamed, logprobs=1
        )
    else:
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(
            **common, messages=messages, max_completion_tokens=length, stream=streamed
        )
    if not abandoned:
        result = await answer
        if not streamed:
            assert len(result.choices) == common["n"]
            assert all(choice.finish_reason for choice in result.choices)
            return "whole"
        ends = [c.finish_reason async for chunk in result for c in chunk.choices]
        assert len([end for end in ends if end]) == common["n"]
        return "streamed"
    try:
        async with asyncio.timeout(rng.uniform(0.02, 1.5)):
            result = await answer
            if streamed:
                num_chunks = rng.randrange(12)
                async for _ in result:
                    num_chunks -= 1
                    if num_chunks < 0:
                        break
                await result.close()
    except TimeoutError:
        pass
    return "abandoned"
