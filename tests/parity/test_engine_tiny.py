"""What a request returns depends on itself alone, however it was batched, cut, cached or preempted.

The oracle computes each token from the whole sequence, without the engine. The same parities with a real checkpoint
are in `test_engine_nano.py`.
"""

from __future__ import annotations

import random

import pytest

from evermini.engine.engine import Engine
from evermini.engine.request import Emphasis, PromptDone, SamplingParams
from tests.fakes import (
    Outcome,
    TinyModel,
    drive,
    drive_crowd,
    greedy_oracle,
    random_prompt,
    tiny_config,
)

LENGTHS = (1, 5, 31, 32, 33, 64, 100, 257)
NUM_TOKENS = 40


def make_engine(**changes) -> Engine:
    arguments = {
        "num_blocks": 256,
        "max_batch_tokens": 512,
        "max_num_seqs": 16,
        "max_waiting": 1000,
    }
    return Engine(TinyModel(), **{**arguments, **changes})


def greedy(num_tokens: int = NUM_TOKENS, **changes) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, **changes)


def sampled(num_tokens: int = NUM_TOKENS, seed: int = 1, **changes) -> SamplingParams:
    return SamplingParams(
        max_tokens=num_tokens,
        seed=seed,
        top_p=0.95,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        top_logprobs=3,
        **changes,
    )


PROMPTS = [random_prompt(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [greedy_oracle(TinyModel(), prompt, NUM_TOKENS) for prompt in PROMPTS]


def run_all(engine: Engine, prompts, params) -> list[Outcome]:
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, params)
    outcomes = drive(engine)
    return [outcomes[str(index)] for index in range(len(prompts))]


def tokens_of(outcomes: list[Outcome]) -> list[list[int]]:
    return [outcome.tokens for outcome in outcomes]


def test_the_oracle_depends_on_every_token(expected):
    """Else the tests below could not fail."""
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert len(set(tokens)) > 5
        for position in {0, len(prompt) // 2, len(prompt) - 1}:
            changed = list(prompt)
            changed[position] = (changed[position] + 1) % 97
            assert greedy_oracle(TinyModel(), changed, NUM_TOKENS) != tokens


def test_alone(expected):
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert tokens_of(run_all(make_engine(), [prompt], greedy())) == [tokens]


def test_batched_equals_alone(expected):
    engine = make_engine()
    assert tokens_of(run_all(engine, PROMPTS, greedy())) == expected
    assert engine.stats().steps < 2 * NUM_TOKENS


@pytest.mark.parametrize("max_batch_tokens", [3, 7, 33, 64, 100])
def test_chunked_equals_whole(expected, max_batch_tokens):
    engine = make_engine(max_batch_tokens=max_batch_tokens, max_num_seqs=2)
    assert tokens_of(run_all(engine, PROMPTS, greedy())) == expected


def test_cached_equals_fresh(expected):
    engine = make_engine()
    fresh = run_all(engine, PROMPTS, greedy())
    cached = run_all(engine, PROMPTS, greedy())
    assert tokens_of(fresh) == tokens_of(cached) == expected
    assert [o.prompt.cached_tokens for o in fresh] == [0] * len(PROMPTS)
    assert [o.prompt.cached_tokens for o in cached] == [(n - 1) // 32 * 32 for n in LENGTHS]


def test_a_conversation_reuses_its_answers_too():
    engine = make_engine()
    prompt = random_prompt(50)
    for turn in range(4):
        outcome = run_all(engine, [prompt], greedy(30))[0]
        assert outcome.tokens == greedy_oracle(TinyModel(), prompt, 30)
        # The last drawn token of a turn is not computed in that turn.
        assert outcome.prompt.cached_tokens == (0 if turn == 0 else (len(prompt) - 6) // 32 * 32)
        prompt = prompt + outcome.tokens + random_prompt(5, turn)


def test_emphasis_is_a_part_of_the_prefix():
    """Blocks are shared up to the first one whose keys weigh otherwise, and results are those of a fresh engine."""
    prompt, engine = random_prompt(257), make_engine()
    ways = {
        "none": None,
        "early": Emphasis(((40, 50, 1.0),)),
        "late": Emphasis(((200, 203, 1.0),)),
        "more": Emphasis(((200, 203, 2.0),)),
    }
    for name, emphasis in ways.items():
        engine.add(name, prompt, greedy(), emphasis=emphasis)
        cached = drive(engine)[name]
        assert cached.prompt.cached_tokens == {"none": 0, "early": 32}.get(name, 192)
        engine.add("again", prompt, greedy(), emphasis=emphasis)
        assert drive(engine)["again"].prompt.cached_tokens == 256
        fresh = make_engine(max_batch_tokens=33)
        fresh.add(name, prompt, greedy(), emphasis=emphasis)
        assert drive(fresh)[name].tokens == cached.tokens


def test_prefixes_that_differ_late_share_only_what_is_equal():
    engine = make_engine()
    prompt = random_prompt(257)
    run_all(engine, [prompt], greedy())
    for position in (0, 31, 32, 100, 255):
        changed = list(prompt)
        changed[position] = (changed[position] + 1) % 97
        outcome = run_all(engine, [changed], greedy())[0]
        assert outcome.prompt.cached_tokens == position // 32 * 32
        assert outcome.tokens == greedy_oracle(TinyModel(), changed, NUM_TOKENS)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_equals_undisturbed(expected, prefix_caching):
    # 16 blocks: the longest request needs 10 alone, all together 25.
    engine = make_engine(num_blocks=16, prefix_caching=prefix_caching)
    assert tokens_of(run_all(engine, PROMPTS, greedy())) == expected
    assert engine.stats().preemptions > 0


def test_preempted_equals_undisturbed_when_sampled():
    alone = [run_all(make_engine(), [prompt], sampled())[0] for prompt in PROMPTS]
    engine = make_engine(num_blocks=12, max_batch_tokens=40)
    crowded = run_all(engine, PROMPTS, sampled())
    assert engine.stats().preemptions > 0
    assert tokens_of(crowded) == tokens_of(alone)
    for a, b in zip(alone, crowded, strict=True):
        assert [o.logprob.top[0][0] for o in a.outputs] == [o.logprob.top[0][0] for o in b.outputs]
        assert [o.logprob.logprob for o in a.outputs] == pytest.approx(
            [o.logprob.logprob for o in b.outputs], abs=1e-5
        )


def test_seeds_are_independent_of_batch_mates_and_order():
    prompt = random_prompt(20)
    alone = [run_all(make_engine(), [prompt], sampled(seed=seed))[0].tokens for seed in range(6)]
    assert len({tuple(tokens) for tokens in alone}) == 6
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        engine = make_engine()
        for seed in order:
            engine.add(str(seed), prompt, sampled(seed=seed))
        engine.add("other", random_prompt(77), SamplingParams(max_tokens=NUM_TOKENS))
        outcomes = drive(engine)
        assert [outcomes[str(seed)].tokens for seed in range(6)] == alone


def test_no_seed_means_other_tokens_each_time():
    runs = {
        tuple(run_all(make_engine(), [PROMPTS[1]], SamplingParams(max_tokens=30))[0].tokens)
        for _ in range(3)
    }
    assert len(runs) == 3


def scores(outcome: Outcome) -> list[float]:
    return [item.logprob for item in outcome.prompt.prompt_logprobs[1:]]


@pytest.mark.parametrize("max_batch_tokens", [7, 40, 512])
def test_prompt_scores_do_not_depend_on_chunks_mates_or_cache(max_batch_tokens):
    score = greedy(5, prompt_logprobs=2)
    whole = [run_all(make_engine(), [prompt], score)[0] for prompt in PROMPTS]
    engine = make_engine(max_batch_tokens=max_batch_tokens, max_num_seqs=6, num_blocks=14)
    run_all(engine, PROMPTS, greedy(1))  # something to find in the cache
    for outcome, alone, prompt in zip(run_all(engine, PROMPTS, score), whole, PROMPTS, strict=True):
        assert len(outcome.prompt.prompt_logprobs) == len(prompt)
        assert outcome.prompt.cached_tokens == 0
        assert outcome.prompt.prompt_logprobs[0] is None
        assert [item.token_id for item in outcome.prompt.prompt_logprobs[1:]] == prompt[1:]
        assert scores(outcome) == pytest.approx(scores(alone), abs=1e-5)
        assert outcome.tokens == alone.tokens


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_scoring_goes_on_where_a_preemption_cut_it(prefix_caching):
    prompt = random_prompt(1500)
    score = greedy(0, prompt_logprobs=1)
    engine = make_engine(num_blocks=50, max_batch_tokens=160, prefix_caching=prefix_caching)
    engine.add("old", random_prompt(63), greedy(100))
    engine.step()
    engine.add("young", prompt, score)
    outcomes = drive(engine, {"old": Outcome(prompt=PromptDone(0))})
    assert engine.stats().preemptions == 1
    assert scores(outcomes["young"]) == pytest.approx(
        scores(run_all(make_engine(), [prompt], score)[0]), abs=1e-5
    )


def test_prompt_scores_equal_the_logprobs_of_the_same_tokens_when_generated():
    prompt = random_prompt(40)
    generated = run_all(make_engine(), [prompt], greedy(30, top_logprobs=1))[0]
    scored = run_all(make_engine(), [prompt + generated.tokens], greedy(0, prompt_logprobs=1))[0]
    assert scores(scored)[39:] == pytest.approx(
        [output.logprob.logprob for output in generated.outputs], abs=1e-5
    )
    assert [item.top[0][0] for item in scored.prompt.prompt_logprobs[40:]] == generated.tokens


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_with_everything_at_once(seed):
    """Random arrivals, prefixes, sampling, scoring and aborts in little memory; each result as if alone."""
    rng = random.Random(seed)
    stems = [random_prompt(rng.randrange(30, 150), stem) for stem in range(3)]
    engine = make_engine(
        num_blocks=rng.choice([10, 14, 20]),
        max_batch_tokens=rng.choice([9, 40, 100]),
        max_num_seqs=rng.choice([2, 5, 8]),
        prefix_caching=rng.random() < 0.8,
    )
    requests = {}
    for index in range(20):
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem))] + random_prompt(rng.randrange(0, 40), index)
        make = rng.choice([greedy, sampled])
        scoring = 1 if rng.random() < 0.2 else None
        requests[str(index)] = prompt, make(rng.randrange(0, 60), prompt_logprobs=scoring)

    outcomes, aborted = drive_crowd(engine, requests, rng)
    for request_id, outcome in outcomes.items():
        prompt, params = requests[request_id]
        alone = run_all(make_engine(), [prompt], params)[0]
        if outcome.finished.reason == "abort":
            assert request_id in aborted
            assert outcome.tokens == alone.tokens[: len(outcome.tokens)]
            continue
        assert outcome.tokens == alone.tokens, request_id
        if params.prompt_logprobs is not None:
            assert scores(outcome) == pytest.approx(scores(alone), abs=1e-5)


def test_the_window_can_be_used_to_its_last_token():
    model = TinyModel(tiny_config(max_position=96))
    engine = Engine(model, num_blocks=3, max_batch_tokens=64, max_num_seqs=4, max_waiting=4)
    prompt = random_prompt(50)
    assert tokens_of(run_all(engine, [prompt], greedy(46))) == [
        greedy_oracle(TinyModel(tiny_config(max_position=96)), prompt, 46)
    ]
