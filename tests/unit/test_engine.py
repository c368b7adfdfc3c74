"""What the engine promises about events, order, memory and failure; that tokens are right is for tests/parity."""

from __future__ import annotations

import itertools
import random

import pytest

from evermini.engine.engine import Engine
from evermini.engine.request import (
    BATCH,
    INTERACTIVE,
    Finished,
    PromptDone,
    SamplingParams,
    TokenOutput,
)
from evermini.engine.scheduler import MAX_OVERTAKES, MAX_SCORED_ROWS, PREFIX_PATIENCE
from evermini.errors import ContextLengthError, InvalidRequestError, OverloadedError
from tests.fakes import Outcome, TinyModel, drive, greedy_oracle, tiny_config


def make_engine(model: TinyModel | None = None, **changes) -> Engine:
    """Without speculation, so that steps and rows can be counted; test_speculation.py is about it."""
    arguments = {
        "num_blocks": 256,
        "max_batch_tokens": 512,
        "max_num_seqs": 16,
        "max_waiting": 64,
        "speculation": False,
    }
    return Engine(model or TinyModel(), **{**arguments, **changes})


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(97) for _ in range(length)]


def greedy(num_tokens: int, **changes) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, **changes)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> Outcome:
    engine.add("only", prompt, params)
    return drive(engine)["only"]


# Events


def test_events_come_in_order_and_tokens_as_they_are_drawn():
    engine = make_engine(max_batch_tokens=40)
    engine.add("a", prompt_of(100), greedy(3))
    kinds = []
    while engine.has_work:
        kinds.append([type(event) for _, event in engine.step()])
    assert kinds == [[], [], [PromptDone, TokenOutput], [TokenOutput], [TokenOutput, Finished]]
    assert engine.step() == []


def test_length():
    outcome = run(make_engine(), prompt_of(5), greedy(4))
    assert outcome.finished == Finished("length")
    assert len(outcome.tokens) == 4


def test_a_stop_token_ends_the_output_and_is_not_part_of_it():
    tokens = greedy_oracle(TinyModel(), prompt_of(5), 10)
    stop = next(t for i, t in enumerate(tokens) if i > 2 and t not in tokens[:i])
    outcome = run(make_engine(), prompt_of(5), greedy(10, stop_token_ids=frozenset({stop})))
    assert outcome.finished == Finished("stop")
    assert outcome.tokens == tokens[: tokens.index(stop)]


def test_min_tokens_postpones_the_stop():
    tokens = greedy_oracle(TinyModel(), prompt_of(5), 10)
    params = greedy(10, stop_token_ids=frozenset(tokens), min_tokens=4)
    assert (
        run(make_engine(), prompt_of(5), greedy(10, stop_token_ids=frozenset(tokens))).tokens == []
    )
    outcome = run(make_engine(), prompt_of(5), params)
    assert len(outcome.tokens) >= 4
    assert not set(outcome.tokens[:4]) & set(tokens)


def test_max_tokens_zero_computes_the_prompt_only():
    engine = make_engine()
    outcome = run(engine, prompt_of(100), greedy(0))
    assert outcome.prompt == PromptDone(0)
    assert outcome.finished == Finished("length")
    assert outcome.tokens == []
    assert run(engine, prompt_of(100), greedy(0)).prompt == PromptDone(96)


def test_a_one_token_prompt_can_be_scored():
    outcome = run(make_engine(), [5], greedy(0, prompt_logprobs=3))
    assert outcome.prompt == PromptDone(0, (None,))


def test_logprobs_of_generated_tokens():
    outcome = run(make_engine(), prompt_of(5), greedy(3, top_logprobs=2))
    for output in outcome.outputs:
        assert output.logprob.token_id == output.token_id == output.logprob.top[0][0]
        assert output.logprob.logprob == output.logprob.top[0][1] > output.logprob.top[1][1]
    assert run(make_engine(), prompt_of(5), greedy(3)).outputs[0].logprob is None


def test_stats_count_what_happened():
    engine = make_engine()
    run(engine, prompt_of(100), greedy(3))
    run(engine, prompt_of(100), greedy(3))
    engine.add("gone", prompt_of(7), greedy(3))
    engine.abort("gone")
    stats = engine.stats()
    assert stats.finished == {"length": 2, "abort": 1}
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (200, 96, 6)
    assert stats.steps == 6
    assert stats.step_seconds > 0
    assert (stats.kv_blocks_total, stats.kv_blocks_used) == (256, 0)
    assert stats.kv_blocks_cached == 3


# Refusals


def test_a_request_that_cannot_fit_is_refused_in_words_with_counts():
    engine = make_engine(TinyModel(tiny_config(max_position=64)))
    engine.validate(prompt_of(60), greedy(4))
    with pytest.raises(ContextLengthError) as error:
        engine.add("a", prompt_of(60), greedy(5))
    assert error.value.message == (
        "This model's maximum context length is 64 tokens. However, you requested 65 tokens (60 in the messages, "
        "5 in the completion). Please reduce the length of the messages or completion."
    )
    assert error.value.code == "context_length_exceeded"
    assert not engine.has_work


def test_memory_may_be_the_smaller_window():
    engine = make_engine(num_blocks=3)
    assert engine.max_model_len == 96
    with pytest.raises(ContextLengthError, match="96 tokens"):
        engine.add("a", prompt_of(90), greedy(7))


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ([], {}, "empty"),
        ([97], {}, "outside"),
        ([-1], {}, "outside"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"logit_bias": {97: 1.0}}, "97"),
        ([1], {"stop_token_ids": frozenset({1000})}, "1000"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.1}, "top_p"),
    ],
)
def test_values_out_of_range_are_refused(prompt, changes, words):
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=words):
        engine.add("a", prompt, SamplingParams(**changes))
    assert not engine.has_work


def test_a_full_queue_refuses():
    engine = make_engine(max_num_seqs=2, max_waiting=1)
    for name in "abc":
        engine.add(name, prompt_of(5), greedy(2))
    with pytest.raises(OverloadedError, match="3 requests"):
        engine.add("d", prompt_of(5), greedy(2))
    drive(engine)
    engine.add("d", prompt_of(5), greedy(2))


def test_ids_of_unfinished_requests_are_taken():
    engine = make_engine()
    engine.add("a", prompt_of(5), greedy(2))
    with pytest.raises(ValueError, match="'a'"):
        engine.add("a", prompt_of(5), greedy(2))


@pytest.mark.parametrize("sizes", [(8, 8), (4, 8), (8, 0)])
def test_steps_too_small_for_prompts_beside_decodes_are_refused(sizes):
    with pytest.raises(ValueError, match="max_"):
        make_engine(max_batch_tokens=sizes[0], max_num_seqs=sizes[1])


# Sharing


def test_identical_prompts_share_one_prefill():
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=64)
    for name in "abc":
        engine.add(name, prompt_of(300), SamplingParams(max_tokens=10))
    outcomes = drive(engine)
    prefilled = sum(size for batch in model.batches for size in batch if size > 1)
    assert prefilled == 300 + 2 * (300 - 288)
    assert sorted(o.prompt.cached_tokens for o in outcomes.values()) == [0, 288, 288]


def test_a_common_beginning_is_computed_once():
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=64)
    for index in range(3):
        engine.add(str(index), prompt_of(128) + prompt_of(50, index), greedy(2))
    outcomes = drive(engine)
    assert sum(size for batch in model.batches for size in batch if size > 1) == 128 + 3 * 50
    assert sorted(o.prompt.cached_tokens for o in outcomes.values()) == [0, 128, 128]


def test_different_salts_share_nothing():
    engine = make_engine()
    for name in "ab":
        engine.add(name, prompt_of(100), greedy(1), cache_salt=name.encode())
    engine.add("c", prompt_of(100), greedy(1), cache_salt=b"a")
    cached = {name: o.prompt.cached_tokens for name, o in drive(engine).items()}
    assert cached == {"a": 0, "b": 0, "c": 96}


def test_without_prefix_caching_equal_prompts_do_not_wait_for_each_other():
    engine = make_engine(prefix_caching=False)
    for name in "ab":
        engine.add(name, prompt_of(100), greedy(1))
    outcomes = drive(engine)
    assert [o.steps for o in outcomes.values()] == [[0], [0]]
    assert [o.prompt.cached_tokens for o in outcomes.values()] == [0, 0]


def test_who_waits_for_a_prefix_goes_on_alone_when_its_author_ends():
    engine = make_engine(max_batch_tokens=40)
    engine.add("author", prompt_of(300), greedy(2))
    engine.add("reader", prompt_of(300), greedy(2))
    engine.step()
    assert engine.stats().waiting == 1
    engine.abort("author")
    outcomes = drive(engine)
    assert outcomes["author"].finished.reason == "abort"
    assert outcomes["reader"].prompt.cached_tokens == 32
    assert outcomes["reader"].tokens == greedy_oracle(TinyModel(), prompt_of(300), 2)


def test_who_waits_for_a_prefix_of_a_stalled_author_loses_patience():
    engine = make_engine(max_batch_tokens=40, max_num_seqs=6)
    engine.add("oldest", prompt_of(2000, 1), greedy(1))
    engine.add("author", prompt_of(900), greedy(1))
    engine.step()  # the author has 20 tokens, not yet a block
    engine.add("reader", prompt_of(900)[:40], greedy(1))

    def crowd(step: int) -> None:
        """Prompts between the two in length take all that the oldest leaves, so the author stands still."""
        if step < 50:
            engine.add(f"middle{step}", prompt_of(100, step), greedy(1))

    crowd(0)
    outcomes = drive(engine, after_step=lambda step: crowd(step + 1))
    assert PREFIX_PATIENCE <= outcomes["reader"].steps[0] <= PREFIX_PATIENCE + 5
    assert outcomes["reader"].prompt.cached_tokens == 0
    assert outcomes["author"].steps[0] > 50


# Fairness


def test_a_short_prompt_behind_a_long_one_starts_at_once():
    engine = make_engine()
    engine.add("long", prompt_of(4000), greedy(2))
    outcomes: dict[str, Outcome] = {}
    engine.step()
    engine.add("short", prompt_of(20), greedy(3))
    drive(engine, outcomes)
    assert outcomes["short"].steps[0] == 0
    assert outcomes["long"].steps[0] >= 7


def test_a_long_prompt_among_short_ones_advances_by_half():
    """A stream of short prompts cannot keep it from getting at least half of each step."""
    engine = make_engine(max_batch_tokens=64, max_num_seqs=8, max_waiting=1000)
    engine.add("long", prompt_of(640), greedy(1))

    def more(step: int) -> None:
        if step < 100:
            for index in range(4):
                engine.add(f"{step} {index}", prompt_of(30, step * 4 + index), greedy(1))

    outcomes = drive(engine, after_step=more)
    assert outcomes["long"].steps[0] <= 640 // 32


def test_prompts_of_a_step_or_less_wait_for_those_before_them_only():
    """More comes than can be computed, and what is short does not push back what is less short."""
    engine = make_engine(max_batch_tokens=256, max_num_seqs=200, max_waiting=1000, num_blocks=4096)
    share = 256 // 4  # of a step, beside streams
    engine.add("stream", prompt_of(10), greedy(1000))
    engine.step()
    arrived: dict[str, tuple[int, int, int]] = {}
    left: dict[str, int] = {}
    first: dict[str, int] = {}
    for step in range(120):
        for size in (20, 20, 60) if step % 2 else (200,):
            name = f"{step} {len(arrived)}"
            arrived[name] = step, size, sum(left.values())
            left[name] = size
            engine.add(name, prompt_of(size, len(arrived)), greedy(1))
        for name, event in engine.step():
            if isinstance(event, TokenOutput) and name != "stream":
                del left[name]
                first[name] = step
    assert len(first) > 40
    for name, step in first.items():
        came, size, before = arrived[name]
        # All that came before, and twice its own tokens: the oldest gets half of the share at least.
        assert step - came <= (before + 2 * size) / share + 1, arrived[name]


def test_prompts_take_a_quarter_of_the_step_beside_streams():
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=256)
    engine.add("stream", prompt_of(10), greedy(20))
    engine.step()
    engine.add("long", prompt_of(500), greedy(1))
    drive(engine, {"stream": Outcome(prompt=PromptDone(0))})
    beside = [batch for batch in model.batches if len(batch) == 2]
    assert [batch[1] for batch in beside] == [64] * 7 + [500 - 7 * 64]


@pytest.mark.parametrize(
    ("num_prompts", "priority", "share"),
    [(1, INTERACTIVE, 64), (6, INTERACTIVE, 96), (15, INTERACTIVE, 128), (15, BATCH, 64)],
)
def test_a_crowd_of_prompts_takes_up_to_half_of_the_step(num_prompts, priority, share):
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=256, num_blocks=1024)
    engine.add("stream", prompt_of(10), greedy(20))
    engine.step()
    for index in range(num_prompts):
        engine.add(str(index), prompt_of(300, index), greedy(1), priority=priority)
    engine.step()
    assert sum(model.batches[-1]) == 1 + share


def test_streams_get_a_token_in_every_step():
    engine = make_engine(max_batch_tokens=64, max_num_seqs=4)
    engine.add("stream", prompt_of(10), greedy(50))
    engine.step()
    for index in range(6):
        engine.add(str(index), prompt_of(300, index), greedy(5))
    outcomes: dict[str, Outcome] = {"stream": Outcome(prompt=PromptDone(0))}
    drive(engine, outcomes)
    assert outcomes["stream"].steps == list(range(49))


def test_equal_requests_start_in_order_of_arrival():
    engine = make_engine(max_batch_tokens=64, max_num_seqs=2)
    for index in range(8):
        engine.add(str(index), prompt_of(100, index), greedy(3))
    outcomes = drive(engine)
    first = [outcomes[str(index)].steps[0] for index in range(8)]
    assert first == sorted(first)


def test_a_request_that_waits_for_memory_is_overtaken_only_so_often():
    engine = make_engine(num_blocks=8, max_num_seqs=6, max_waiting=1000, max_batch_tokens=300)
    for index in range(200):
        engine.add(f"before{index}", prompt_of(20, index), greedy(1 + index % 7))
        if index == 5:
            engine.add("big", prompt_of(224), greedy(32))
    order: list[str] = []
    while engine.has_work:
        order += [name for name, event in engine.step() if isinstance(event, PromptDone)]
        engine.check_integrity()
    assert len(order) == 201
    assert order.index("big") <= 6 + MAX_OVERTAKES


def test_scored_rows_per_step_are_bounded():
    model = TinyModel()
    engine = make_engine(model)
    for index in range(3):
        engine.add(str(index), prompt_of(400, index), greedy(0, prompt_logprobs=0))
    drive(engine)
    assert max(sum(batch) for batch in model.batches) == MAX_SCORED_ROWS


# Memory


def test_the_youngest_gives_way_and_returns_before_those_behind_it():
    engine = make_engine(num_blocks=6, max_num_seqs=2)
    engine.add("old", prompt_of(60, 1), greedy(100))
    engine.add("young", prompt_of(60, 2), greedy(100))
    engine.add("later", prompt_of(60, 3), greedy(1))
    outcomes = drive(engine)
    assert engine.stats().preemptions >= 1
    gaps = {n: [b - a for a, b in zip(o.steps, o.steps[1:])] for n, o in outcomes.items()}  # noqa: B905
    assert max(gaps["old"]) == 1
    assert max(gaps["young"]) > 1
    assert outcomes["old"].steps[-1] < outcomes["young"].steps[-1]


def test_who_was_preempted_returns_before_shorter_newcomers():
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=40)
    engine.add("long", prompt_of(1000), greedy(1))
    engine.step()
    engine.add("back", prompt_of(200, 1), greedy(1))
    engine.add("short", prompt_of(10, 2), greedy(1))
    engine._sequences["back"].preempted = True
    engine.step()
    assert model.batches[-1] == [20, 20]
    assert engine.stats().waiting == 1


def test_a_prompt_preempted_midway_does_not_count_its_own_blocks_as_cached():
    engine = make_engine(num_blocks=49, max_batch_tokens=64)
    engine.add("old", prompt_of(31), greedy(100))
    engine.step()
    engine.add("young", prompt_of(1500), greedy(1))
    outcomes = {"old": Outcome(prompt=PromptDone(0))}
    drive(engine, outcomes)
    assert engine.stats().preemptions == 1
    assert outcomes["young"].prompt == PromptDone(0)


def test_admission_leaves_room_to_grow():
    """Else requests are admitted only to be preempted (here 45 times instead of 6)."""
    engine = make_engine(num_blocks=20)
    for index in range(30):
        engine.add(str(index), prompt_of(40 + index % 24, index), greedy(100))
    drive(engine)
    assert engine.stats().preemptions < 15


@pytest.mark.parametrize("steps", range(12))
def test_abort_at_any_stage_frees_everything_within_a_step(steps):
    """Waiting, in prefill, awaiting a prefix, decoding, preempted."""
    engine = make_engine(num_blocks=8, max_batch_tokens=48, max_num_seqs=3)
    names = [str(index) for index in range(5)]
    for index, name in enumerate(names):
        engine.add(name, prompt_of(90, index // 2), greedy(100, prompt_logprobs=index % 2 or None))
    for _ in range(steps**2):
        engine.step()
    for name in [*names, "unknown"]:
        engine.abort(name)
        engine.abort(name)
        engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    ended = [name for name, event in engine.step() if isinstance(event, Finished)]
    assert set(ended) <= set(names)
    assert len(ended) == len(set(ended))
    assert not engine.has_work


# Failure


def test_a_failing_step_ends_its_requests_and_no_others():
    model = TinyModel()
    engine = make_engine(model, max_num_seqs=2)
    for index in range(3):
        engine.add(str(index), prompt_of(40, index), greedy(5))
    model.fail_on = 2
    outcomes = drive(engine)
    for name in "01":
        assert outcomes[name].finished.reason == "error"
        assert "RuntimeError: injected failure" in outcomes[name].finished.message
        assert len(outcomes[name].tokens) == 2
    assert outcomes["2"].finished == Finished("length")
    assert outcomes["2"].tokens == greedy_oracle(TinyModel(), prompt_of(40, 2), 5)
    assert engine.stats().finished == {"error": 2, "length": 1}


@pytest.mark.parametrize("step", range(6))
def test_nothing_half_computed_is_shared_after_a_failure(step):
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=50)
    model.fail_on = step
    assert run(engine, prompt_of(200), greedy(5)).finished.reason == "error"
    outcome = run(engine, prompt_of(200), greedy(5))
    assert outcome.tokens == greedy_oracle(TinyModel(), prompt_of(200), 5)


@pytest.mark.parametrize("changes", [{}, {"prompt_logprobs": 1}])
def test_logits_that_are_no_numbers_end_that_request_only(changes):
    class Broken(TinyModel):
        def forward(self, batch, kv):
            logits = super().forward(batch, kv)
            if len(self.batches) > 2:
                logits[0] = float("nan")
            return logits

    engine = make_engine(Broken())
    engine.add("good", prompt_of(20, 1), greedy(2))
    engine.step()
    engine.step()
    engine.add("bad", prompt_of(20), greedy(5, **changes))
    engine.add("fine", prompt_of(30), greedy(1))
    outcomes = drive(engine)
    assert outcomes["bad"].finished.reason == "error"
    assert "not a number" in outcomes["bad"].finished.message
    assert outcomes["fine"].finished == Finished("length")


# Priorities


def test_who_is_waited_for_goes_before_older_batches():
    engine = make_engine(max_batch_tokens=64, max_num_seqs=2)
    for index in range(4):
        engine.add(f"batch {index}", prompt_of(60, index), greedy(40), priority=BATCH)
    engine.step()
    engine.add("asked", prompt_of(20), greedy(40))
    outcomes = drive(engine)
    last = {name: outcome.steps[-1] for name, outcome in outcomes.items()}
    assert min(last, key=lambda name: last[name]) == "asked"
    assert outcomes["asked"].steps[0] == 0, "a batch gave up its place at once"
    gaps = {b - a for a, b in itertools.pairwise(outcomes["asked"].steps)}
    assert gaps == {1}


def test_batches_give_up_memory_and_lose_nothing():
    model = TinyModel()
    engine = make_engine(model, num_blocks=16)
    prompts = {f"batch {index}": prompt_of(100, index) for index in range(3)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, greedy(30), priority=BATCH)
    outcomes: dict[str, Outcome] = {}
    for _ in range(10):
        for name, event in engine.step():
            outcomes.setdefault(name, Outcome()).add(event)
    prompts["asked"] = prompt_of(400, 9)
    engine.add("asked", prompts["asked"], greedy(5))
    before = len(model.batches)
    drive(engine, outcomes)
    assert engine.stats().preemptions >= 3
    assert model.batches[before] == [400], "the batches made way, all at once"
    for name, outcome in outcomes.items():
        number = 5 if name == "asked" else 30
        assert outcome.tokens == greedy_oracle(TinyModel(), prompts[name], number), name


def test_who_is_waited_for_never_gives_way_to_a_batch():
    engine = make_engine(num_blocks=6, max_num_seqs=2)
    engine.add("batch", prompt_of(60, 1), greedy(100), priority=BATCH)
    engine.add("asked", prompt_of(60, 2), greedy(100))
    outcomes = drive(engine)
    assert {b - a for a, b in itertools.pairwise(outcomes["asked"].steps)} == {1}
    assert engine.stats().preemptions >= 1


def test_a_batchs_prompts_leave_steps_short():
    model = TinyModel()
    engine = make_engine(model, max_batch_tokens=256)
    engine.add("a", prompt_of(300, 1), greedy(1), priority=BATCH)
    engine.add("b", prompt_of(300, 2), greedy(1), priority=BATCH)
    drive(engine)
    assert max(sum(batch) for batch in model.batches) == 64
