"""Speculation changes how many steps an answer takes, and nothing else: every result equals the plain engine's.

With the native kernels that is exact, log-probabilities included, since a row's logits do not depend on the rows beside
it. In the tiny model (float64) tokens are compared exactly. ``eager`` makes the engine verify every guess it can make,
however unlikely, so that drafts are rejected at every place.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from evermini.engine import speculation
from evermini.engine.engine import Engine
from evermini.engine.request import SamplingParams
from evermini.errors import ContextLengthError, InvalidRequestError
from evermini.models.batch import BLOCK_SIZE
from evermini.models.checkpoint import open_checkpoint
from evermini.models.load import load_model
from evermini.text.tokenizer import Tokenizer
from tests.batches import make_batch
from tests.fakes import (
    END,
    Outcome,
    Steps,
    TinyModel,
    drive,
    drive_crowd,
    greedy_oracle,
    random_prompt,
)

NUM_TOKENS = 60


@pytest.fixture(params=["sparing", "eager"])
def zeal(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(speculation, "ROW_COST", 0.0)
    return request.param


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(speculation, "ROW_COST", 0.0)


def make_engine(model=None, **changes) -> Engine:
    arguments = {
        "num_blocks": 256,
        "max_batch_tokens": 512,
        "max_num_seqs": 16,
        "max_waiting": 1000,
    }
    return Engine(model or TinyModel(), **{**arguments, **changes})


def predictions(answer: list[int]) -> dict[str, list[int]]:
    """Predictions of ``answer`` from right to useless."""
    rng = random.Random(7)
    half = len(answer) // 2
    return {
        "right": answer,
        "longer": answer + answer[:20],
        "shorter": answer[:half],
        "begins later": answer[5:],
        "one replaced": [*answer[:half], (answer[half] + 1) % 97, *answer[half + 1 :]],
        "some removed": [*answer[: half - 6], *answer[half:]],
        "some inserted": [*answer[:half], *random_prompt(9, 3), *answer[half:]],
        "every third wrong": [t if i % 3 else (t + 1) % 97 for i, t in enumerate(answer)],
        "shuffled": rng.sample(answer, len(answer)),
        "one token": answer[:1] * 40,
        "other": random_prompt(70, 9),
    }


PARAMS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 5, "temperature": 0.3},
    "penalties": {"seed": 5, "temperature": 0.5, "frequency_penalty": 0.6, "presence_penalty": 0.3},
    "logprobs": {"seed": 6, "top_p": 0.8, "top_logprobs": 3},
    "bias": {"temperature": 0.0, "logit_bias": {3: 4.0, 5: -100.0}, "min_tokens": 10},
}


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> Outcome:
    engine.add("only", prompt, params)
    return drive(engine)["only"]


def check_equal(speculated: Outcome, plain: Outcome) -> None:
    assert speculated.tokens == plain.tokens
    assert speculated.finished == plain.finished
    for a, b in zip(speculated.outputs, plain.outputs, strict=True):
        assert (a.logprob is None) == (b.logprob is None)
        if a.logprob and b.logprob:
            assert a.logprob.logprob == pytest.approx(b.logprob.logprob, abs=1e-5)
            assert [i for i, _ in a.logprob.top] == [i for i, _ in b.logprob.top]


@pytest.mark.parametrize("kind", PARAMS)
def test_any_prediction_any_parameters(zeal, kind):
    prompt = random_prompt(45)
    plain = run(
        make_engine(speculation=False),
        prompt,
        SamplingParams(max_tokens=NUM_TOKENS, **PARAMS[kind]),
    )
    for name, prediction in predictions(plain.tokens).items():
        params = SamplingParams(max_tokens=NUM_TOKENS, prediction=tuple(prediction), **PARAMS[kind])
        engine = make_engine()
        check_equal(run(engine, prompt, params), plain)
        if name == "right":
            assert engine.stats().steps < NUM_TOKENS / 4
            assert engine.stats().accepted_tokens > NUM_TOKENS * 3 / 4


def test_drafts_obey_a_grammar(zeal):
    """Masks hold at every row of a draft; a draft ends at its first forbidden token."""
    low, high = set(range(40)) - {END}, set(range(60, 97))
    for grammar in (Steps(low, low, high, endless=True), Steps(*[low, {50}, high] * 15)):
        params = {"max_tokens": NUM_TOKENS, "stop_token_ids": frozenset({END}), "seed": 3}
        plain = run(
            make_engine(speculation=False),
            random_prompt(45),
            SamplingParams(constraint=grammar, **params),
        )
        for name, prediction in predictions(plain.tokens).items():
            engine = make_engine()
            guessed = SamplingParams(constraint=grammar, prediction=tuple(prediction), **params)
            check_equal(run(engine, random_prompt(45), guessed), plain)
            if name == "right":
                assert engine.stats().steps < len(plain.tokens) / 3


def test_prompts_full_of_repetition(zeal):
    """Prompt lookup guesses in each of these, rightly or not."""
    stem = random_prompt(20)
    prompts = [stem * 4, [1] * 50, [1, 2] * 30, stem + random_prompt(30, 2) + stem, stem * 2 + [5]]
    prompts += [stem + greedy_oracle(TinyModel(), stem * 2, 40)[:k] + stem for k in (10, 25, 40)]
    for seed in range(3):
        params = SamplingParams(max_tokens=50, temperature=0.4, seed=seed)
        for prompt in prompts:
            check_equal(
                run(make_engine(), prompt, params),
                run(make_engine(speculation=False), prompt, params),
            )


def test_a_stop_token_inside_a_draft(zeal):
    prompt = random_prompt(45)
    tokens = greedy_oracle(TinyModel(), prompt, NUM_TOKENS)
    for at in (0, 1, 7, 30):
        stops = frozenset({tokens[at]})
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=stops)
        plain = run(make_engine(speculation=False), prompt, params)
        predicted = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=stops, prediction=tuple(tokens)
        )
        check_equal(run(make_engine(), prompt, predicted), plain)
        assert plain.finished.reason == "stop"


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3, 31, 32, 33, 34, 60])
def test_the_limit_is_kept_and_nothing_is_computed_beyond_it(eager, max_tokens):
    prompt = random_prompt(45)
    tokens = greedy_oracle(TinyModel(), prompt, NUM_TOKENS)
    model = TinyModel()
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, prediction=tuple(tokens))
    outcome = run(make_engine(model), prompt, params)
    assert outcome.tokens == tokens[:max_tokens]
    assert outcome.finished.reason == "length"
    assert sum(map(sum, model.batches)) <= len(prompt) + max(0, max_tokens - 1)


@pytest.mark.parametrize(
    "shape", [{}, {"num_blocks": 8}, {"max_batch_tokens": 9, "max_num_seqs": 4}]
)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_batches_chunks_and_preemption(zeal, shape, prefix_caching):
    """Many requests at once, with good and bad predictions, in little memory: each as if alone and unguessed."""
    prompts = [random_prompt(n) for n in (1, 5, 31, 33, 64, 100)]
    sampling = {"seed": 5, "temperature": 0.4, "top_logprobs": 1}
    plain = [
        run(make_engine(speculation=False), p, SamplingParams(max_tokens=NUM_TOKENS, **sampling))
        for p in prompts
    ]
    engine = make_engine(prefix_caching=prefix_caching, **shape)
    wanted = {}
    for number, (prompt, alone) in enumerate(zip(prompts, plain, strict=True)):
        for name, prediction in list(predictions(alone.tokens).items())[number % 3 :: 3]:
            wanted[f"{number} {name}"] = alone
            params = SamplingParams(max_tokens=NUM_TOKENS, prediction=tuple(prediction), **sampling)
            engine.add(f"{number} {name}", prompt, params)
    for request_id, outcome in drive(engine).items():
        check_equal(outcome, wanted[request_id])
    if "num_blocks" in shape:
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_with_everything_at_once(eager, seed):
    """Random arrivals, prefixes, sampling, predictions, stops and aborts in little memory."""
    rng = random.Random(seed)
    stems = [random_prompt(rng.randrange(30, 150), stem) for stem in range(3)]
    engine = make_engine(
        num_blocks=rng.choice([10, 14, 20]),
        max_batch_tokens=rng.choice([9, 40, 100]),
        max_num_seqs=rng.choice([2, 5, 8]),
        prefix_caching=rng.random() < 0.8,
    )
    requests, plain = {}, {}
    for index in range(20):
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem))] * rng.choice([1, 1, 2])
        sampling = {
            "max_tokens": rng.randrange(0, 60),
            "stop_token_ids": frozenset(rng.sample(range(97), rng.randrange(3))),
            **PARAMS[rng.choice(list(PARAMS))],
        }
        alone = run(make_engine(speculation=False), prompt, SamplingParams(**sampling))
        prediction = rng.choice(list(predictions(alone.tokens + random_prompt(10)).values()))
        requests[str(index)] = prompt, SamplingParams(**sampling, prediction=tuple(prediction))
        plain[str(index)] = alone
    outcomes, aborted = drive_crowd(engine, requests, rng)
    for request_id, outcome in outcomes.items():
        if outcome.finished.reason == "abort":
            assert request_id in aborted
            assert outcome.tokens == plain[request_id].tokens[: len(outcome.tokens)]
        else:
            check_equal(outcome, plain[request_id])


def test_what_a_speculated_answer_leaves_in_the_cache(eager):
    """Only blocks of tokens that were really written are shared, and all of these are."""
    prompt = random_prompt(50)
    answer = greedy_oracle(TinyModel(), prompt, NUM_TOKENS)
    for prediction in predictions(answer).values():
        engine = make_engine()
        params = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=0.0, prediction=tuple(prediction)
        )
        run(engine, prompt, params)
        told = prompt + answer
        again = run(engine, [*told, 1], SamplingParams(max_tokens=20, temperature=0.0))
        assert again.prompt.cached_tokens == (len(told) - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert again.tokens == greedy_oracle(TinyModel(), [*told, 1], 20)
        # What was predicted but not written is no prefix of anything.
        foreign = prompt + prediction
        common = next(
            (i for i, (a, b) in enumerate(zip(told, foreign, strict=False)) if a != b),
            min(len(told), len(foreign)),
        )
        other = run(engine, [*foreign, 1], SamplingParams(max_tokens=20, temperature=0.0))
        assert other.prompt.cached_tokens <= common
        assert other.tokens == greedy_oracle(TinyModel(), [*foreign, 1], 20)


def test_sampled_tokens_have_the_models_distribution(eager):
    """Pairs of tokens over many seeds against the exact probabilities (chi-squared, p > 0.001)."""
    model, prompt, num_seeds = TinyModel(), random_prompt(12), 3000
    bias = dict.fromkeys(range(8, 97), -100.0)  # leaves 8 tokens, 64 pairs

    def probabilities(tokens: list[int]) -> torch.Tensor:
        blocks = list(range(len(tokens) // BLOCK_SIZE + 1))
        logits = model.forward(make_batch([(tokens, 0, blocks)]), model.new_kv_cache(len(blocks)))
        return torch.softmax(logits[0, :8].double() / 2.0, 0)

    engine = make_engine(model, max_num_seqs=64, max_waiting=num_seeds)
    likely = int(probabilities(prompt).argmax())
    for seed in range(num_seeds):
        params = SamplingParams(
            max_tokens=3, temperature=2.0, seed=seed, logit_bias=bias, prediction=(likely, 1, 2)
        )
        engine.add(str(seed), prompt, params)
    pairs = Counter(tuple(outcome.tokens[:2]) for outcome in drive(engine).values())
    assert engine.stats().accepted_tokens > 0
    first = probabilities(prompt)
    expected = {
        (a, b): num_seeds * float(first[a] * p)
        for a in range(8)
        for b, p in enumerate(probabilities([*prompt, a]).tolist())
    }
    frequent = {pair: e for pair, e in expected.items() if e >= 5}
    rare = sum(e for e in expected.values() if e < 5)
    statistic = sum((pairs[pair] - e) ** 2 / e for pair, e in frequent.items())
    num_rare = num_seeds - sum(pairs[pair] for pair in frequent)
    statistic += (num_rare - rare) ** 2 / rare if rare else 0.0
    freedom = len(frequent)
    # Wilson and Hilferty's approximation of the 0.999 quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


@pytest.mark.parametrize("speculation", [True, False])
def test_what_became_of_the_prediction(speculation):
    """It depends on the output alone, not on what was drafted."""
    prompt = random_prompt(45)
    answer = greedy_oracle(TinyModel(), prompt, NUM_TOKENS)

    def accepted(prediction: list[int]) -> int:
        params = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=0.0, prediction=tuple(prediction)
        )
        outcome = run(make_engine(speculation=speculation), prompt, params)
        return sum(output.is_predicted for output in outcome.outputs)

    assert accepted(answer) == NUM_TOKENS
    assert accepted(answer[:20]) == 20
    assert accepted([*answer[:30], (answer[30] + 1) % 97, *answer[31:]]) == NUM_TOKENS - 1
    assert accepted(random_prompt(70, 9)) < 5
    assert accepted([]) == 0


def test_switched_off_nothing_is_drafted():
    engine = make_engine(speculation=False)
    run(engine, [1, 2] * 30, SamplingParams(max_tokens=20, prediction=(1, 2, 3)))
    assert engine.stats().drafted_tokens == 0
    assert engine.stats().steps == 20


def test_a_prediction_longer_than_the_window_is_refused():
    engine = make_engine(num_blocks=3)
    with pytest.raises(ContextLengthError, match="your prediction resulted in 97 tokens"):
        engine.add("a", [1], SamplingParams(prediction=(1,) * 97))
    with pytest.raises(InvalidRequestError, match="prediction has a token id outside"):
        engine.add("a", [1], SamplingParams(prediction=(97,)))


# The same with real weights, bit for bit.

TEXT = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return width * height * depth

"""


@pytest.fixture(scope="module")
def nano(nano_path):
    checkpoint = open_checkpoint(nano_path)
    model = load_model(checkpoint, device="cpu", precision="int8")
    return model, Tokenizer(checkpoint.tokenizer).encode(TEXT * 3 + "def area(width")


@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalties", "logprobs"])
def test_real_weights_bit_for_bit(nano, zeal, kind):
    model, prompt = nano
    shape = {"num_blocks": 64, "max_waiting": 100}
    plain = run(
        make_engine(model, speculation=False, **shape),
        prompt,
        SamplingParams(max_tokens=NUM_TOKENS, **{"top_logprobs": 2, **PARAMS[kind]}),
    )
    engine = make_engine(model, **shape)
    for name, prediction in predictions(plain.tokens).items():
        params = SamplingParams(
            max_tokens=NUM_TOKENS,
            prediction=tuple(prediction),
            **{"top_logprobs": 2, **PARAMS[kind]},
        )
        engine.add(name, prompt, params)
    for outcome in drive(engine).values():
        assert [o.token_id for o in outcome.outputs] == plain.tokens
        assert [o.logprob for o in outcome.outputs] == [o.logprob for o in plain.outputs]
    assert engine.stats().accepted_tokens > 100


def test_repeated_code_takes_fewer_steps(nano):
    model, prompt = nano
    engine = make_engine(model, num_blocks=64)
    run(engine, prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0))
    assert engine.stats().steps < NUM_TOKENS / 3
