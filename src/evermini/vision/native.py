"""Vision towers on our own int8 kernels: their layers, the merger, the connector. What is left is done by torch.

    weights = dict(NativeQwen.pack(config, read))     # or mapped from a file: evermini.models.packed
    NativeQwen(config, weights).rows(pixels, before_piece)

Patches are embedded in float32: that is 1 % of the arithmetic, and pixels are what everything else depends on. Qwen's
windows are spans of rows of the encoder, Idefics3's tiles go one after the other, so memory does not grow with them.
`evermini.vision.network` is the same computation in float32 (tolerances in docs/vision.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from evermini.models.encoder import (
    BITS,
    EncoderConfig,
    EncoderLayerParameters,
    NativeEncoder,
    NativeLinear,
    pack_layer,
    spans_of,
)
from evermini.models.packed import pack_linear
from evermini.models.rms_norm import rms_norm
from evermini.vision.network import BeforePiece, idefics_classes, seen_patches

Read = Callable[[str], Tensor]
"""Returns a parameter by the name that it has in `evermini.vision.network`."""
_QWEN_EPS = 1e-6
"""Of all norms of Qwen's tower; its code has it, config.json does not."""


class NativeNetwork(Protocol):
    """A `evermini.vision.network.Network` on the kernels."""

    def __init__(self, config: Any, weights: Mapping[str, Tensor]) -> None: ...

    @staticmethod
    def is_supported(config: Any) -> bool:
        """Return whether the kernels have what a checkpoint's configuration asks for."""
        ...

    @staticmethod
    def pack(config: Any, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as the kernels read them, one matrix in memory at a time."""
        ...

    def rows(self, pixels: Mapping[str, Tensor], before_piece: BeforePiece) -> Tensor:
        """Return the rows of an image; see `evermini.vision.network.Network`."""
        ...


class NativeQwen:
    """Qwen2.5-VL's.

    Args:
        config: The checkpoint's, of `transformers`.
        weights: From `pack`.
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor]) -> None:
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

        self._vision = config.vision_config
        self._weights = weights
        self._rotary = code.Qwen2_5_VLVisionRotaryEmbedding(self._vision)
        self._encoder = NativeEncoder(_qwen_shape(config), weights)
        merged = self._vision.hidden_size * self._vision.spatial_merge_size**2
        self._merge_in = NativeLinear(weights, "merger.in", merged, merged)
        self._merge_out = NativeLinear(weights, "merger.out", self._vision.out_hidden_size, merged)

    @staticmethod
    def is_supported(config: Any) -> bool:
        """Return whether it is SiLU behind the gates; see `NativeNetwork.is_supported`."""
        return bool(config.vision_config.hidden_act == "silu")

    @staticmethod
    def pack(config: Any, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Yield the packed weights; see `NativeNetwork.pack`."""
        yield "patch", read("patch_embed.proj.weight").flatten(1)
        shape = _qwen_shape(config)
        for index in range(shape.num_layers):
            p = f"blocks.{index}."
            layer = EncoderLayerParameters(
                qkv=read(p + "attn.qkv.weight"),
                qkv_bias=read(p + "attn.qkv.bias"),
                o=read(p + "attn.proj.weight"),
                o_bias=read(p + "attn.proj.bias"),
                up=torch.cat([read(p + f"mlp.{name}_proj.weight") for name in ("gate", "up")]),
                up_bias=torch.cat([read(p + f"mlp.{name}_proj.bias") for name in ("gate", "up")]),
                down=read(p + "mlp.down_proj.weight"),
                down_bias=read(p + "mlp.down_proj.bias"),
                norm1=read(p + "norm1.weight"),
                norm1_bias=None,
                norm2=read(p + "norm2.weight"),
                norm2_bias=None,
            )
            yield from pack_layer(f"layers.{index}.", layer, shape)
        yield "merger.norm", read("merger.ln_q.weight")
        for name, number in (("in", 0), ("out", 2)):
            weight, bias = (read(f"merger.mlp.{number}.{part}") for part in ("weight", "bias"))
            yield from pack_linear(f"merger.{name}", weight, bias, BITS)

    def rows(self, pixels: Mapping[str, Tensor], before_piece: BeforePiece) -> Tensor:
        """Return the rows of an image; see `evermini.vision.network.Network`."""
        from transformers import vision_utils

        vision, grid = self._vision, pixels["image_grid_thw"]
        merge, width = vision.spatial_merge_size, vision.hidden_size
        order, ends = vision_utils.get_vision_window_index(
            grid, merge, vision.window_size, vision.patch_size
        )

        def in_windows(rows: Tensor) -> Tensor:
            return rows.view(len(order), merge * merge, -1)[order].flatten(0, 1)

        before_piece()
        hidden = in_windows(F.linear(pixels["pixel_values"].float(), self._weights["patch"]))
        cos, sin = self._rotary(hidden, vision_utils.get_vision_position_ids(grid, merge))
        half = cos.shape[-1] // 2  # the other half is the same
        windows, whole = spans_of(ends.diff().tolist()), spans_of([len(hidden)])
        is_whole = set(vision.fullatt_block_indexes)
        self._encoder.forward(
            hidden,
            [whole if index in is_whole else windows for index in range(vision.depth)],
            rotations=(in_windows(cos[:, :half]), in_windows(sin[:, :half])),
            before_piece=before_piece,
        )
        normed = rms_norm(hidden, self._weights["merger.norm"], _QWEN_EPS)
        inner = self._merge_in(normed.view(-1, width * merge * merge), before_piece)
        return self._merge_out(F.gelu(inner), before_piece)[order.argsort()]


def _qwen_shape(config: Any) -> EncoderConfig:
    vision = config.vision_config
    return EncoderConfig(
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_heads,
        vision.depth,
        _QWEN_EPS,
        is_gated=True,
    )


class NativeIdefics:
    """Idefics3's and SmolVLM's.

    Args:
        config: The checkpoint's, of `transformers`.
        weights: From `pack`.
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor]) -> None:
        self._vision = vision = config.vision_config
        self._weights = weights
        embeddings, _, connector = idefics_classes(config)
        with torch.device("meta"):
            self._embeddings: Any = embeddings(vision)
            self._connector: Any = connector(config)
        self._embeddings.load_state_dict(
            {name: weights[f"embeddings.{name}"] for name in self._embeddings.state_dict()},
            assign=True,
        )
        self._encoder = NativeEncoder(_idefics_shape(config), weights)
        inputs = vision.hidden_size * config.scale_factor**2
        self._projection = NativeLinear(
            weights, "projection", config.text_config.hidden_size, inputs
        )

    @staticmethod
    def is_supported(config: Any) -> bool:
        """Return whether it is GELU in its tanh form; see `NativeNetwork.is_supported`."""
        return bool(config.vision_config.hidden_act == "gelu_pytorch_tanh")

    @staticmethod
    def pack(config: Any, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Yield the packed weights; see `NativeNetwork.pack`."""
        p = "vision_model.embeddings."
        for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight"):
            yield f"embeddings.{name}", read(p + name)
        shape = _idefics_shape(config)
        for index in range(shape.num_layers):
            p = f"vision_model.encoder.layers.{index}."
            weight, bias = (
                torch.cat([read(f"{p}self_attn.{name}_proj.{part}") for name in "qkv"])
                for part in ("weight", "bias")
            )
            layer = EncoderLayerParameters(
                qkv=weight,
                qkv_bias=bias,
                o=read(p + "self_attn.out_proj.weight"),
                o_bias=read(p + "self_attn.out_proj.bias"),
                up=read(p + "mlp.fc1.weight"),
                up_bias=read(p + "mlp.fc1.bias"),
                down=read(p + "mlp.fc2.weight"),
                down_bias=read(p + "mlp.fc2.bias"),
                norm1=read(p + "layer_norm1.weight"),
                norm1_bias=read(p + "layer_norm1.bias"),
                norm2=read(p + "layer_norm2.weight"),
                norm2_bias=read(p + "layer_norm2.bias"),
            )
            yield from pack_layer(f"layers.{index}.", layer, shape)
        for part in ("weight", "bias"):
            yield f"norm.{part}", read(f"vision_model.post_layernorm.{part}")
        projection = read("connector.modality_projection.proj.weight")
        yield from pack_linear("projection", projection, None, BITS)

    def rows(self, pixels: Mapping[str, Tensor], before_piece: BeforePiece) -> Tensor:
        """Return the rows of an image; see `evermini.vision.network.Network`."""
        is_seen = seen_patches(pixels, self._vision.patch_size)
        assert is_seen.all(), "tiles of one image have one size, so none of them is padded"
        tiles = zip(pixels["pixel_values"].float(), is_seen, strict=True)
        return torch.cat([self._tile(tile[None], mask[None], before_piece) for tile, mask in tiles])

    def _tile(self, pixels: Tensor, is_seen: Tensor, before_piece: BeforePiece) -> Tensor:
        before_piece()
        hidden: Tensor = self._embeddings(pixel_values=pixels, patch_attention_mask=is_seen)
        hidden = hidden[0].contiguous()
        spans = spans_of([len(hidden)])
        config = self._encoder.config
        self._encoder.forward(hidden, [spans] * config.num_layers, before_piece=before_piece)
        weight, bias = self._weights["norm.weight"], self._weights["norm.bias"]
        hidden = F.layer_norm(hidden, (config.hidden_size,), weight, bias, config.eps)
        shuffled = self._connector.pixel_shuffle(hidden[None], self._connector.scale_factor)
        return self._projection(shuffled[0], before_piece)


def _idefics_shape(config: Any) -> EncoderConfig:
    vision = config.vision_config
    return EncoderConfig(
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_attention_heads,
        vision.num_hidden_layers,
        vision.layer_norm_eps,
        is_gated=False,
    )
