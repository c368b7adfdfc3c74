"""DPO on nano: after training on some pairs, the better answers of others are preferred."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tuning_files import MODEL, tuning_server, upload, wait_for_status

pytest.importorskip("trl")
pytestmark = pytest.mark.slow
TOPICS = """rain clouds rivers trees engines bridges salt sugar bread cheese clocks maps ships trains birds bees
ants wolves glass paper ink steel copper gold wind waves tides stars moons comets deserts islands volcanoes caves
frost snow hail fog dew thunder lanterns candles mirrors windows doors keys locks ropes nets sails""".split()  # noqa: SIM905


def pair(topic: str) -> dict[str, Any]:
    """The short answer is the better one, whatever it is about."""
    return {
        "input": {"messages": [{"role": "user", "content": f"Tell me about {topic}."}]},
        "preferred_output": [{"role": "assistant", "content": f"In short: {topic} matter."}],
        "non_preferred_output": [
            {
                "role": "assistant",
                "content": f"What a wonderful question! I would love to talk about {topic} at length.",
            }
        ],
    }


def test_held_out_pairs(nano_path: Path) -> None:
    with tuning_server(nano_path) as (client, _):
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=upload(client, [pair(topic) for topic in TOPICS[:30]]),
            validation_file=upload(client, [pair(topic) for topic in TOPICS[30:]]),
            method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
            seed=3,
        )
        job = wait_for_status(client, job.id, "succeeded", "failed", seconds=900)
        assert job.error is None
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        found = [one.metrics.model_dump() for one in reversed(checkpoints)]
        print(found)
        assert found[-1]["full_valid_reward_accuracy"] >= 0.9
        assert found[-1]["full_valid_loss"] < 0.6 < 0.6931  # log 2: no preference
