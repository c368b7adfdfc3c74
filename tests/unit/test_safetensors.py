"""Hugging Face folders, as `transformers` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evermini.errors import (
    DamagedCheckpointError,
    ModelError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
)
from evermini.models.checkpoint import open_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save(folder: Path, family: str = "Llama", dtype: str = "float32", **options: Any) -> Any:
    """Write a random model's folder with `transformers` and return the model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms start as constants
        torch.nn.init.normal_(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=options.get("shard", "1GB")
    )
    (folder / "tokenizer.json").write_text("{}")
    return model


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_tensors_are_those_of_the_model(tmp_path: Path, family: str, tie: bool, dtype: str) -> None:
    model = save(tmp_path, family, dtype, tie_word_embeddings=tie, head_dim=8)
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    if tie:
        del expected["lm_head.weight"]
    assert checkpoint.names() == set(expected)
    for name, values in expected.items():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, values.float(), rtol=0, atol=0)
    part = checkpoint.rows("model.embed_tokens.weight", 10, 20)
    torch.testing.assert_close(
        part, expected["model.embed_tokens.weight"][10:20].float(), rtol=0, atol=0
    )
    assert checkpoint.config.tie_embeddings == tie
    assert checkpoint.config.attention_bias == (family == "Qwen2")
    assert checkpoint.config.qk_norm == (family == "Qwen3")


def test_shards(tmp_path: Path) -> None:
    model = save(tmp_path, shard="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(checkpoint.tensor(name), values, rtol=0, atol=0)
    assert open_checkpoint(next(tmp_path.glob("*.safetensors"))).path == tmp_path

    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(DamagedCheckpointError, match="lacks model-00002-of-"):
        open_checkpoint(tmp_path)


class TestConfig:
    def test_values(self, tmp_path: Path) -> None:
        save(tmp_path, "Qwen3", head_dim=16)
        config = open_checkpoint(tmp_path).config
        assert config.family == "qwen3"
        assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (60, 32, 48)
        assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
        assert (config.head_dim, config.max_position, config.rms_norm_eps) == (16, 256, 1e-5)

    @pytest.mark.parametrize("family", ["Llama", "Qwen3"])
    def test_attention_bias_covers_the_output_projection(self, tmp_path: Path, family: str) -> None:
        model = save(tmp_path, family, attention_bias=True, head_dim=8)
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.config.attention_bias
        assert checkpoint.config.output_bias
        name = "model.layers.1.self_attn.o_proj.bias"
        torch.testing.assert_close(checkpoint.tensor(name), model.state_dict()[name])

    @pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
    def test_rope_as_transformers_5_writes_it(
        self, tmp_path: Path, scaling: dict[str, Any] | None
    ) -> None:
        rope = (scaling or {"rope_type": "default"}) | {"rope_theta": 5e5}
        save(tmp_path, rope_parameters=rope)
        config = open_checkpoint(tmp_path).config
        assert config.rope_theta == 5e5
        assert config.rope_scaling == scaling

    @pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, LLAMA3])
    def test_rope_as_older_ones_write_it(
        self, tmp_path: Path, scaling: dict[str, Any] | None
    ) -> None:
        save(tmp_path)
        edit(tmp_path / "config.json", rope_parameters=None, rope_theta=7e4, rope_scaling=scaling)
        config = open_checkpoint(tmp_path).config
        assert config.rope_theta == 7e4
        if scaling is None:
            assert config.rope_scaling is None
        else:
            assert config.rope_scaling is not None
            assert config.rope_scaling["factor"] == scaling["factor"]
            assert config.rope_scaling["rope_type"] in ("linear", "llama3")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*LlamaForCausalLM"),
            ({"use_sliding_window": True}, "sliding-window attention"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
            ({"mlp_bias": True}, "mlp_bias"),
            ({"hidden_act": "gelu"}, "activation 'gelu'"),
            ({"partial_rotary_factor": 0.5}, "partial rotary"),
            ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ],
    )
    def test_unsupported_options(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        save(tmp_path)
        edit(tmp_path / "config.json", **changes)
        with pytest.raises(UnsupportedArchitectureError, match=message):
            open_checkpoint(tmp_path)

    def test_quantised(self, tmp_path: Path) -> None:
        save(tmp_path)
        edit(tmp_path / "config.json", quantization_config={"quant_method": "awq"})
        with pytest.raises(UnsupportedQuantizationError, match=r"awq.*GGUF"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": None}, "hidden_size is None, not int"),
            ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
            ({"num_hidden_layers": 3}, r"model\.layers\.2"),
            ({"num_hidden_layers": 2**40}, "layers"),
            ({"vocab_size": 61}, "shape"),
            ({"num_attention_heads": 0}, "num_heads is 0"),
            ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ],
    )
    def test_damaged(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        save(tmp_path, head_dim=8)
        edit(tmp_path / "config.json", **changes)
        with pytest.raises(DamagedCheckpointError, match=message):
            open_checkpoint(tmp_path)


class TestFiles:
    def test_int8_tensors(self, tmp_path: Path) -> None:
        save(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedQuantizationError, match=r"model\.norm\.weight has type I8"):
            open_checkpoint(tmp_path)

    def test_tensors_of_another_model(self, tmp_path: Path) -> None:
        save(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedArchitectureError, match="lora_A"):
            open_checkpoint(tmp_path)

    def test_leftovers_that_do_no_harm(self, tmp_path: Path) -> None:
        save(tmp_path, tie_word_embeddings=True)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        save_file(tensors, tmp_path / "model.safetensors")
        assert "lm_head.weight" not in open_checkpoint(tmp_path).names()

    @pytest.mark.parametrize("keep", [0, 7, 500, -1])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        save(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DamagedCheckpointError, match="fetch it again"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_missing(self, tmp_path: Path, name: str) -> None:
        save(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ModelError, match=name if name != "config.json" else "config"):
            open_checkpoint(tmp_path)

    def test_config_that_is_not_json(self, tmp_path: Path) -> None:
        save(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(DamagedCheckpointError, match=r"config\.json cannot be read"):
            open_checkpoint(tmp_path)

    def test_fingerprint_depends_on_weights_and_config_only(self, tmp_path: Path) -> None:
        save(tmp_path / "a", shard="10KB")
        save(tmp_path / "b", shard="10KB")
        (tmp_path / "b" / "README.md").write_text("x")
        first = open_checkpoint(tmp_path / "a").fingerprint
        assert len(first) == 64
        assert open_checkpoint(tmp_path / "b").fingerprint == first
        edit(tmp_path / "b" / "config.json", rope_parameters={"rope_theta": 1.0})
        assert open_checkpoint(tmp_path / "b").fingerprint != first


class TestTokenizerSource:
    def test_everything_is_found(self, tmp_path: Path) -> None:
        save(tmp_path, eos_token_id=3)
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
        settings = {"eos_token": "<e>", "chat_template": "T"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
        source = open_checkpoint(tmp_path).tokenizer
        assert source.format == "huggingface"
        assert source.tokenizer_json == '{"version": "1.0"}'
        assert source.metadata == settings
        assert source.chat_template == "T"
        assert set(source.eos_ids) == {3, 5}
        assert source.vocab_size == 60

    def test_template_file_goes_first(self, tmp_path: Path) -> None:
        save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
        (tmp_path / "chat_template.jinja").write_text("new")
        assert open_checkpoint(tmp_path).tokenizer.chat_template == "new"

    def test_named_templates(self, tmp_path: Path) -> None:
        save(tmp_path)
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert open_checkpoint(tmp_path).tokenizer.chat_template == "y"
