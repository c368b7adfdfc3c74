"""Requests with adapters: each gets what it gets alone, in whatever batch, and adapters share no KV memory."""

from __future__ import annotations

import pytest

from evermini.engine.adapters import LoadedAdapter
from evermini.engine.engine import Engine
from evermini.engine.request import SamplingParams
from tests.fakes import Outcome, TinyAdapter, TinyModel, drive, greedy_oracle, random_prompt
from tests.parity.test_engine_tiny import greedy, make_engine

NUM_TOKENS = 24
ADAPTERS = [None, *(LoadedAdapter(bytes([n]) * 32, TinyAdapter(n)) for n in range(8))]
PROMPT = random_prompt(100)


def oracle(prompt: list[int], adapter: LoadedAdapter | None) -> list[int]:
    weights = adapter.weights if adapter else None
    assert weights is None or isinstance(weights, TinyAdapter)
    return greedy_oracle(TinyModel(), prompt, NUM_TOKENS, weights)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [oracle(PROMPT, adapter) for adapter in ADAPTERS]


def run(engine: Engine, params: SamplingParams) -> list[Outcome]:
    """The same prompt under every adapter, and twice under the first of them."""
    for number, adapter in enumerate([*ADAPTERS, ADAPTERS[1]]):
        engine.add(str(number), PROMPT, params, adapter=adapter)
    outcomes = drive(engine)
    assert outcomes[str(len(ADAPTERS))].tokens == outcomes["1"].tokens
    return [outcomes[str(number)] for number in range(len(ADAPTERS))]


def test_every_adapter_answers_differently(expected: list[list[int]]):
    """Else the tests below could not fail."""
    assert len({tuple(tokens) for tokens in expected}) == len(ADAPTERS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batch_tokens": 37, "max_num_seqs": 12},
        {"num_blocks": 14},
        {"speculation": False},
        {"prefix_caching": False},
    ],
    ids=["plain", "chunked", "preempted", "unspeculated", "uncached"],
)
def test_eight_adapters_in_a_batch_are_each_alone(
    expected: list[list[int]], changes: dict[str, int]
):
    outcomes = run(make_engine(**changes), greedy(NUM_TOKENS))
    assert [outcome.tokens for outcome in outcomes] == expected


def test_a_prefix_is_shared_under_the_same_adapter_alone(expected: list[list[int]]):
    engine = make_engine()
    fresh = run(engine, greedy(NUM_TOKENS))
    assert [o.prompt.cached_tokens for o in fresh if o.prompt] == [0] * len(ADAPTERS)
    cached = run(engine, greedy(NUM_TOKENS))
    assert [o.prompt.cached_tokens for o in cached if o.prompt] == [96] * len(ADAPTERS)
    assert [o.tokens for o in cached] == [o.tokens for o in fresh] == expected
    engine.add("new", PROMPT, greedy(1), adapter=LoadedAdapter(b"new", TinyAdapter(0)))
    prompt = drive(engine)["new"].prompt
    assert prompt is not None
    assert prompt.cached_tokens == 0


def test_predictions_are_verified_with_the_adapter(expected: list[list[int]]):
    engine = make_engine()
    for number, adapter in enumerate(ADAPTERS):
        predicted = greedy(NUM_TOKENS, prediction=tuple(expected[number]))
        engine.add(str(number), PROMPT, predicted, adapter=adapter)
    outcomes = drive(engine)
    assert [outcomes[str(n)].tokens for n in range(len(ADAPTERS))] == expected
    assert engine.stats().accepted_tokens > NUM_TOKENS


def test_a_failed_step_ends_its_requests_only():
    engine = make_engine(max_num_seqs=2, max_batch_tokens=300)
    model = engine._model
    assert isinstance(model, TinyModel)
    model.fail_on = 0
    for number in range(4):
        engine.add(str(number), PROMPT, greedy(4), adapter=ADAPTERS[number])
    reasons = {key: o.finished.reason for key, o in drive(engine).items() if o.finished}
    assert sorted(reasons.values()) == ["error", "error", "length", "length"]
