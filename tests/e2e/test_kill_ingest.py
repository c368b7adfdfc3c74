"""``kill -9`` in the middle of ``evermini ingest``, with the real nano model: nothing is lost, nothing differs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.recall_fakes import filler

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_ingest.py"


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_undisturbed(tmp_path, nano_path):
    text = tmp_path / "text.txt"
    text.write_text(filler(6000))
    command = [sys.executable, str(SCRIPT), "--text", str(text), "--model", "nano", "--kills", "3"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "verify clean: True; index equal: True; passages and answers equal: True" in run.stdout
    assert run.stdout.count("% done") == 3
