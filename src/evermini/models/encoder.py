"""A vision encoder's layers on `evermini.kernels`: int8 weights, attention in blocks, tens of milliseconds at a time.

    weights = dict(pack_layer("layers.0.", parameters))      # or mapped from a file: evermini.models.packed
    encoder = NativeEncoder(config, weights)
    encoder.forward(hidden, [spans_of([64, 64, 48])] * config.num_layers, before_piece=check)

`hidden` is rows (patches) in spans; a row sees the rows of its span. Activations are quantised row by row, rotated as
the decoder's are (`evermini.models.quantize`). No matrix of rows times rows is ever in memory: the largest things are
q, k and v of one layer. Between two pieces a caller may stop.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evermini import kernels
from evermini.models.native import ActivationBuffer, linear_struct, padded_to
from evermini.models.packed import interleave, pack_linear

BITS = 8
"""Of a tower's weights, whatever the decoder has: its layers are bound by arithmetic, which fewer bits do not spare."""
_RUN = 128
"""The MLP's inner size is padded to a multiple, so that all of it is rotated: 3,420 (Qwen2.5-VL) is none of 16. Zeros
stay zeros behind SiLU and GELU."""
_STEP = 64
"""Keys of a block; ``STEP`` of tiles.h."""
_PIECE = 258
"""Rows of a piece for each four threads: kernels/linear.c cuts rows into such chunks."""

BeforePiece = Callable[[], None]
"""Called before each piece; ends the computation by an exception."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    Attributes:
        hidden_size: Width of a row.
        intermediate_size: Inner width of the MLP.
        num_heads: Attention heads, each with keys of its own.
        num_layers: Layers.
        eps: Of the norms.
        is_gated: The MLP is silu(gate) * up; else GELU in its tanh form.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    eps: float
    is_gated: bool

    @property
    def inner_size(self) -> int:
        """The MLP's inner width as it is packed."""
        return padded_to(self.intermediate_size, _RUN)


@dataclass(frozen=True)
class EncoderLayerParameters:
    """One layer's tensors as loaded, float32; q, k, v are fused, and gate and up if the MLP has a gate.

    Norms without a bias are RMS norms, with one layer norms.
    """

    qkv: Tensor
    qkv_bias: Tensor
    o: Tensor
    o_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    norm1: Tensor
    norm1_bias: Tensor | None
    norm2: Tensor
    norm2_bias: Tensor | None


@dataclass(frozen=True)
class Spans:
    """Which rows see each other.

    Attributes:
        span_of_row: (rows) int32.
        starts: (spans + 1) int32, first rows; the last one is the number of rows.
        blocks: (spans) int32, first blocks of keys.
        num_blocks: Blocks of 64 keys of all spans.
    """

    span_of_row: Tensor
    starts: Tensor
    blocks: Tensor
    num_blocks: int


def is_available() -> bool:
    """Return whether this machine has the kernels."""
    return kernels.load() is not None


def spans_of(lengths: Sequence[int]) -> Spans:
    """Return spans of so many rows, one behind the other."""
    sizes = torch.tensor(lengths)
    blocks = F.pad((sizes + _STEP - 1).div(_STEP, rounding_mode="floor").cumsum(0), (1, 0))
    return Spans(
        torch.repeat_interleave(torch.arange(len(lengths)), sizes).int(),
        F.pad(sizes.cumsum(0), (1, 0)).int(),
        blocks[:-1].int(),
        int(blocks[-1]),
    )


def pack_layer(
    prefix: str, p: EncoderLayerParameters, config: EncoderConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors as the kernels read them."""
    more = config.inner_size - config.intermediate_size
    up, up_bias = p.up, p.up_bias
    if config.is_gated:
        up = torch.cat([_more_rows(half, more) for half in up.chunk(2)])
        up_bias = torch.cat([_more_rows(half, more) for half in up_bias.chunk(2)])
        up, up_bias = interleave(up), interleave(up_bias[:, None])[:, 0]
    else:
        up, up_bias = _more_rows(up, more), _more_rows(up_bias, more)
    yield from pack_linear(prefix + "qkv", p.qkv, p.qkv_bias, BITS)
    yield from pack_linear(prefix + "o", p.o, p.o_bias, BITS)
    yield from pack_linear(prefix + "up", up, up_bias, BITS)
    yield from pack_linear(prefix + "down", F.pad(p.down, (0, more)), p.down_bias, BITS)
    for name in ("norm1", "norm1_bias", "norm2", "norm2_bias"):
        if (tensor := getattr(p, name)) is not None:
            yield prefix + name, tensor


def _more_rows(tensor: Tensor, count: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])])


class NativeLinear:
    """A linear layer on its own.

    Args:
        weights: Packed tensors, kept as long as this is.
        name: Which of them.
        n: Outputs.
        k: Inputs.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, n: int, k: int) -> None:
        self._library = _library()
        self._weights = weights
        self._struct = linear_struct(weights, name, n, k, BITS)

    def __call__(self, x: Tensor, before_piece: BeforePiece) -> Tensor:
        """Map (rows, k) to (rows, n), float32."""
        x = x.contiguous()
        rows = x.shape[0]
        y = torch.empty(rows, self._struct.n)
        pieces = _pieces(rows)
        act = ActivationBuffer(_longest(pieces), self._struct.k)
        for first, end in pieces:
            before_piece()
            self._library.em_linear(
                ctypes.byref(self._struct), ctypes.byref(act.struct), x[first].data_ptr(), end - first,
                y[first].data_ptr(),
            )  # fmt: skip
        return y


class NativeEncoder:
    """The layers of a vision encoder. Any thread may call it, several at a time.

    Args:
        config: Its shape.
        weights: What `pack_layer` yields for ``layers.0.``, ``layers.1.``, ..., kept as long as this is.
    """

    def __init__(self, config: EncoderConfig, weights: Mapping[str, Tensor]) -> None:
        self._library = _library()
        self.config = config
        self._weights = weights
        self._shape = kernels.EncoderShape(
            config.hidden_size, config.num_heads, config.hidden_size // config.num_heads,
            config.is_gated, config.eps,
        )  # fmt: skip
        self._layers = [self._layer(f"layers.{index}.") for index in range(config.num_layers)]

    def _layer(self, prefix: str) -> kernels.EncoderLayer:
        config, hidden, inner = self.config, self.config.hidden_size, self.config.inner_size
        shapes = {
            "qkv": (3 * hidden, hidden),
            "o": (hidden, hidden),
            "up": (inner * (1 + config.is_gated), hidden),
            "down": (hidden, inner),
        }
        norms = (
            self._weights.get(prefix + name)
            for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")
        )
        return kernels.EncoderLayer(
            *(linear_struct(self._weights, prefix + name, *shape, BITS) for name, shape in shapes.items()),
            *(None if norm is None else norm.data_ptr() for norm in norms),
        )  # fmt: skip

    @torch.inference_mode()
    def forward(
        self,
        hidden: Tensor,
        spans: Sequence[Spans],
        *,
        rotations: tuple[Tensor, Tensor] | None = None,
        before_piece: BeforePiece = lambda: None,
    ) -> None:
        """Put rows through all layers, in place.

        Args:
            hidden: (rows, hidden_size) float32, contiguous; at least one row.
            spans: Which rows see each other, in each layer.
            rotations: cos and sin of each row, (rows, head_dim / 2) float32 each (rotate-half RoPE); ``None``: none.
            before_piece: Called before each piece. What it raises comes through, and ``hidden`` is lost.
        """
        config, rows = self.config, hidden.shape[0]
        assert hidden.is_contiguous()
        assert len(spans) == config.num_layers
        head_dim = padded_to(config.hidden_size // config.num_heads, 16)
        num_blocks = max(each.num_blocks for each in spans)
        pieces = _pieces(rows)
        piece = _longest(pieces)
        q = torch.empty(config.num_heads, rows, head_dim)
        k, v = torch.empty(2, num_blocks, config.num_heads, _STEP * head_dim)
        act = ActivationBuffer(piece, max(config.hidden_size, config.inner_size))
        wide = torch.empty(piece, max(3 * config.hidden_size, config.inner_size))
        attn = torch.empty(piece, config.hidden_size)
        cos, sin = (None, None) if rotations is None else (t.contiguous() for t in rotations)
        for layer, each in zip(self._layers, spans, strict=True):
            batch = kernels.EncoderBatch(
                rows, each.span_of_row.data_ptr(), each.starts.data_ptr(), each.blocks.data_ptr(),
                None if cos is None else cos.data_ptr(), None if sin is None else sin.data_ptr(),
                hidden.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), act.struct, wide.data_ptr(),
                attn.data_ptr(),
            )  # fmt: skip
            for step in (self._library.em_encoder_keys, self._library.em_encoder_rows):
                for first, end in pieces:
                    before_piece()
                    step(
                        ctypes.byref(self._shape), ctypes.byref(layer), ctypes.byref(batch), first, end,
                    )  # fmt: skip


def _pieces(rows: int) -> list[tuple[int, int]]:
    """Return the first and last rows of pieces, evenly divided."""
    count = -(-rows // (_PIECE * -(-torch.get_num_threads() // 4)))
    cuts = [rows * index // count for index in range(count + 1)]
    return list(itertools.pairwise(cuts))


def _longest(pieces: Sequence[tuple[int, int]]) -> int:
    return max(end - first for first, end in pieces)


def _library() -> ctypes.CDLL:
    library = kernels.load()
    assert library is not None, "callers check kernels.load() first"
    return library
