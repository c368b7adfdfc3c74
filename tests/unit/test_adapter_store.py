"""Adapters under their names: what is refused, what is kept, and that nothing is lost or left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evermini.config import Settings
from evermini.errors import AdapterError, InvalidRequestError, StorageError
from evermini.models.lora import read_peft
from evermini.service.adapters import AdapterStore, FineTunedName
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from evermini.storage.files import FileStore
from tests.adapters import write_adapter
from tests.fakes import tiny_config

NAME = "ft:gpt-4.1-mini-2025-04-14:acme:support:AbCd1234"
BASE = tiny_config()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    with Database.open(settings) as database:
        yield database


@pytest.fixture
def store(settings: Settings, database: Database) -> AdapterStore:
    return AdapterStore.open(settings, database)


def blobs_of(settings: Settings) -> list[Path]:
    return [path for path in (settings.home / "blobs").rglob("*") if path.is_file()]


def test_an_adapter_is_found_again_with_its_bytes(store: AdapterStore, tmp_path: Path):
    folder = write_adapter(tmp_path / "a", BASE, rank=4, rank_pattern={"v_proj": 6})
    added = store.add(folder, name=NAME, tier="mini", job_id="ftjob-1", base=BASE)
    assert (added.owner, added.tier, added.rank, added.job_id) == ("acme", "mini", 6, "ftjob-1")
    assert store.get(NAME) == added
    assert store.list() == [added]
    shutil.rmtree(folder)
    kept = read_peft(store.folder(added))
    assert kept.rank == 6
    assert kept.layer(0).keys() == kept.layer(1).keys()
    assert len(kept.layer(0)) == 7


def test_the_copy_on_this_machine_is_made_anew_and_checked(
    store: AdapterStore, settings: Settings, tmp_path: Path
):
    added = store.add(write_adapter(tmp_path / "a", BASE), name=NAME, tier="mini")
    place = store.folder(added)
    assert store.folder(added) == place
    shutil.rmtree(place)
    assert store.folder(added) == place
    shutil.rmtree(place)
    largest = max(blobs_of(settings), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="damaged"):
        store.folder(added)
    assert not list((settings.home / "adapters").iterdir())


def test_adding_it_again_changes_nothing(store: AdapterStore, settings: Settings, tmp_path: Path):
    folder = write_adapter(tmp_path / "a", BASE)
    added = store.add(folder, name=NAME, tier="mini")
    assert store.add(folder, name=NAME, tier="mini") == added
    assert len(blobs_of(settings)) == 2
    other = write_adapter(tmp_path / "b", BASE, seed=1)
    with pytest.raises(InvalidRequestError, match="another model's name already"):
        store.add(other, name=NAME, tier="mini")
    with pytest.raises(InvalidRequestError, match="another model's name already"):
        store.add(folder, name=NAME, tier="nano")
    assert len(blobs_of(settings)) == 2


def test_a_job_that_makes_its_model_over_keeps_the_first(store: AdapterStore, tmp_path: Path):
    first = store.add(write_adapter(tmp_path / "a", BASE), name=NAME, tier="mini", job_id="ftjob-1")
    other = write_adapter(tmp_path / "b", BASE, seed=1)
    assert store.add(other, name=NAME, tier="mini", job_id="ftjob-1") == first
    for job_id in ("ftjob-2", None):
        with pytest.raises(InvalidRequestError, match="another model's name"):
            store.add(other, name=NAME, tier="mini", job_id=job_id)


def test_what_is_deleted_leaves_nothing_behind(
    store: AdapterStore, settings: Settings, tmp_path: Path
):
    folder = write_adapter(tmp_path / "a", BASE)
    twin = f"{NAME}:ckpt-step-10"
    for name in (NAME, twin):
        store.add(folder, name=name, tier="mini")
    store.set_alias("ft:gpt-4o-mini:acme::old", NAME)
    adapter = store.get(twin)
    assert adapter is not None
    place = store.folder(adapter)
    assert store.delete(NAME)
    assert store.alias("ft:gpt-4o-mini:acme::old") is None
    assert place.is_dir(), "another model has the same adapter"
    assert store.delete(twin)
    assert not place.exists()
    assert not blobs_of(settings)
    assert not store.delete(NAME)


def test_blobs_of_adapters_are_no_orphans(
    store: AdapterStore, settings: Settings, database: Database, tmp_path: Path
):
    store.add(write_adapter(tmp_path / "a", BASE), name=NAME, tier="mini")
    files, blobs = FileStore(database), BlobStore.open(settings)
    assert blobs.orphans(lambda names: files.used_blobs(names) | store.used_blobs(names), 0) == []
    assert len(blobs.orphans(files.used_blobs, 0)) == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 5}, "should have 5"),
        ({"extra": {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 4)}}, "lm_head"),
        (
            {
                "extra": {
                    "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude": torch.ones(4)
                }
            },
            "lora_magnitude",
        ),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(
    store: AdapterStore, settings: Settings, tmp_path: Path, changed: dict[str, object], named: str
):
    folder = write_adapter(tmp_path / "a", BASE, **changed)
    with pytest.raises(AdapterError, match=named):
        store.add(folder, name=NAME, tier="mini")
    assert store.list() == []
    assert not blobs_of(settings)


def test_damaged_folders_are_refused(store: AdapterStore, tmp_path: Path):
    folder = write_adapter(tmp_path / "a", BASE)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cannot be read"):
        store.add(folder, name=NAME, tier="mini")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        store.add(folder, name=NAME, tier="mini")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        store.add(folder, name=NAME, tier="mini")
    nan = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.full((4, 32), torch.nan)
    }
    with pytest.raises(AdapterError, match="not finite"):
        store.add(write_adapter(tmp_path / "n", BASE, extra=nan), name=NAME, tier="mini")


def test_another_base_is_refused(store: AdapterStore, tmp_path: Path):
    deeper, wider = replace(BASE, num_layers=6), replace(BASE, hidden_size=64)
    deep = write_adapter(tmp_path / "a", deeper, layers=[5], base_model_name_or_path="org/deeper")
    with pytest.raises(AdapterError, match=r"only 2 layers.*org/deeper"):
        store.add(deep, name=NAME, tier="mini", base=BASE)
    wide = write_adapter(tmp_path / "b", wider, targets=["q_proj"])
    with pytest.raises(AdapterError, match="of 64 inputs and 32 outputs, the base's has 32"):
        store.add(wide, name=NAME, tier="mini", base=BASE)


@pytest.mark.parametrize(
    "name", ["gpt-4.1-mini", "ft:", "ft:gpt-4.1-mini", "ft:a:b:c", "ft:a b:c:d:e", "ft:a:b:c:d:x-1"]
)
def test_a_malformed_name_is_refused(store: AdapterStore, tmp_path: Path, name: str):
    with pytest.raises(InvalidRequestError, match="no name of a fine-tuned model"):
        store.add(write_adapter(tmp_path / "a", BASE), name=name, tier="mini")


def test_names_have_parts():
    name = FineTunedName.parse(f"{NAME}:ckpt-step-88")
    assert (name.org, name.suffix, name.id, name.step) == ("acme", "support", "AbCd1234", 88)
    assert name.tier == "mini"
    assert str(name) == f"{NAME}:ckpt-step-88"
    assert FineTunedName.parse("ft:gpt-4o-mini-2024-07-18:acme::x1").tier is None
    made = FineTunedName.new("gpt-4.1-nano-2025-04-14", "acme")
    assert FineTunedName.parse(str(made)) == made
    assert len(made.id) == 8
    assert made.tier == "nano"


def test_aliases(store: AdapterStore, tmp_path: Path):
    store.add(write_adapter(tmp_path / "a", BASE), name=NAME, tier="mini")
    old = "ft:gpt-4o-mini-2024-07-18:acme::x1"
    store.set_alias(old, "gpt-4.1-mini")
    store.set_alias(old, NAME)
    assert store.alias(old) == NAME
    assert [(alias.name, alias.target) for alias in store.aliases()] == [(old, NAME)]
    with pytest.raises(InvalidRequestError, match="no model"):
        store.set_alias("ft:x", "ft:gpt-4.1:nobody::here")
    for own in (NAME, "gpt-4.1-mini", "mini", " "):
        with pytest.raises(InvalidRequestError, match="cannot be an alias"):
            store.set_alias(own, NAME)
    assert store.delete_alias(old)
    assert not store.delete_alias(old)
    store.set_alias(old, "nano")
    store.add(write_adapter(tmp_path / "a", BASE), name=old, tier="mini")
    assert store.alias(old) is None, "the imported model has the name now"
