"""Pooled hidden states: `transformers`' own, whatever the batch, chunks, memory or arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evermini.engine.engine import Engine
from evermini.engine.request import SamplingParams
from evermini.models.batch import BLOCK_SIZE
from evermini.models.checkpoint import open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from tests.batches import make_batch
from tests.fakes import TinyModel, drive
from tests.parity.test_decoder_transformers import CASES, TINY, save_tiny

POOL = SamplingParams(max_tokens=0, pool=True)


def some_tokens(length: int, seed: int = 0, vocab_size: int = 97) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def pooled(model, prompts, others=(), **changes) -> list[torch.Tensor]:
    arguments = {"num_blocks": 64, "max_batch_tokens": 512, "max_num_seqs": 8, "max_waiting": 64}
    engine = Engine(model, **{**arguments, **changes})
    for number, prompt in enumerate(others):
        engine.add(f"other {number}", prompt, SamplingParams(max_tokens=100, temperature=0.0))
        engine.step()
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, POOL)
    outcomes = drive(engine, {f"other {n}": _begun() for n in range(len(others))})
    assert not others or "num_blocks" not in changes or engine.stats().preemptions
    return [torch.tensor(outcomes[str(n)].prompt.pooled) for n in range(len(prompts))]


def _begun():
    from evermini.engine.request import PromptDone
    from tests.fakes import Outcome

    return Outcome(prompt=PromptDone(0))


@pytest.mark.parametrize("case", CASES)
def test_transformers_hidden_states(case: str, tmp_path: Path) -> None:
    reference = save_tiny(case, tmp_path)
    ids = some_tokens(150, vocab_size=TINY["vocab_size"])
    with torch.no_grad():
        expected = reference.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    (actual,) = pooled(Decoder(open_checkpoint(tmp_path)), [ids])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def mean_alone(model: TinyModel, ids: list[int]) -> torch.Tensor:
    blocks = list(range(len(ids) // BLOCK_SIZE + 1))
    _, hidden = model.forward_hidden(
        make_batch([(ids, 0, blocks)]), model.new_kv_cache(len(blocks))
    )
    return hidden.double().mean(0).float()


@pytest.mark.parametrize(
    "changes", [{}, {"max_batch_tokens": 9}, {"max_batch_tokens": 40, "prefix_caching": False}]
)
def test_batches_chunks_and_shared_prefixes(changes) -> None:
    prompts = [some_tokens(n) for n in (1, 5, 32, 33, 100, 257)]
    prompts += [prompts[-1][:200], prompts[-1]]  # in the cache by then
    for prompt, actual in zip(prompts, pooled(TinyModel(), prompts, **changes), strict=True):
        torch.testing.assert_close(actual, mean_alone(TinyModel(), prompt), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_midway(prefix_caching: bool) -> None:
    prompt = some_tokens(1500)
    (actual,) = pooled(
        TinyModel(), [prompt], [some_tokens(63)],
        num_blocks=50, max_batch_tokens=160, prefix_caching=prefix_caching,
    )  # fmt: skip
    torch.testing.assert_close(actual, mean_alone(TinyModel(), prompt), rtol=1e-5, atol=1e-6)


def test_integer_weights_stay_close_to_the_oracle(nano_path: Path) -> None:
    checkpoint = open_checkpoint(nano_path)
    native = load_model(checkpoint, device="cpu", precision="int8")
    prompts = [some_tokens(n, vocab_size=40000) for n in (3, 40, 300)]
    exact = pooled(Decoder(checkpoint), prompts)
    for a, b in zip(pooled(native, prompts), exact, strict=True):
        assert torch.cosine_similarity(a, b, dim=0) > 0.995
    again = pooled(native, prompts, max_batch_tokens=33)
    for a, b in zip(pooled(native, prompts), again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
