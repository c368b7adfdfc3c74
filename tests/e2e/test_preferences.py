"""DPO on nano: after training on some pairs, the better answers of others are the likelier ones, over HTTP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from evermini.models.checkpoint import open_checkpoint
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer
from evermini.tuning.examples import PreferenceExample, encode_row
from evermini.tuning.rows import read_rows
from tests.tuning_files import MODEL, jsonl, tuning_server, upload, wait_for_status

pytest.importorskip("trl")
pytestmark = pytest.mark.slow
NUM_LEARNT = 24
TOPICS = """rain clouds rivers trees engines bridges salt sugar bread cheese clocks maps ships trains birds bees
ants wolves glass paper ink steel copper gold wind waves tides stars moons comets deserts islands volcanoes caves
frost snow hail fog thunder lanterns candles mirrors windows doors""".split()  # noqa: SIM905


def pair(topic: str) -> dict[str, Any]:
    """The pirate's answer is the better one, and nothing that the model would say by itself."""
    return {
        "input": {"messages": [{"role": "user", "content": f"Tell me about {topic}."}]},
        "preferred_output": [
            {"role": "assistant", "content": f"Arr, {topic} be a fine thing, matey."}
        ],
        "non_preferred_output": [
            {"role": "assistant", "content": f"I think that {topic} are very interesting."}
        ],
    }


def held_out(template: ChatTemplate) -> list[PreferenceExample]:
    rows = read_rows(io.BytesIO(jsonl([pair(topic) for topic in TOPICS[NUM_LEARNT:]])), "dpo")
    found = [encode_row(template, row, 8192) for row in rows]  # type: ignore[arg-type]
    return [one for one in found if isinstance(one, PreferenceExample)]


def log_likelihood(
    client: openai.OpenAI, model: str, prompt: Sequence[int], answer: Sequence[int]
) -> float:
    scored = client.completions.create(
        model=model,
        prompt=[int(token) for token in (*prompt, *answer)],
        max_tokens=0,
        echo=True,
        logprobs=1,
    )
    values = scored.choices[0].logprobs.token_logprobs[-len(answer) :]
    return float(sum(values))


def num_preferred(client: openai.OpenAI, model: str, pairs: Sequence[PreferenceExample]) -> int:
    return sum(
        log_likelihood(client, model, one.prompt, one.chosen)
        > log_likelihood(client, model, one.prompt, one.rejected)
        for one in pairs
    )


def test_held_out_pairs(nano_path: Path) -> None:
    """24 pairs to learn from, twice; of 20 others at most 2 are preferred before and at least 18 after."""
    pairs = held_out(ChatTemplate(Tokenizer(open_checkpoint(nano_path).tokenizer)))
    assert len(pairs) == 20
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 2}
    with tuning_server(nano_path) as (client, _):
        learnt = upload(client, [pair(topic) for topic in TOPICS[:NUM_LEARNT]])
        jobs = [
            client.fine_tuning.jobs.create(
                model=MODEL,
                training_file=learnt,
                method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
                seed=3,
            )
            for _ in range(2)
        ]
        ended = [
            wait_for_status(client, one.id, "succeeded", "failed", seconds=900) for one in jobs
        ]
        assert [one.error for one in ended] == [None, None]
        tables = [client.files.content(one.result_files[0]).text for one in ended]
        assert tables[0] == tables[1], "the same seed, the same losses"
        before = num_preferred(client, MODEL, pairs)
        after = num_preferred(client, ended[0].fine_tuned_model, pairs)
        print(f"preferred: {before} of {len(pairs)} before, {after} after\n{tables[0]}")
        assert before <= 2
        assert after >= 18
