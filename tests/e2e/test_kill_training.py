"""``kill -9`` while a model is trained: of the training process, five times; and of the server with it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.test_fine_tuning import steps_of, training_process, training_processes
from tests.tuning_files import MODEL, tuning_server, upload, wait_for_status, wait_until, words

pytest.importorskip("trl")
pytestmark = pytest.mark.slow
METHOD: Any = {
    "type": "supervised",
    "supervised": {"hyperparameters": {"n_epochs": 8, "batch_size": 4}},
}


def losses(client: openai.OpenAI, job_id: str) -> dict[int, float]:
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return {e.data["step"]: e.data["train_loss"] for e in events if e.type == "metrics"}


def test_five_kills_change_nothing(nano_path: Path) -> None:
    with tuning_server(nano_path) as (client, _):
        file = upload(client, words())
        jobs = [
            client.fine_tuning.jobs.create(model=MODEL, training_file=file, method=METHOD, seed=5)
            for _ in range(2)
        ]
        left, killed = (job.id for job in jobs)
        assert wait_for_status(client, left, "succeeded", "failed", seconds=900).error is None
        for number in range(5):
            done = number * 4 + 2
            wait_until(
                lambda: steps_of(client, killed), lambda steps, done=done: len(steps) >= done, 600
            )
            os.kill(training_process(killed), signal.SIGKILL)
            wait_until(lambda: training_processes(killed), lambda found: len(found) == 1)
        job = wait_for_status(client, killed, "succeeded", "failed", seconds=900)
        assert job.error is None
        expected, found = losses(client, left), losses(client, killed)
        assert sorted(found) == list(range(1, 25))
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("is_other_machine", [False, True])
def test_a_killed_server(nano_path: Path, tmp_path: Path, is_other_machine: bool) -> None:
    """The next one goes on; with a home folder of its own, and the same database and blobs, it begins anew."""
    from tests.cli.conftest import Server
    from tests.serving import make_client

    flags = [
        *("--model", f"nano={nano_path}", "--kv-memory", "256MiB", "--threads", "1"),
        *("--database-url", f"sqlite:///{tmp_path}/evermini.db"),
        *("--blob-url", str(tmp_path / "blobs")),
        *("--log-level", "warning"),  # nobody reads its output
    ]
    homes = [tmp_path / "a", tmp_path / ("b" if is_other_machine else "a")]
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}}
    first = Server(*flags, "--home", str(homes[0]), "--organization", "first")
    client = make_client(first.base_url.removesuffix("/v1"))
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(client, words()), method=method, seed=5
    )
    wait_until(lambda: steps_of(client, job.id), lambda steps: len(steps) >= 5, 300)
    first.process.kill()
    first.process.communicate()
    if is_other_machine:  # whose disk nobody else sees
        shutil.rmtree(homes[0])
    second = Server(*flags, "--home", str(homes[1]), "--organization", "second")
    try:
        client = make_client(second.base_url.removesuffix("/v1"))
        ended = wait_for_status(client, job.id, "succeeded", "failed", seconds=900)
        assert ended.error is None
        assert sorted(losses(client, job.id)) == list(range(1, 13))
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert any("resumed after step" in one for one in messages) is not is_other_machine
        assert messages.count("Fine-tuning job started") == 1 + is_other_machine
        names = [
            ended.fine_tuned_model,
            *(
                one.fine_tuned_model_checkpoint
                for one in client.fine_tuning.jobs.checkpoints.list(job.id).data[:3]
            ),
        ]
        assert names[0].startswith(f"ft:{MODEL}:first:"), "the organization that asked for it"
        for name in names:
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "river 5"}], max_tokens=4
            )
            assert answer.model == name
        assert not homes[0].exists() or homes[0] == homes[1]
    finally:
        second.process.kill()
        second.process.communicate()
