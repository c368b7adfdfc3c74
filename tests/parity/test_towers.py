"""Vision towers on int8 kernels, against float32 and against the same integers written out in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evermini import kernels
from evermini.errors import EngineStoppedError
from evermini.models import encoder
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.models.encoder import (
    EncoderConfig,
    EncoderLayerParameters,
    NativeEncoder,
    NativeLinear,
    pack_layer,
    spans_of,
)
from evermini.models.packed import pack_linear
from evermini.models.quantize import quantize_activations, quantize_weight
from evermini.models.rms_norm import rms_norm
from evermini.vision.tower import VisionTower, load_tower
from tests.vlm_checkpoints import FAMILIES, picture, save_vlm

pytestmark = pytest.mark.skipif(
    kernels.load() is None, reason=f"native kernels: {kernels.unavailable_reason()}"
)

Rotations = tuple[torch.Tensor, torch.Tensor]
SPANS = [64, 1, 63, 65, 130, 7, 200]
WINDOWS, WHOLE = spans_of(SPANS), spans_of([sum(SPANS)])
SHAPES = {
    "qwen": EncoderConfig(80, 85, 2, 3, 1e-6, is_gated=True),  # heads of 40, an odd inner size
    "siglip": EncoderConfig(144, 269, 8, 3, 1e-6, is_gated=False),  # heads of 18
}


def parameters(config: EncoderConfig, seed: int) -> EncoderLayerParameters:
    generator = torch.Generator().manual_seed(seed)

    def of(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    hidden, inner = config.hidden_size, config.intermediate_size
    wide = inner * (1 + config.is_gated)
    has_bias = not config.is_gated
    return EncoderLayerParameters(
        qkv=of(3 * hidden, hidden),
        qkv_bias=of(3 * hidden),
        o=of(hidden, hidden),
        o_bias=of(hidden),
        up=of(wide, hidden),
        up_bias=of(wide),
        down=of(hidden, inner),
        down_bias=of(hidden),
        norm1=1 + of(hidden),
        norm1_bias=of(hidden) if has_bias else None,
        norm2=1 + of(hidden),
        norm2_bias=of(hidden) if has_bias else None,
    )


@dataclass(frozen=True)
class Case:
    """An encoder, its layers' parameters, and rows to put through it."""

    config: EncoderConfig
    layers: list[EncoderLayerParameters]
    hidden: torch.Tensor
    rotations: Rotations | None

    def native(self) -> torch.Tensor:
        weights = {
            name: tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in pack_layer(f"layers.{index}.", layer, self.config)
        }
        hidden = self.hidden.clone()
        NativeEncoder(self.config, weights).forward(
            hidden, [WINDOWS, WHOLE, WINDOWS], rotations=self.rotations
        )
        return hidden

    def expected(self, bits: int | None) -> torch.Tensor:
        """The same in PyTorch operations; ``bits``: with integer products."""
        config, x = self.config, self.hidden.clone()

        def linear(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: int = 0
        ) -> torch.Tensor:
            if bits is None:
                return F.linear(x, weight, bias)
            quantized = quantize_weight(F.pad(weight, (0, padding)), bits)
            q, scale = quantize_activations(F.pad(x, (0, padding)))
            product = q.double() @ quantized.int8().double().t()
            return (product * scale[:, None].double() * quantized.scale.double()).float() + bias

        def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if bias is None:
                return rms_norm(x, weight, config.eps)
            return F.layer_norm(x, (config.hidden_size,), weight, bias, config.eps)

        for index, p in enumerate(self.layers):
            sizes = [len(x)] if index == 1 else SPANS
            qkv = linear(norm(x, p.norm1, p.norm1_bias), p.qkv, p.qkv_bias)
            q, k, v = qkv.view(len(x), 3, config.num_heads, -1).permute(1, 2, 0, 3)
            if self.rotations is not None:
                q, k = (rotated(each, self.rotations) for each in (q, k))
            pieces = zip(*(each.split(sizes, 1) for each in (q, k, v)), strict=True)
            seen = [F.scaled_dot_product_attention(*piece) for piece in pieces]
            attended = torch.cat(seen, 1).transpose(0, 1).flatten(1)
            x = x + linear(attended, p.o, p.o_bias)
            up = linear(norm(x, p.norm2, p.norm2_bias), p.up, p.up_bias)
            if config.is_gated:
                gate, factor = up.chunk(2, -1)
                inner = F.silu(gate) * factor
            else:
                inner = F.gelu(up, approximate="tanh")
            x = x + linear(inner, p.down, p.down_bias, config.inner_size - config.intermediate_size)
        return x


def rotated(x: torch.Tensor, rotations: Rotations) -> torch.Tensor:
    cos, sin = rotations
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> Case:
    config = SHAPES[request.param]
    rows = sum(SPANS)
    hidden = torch.randn(rows, config.hidden_size, generator=torch.Generator().manual_seed(1))
    rotations = None
    if config.is_gated:
        angles = torch.arange(rows)[:, None] * torch.rand(
            config.hidden_size // config.num_heads // 2
        )
        rotations = angles.cos(), angles.sin()
    layers = [parameters(config, seed) for seed in range(config.num_layers)]
    return Case(config, layers, hidden, rotations)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_the_encoder_is_its_arithmetic_written_out(case: Case) -> None:
    actual = case.native()
    # An activation at a tie may be rounded either way, and layers pass that on.
    written_out, exact = error(actual, case.expected(8)), error(actual, case.expected(None))
    print(f"{written_out:.4f} {exact:.4f}")
    assert written_out < 0.01
    assert exact < 0.03


def test_outliers_lose_little(case: Case) -> None:
    """Real encoders have a few channels, and a few patches, that are hundreds of times as large as the others."""
    for layer in case.layers:
        layer.up[::40] *= 20
        layer.up_bias[::40] += 20
    case.hidden[3] *= 100
    case.hidden[:, 5] *= 30
    lost = error(case.native(), case.expected(None))
    print(f"{lost:.4f}")
    assert lost < 0.03


def test_pieces_change_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.native()
    monkeypatch.setattr(encoder, "_PIECE", 37)
    assert torch.equal(case.native(), whole)


def test_a_linear_layer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(70, 96), torch.randn(300, 96)
    weights = dict(pack_linear("w", weight, None, 8))
    linear = NativeLinear(weights, "w", 70, 96)
    asked: list[None] = []
    whole = linear(x, lambda: asked.append(None))
    assert len(asked) == 2
    assert error(whole, x @ weight.t()) < 0.02
    monkeypatch.setattr(encoder, "_PIECE", 7)
    assert torch.equal(linear(x, lambda: None), whole)


@dataclass(frozen=True)
class Towers:
    checkpoint: Checkpoint
    home: Path
    fp32: VisionTower
    int8: VisionTower


@pytest.fixture(scope="module", params=FAMILIES)
def towers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Towers:
    folder, home = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("home")
    save_vlm(request.param, folder)
    checkpoint = open_checkpoint(folder)
    fp32 = load_tower(checkpoint, precision="fp32")
    int8 = load_tower(checkpoint, precision="int8", home=home)
    assert fp32 is not None
    assert int8 is not None
    return Towers(checkpoint, home, fp32, int8)


@pytest.mark.parametrize("size", [(112, 84), (56, 140), (300, 200)])
def test_int8_towers_follow_float32(towers: Towers, size: tuple[int, int]) -> None:
    image = towers.fp32.prepare(picture(1, size))
    expected, actual = towers.fp32.encode(image), towers.int8.encode(image)
    assert actual.shape == expected.shape
    cosine = torch.cosine_similarity(actual, expected, dim=-1).min().item()
    print(f"{size}: {error(actual, expected):.3f}, {cosine:.4f}")
    assert error(actual, expected) < 0.04
    assert cosine > 0.999
    other = towers.int8.encode(towers.int8.prepare(picture(9, size)))
    assert error(other, expected) > 0.3  # it looks at the image


def test_packed_weights_are_written_once(towers: Towers) -> None:
    (file,) = (towers.home / "packed").glob("*.safetensors")
    assert file.name.startswith(towers.checkpoint.fingerprint)
    stamp = file.stat().st_mtime_ns
    again = load_tower(towers.checkpoint, home=towers.home)
    assert again is not None
    assert file.stat().st_mtime_ns == stamp
    image = again.prepare(picture(3))
    assert torch.equal(again.encode(image), towers.int8.encode(image))


def test_an_image_that_nobody_waits_for_ends_after_the_piece_in_work(towers: Towers) -> None:
    answers = iter([False, False, False, True])
    image = towers.int8.prepare(picture(1))
    with pytest.raises(EngineStoppedError):
        towers.int8.encode(image, lambda: next(answers))
    assert next(answers, None) is None
    assert towers.int8.encode(image).isfinite().all()


def test_an_activation_without_a_kernel_is_computed_in_float32(
    towers: Towers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(towers.int8.native_network, "is_supported", lambda config: False)
    tower = load_tower(towers.checkpoint, home=towers.home)
    assert tower is not None
    assert "falls back to slower PyTorch operations" in caplog.text
    image = tower.prepare(picture(1))
    assert torch.equal(tower.encode(image), towers.fp32.encode(image))
