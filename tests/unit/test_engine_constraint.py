"""Grammars in the engine: what is drawn obeys them, whoever shares the batch and whatever memory does."""

from __future__ import annotations

import pytest
from torch import Tensor

from evermini.engine.engine import Engine
from evermini.engine.request import Finished, SamplingParams
from evermini.errors import GrammarLimitError
from tests.fakes import END, Steps, StepsState, TinyModel, drive


class Broken(Steps):
    """Runs out of resources at its second token."""

    def start(self) -> StepsState:
        return BrokenState(self)


class BrokenState(StepsState):
    def fill_mask(self, row: Tensor) -> None:
        if self.drawn:
            raise GrammarLimitError("too complex")
        super().fill_mask(row)


def engine_of(model: TinyModel | None = None, **changes) -> Engine:
    arguments = {"num_blocks": 256, "max_batch_tokens": 64, "max_num_seqs": 8, "max_waiting": 64}
    return Engine(model or TinyModel(), **{**arguments, **changes})


def params(constraint: Steps | None, max_tokens: int = 20, **changes) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "stop_token_ids": frozenset({END})}
        | changes,
        constraint=constraint,
    )


EVEN = set(range(0, 97, 2))
ODD = set(range(1, 97, 2)) - {END}


def test_only_allowed_tokens_are_drawn_and_the_output_ends_with_the_grammar():
    engine = engine_of()
    engine.add("a", [1, 2, 3], params(Steps(EVEN, ODD, {40}, {7, 8})))
    outcome = drive(engine)["a"]
    assert [t % 2 for t in outcome.tokens[:2]] == [0, 1]
    assert outcome.tokens[2] == 40
    assert outcome.tokens[3] in {7, 8}
    assert outcome.finished == Finished("stop")
    assert len(outcome.tokens) == 4


def test_a_done_grammar_takes_no_step_of_its_own():
    model = TinyModel()
    engine = engine_of(model)
    engine.add("a", [1, 2, 3], params(Steps({9}, {8})))
    assert drive(engine)["a"].finished == Finished("stop")
    assert len(model.batches) == 2


def test_an_output_that_is_complete_at_the_limit_is_complete():
    for limit, reason in ((3, "stop"), (2, "length")):
        engine = engine_of()
        engine.add("a", [1, 2, 3], params(Steps({9}, {8}, {10}), max_tokens=limit))
        assert drive(engine)["a"].finished == Finished(reason)


def test_end_tokens_are_drawn_only_where_the_grammar_may_end():
    engine = engine_of()
    bias = {END: 100.0}
    engine.add("a", [1, 2], params(Steps({9}, {8}, {10}, endless=True), logit_bias=bias))
    outcome = drive(engine)["a"]
    assert outcome.tokens == [9, 8, 10]
    assert outcome.finished == Finished("stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_no_bias_or_penalty_breaks_the_grammar(temperature):
    engine = engine_of()
    changes = {"logit_bias": {1: 100.0, 40: -100.0}, "frequency_penalty": 2.0, "top_p": 0.1}
    grammar = Steps({40, 41}, {40}, {2, 4})
    for seed in range(20):
        changes |= {"seed": seed, "temperature": temperature}
        engine.add(f"{seed}", [1, 2, seed], params(grammar, **changes))
    for outcome in drive(engine).values():
        assert outcome.tokens[:2] == [41, 40]
        assert outcome.tokens[2] in {2, 4}


def test_log_probabilities_are_those_of_the_model():
    free, bound = engine_of(), engine_of()
    free.add("a", [1, 2, 3], params(None, max_tokens=1, top_logprobs=97))
    bound.add("a", [1, 2, 3], params(Steps({9}), max_tokens=1, top_logprobs=97))
    whole = drive(free)["a"].outputs[0].logprob
    masked = drive(bound)["a"].outputs[0].logprob
    assert whole is not None
    assert masked is not None
    assert masked.top == whole.top
    assert masked.logprob == dict(whole.top)[9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_mates_and_preemption_change_nothing(temperature):
    grammars = [Steps(*[EVEN, ODD] * 40), None, Steps(*[EVEN] * 70), Steps(*[ODD, EVEN, EVEN] * 20)]

    def add(engine: Engine, number: int) -> None:
        prompt = [number + 1] * (17 + number)
        wanted = params(grammars[number % 4], 90, temperature=temperature, seed=number)
        engine.add(str(number), prompt, wanted)

    alone = {}
    for number in range(8):
        engine = engine_of()
        add(engine, number)
        alone |= drive(engine)
    crowded = engine_of(num_blocks=18)
    for number in range(8):
        add(crowded, number)
    together = drive(crowded)
    assert crowded.stats().preemptions > 0
    for number in alone:
        assert together[number].tokens == alone[number].tokens
        assert together[number].finished == alone[number].finished


def test_a_grammar_that_fails_ends_its_request_alone():
    engine = engine_of()
    engine.add("broken", [1, 2], params(Broken({9}, {8})))
    engine.add("fine", [1, 2], params(Steps({9}, {8})))
    engine.add("free", [1, 2], params(None, max_tokens=3))
    outcomes = drive(engine)
    assert outcomes["broken"].finished == Finished("grammar", "too complex")
    assert outcomes["fine"].finished == Finished("stop")
    assert outcomes["free"].finished == Finished("length")


def test_a_grammar_that_allows_nothing_is_an_error():
    engine = engine_of()
    engine.add("a", [1, 2], params(Steps(set())))
    finished = drive(engine)["a"].finished
    assert finished is not None
    assert finished.reason == "grammar"
    assert "grammar" in finished.message


def test_a_failed_step_leaves_the_engine_usable():
    model = TinyModel()
    engine = engine_of(model)
    model.fail_on = 1
    engine.add("a", [1, 2], params(Steps({9}, {8}, {7})))
    outcome = drive(engine)["a"]
    assert outcome.finished is not None
    assert outcome.finished.reason == "error"
    engine.add("b", [1, 2], params(Steps({9}, {8}, {7})))
    assert drive(engine)["b"].tokens == [9, 8, 7]


def test_abort_frees_a_constrained_request():
    engine = engine_of()
    engine.add("a", [1, 2], params(Steps(EVEN, ODD, endless=True), max_tokens=1000))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    assert drive(engine)["a"].finished == Finished("abort")


def test_steps_with_masks_are_counted():
    engine = engine_of()
    engine.add("a", [1, 2], params(None, max_tokens=3))
    drive(engine)
    assert sum(engine.stats().mask_times.counts) == 0
    engine.add("b", [1, 2], params(Steps({9}, {8})))
    drive(engine)
    times = engine.stats().mask_times
    assert sum(times.counts) == 2
    assert times.seconds > 0


def test_what_must_come_takes_few_steps_and_changes_nothing():
    grammar = Steps(EVEN, {1}, {2}, {3}, {4}, {6}, ODD, {7}, {8})
    plain, quick = TinyModel(), TinyModel()
    outcomes = []
    for model, speculation in ((plain, False), (quick, True)):
        engine = engine_of(model, speculation=speculation)
        engine.add("a", [1, 2, 3], params(grammar, top_logprobs=3))
        outcomes.append(drive(engine)["a"])
    assert outcomes[0].tokens == outcomes[1].tokens
    assert outcomes[0].finished == outcomes[1].finished == Finished("stop")
    assert len(plain.batches) == 9
    assert len(quick.batches) < 6
