"""``evermini pull``, ``models`` and ``rm`` on a home folder of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from evermini.cli.pull import models, pull, rm
from evermini.errors import ModelNotFoundError
from evermini.models.catalogue import find
from evermini.models.store import ModelStore

app = typer.Typer()
for command in (pull, models, rm):
    app.command()(command)
nano = find("nano")
assert nano is not None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVERMINI_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cached(home: Path) -> Path:
    """A file of nano's size under nano's name: enough for commands that do not read it."""
    assert nano is not None
    path = ModelStore(home).path(nano)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(nano.size)
    return path


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_models_lists_what_is_on_disk(home: Path, cached: Path) -> None:
    rows = {row["tier"]: row for row in json.loads(invoke("models", "--json"))}
    assert list(rows) == ["nano", "mini", "full"]
    assert rows["nano"]["cached"] is True
    assert rows["nano"]["path"] == str(cached)
    assert rows["mini"]["cached"] is False
    assert rows["mini"]["path"] is None
    assert rows["mini"]["aliases"] == ["gpt-4.1-mini", "gpt-4.1-mini-2025-04-14"]
    assert rows["mini"]["native_window"] == 32768
    assert rows["mini"]["size"] == 491_400_064


def test_models_table_shows_begun_downloads(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert nano is not None
    partial = ModelStore(home).partial(nano)
    partial.mkdir(parents=True)
    (partial / "hub.part").write_bytes(bytes(2_500_000))
    output = invoke("models")
    for text in ("gpt-4.1-mini-2025-04-14", "Apache-2.0", "32,768", "491.4 MB", "2.5 MB begun"):
        assert text in output


def test_rm_deletes_and_tells_what_was_freed(home: Path, cached: Path) -> None:
    assert invoke("rm", "gpt-4.1-nano") == "nano: 98.4 MB freed\n"
    assert not cached.exists()
    assert invoke("rm", "nano") == "nano: not on disk\n"


def test_rm_of_an_unknown_tier_deletes_nothing(home: Path, cached: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="No tier 'tiny'"):
        invoke("rm", "nano", "tiny")
    assert cached.exists()


def test_pull_prints_the_path_alone(home: Path) -> None:
    (home / "model.gguf").touch()
    assert invoke("pull", str(home / "model.gguf")) == f"{home}/model.gguf\n"
