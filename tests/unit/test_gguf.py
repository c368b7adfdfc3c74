"""GGUF files: what is read is what was written, and what cannot be read is refused in words."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from evermini.errors import (
    DamagedCheckpointError,
    ModelError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
)
from evermini.models.checkpoint import open_checkpoint, parameter_shapes
from evermini.models.config import ModelConfig
from evermini.models.gguf_file import GgufFile, readable_kinds
from tests.gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    tiny_metadata,
    tiny_tensors,
    write_gguf,
)


class TestFile:
    def test_metadata_and_tensors_equal_those_of_the_gguf_package(self, tmp_path: Path) -> None:
        extra = {
            "x.text": "grüße",
            "x.flag": True,
            "x.floats": [0.5, -1.25],
            "x.ints": [-1, 2, 3],
            "x.bools": [True, False],
            "x.texts": ["a", "", "日本"],
        }
        path = write_gguf(tmp_path / "m.gguf", metadata=extra)
        ours, theirs = GgufFile(path), gguf.GGUFReader(path)
        expected = {
            key: field.contents()
            for key, field in theirs.fields.items()
            if not key.startswith("GGUF.")
        }
        assert ours.metadata == expected
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            np.testing.assert_array_equal(ours.read(tensor.name), tensor.data)

    @pytest.mark.parametrize("kind", sorted(readable_kinds()), ids=lambda kind: kind.name)
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes hold odd scales
    def test_every_quantisation_is_read_as_the_gguf_package_does(
        self, tmp_path: Path, kind: GGMLQuantizationType
    ) -> None:
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = 3 * block_bytes
        # 600 rows of K-quants are more than one piece of the reader.
        raw = np.random.default_rng(1).integers(0, 256, (600, row_bytes), dtype=np.uint8)
        path = write_gguf(tmp_path / "m.gguf", tensors={"t": raw}, kinds={"t": kind})
        values = GgufFile(path).read("t")
        assert values.shape == (600, 3 * block_size)
        np.testing.assert_array_equal(values, dequantize(raw, kind))
        np.testing.assert_array_equal(GgufFile(path).read("t", 7, 433), values[7:433])

    def test_a_quantised_vector(self, tmp_path: Path) -> None:
        raw = np.random.default_rng(1).integers(0, 120, 4 * 34, dtype=np.uint8)
        kinds = {"t": GGMLQuantizationType.Q8_0}
        file = GgufFile(write_gguf(tmp_path / "m.gguf", tensors={"t": raw}, kinds=kinds))
        expected = dequantize(raw, GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(file.read("t", 5, 50), expected[5:50])

    def test_rows_outside_are_an_index_error(self, tmp_path: Path) -> None:
        file = GgufFile(write_gguf(tmp_path / "m.gguf"))
        with pytest.raises(IndexError, match="which has 50"):
            file.read("token_embd.weight", 0, VOCAB + 1)

    def test_common_kinds_are_supported(self) -> None:
        names = {kind.name for kind in readable_kinds()}
        assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
        assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_config(tmp_path: Path, arch: str) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", arch))
    assert checkpoint.config == ModelConfig(
        family=arch,  # type: ignore[arg-type]
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position=128,
        rope_theta=20_000.0,
        rms_norm_eps=pytest.approx(1e-5),
        tie_embeddings=True,
        attention_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
    )
    shapes = parameter_shapes(checkpoint.config)
    assert checkpoint.names() == set(shapes)
    for name, shape in shapes.items():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == shape
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()


def test_head_dim_without_key_length(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    width = HIDDEN // HEADS  # 8
    for name, values in tensors.items():
        if "attn_q" in name:
            tensors[name] = values[: HEADS * width]
        elif "attn_k" in name or "attn_v" in name:
            tensors[name] = values[: KV_HEADS * width]
        elif "attn_output" in name:
            tensors[name] = np.ascontiguousarray(values[:, : HEADS * width])
    missing: dict[str, Any] = {
        "llama.attention.key_length": None,
        "llama.attention.value_length": None,
    }
    for extra in ({}, {"llama.rope.dimension_count": width}):
        path = write_gguf(tmp_path / "m.gguf", metadata=missing | extra, tensors=tensors)
        assert open_checkpoint(path).config.head_dim == width


def test_untied_output(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"] + 1
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert not checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), tensors["output.weight"])


class TestPermutation:
    """The converter stores row 2i+j of a llama head where row j*half+i was."""

    @pytest.mark.parametrize(("inner", "heads"), [("q", HEADS), ("k", KV_HEADS)])
    def test_llama_rows_are_put_back(self, tmp_path: Path, inner: str, heads: int) -> None:
        tensors = tiny_tensors()
        original = tensors[f"blk.1.attn_{inner}.weight"].copy()
        stored = np.empty_like(original)
        half = HEAD_DIM // 2
        for head in range(heads):
            for i in range(half):
                for j in range(2):
                    stored[head * HEAD_DIM + 2 * i + j] = original[head * HEAD_DIM + j * half + i]
        tensors[f"blk.1.attn_{inner}.weight"] = stored
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))
        name = f"model.layers.1.self_attn.{inner}_proj.weight"
        np.testing.assert_array_equal(checkpoint.tensor(name), original)
        np.testing.assert_array_equal(checkpoint.rows(name, 3, 20), original[3:20])

    @pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
    def test_other_families_are_left_alone(self, tmp_path: Path, arch: str) -> None:
        tensors = tiny_tensors(arch)
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", arch, tensors=tensors))
        for inner in ("q", "k", "v"):
            np.testing.assert_array_equal(
                checkpoint.tensor(f"model.layers.0.self_attn.{inner}_proj.weight"),
                tensors[f"blk.0.attn_{inner}.weight"],
            )


class TestRopeScaling:
    def test_linear(self, tmp_path: Path) -> None:
        keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        config = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=keys)).config
        assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}

    def test_none(self, tmp_path: Path) -> None:
        keys = {"llama.rope.scaling.type": "none"}
        path = write_gguf(tmp_path / "m.gguf", metadata=keys)
        assert open_checkpoint(path).config.rope_scaling is None

    @pytest.mark.parametrize("factor", [8.0, 32.0])
    def test_llama3_factors(self, tmp_path: Path, factor: float) -> None:
        config_utils = pytest.importorskip("transformers.modeling_rope_utils")
        from transformers import LlamaConfig

        described = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(
            hidden_size=HEADS * HEAD_DIM,
            num_attention_heads=HEADS,
            rope_parameters=described | {"rope_theta": 20_000.0},
        )
        scaled, _ = config_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 20_000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        factors = (plain / scaled.numpy()).astype(np.float32)
        tensors = tiny_tensors() | {"rope_freqs.weight": factors}
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        assert open_checkpoint(path).config.rope_scaling == pytest.approx(described)

    def test_other_factors_are_refused(self, tmp_path: Path) -> None:
        factors = np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)
        tensors = tiny_tensors() | {"rope_freqs.weight": factors}
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        with pytest.raises(UnsupportedArchitectureError, match="RoPE factors"):
            open_checkpoint(path)


def test_split_files(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    names = sorted(tensors)
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", tensors=tensors))
    (tmp_path / "parts").mkdir()
    for number, part in enumerate((names[:9], names[9:]), start=1):
        write_gguf(
            tmp_path / "parts" / f"m-{number:05d}-of-00002.gguf",
            # As llama-gguf-split does: only the first part carries the model's keys.
            metadata={"split.count": 2} | (dict.fromkeys(tiny_metadata()) if number == 2 else {}),
            tensors={name: tensors[name] for name in part},
        )
    second = tmp_path / "parts" / "m-00002-of-00002.gguf"
    for path in (second, second.parent):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path.name == "m-00001-of-00002.gguf"
        for name in whole.names():
            torch.testing.assert_close(checkpoint.tensor(name), whole.tensor(name), rtol=0, atol=0)
    assert checkpoint.fingerprint != whole.fingerprint

    second.unlink()
    with pytest.raises(DamagedCheckpointError, match="missing beside it: m-00002-of-00002"):
        open_checkpoint(second.with_name("m-00001-of-00002.gguf"))


def test_fingerprint_is_the_files_hash(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_checkpoint(path).fingerprint == expected
    write_gguf(path, tensors=tiny_tensors(seed=1))
    changed = open_checkpoint(path).fingerprint
    assert changed == hashlib.sha256(path.read_bytes()).hexdigest() != expected


class TestRefusals:
    @pytest.mark.parametrize(
        ("arch", "metadata", "message"),
        [
            ("gemma3", {}, "'gemma3' model.*llama, qwen2, qwen3"),
            ("llama", {"llama.expert_count": 8}, "mixture-of-experts"),
            ("llama", {"llama.rope.scaling.type": "yarn"}, "'yarn'.*linear and llama3"),
            ("llama", {"llama.rope.dimension_count": 8}, "RoPE over 8"),
            ("llama", {"llama.attention.value_length": 8}, "values of 8"),
        ],
    )
    def test_architecture(
        self, tmp_path: Path, arch: str, metadata: dict[str, Any], message: str
    ) -> None:
        path = write_gguf(tmp_path / "m.gguf", arch, metadata, tiny_tensors())
        with pytest.raises(UnsupportedArchitectureError, match=message):
            open_checkpoint(path)

    def test_unknown_tensor(self, tmp_path: Path) -> None:
        tensors = tiny_tensors() | {"blk.0.ffn_up.bias": np.zeros(INNER, np.float32)}
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        with pytest.raises(UnsupportedArchitectureError, match=r"layers\.0\.mlp\.up_proj\.bias"):
            open_checkpoint(path)

    def test_quantisation(self, tmp_path: Path) -> None:
        tensors = tiny_tensors() | {"blk.0.ffn_up.weight": np.zeros((INNER, HIDDEN), np.int8)}
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        pattern = r"blk\.0\.ffn_up\.weight has type I8.*Supported: BF16.*Q8_0"
        with pytest.raises(UnsupportedQuantizationError, match=pattern):
            open_checkpoint(path)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("llama.block_count", None, "llama.block_count is missing"),
            ("llama.block_count", "two", "block_count is 'two', not int"),
            ("llama.embedding_length", 31, "shape"),
            ("llama.attention.head_count", 0, "head_count is 0"),
            ("llama.attention.head_count_kv", 3, "do not fit together"),
            ("llama.attention.head_count_kv", [2, 1], r"is \[2, 1\], not int"),
            ("general.alignment", 33, "not a power of two"),
        ],
    )
    def test_bad_metadata(self, tmp_path: Path, key: str, value: Any, message: str) -> None:
        path = write_gguf(tmp_path / "m.gguf", metadata={key: value})
        with pytest.raises(DamagedCheckpointError, match=message):
            open_checkpoint(path)

    def test_one_value_per_layer_is_fine_when_all_are_equal(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", metadata={"llama.attention.head_count_kv": [2, 2]})
        assert open_checkpoint(path).config.num_kv_heads == 2

    def test_missing_tensor(self, tmp_path: Path) -> None:
        tensors = tiny_tensors()
        del tensors["blk.1.ffn_down.weight"]
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        with pytest.raises(DamagedCheckpointError, match=r"layers\.1\.mlp\.down_proj"):
            open_checkpoint(path)


class TestDamage:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_a_truncated_file_is_always_found_at_opening(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(Path(folder) / "m.gguf")
            raw = path.read_bytes()
            # The last tensor may be followed by padding, whose loss harms nothing.
            end = max(info.offset + info.num_bytes for info in GgufFile(path).tensors.values())
            path.write_bytes(raw[: data.draw(st.integers(0, end - 1))])
            with pytest.raises(DamagedCheckpointError, match="fetch it again"):
                open_checkpoint(path)

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_flipped_bytes_never_end_in_a_traceback(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(Path(folder) / "m.gguf")
            raw = bytearray(path.read_bytes())
            header = min(info.offset for info in GgufFile(path).tensors.values())
            for _ in range(data.draw(st.integers(1, 3))):
                raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
            path.write_bytes(raw)
            try:
                checkpoint = open_checkpoint(path)
            except ModelError as error:
                assert str(path) in str(error)  # noqa: PT017 - opening may also succeed
            else:
                for name in checkpoint.names():
                    checkpoint.tensor(name)

    def test_a_file_that_shrinks_after_opening(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        checkpoint = open_checkpoint(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(DamagedCheckpointError, match="changed after it was opened"):
            checkpoint.tensor("model.norm.weight")

    def test_old_and_foreign_versions(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        raw = path.read_bytes()
        for version, message in ((b"\1\0\0\0", "version 1"), (b"\0\0\0\3", "big-endian")):
            path.write_bytes(raw[:4] + version + raw[8:])
            with pytest.raises(DamagedCheckpointError, match=message):
                open_checkpoint(path)


class TestOpening:
    def test_a_folder_with_one_file(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        assert open_checkpoint(tmp_path).path == path

    def test_a_folder_with_several(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "a.gguf")
        write_gguf(tmp_path / "b.gguf")
        with pytest.raises(ModelError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
            open_checkpoint(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            open_checkpoint(tmp_path / "absent")
        with pytest.raises(ModelError, match="holds no checkpoint"):
            open_checkpoint(tmp_path)

    def test_a_pickle_is_not_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(b"PK\3\4")
        with pytest.raises(ModelError, match="can run code"):
            open_checkpoint(path)
