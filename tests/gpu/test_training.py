"""Training on GPUs: bf16 and four bits on one, and several by accelerate, against the CPU's losses."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from evermini.service.fine_tuning.process import command
from evermini.service.fine_tuning.spec import (
    TRAINING,
    Hyperparameters,
    TrainingSpec,
    TuningOptions,
)
from tests.tuning_files import jsonl, words

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def losses(
    folder: Path, nano_path: Path, device: str, options: TuningOptions, num_processes: int = 1
) -> list[float]:
    """Train as a job does, in processes of its own, and return each step's loss."""
    folder.mkdir()
    (folder / TRAINING).write_bytes(jsonl(words()))
    spec = TrainingSpec(
        source=str(nano_path),
        home=str(folder),
        weights_dir=None,
        device=device,
        threads=None,
        method="supervised",
        hyperparameters=Hyperparameters(
            n_epochs=4, batch_size=4, learning_rate_multiplier=5.0, beta=0.1
        ),
        seed=3,
        options=options,
        has_validation=False,
    )
    spec.write(folder)
    done = subprocess.run(
        command("train", folder, num_processes),
        stdin=subprocess.PIPE,
        capture_output=True,
        check=True,
        text=True,
        timeout=600,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports[-1]["type"] == "finished"
    return [one["metrics"]["train_loss"] for one in reports if one["type"] == "metrics"]


@pytest.fixture
def expected(nano_path: Path, tmp_path: Path) -> list[float]:
    return losses(tmp_path / "cpu", nano_path, "cpu", TuningOptions(precision="fp32"))


def test_half_precision_follows_the_cpu(
    nano_path: Path, tmp_path: Path, expected: list[float]
) -> None:
    found = losses(tmp_path / "gpu", nano_path, "cuda", TuningOptions())
    assert found == pytest.approx(expected, rel=0.1, abs=0.05)
    assert found[-1] < 0.5 * found[0]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_four_bits_learn(nano_path: Path, tmp_path: Path, expected: list[float]) -> None:
    found = losses(tmp_path / "four", nano_path, "cuda", TuningOptions(quantize="4bit"))
    assert found[0] == pytest.approx(expected[0], rel=0.3), "four bits, but the same model"
    assert found[-1] < 0.5 * found[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_follow_one(nano_path: Path, tmp_path: Path) -> None:
    one = losses(tmp_path / "one", nano_path, "cuda:0", TuningOptions())
    two = losses(tmp_path / "two", nano_path, "cuda", TuningOptions(), num_processes=2)
    assert two == pytest.approx(one, rel=0.1, abs=0.05)
