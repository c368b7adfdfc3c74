"""`evermini tune import`, `models`, `alias`, `export` and `rm`, and the Python API and `ask` with what they made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evermini import LLM
from evermini.cli import app
from evermini.config import default_home
from evermini.errors import AdapterError, EverminiError, InvalidRequestError, ModelNotFoundError
from evermini.models.checkpoint import open_checkpoint
from evermini.models.lora import read_peft
from tests.adapters import random_lora, write_adapter
from tests.fakes import tiny_config
from tests.parity.test_adapter_files import write_gguf_lora

NAME = "ft:gpt-4.1-nano-2025-04-14:acme:support:AbCd1234"
OLD = "ft:gpt-4o-mini-2024-07-18:acme::old00000"
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def home(tmp_path: Path, nano_path: Path) -> Path:
    """A home of its own, with the weights of the real one."""
    home = tmp_path / "home"
    home.mkdir()
    for folder in ("models", "packed"):
        (default_home() / folder).mkdir(exist_ok=True)
        (home / folder).symlink_to(default_home() / folder)
    return home


@pytest.fixture
def adapter(tmp_path: Path, nano_path: Path) -> Path:
    return write_adapter(
        tmp_path / "adapter",
        open_checkpoint(nano_path).config,
        base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
    )


def run(home: Path, *args: str) -> str:
    result = CliRunner().invoke(app, [*args, "--home", str(home)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_from_import_to_deletion(home: Path, adapter: Path, tmp_path: Path):
    assert "tier nano, rank 4" in run(home, "tune", "import", str(adapter), "--as", NAME)
    assert f"{OLD}  ->  {NAME}" in run(home, "tune", "alias", OLD, NAME)
    listed = json.loads(run(home, "tune", "models", "--json"))
    assert [model["name"] for model in listed["models"]] == [NAME]
    assert listed["models"][0]["base"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert listed["aliases"] == {OLD: NAME}
    assert NAME in run(home, "tune", "models")
    out = tmp_path / "out"
    assert run(home, "tune", "export", OLD, "--out", str(out)).strip() == str(out)
    assert read_peft(out).rank == 4

    with LLM("nano", home=home, recall=False, kv_memory="128MiB") as llm:
        base = llm.chat(HELLO, temperature=0, max_tokens=8).text
    with LLM(OLD, home=home, recall=False, kv_memory="128MiB") as llm:
        assert llm.info.id == NAME
        answer = llm.chat(HELLO, temperature=0, max_tokens=8)
    assert answer.model == NAME
    assert answer.text != base
    shown = run(
        home, "ask", "-m", NAME, "Hello!", "--temperature", "0", "--max-tokens", "8", "--json"
    )
    assert json.loads(shown)["text"] == answer.text

    run(home, "tune", "rm", NAME)
    assert json.loads(run(home, "tune", "models", "--json")) == {"models": [], "aliases": {}}
    with pytest.raises(ModelNotFoundError, match="evermini tune import"):
        LLM(NAME, home=home)


def test_a_gguf_file_is_imported(home: Path, tmp_path: Path, nano_path: Path):
    config = open_checkpoint(nano_path).config
    lora = random_lora(tmp_path / "a", config, rank=3)
    path = write_gguf_lora(tmp_path / "lora.gguf", lora, config, alpha=6.0)
    run(home, "tune", "import", str(path), "--as", OLD, "--tier", "nano")
    run(home, "tune", "export", OLD, "--out", str(tmp_path / "out"))
    assert read_peft(tmp_path / "out").factors.keys() == lora.factors.keys()


def test_what_cannot_be_imported(home: Path, adapter: Path, tmp_path: Path):
    def refused(error: type[EverminiError], match: str, *args: str) -> None:
        with pytest.raises(error, match=match):
            run(home, "tune", "import", *args)

    refused(InvalidRequestError, "does not tell the tier", str(adapter), "--as", OLD)
    refused(InvalidRequestError, "no tier big", str(adapter), "--as", OLD, "--tier", "big")
    refused(InvalidRequestError, "no name of a fine-tuned", str(adapter), "--as", "mine")
    refused(AdapterError, "nothing at", str(tmp_path / "none"), "--as", NAME)
    weights = str(adapter / "adapter_model.safetensors")
    refused(AdapterError, "Give the folder", weights, "--as", NAME)
    tiny = write_adapter(tmp_path / "tiny", tiny_config())
    refused(AdapterError, "trained on another model", str(tiny), "--as", NAME)
    assert json.loads(run(home, "tune", "models", "--json"))["models"] == []


def test_a_base_of_another_name_is_pointed_out(home: Path, tmp_path: Path, nano_path: Path):
    config = open_checkpoint(nano_path).config
    folder = write_adapter(tmp_path / "a", config, base_model_name_or_path="org/other")
    result = CliRunner().invoke(
        app, ["tune", "import", str(folder), "--as", NAME, "--home", str(home)]
    )
    assert result.exit_code == 0
    assert "trained on org/other" in result.stderr
