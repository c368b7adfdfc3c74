"""Packed weights: quantised once, mapped ever after, readable by others, gone with the tier."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from evermini.errors import DiskSpaceError
from evermini.models import packed
from evermini.models.catalogue import find
from evermini.models.checkpoint import open_checkpoint
from evermini.models.packed import open_packed, pack_linear
from evermini.models.store import ModelStore


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def packed_file(home: Path) -> Path:
    (path,) = (home / "packed").glob("*.safetensors")
    return path


def test_written_once_then_mapped(nano_path: Path, home: Path) -> None:
    checkpoint = open_checkpoint(nano_path)
    first = open_packed(checkpoint, 8, home)
    stamp = packed_file(home).stat().st_mtime_ns
    again = open_packed(checkpoint, 8, home)
    assert packed_file(home).stat().st_mtime_ns == stamp
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = checkpoint.tensor("model.layers.3.mlp.down_proj.weight")
    for name, tensor in pack_linear("layers.3.down", weight, None, 8):
        assert torch.equal(again[name], tensor)
    assert all(tensor.data_ptr() % packed.ALIGNMENT == 0 for tensor in again.values())


def test_is_a_safetensors_file(nano_path: Path, home: Path) -> None:
    checkpoint = open_checkpoint(nano_path)
    ours = open_packed(checkpoint, 8, home)
    with safe_open(packed_file(home), "pt") as theirs:
        assert theirs.metadata()["fingerprint"] == checkpoint.fingerprint
        for name in ("embedding", "head.scale", "layers.29.gate_up.data"):
            assert torch.equal(theirs.get_tensor(name), ours[name])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_half_file_is_left(
    nano_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(name: str, *_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(packed, "pack_linear", full)
    with pytest.raises(DiskSpaceError, match="EVERMINI_HOME"):
        open_packed(open_checkpoint(nano_path), 4, tmp_path)
    assert not list((tmp_path / "packed").glob("*.safetensors"))
    assert not list((tmp_path / "packed").glob("*.tmp"))


def test_removed_with_its_tier(nano_path: Path, home: Path) -> None:
    open_packed(open_checkpoint(nano_path), 8, home)
    size = packed_file(home).stat().st_size
    entry = find("nano")
    assert entry is not None
    assert ModelStore(home).remove(entry) >= size
    assert not list((home / "packed").glob("*.safetensors"))
