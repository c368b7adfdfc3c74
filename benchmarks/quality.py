"""What a precision costs: perplexity on real prose, as a ratio to the float32 weights of the same checkpoint.

    python benchmarks/quality.py --model nano --tokens 20000

llama.cpp's quantisations of the same file (made by build_llamacpp.py) are dequantised to float32 and read in the same
windows, so the last column compares precisions and nothing else. (llama.cpp also quantises activations, which this
leaves out: its own figures can only be worse.)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from evermini.config import default_home
from evermini.models.batch import BLOCK_SIZE, Model, whole_prompt
from evermini.models.checkpoint import open_checkpoint
from evermini.models.load import load_model
from evermini.models.pull import ensure
from evermini.text.tokenizer import Tokenizer

WINDOW = 1024


def perplexity(model: Model, ids: list[int]) -> float:
    num_blocks = WINDOW // BLOCK_SIZE
    kv, positions = model.new_kv_cache(num_blocks), torch.arange(WINDOW)
    total, count = 0.0, 0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor(ids[start : start + WINDOW])
        batch = replace(whole_prompt(window), logits_rows=positions)
        logits = model.forward(batch, kv)[:-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += WINDOW - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="tier, alias or path")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--precisions", nargs="*", default=["int8", "int6", "int5", "int4"])
    parser.add_argument(
        "--text", type=Path, help="text file, may be .gz (default: the Debian handbook)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    data = os.environ.get("EVERMINI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
    text = options.text or Path(data) / "prose" / "debian_handbook_en.txt.gz"
    with (gzip.open if text.suffix == ".gz" else open)(text, "rt") as file:
        content = file.read(options.tokens * 6)
    path = ensure(options.model)
    checkpoint = open_checkpoint(path)
    ids = Tokenizer(checkpoint.tokenizer).encode(content)[: options.tokens]
    runs = [(precision, checkpoint, precision) for precision in ("fp32", *options.precisions)]
    for kind in ("Q8_0", "Q4_0"):
        peer = default_home() / "benchmarks" / "gguf" / f"{checkpoint.fingerprint[:16]}-{kind}.gguf"
        if peer.exists():
            runs.append((f"llama.cpp {kind}", open_checkpoint(peer), "fp32"))
    figures: dict[str, float] = {}
    print(
        f"{path.name}: {len(ids) // WINDOW * WINDOW} tokens of {text.name} in windows of {WINDOW}\n"
    )
    print("| weights | perplexity | against fp32 | seconds |\n|---|---|---|---|")
    for name, source, precision in runs:
        start = time.perf_counter()
        figures[name] = perplexity(load_model(source, device="cpu", precision=precision), ids)
        change = figures[name] / figures["fp32"] - 1
        seconds = time.perf_counter() - start
        print(f"| {name} | {figures[name]:.4f} | {change:+.2%} | {seconds:.0f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
