"""An index model and a tokenizer small enough to reason about, for tests of recall."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from evermini.models.batch import QueriesKeys
from evermini.models.config import ModelConfig
from evermini.recall.calibration import Calibration
from evermini.recall.recall import Recall
from evermini.recall.store import SegmentStore
from evermini.recall.windows import Windows

DIM = 64


class WordTokenizer:
    """One token per word (with the space before it) or other character; the vocabulary grows as it is used."""

    def __init__(self) -> None:
        self.pieces: list[str] = ["<start>"]
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        found = re.findall(r" ?[\w-]+|\W", text)
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()


class LexicalModel:
    """A token's key and query are a random direction of its id, with some of the token before it; every layer alike.

    So a question's words find themselves, and a key depends on what its pass put before it: a chunk that was run with
    a wrong window gives other keys.
    """

    def __init__(self) -> None:
        self.config = ModelConfig(
            family="llama", vocab_size=1 << 16, hidden_size=DIM, intermediate_size=DIM, num_layers=4, num_heads=2,
            num_kv_heads=1, head_dim=DIM, max_position=4096, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self._directions = torch.randn(1 << 16, DIM, generator=generator)
        self.passes: list[int] = []

    def index_pass(self, token_ids, layers) -> list[QueriesKeys]:
        self.passes.append(len(token_ids))
        assert len(token_ids) <= self.config.max_position
        own = self._directions[token_ids]
        context = 0.3 * torch.nn.functional.pad(own[:-1], (0, 0, 1, 0))
        return [
            ((3 * own)[:, None].expand(-1, 2, -1), (own + context + 5)[:, None]) for _ in layers
        ]


def fake_calibration(**windows: int) -> Calibration:
    sizes = {"sinks": 8, "window": 32, "chunk": 64, **windows}
    return Calibration(
        weights="fake",
        head_dim=DIM,
        group=2,
        heads=((0, 0), (1, 1)),
        means=((5.0,) * DIM,) * 2,
        windows=Windows((0,), **sizes),
    )


def fake_recall(home: Path, max_bytes: int | None = None, **windows: int) -> Recall:
    store = SegmentStore(home, fake_calibration(**windows), max_bytes)
    return Recall(LexicalModel(), WordTokenizer(), store)


def filler(num_words: int, seed: int = 0) -> str:
    """Words that are all different from those of a test's needle."""
    words = [f"w{(i * 7919 + seed * 104729) % 4999}" for i in range(num_words)]
    return "\n".join(" ".join(words[i : i + 12]) for i in range(0, num_words, 12))
