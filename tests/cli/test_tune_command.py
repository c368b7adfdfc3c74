"""`evermini tune`: files are checked, and jobs are created, followed, listed and steered without a server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result
from tests.tuning_files import jsonl, words

pytest.importorskip("trl")
Evermini = Callable[..., Result]


@pytest.fixture
def model(nano_path: Path) -> str:
    return f"nano={nano_path}"


def test_check_counts(evermini: Evermini, model: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(words(12)))
    result = evermini("tune", "check", file, "--model", model, "--machine-price", "0.5")
    assert result.code == 0, result.err
    assert result.out.startswith("12 examples, all good\n")
    assert re.search(
        r"9 epochs, batches of 4, learning rate multiplier 2: [\d,]+ tokens", result.out
    )
    assert "of 8,192" in result.out
    assert re.search(r"Cost: \$\d+\.\d\d here; \$0\.0\d at OpenAI's list price", result.out)


def test_check_tells_all_errors(evermini: Evermini, model: str, tmp_path: Path) -> None:
    rows = words(12)
    rows[1]["messages"].pop()
    rows[6]["messages"][0]["content"] = None
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(rows) + b"[]\n")
    result = evermini("tune", "check", file, "--model", model)
    assert result.code == 1
    lines = result.out.splitlines()
    assert [re.findall(r"line \d+", line) for line in lines[:-1]] == [
        *(["line 2"], ["line 2"], ["line 7"], ["line 13"])
    ]
    assert lines[-1].startswith("4 errors.")


def test_a_job_without_a_server(
    evermini: Evermini, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Created, left with Ctrl-C, gone on with, and seen in the list and the log."""
    home, file = tmp_path / "home", tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(words(12)))
    flags = ["--model", model, "--home", str(home), "--threads", "1"]
    command = [sys.executable, "-m", "evermini", "tune", "run", str(file), *flags]
    process = subprocess.Popen(
        [*command, "--epochs", "2", "--suffix", "shout", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout
    assert process.stderr
    job_id = process.stdout.readline().strip()
    assert job_id.startswith("ftjob-")
    assert "Ctrl-C" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"evermini tune resume {job_id}" in out
    monkeypatch.setenv("EVERMINI_HOME", str(home))
    assert job_id in evermini("tune", "ls").out

    picture = tmp_path / "loss.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "evermini", "tune", "resume", job_id, *flags),
            *("--plot", str(picture)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"ft:gpt-4.1-nano-2025-04-14:personal:shout:\w{8}", name)
    assert picture.read_bytes().startswith(b"\x89PNG")

    listed = evermini("tune", "ls").out
    assert "succeeded" in listed
    assert name in listed
    log = evermini("tune", "logs", job_id, "--follow").out
    assert "Step 6/6: training loss=" in log
    assert f"New fine-tuned model created: {name}" in log
    refused = evermini("tune", "cancel", job_id)
    assert refused.code == 1
    assert "already ended" in refused.err
    assert evermini("tune", "logs", "ftjob-none").code == 1
