"""Vision towers of published sizes, with random weights: our int8 kernels against `transformers`' float32.

    python benchmarks/tower.py --threads 2 --out tower.json [qwen2.5-vl-3b smolvlm-256m ... streams]

Sizes: the layers and widths of the published checkpoints, built in memory with random weights, so nothing is fetched
and nothing is said about what a model sees. An image is a photo of 1024 x 768 pixels: 3,996 patches in Qwen2.5-VL, 13
tiles in SmolVLM (`--tiles` takes fewer). Both compute the same pixels in turns, in the same process; the ratio is of
medians. Beside it the processor's seconds, which say more on a machine that does other work (with one thread), and the
relative error and the lowest cosine of int8's rows to float32's.

streams: what a stream of text suffers from an image: the gaps between tokens (nano) alone, while images are computed
at the low priority that the server gives them, and while they are computed at the same priority, in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, SmolVLMConfig

from evermini.config import load_settings
from evermini.engine.request import Finished, SamplingParams
from evermini.service.loading import load_checkpoint
from evermini.service.offload import step_back
from evermini.service.runtime import start_worker
from evermini.vision.native import NativeIdefics, NativeQwen
from evermini.vision.network import Network, TorchIdefics, TorchQwen

GRID = (54, 74)
"""Patches of 14 x 14 pixels of 756 x 1036, which Qwen2.5-VL makes of 768 x 1024."""
TILES = 13
"""Of 1024 x 768 in SmolVLM: resized to a longest edge of four tiles, 4 x 3, and the whole shrunk to one."""
SIZES = ("qwen2.5-vl-3b", "smolvlm-256m", "smolvlm-500m", "smolvlm-2.2b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=[*SIZES, "streams"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=TILES, help="of SmolVLM")
    parser.add_argument("--out", type=Path, default=Path("tower.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {"threads": given.threads}
    for name in given.parts:
        found[name] = streams(given.threads) if name == "streams" else compared(name, given)
        print(name, found[name], flush=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def qwen_config() -> Any:
    """Return the configuration of Qwen2.5-VL-3B's tower."""
    return Qwen2_5_VLConfig(
        text_config={"hidden_size": 2048},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    )


def smolvlm_config(name: str) -> Any:
    """Return the configuration of a SmolVLM's tower."""
    is_large = name == "smolvlm-2.2b"
    vision = {
        "hidden_size": 1152 if is_large else 768,
        "intermediate_size": 4304 if is_large else 3072,
        "num_hidden_layers": 27 if is_large else 12,
        "num_attention_heads": 16 if is_large else 12,
        "image_size": 384 if is_large else 512,
        "patch_size": 14 if is_large else 16,
    }
    width = {"smolvlm-256m": 576, "smolvlm-500m": 960, "smolvlm-2.2b": 2048}[name]
    return SmolVLMConfig(
        text_config={"model_type": "llama", "hidden_size": width},
        vision_config=vision,
        scale_factor=3 if is_large else 4,
    )


def built(name: str, tiles: int) -> tuple[Network, Network, dict[str, torch.Tensor]]:
    """Return a tower in float32 and in int8, with the same random weights, and the pixels of an image."""
    is_qwen = name == "qwen2.5-vl-3b"
    torch.manual_seed(0)
    if is_qwen:
        config, kind, native = qwen_config(), TorchQwen, NativeQwen
        rows, columns = GRID
        pixels = {
            "pixel_values": torch.randn(rows * columns, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
    else:
        config, kind, native = smolvlm_config(name), TorchIdefics, NativeIdefics
        side = config.vision_config.image_size
        pixels = {"pixel_values": torch.randn(tiles, 3, side, side)}
    modules = kind.build(config)
    weights = {
        prefix + parameter: tensor
        for prefix, module in modules.items()
        for parameter, tensor in module.state_dict().items()
    }
    began = time.perf_counter()
    packed = dict(native.pack(config, weights.__getitem__))
    print(f"{name}: packed in {time.perf_counter() - began:.1f} s", flush=True)
    theirs = kind(modules, weights.__getitem__, torch.device("cpu"), torch.float32)
    return theirs, native(config, packed), pixels


@torch.inference_mode()
def compared(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of an image in both, their ratio, and how much the rows differ."""
    theirs, ours, pixels = built(name, given.tiles)
    seconds: dict[str, list[float]] = {"float32": [], "int8": []}
    work: dict[str, list[float]] = {"float32": [], "int8": []}
    rows: dict[str, torch.Tensor] = {}
    pieces: list[float] = []

    def before_piece() -> None:
        pieces.append(time.perf_counter())

    for _ in range(given.turns):
        for kind, network in (("int8", ours), ("float32", theirs)):
            pieces.clear()
            began, worked = time.perf_counter(), time.process_time()
            rows[kind] = network.rows(pixels, before_piece)
            seconds[kind].append(time.perf_counter() - began)
            work[kind].append(time.process_time() - worked)
            if kind == "int8":
                longest = max(b - a for a, b in itertools.pairwise(pieces))
    difference = (rows["int8"] - rows["float32"]).norm() / rows["float32"].norm()
    cosine = torch.cosine_similarity(rows["int8"], rows["float32"], dim=-1).min()
    ours_s, theirs_s = median(seconds["int8"]), median(seconds["float32"])
    return {
        "int8_s": round(ours_s, 2),
        "float32_s": round(theirs_s, 2),
        "ratio": round(theirs_s / ours_s, 1),
        "int8_processor_s": round(median(work["int8"]), 2),
        "float32_processor_s": round(median(work["float32"]), 2),
        "longest_piece_ms": round(longest * 1000),
        "relative_error": round(difference.item(), 4),
        "lowest_cosine": round(cosine.item(), 5),
    }


def streams(threads: int) -> dict[str, Any]:
    """Return the gaps between a stream's tokens in milliseconds: alone, and beside an image."""
    theirs, ours, pixels = built("smolvlm-256m", TILES)
    settings = load_settings({"threads": threads, "speculation": "off"}).settings
    worker = start_worker(load_checkpoint("nano", settings).model, settings)
    found = {}
    try:
        for name, network, first in (
            ("alone", None, None),
            ("int8, low priority", ours, step_back),
            ("float32, same priority", theirs, None),
        ):
            gaps = gaps_beside(worker, network, pixels, first)
            found[name] = {
                "median_ms": round(median(gaps), 1),
                "p99_ms": round(sorted(gaps)[len(gaps) * 99 // 100], 1),
                "longest_ms": round(max(gaps), 1),
            }
    finally:
        worker.stop(0.0)
    return found


def gaps_beside(
    worker: Any,
    network: Network | None,
    pixels: dict[str, torch.Tensor],
    first: Callable[[], None] | None,
) -> list[float]:
    """Return the gaps between 400 tokens, in milliseconds, while a tower computes one image after the other."""
    is_over = threading.Event()

    class Over(Exception):
        pass

    def before_piece() -> None:
        if is_over.is_set():
            raise Over

    @torch.inference_mode()
    def compute() -> None:
        if first is not None:
            first()
        try:
            while network is not None:
                network.rows(pixels, before_piece)
        except Over:
            pass

    beside = threading.Thread(target=compute)
    beside.start()
    times = []
    params = SamplingParams(max_tokens=400, min_tokens=400, temperature=1.0, seed=1)
    for event in worker.submit(list(range(100, 132)), params):
        if not isinstance(event, Finished):
            times.append(time.perf_counter())
    is_over.set()
    beside.join()
    return [(b - a) * 1000 for a, b in itertools.pairwise(times[1:])]


if __name__ == "__main__":
    main()
