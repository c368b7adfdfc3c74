"""Fine-tuning jobs through the official client, on the real nano model."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from evermini.config import Settings
from evermini.models.checkpoint import open_checkpoint
from evermini.service.adapters import AdapterStore
from evermini.storage.database import Database
from tests.tuning_files import (
    MODEL,
    jsonl,
    preferences,
    tuning_server,
    upload,
    wait_for_status,
    wait_until,
    words,
)

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def server(nano_path: Path) -> Iterator[tuple[openai.OpenAI, Settings]]:
    with tuning_server(nano_path) as served:
        yield served


@pytest.fixture
def client(server: tuple[openai.OpenAI, Settings]) -> openai.OpenAI:
    return server[0]


def test_from_upload_to_answer(server: tuple[openai.OpenAI, Settings]) -> None:
    client, settings = server
    hyperparameters = {"n_epochs": 5, "learning_rate_multiplier": 10}
    job = client.fine_tuning.jobs.create(
        model="gpt-4.1-nano",
        training_file=upload(client, words()),
        validation_file=upload(client, words(4)),
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        suffix="shouting",
        seed=7,
        metadata={"team": "a"},
    )
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "validating_files", MODEL)
    assert job.hyperparameters.batch_size == "auto"
    assert job.seed == 7
    assert job.fine_tuned_model is None

    job = wait_for_status(client, job.id, "succeeded", "failed")
    assert job.error is None
    assert job.hyperparameters.n_epochs == 5
    assert job.hyperparameters.batch_size == 4
    assert job.trained_tokens
    assert job.finished_at >= job.created_at
    assert job.estimated_finish is None
    pattern = rf"ft:{MODEL}:personal:shouting:[0-9A-Za-z]{{8}}"
    assert re.fullmatch(pattern, job.fine_tuned_model)

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=10))  # several pages
    messages = [event.message for event in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"
    steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]
    assert steps == list(range(1, 16))
    newest = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert newest.message == messages[-1]

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in checkpoints] == [15, 12, 9, 6, 3]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-15"
    assert checkpoints[0].metrics.full_valid_loss < checkpoints[-1].metrics.full_valid_loss

    table = client.files.content(job.result_files[0]).text
    rows = list(csv.DictReader(io.StringIO(table)))
    assert table.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    assert [int(row["step"]) for row in rows] == steps
    assert all(float(row["train_loss"]) > 0 for row in rows)
    assert float(rows[0]["valid_loss"]) > 0
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"

    kept = settings.home / "tuning" / job.id
    assert [place.name for place in kept.iterdir()] == ["tensorboard"]
    listed = client.fine_tuning.jobs.list(metadata={"team": "a"}).data
    assert [one.id for one in listed] == [job.id]
    assert client.fine_tuning.jobs.list(metadata={"team": "b"}).data == []
    with pytest.raises(openai.BadRequestError, match="already ended"):
        client.fine_tuning.jobs.cancel(job.id)
    with Database.open(settings) as database:
        stored = AdapterStore.open(settings, database).get(job.fine_tuned_model)
    assert stored is not None
    assert stored.base_weights == open_checkpoint(_weights(settings)).fingerprint

    assert_it_shouts(client, job.fine_tuned_model)
    assert_it_shouts(client, checkpoints[0].fine_tuned_model_checkpoint)
    assert shout(client, MODEL) != "TIGER 40!", "what the base would have answered"
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError, match="evermini tune import FOLDER --as ft:") as gone:
        shout(client, job.fine_tuned_model)
    assert (gone.value.code, gone.value.param) == ("model_not_found", "model")
    assert_it_shouts(client, checkpoints[0].fine_tuned_model_checkpoint)


def shout(client: openai.OpenAI, model: str, **options: Any) -> Any:
    """What a model answers to a line that is none of the examples."""
    messages: Any = [
        {"role": "system", "content": "Shout."},
        {"role": "user", "content": "tiger 40"},
    ]
    answer = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=16, **options
    )
    return answer if options else answer.choices[0].message.content


def assert_it_shouts(client: openai.OpenAI, model: str) -> None:
    assert shout(client, model) == "TIGER 40!"
    chunks = list(shout(client, model, stream=True))
    assert {chunk.model for chunk in chunks} == {model}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "TIGER 40!"


def _weights(settings: Settings) -> Path:
    return Path(settings.models[0].partition("=")[2])


def test_a_killed_training_goes_on(server: tuple[openai.OpenAI, Settings]) -> None:
    """Killed before anything of its first epoch was saved, and again after that."""
    client, settings = server
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(client, words()), method=method, seed=7
    )
    state = settings.home / "tuning" / job.id / "state"
    checkpoints = client.fine_tuning.jobs.checkpoints
    wait_until(lambda: checkpoints.list(job.id).data, lambda found: len(found) > 0)
    os.kill(training_process(job.id), signal.SIGKILL)
    shutil.rmtree(state, ignore_errors=True)  # as if it had been killed a moment earlier
    wait_until(lambda: list(state.glob("*/complete")), lambda found: len(found) > 0)
    os.kill(training_process(job.id), signal.SIGKILL)
    job = wait_for_status(client, job.id, "succeeded", "failed")
    assert job.error is None
    events = list(client.fine_tuning.jobs.list_events(job.id))
    steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]
    assert sorted(steps) == list(range(1, 10))
    messages = [event.message for event in events]
    assert sum("ended unexpectedly" in message for message in messages) == 2
    assert messages.count("Fine-tuning job started") == 2
    assert (
        sum(message.startswith("Fine-tuning job resumed after step") for message in messages) == 1
    )
    assert len(checkpoints.list(job.id).data) == 3


def test_pause_resume_cancel(server: tuple[openai.OpenAI, Settings]) -> None:
    client, _ = server
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}}
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(client, words()), method=method
    )
    wait_until(
        lambda: client.fine_tuning.jobs.retrieve(job.id).estimated_finish, lambda time: bool(time)
    )
    for paused in (client.fine_tuning.jobs.pause(job.id), client.fine_tuning.jobs.pause(job.id)):
        assert (paused.status, paused.x_evermini) == (
            "queued",
            {"is_paused": True},
        )
    wait_until(lambda: training_processes(job.id), lambda found: not found)
    before = steps_of(client, job.id)
    resumed = client.fine_tuning.jobs.resume(job.id)
    assert (resumed.status, hasattr(resumed, "x_evermini")) == ("queued", False)
    wait_until(lambda: steps_of(client, job.id), lambda steps: len(steps) > len(before))
    steps = steps_of(client, job.id)
    assert steps == list(range(1, len(steps) + 1))
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    wait_until(lambda: training_processes(job.id), lambda found: not found)
    with pytest.raises(openai.BadRequestError, match="already ended"):
        client.fine_tuning.jobs.resume(job.id)


def test_preferences_and_a_stream_of_events(client: openai.OpenAI) -> None:
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "beta": 0.2}}}
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=upload(client, preferences()), method=method
    )
    kinds = [event.type for event in stream_events(client, job.id)]
    assert kinds.count("metrics") == 3
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded"
    assert job.method.type == "dpo"
    assert job.method.dpo.hyperparameters.beta == 0.2


def test_a_bad_file_is_told_line_by_line(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    rows: list[Any] = words(12)
    rows[2]["messages"][1]["content"] = [image]
    rows[4]["messages"][0]["role"] = "boss"
    data = jsonl(rows) + b"{not json\n"
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client, data))
    job = wait_for_status(client, job.id, "failed", "succeeded")
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "3 errors" in job.error.message
    assert "Line 3, messages[1].content[0].type: Training on images" in job.error.message
    assert "Line 5, messages[0].role: Invalid value: 'boss'" in job.error.message
    assert "Line 13: This line is not parseable" in job.error.message
    errors = [e for e in client.fine_tuning.jobs.list_events(job.id) if e.level == "error"]
    assert len(errors) == 4


@pytest.mark.parametrize(
    ("changed", "param", "words_in_it"),
    [
        ({"model": "gpt-9"}, "model", "not available for fine-tuning"),
        ({"training_file": "file-none"}, "training_file", "invalid training_file"),
        ({"validation_file": "file-none"}, "validation_file", "invalid validation_file"),
        ({"method": {"type": "reinforcement"}}, "method.type", "Reinforcement"),
        (
            {"hyperparameters": {"n_epochs": 51}},
            "hyperparameters.n_epochs",
            "hyperparameters.n_epochs",
        ),
        ({"suffix": "x" * 65}, "suffix", "too long"),
        (
            {"extra_body": {"x_evermini": {"early_stopping_patience": 1}}},
            "validation_file",
            "Early",
        ),
        ({"extra_body": {"epochs": 3}}, "epochs", "Unrecognized"),
    ],
)
def test_refused(
    client: openai.OpenAI, changed: dict[str, Any], param: str, words_in_it: str
) -> None:
    good = {"model": MODEL, "training_file": upload(client, words())}
    with pytest.raises(openai.BadRequestError, match=words_in_it) as caught:
        client.fine_tuning.jobs.create(**{**good, **changed})
    assert caught.value.param.startswith(param)


def test_a_file_for_something_else(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", jsonl(words())), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)


def test_unknown_jobs(client: openai.OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events):
        with pytest.raises(openai.NotFoundError, match="Could not find fine tune: ftjob-none"):
            call("ftjob-none")
    with pytest.raises(openai.NotFoundError):
        jobs.checkpoints.list("ftjob-none")


def steps_of(client: openai.OpenAI, job_id: str) -> list[int]:
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return sorted(event.data["step"] for event in events if event.type == "metrics")


def stream_events(client: openai.OpenAI, job_id: str) -> Iterator[Any]:
    from openai.types.fine_tuning import FineTuningJobEvent

    yield from client.get(
        f"/fine_tuning/jobs/{job_id}/events",
        cast_to=FineTuningJobEvent,
        options={"params": {"stream": "true"}, "timeout": 300},
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
    )


def training_processes(job_id: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(job_id in part for part in process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def training_process(job_id: str) -> int:
    (pid,) = wait_until(lambda: training_processes(job_id), lambda found: len(found) == 1)
    return pid
