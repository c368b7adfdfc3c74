"""Training against slow oracles: the base is the checkpoint, a packed batch is its rows alone, and seeds decide."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evermini.errors import ConfigError
from evermini.service.fine_tuning.spec import Hyperparameters, TrainingSpec, TuningOptions
from evermini.tuning.curve import draw
from evermini.tuning.data import Data
from evermini.tuning.examples import (
    IGNORED,
    PreferenceExample,
    SupervisedExample,
    TokenSequence,
)
from tests.parity.test_decoder_transformers import CASES, save_tiny
from tests.ports import free_port

pytest.importorskip("trl")
VOCAB = 199


class Reports:
    """Keeps what a training reports."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, kind: str, **fields: Any) -> None:
        self.sent.append({"type": kind, **fields})

    def losses(self) -> dict[int, float]:
        found = [one for one in self.sent if one["type"] == "metrics"]
        return {
            one["step"]: one["metrics"]["train_loss"]
            for one in found
            if "train_loss" in one["metrics"]
        }


def spec(**changes: Any) -> TrainingSpec:
    wanted = Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=20.0, beta=0.1)
    given: dict[str, Any] = {
        "source": "tiny",
        "home": "",
        "weights_dir": None,
        "device": "cpu",
        "threads": None,
        "method": "supervised",
        "hyperparameters": wanted,
        "seed": 3,
        "options": TuningOptions(rank=4, precision="fp32"),
        "has_validation": False,
    }
    return TrainingSpec(**{**given, **changes})


def supervised(count: int = 10) -> Data:
    chance = np.random.default_rng(5)
    data = Data()
    for line in range(count):
        ids = chance.integers(4, VOCAB, int(chance.integers(6, 40))).astype(np.int32)
        labels = ids.copy()
        labels[: len(ids) // 2] = IGNORED
        data.examples.append(SupervisedExample(line, (TokenSequence(ids, labels),)))
    return data


def preferences(count: int = 10) -> Data:
    chance = np.random.default_rng(6)
    parts = [
        [chance.integers(4, VOCAB, int(chance.integers(4, 20))).astype(np.int32) for _ in range(3)]
        for _ in range(count)
    ]
    return Data([PreferenceExample(line, *three) for line, three in enumerate(parts)])


def run(
    folder: Path,
    base: Path,
    data: Data,
    reports: Reports,
    *,
    held_out: Data | None = None,
    stop: Any = lambda: False,
    **changes: Any,
) -> Reports:
    from evermini.models.checkpoint import open_checkpoint
    from evermini.tuning.train import train

    folder.mkdir(exist_ok=True)
    wanted = spec(**changes)
    train(wanted, folder, open_checkpoint(base), data, held_out, reports, stop)  # type: ignore[arg-type]
    return reports


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny("qwen2", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_base_is_the_checkpoint(case: str, tmp_path: Path) -> None:
    from evermini.models.checkpoint import open_checkpoint
    from evermini.tuning.base import load_base

    reference = save_tiny(case, tmp_path)
    model = load_base(open_checkpoint(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(0, VOCAB, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(ids).logits - reference(ids).logits).abs().max().item()
    assert difference <= 1e-5
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("default")  # of trl and transformers, about each other
def test_a_packed_batch_is_its_rows_alone(base: Path, tmp_path: Path) -> None:
    """The first step's loss, before anything is learnt, from each row by itself."""
    from evermini.models.checkpoint import open_checkpoint
    from evermini.tuning.base import load_base

    data = supervised(4)
    reports = run(tmp_path / "job", base, data, Reports())
    model = load_base(open_checkpoint(base), device=torch.device("cpu"), dtype=torch.float32)
    total, count = 0.0, 0
    for example in data.examples:
        assert isinstance(example, SupervisedExample)
        (one,) = example.sequences
        ids = torch.from_numpy(one.ids.astype(np.int64))[None]
        labels = torch.from_numpy(one.labels.astype(np.int64))
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels[1:] != IGNORED).sum())
    assert reports.losses()[1] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_scoring_learnt_tokens_alone_changes_nothing(
    base: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of six steps and the weights after them, against trl's head, which scores every token on a CPU."""
    data = supervised() if method == "supervised" else preferences()
    quick = run(tmp_path / "quick", base, data, Reports(), method=method)
    monkeypatch.setattr("evermini.tuning.trainers.score_learnt_alone", lambda trainer: None)
    slow = run(tmp_path / "slow", base, data, Reports(), method=method)
    assert quick.losses() == pytest.approx(slow.losses(), rel=1e-5)
    assert weights(tmp_path / "quick", 6) == pytest.approx(weights(tmp_path / "slow", 6), abs=1e-5)


@pytest.mark.filterwarnings("default")
def test_half_precision_follows_full(base: Path, tmp_path: Path) -> None:
    """The base is in bf16, the adapter is not."""
    options = TuningOptions(rank=4, precision="bf16")
    half = run(tmp_path / "half", base, supervised(), Reports(), options=options)
    full = run(tmp_path / "full", base, supervised(), Reports())
    assert half.losses() == pytest.approx(full.losses(), rel=0.01)
    assert half.losses() != full.losses()
    assert half.losses()[6] < half.losses()[1]


@pytest.mark.parametrize(
    ("precision", "capabilities", "wanted"),
    [
        ("auto", {}, torch.float32),
        ("auto", {"avx512_bf16": False, "avx512_f": True}, torch.float32),
        ("auto", {"avx512_bf16": True}, torch.bfloat16),
        ("auto", {"amx_bf16": True}, torch.bfloat16),
        ("fp32", {"avx512_bf16": True}, torch.float32),
        ("bf16", {}, torch.bfloat16),
    ],
)
def test_the_processor_decides_the_precision(
    precision: Any, capabilities: Any, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evermini.tuning.device import pick_dtype

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_dtype(precision, torch.device("cpu")) == wanted


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_seeds_decide_and_an_interruption_does_not(base: Path, tmp_path: Path, method: str) -> None:
    data = supervised() if method == "supervised" else preferences()
    whole = run(tmp_path / "whole", base, data, Reports(), method=method)
    again = run(tmp_path / "again", base, data, Reports(), method=method)
    other = run(tmp_path / "other", base, data, Reports(), method=method, seed=4)
    assert whole.losses() == again.losses() != other.losses()
    assert whole.sent[-1] == {
        "type": "finished",
        "step": 6,
        "adapter_step": 6,
        "trained_tokens": data.num_tokens * 2,
    }

    parts = Reports()
    for after in (
        1,
        2,
        4,
    ):  # stops after one step more: in the first epoch, at its end, in the second
        seen = len(parts.losses())

        def stop(after: int = after, seen: int = seen) -> bool:
            return max(parts.losses(), default=0) >= after

        run(tmp_path / "parts", base, data, parts, method=method, stop=stop)
        assert parts.sent[-1]["type"] == "stopped"
        assert seen < len(parts.losses())
    cut = tmp_path / "parts" / "state" / "checkpoint-6"  # a crash in the middle of saving
    shutil.copytree(cut.with_name("checkpoint-5"), cut)
    for name in ("complete", "trainer_state.json"):
        (cut / name).unlink()
    run(tmp_path / "parts", base, data, parts, method=method)
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert weights(tmp_path / "parts", 6) == pytest.approx(weights(tmp_path / "whole", 6), abs=1e-6)


def test_four_bits_need_a_gpu(base: Path, tmp_path: Path) -> None:
    options = TuningOptions(rank=4, quantize="4bit")
    with pytest.raises(ConfigError, match="quantize needs a GPU"):
        run(tmp_path / "job", base, supervised(), Reports(), options=options)


SCRIPT = """
import json, os, sys
from pathlib import Path
from tests.unit.test_tuning_train import Reports, run, supervised
folder, base = map(Path, sys.argv[1:])
is_first, reports = os.environ["RANK"] == "0", Reports()
run(folder / "whole", base, supervised(12), reports)
parts = Reports()
run(folder / "parts", base, supervised(12), parts, stop=lambda: is_first and len(parts.losses()) >= 2)
seen = len(parts.losses())
run(folder / "parts", base, supervised(12), parts)
if is_first:
    found = {"whole": reports.losses(), "parts": parts.losses(), "seen": seen, "ends": [
        one["type"] for one in parts.sent if one["type"] in ("stopped", "finished")]}
    (folder / "found.json").write_text(json.dumps(found))
assert is_first or not reports.sent
"""


@pytest.mark.slow
def test_several_processes_stop_together(base: Path, tmp_path: Path) -> None:
    """As on several GPUs: the first process alone is told to stop, and all do; then they go on."""
    port = free_port()
    both = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(base)]
        both.append(subprocess.Popen(command, env={**os.environ, **ranks, **master}))
    try:
        assert [process.wait(240) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ends"] == ["stopped", "finished"]
    assert found["seen"] == 3, "told after the second step, it ends with the third"
    assert list(found["whole"]) == [str(step) for step in range(1, 7)]
    assert list(found["parts"].values()) == pytest.approx(list(found["whole"].values()), rel=1e-4)


@pytest.mark.filterwarnings("default")
def test_early_stopping_keeps_the_best_epoch(base: Path, tmp_path: Path) -> None:
    """What is held out has nothing to do with what is learnt, so its loss rises at this rate."""
    wanted = Hyperparameters(n_epochs=50, batch_size=4, learning_rate_multiplier=100.0, beta=0.1)
    options = TuningOptions(rank=4, precision="fp32", early_stopping_patience=2)
    reports = run(
        tmp_path / "job",
        base,
        supervised(8),
        Reports(),
        held_out=supervised(24),
        hyperparameters=wanted,
        options=options,
        has_validation=True,
    )
    ended = reports.sent[-1]
    assert ended["type"] == "finished"
    assert ended["step"] == ended["adapter_step"] + 2 * 2 < 100
    epochs = json.loads((tmp_path / "job" / "progress.json").read_text())
    best = min(epochs, key=lambda epoch: epoch["full_valid_loss"])
    assert best["step"] == ended["adapter_step"]


def weights(folder: Path, step: int) -> list[float]:
    from safetensors.numpy import load_file

    found = load_file(folder / "adapters" / f"step-{step}" / "adapter_model.safetensors")
    return np.concatenate([found[name].ravel() for name in sorted(found)]).tolist()  # type: ignore[no-any-return]


def test_a_curve_on_a_terminal() -> None:
    lines = draw([4.0, 3.0, 2.0, 1.0], width=10, height=3)
    assert [len(line) for line in lines] == [13, 13, 13]
    assert lines[0].startswith("   4.000 █")
    assert lines[-1].startswith("   1.000 ████")
    assert len(draw(list(range(1000)), width=60)[0]) == 69
    assert draw([]) == []
    assert draw([1.0, 1.0])[-1].endswith("██")
