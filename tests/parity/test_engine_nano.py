"""The parities of `test_engine_tiny`, with the real nano weights: greedy, token for token.

fp32 is the oracle in PyTorch operations; the native int8 decoder promises the same bit for bit, so there even
log-probabilities are compared exactly.
"""

from __future__ import annotations

import random
import threading

import pytest

from evermini.engine.engine import Engine
from evermini.engine.request import SamplingParams
from evermini.engine.worker import EngineWorker
from evermini.errors import DownloadError
from evermini.models.checkpoint import open_checkpoint
from evermini.models.load import load_model
from evermini.models.pull import ensure
from evermini.text.tokenizer import Tokenizer
from tests.fakes import Outcome, drive

TEXT = (
    "The lighthouse keeper wrote in his book every evening. On the first of March he noted the wind, the number of "
    "ships, and the colour of the sea; on the second he noted that a stranger had come up the stairs, had asked for "
    "water, and had left a small brass key on the table without a word. For weeks he tried it in every lock he knew: "
    "the door of the oil store, the chest under his bed, the clock. None of them opened. When the supply boat came in "
    "April he showed it to the captain, who laughed and said that such keys were made for music boxes. "
)
SPANS = [(0, 5), (0, 62), (20, 82), (0, 110)]
"""The prompts, as tokens of the text; two are just short of a block's end, so that they soon need another."""


class Nano:
    """The nano model in one precision, its prompts, and what it answers to each of them alone."""

    def __init__(self, precision: str, num_tokens: int = 8) -> None:
        try:
            checkpoint = open_checkpoint(ensure("nano"))
        except DownloadError as error:
            pytest.skip(f"the nano weights are not here and cannot be fetched: {error.message}")
        tokenizer = Tokenizer(checkpoint.tokenizer)
        self.num_tokens = num_tokens
        self.is_exact = precision == "int8"
        self.model = load_model(checkpoint, device="cpu", precision=precision)
        token_ids = tokenizer.encode(TEXT)
        self.prompts = [token_ids[start:end] for start, end in SPANS]
        self.expected = [self.run([prompt], prefix_caching=False)[0] for prompt in self.prompts]

    def engine(self, **changes) -> Engine:
        arguments = {
            "num_blocks": 128,
            "max_batch_tokens": 512,
            "max_num_seqs": 16,
            "max_waiting": 500,
        }
        return Engine(self.model, **{**arguments, **changes})

    def run(self, prompts, engine: Engine | None = None, **changes) -> list[Outcome]:
        engine = engine or self.engine(**changes)
        params = SamplingParams(temperature=0.0, max_tokens=self.num_tokens, top_logprobs=2)
        for index, prompt in enumerate(prompts):
            engine.add(str(index), prompt, params)
        outcomes = drive(engine)
        return [outcomes[str(index)] for index in range(len(prompts))]

    def check(self, outcomes: list[Outcome], expected: list[Outcome] | None = None) -> None:
        for outcome, alone in zip(outcomes, expected or self.expected, strict=True):
            assert outcome.tokens == alone.tokens
            if self.is_exact:
                assert outcome.outputs == alone.outputs


@pytest.fixture(scope="module", params=["fp32", "int8"])
def nano(request) -> Nano:
    return Nano(request.param)


def test_the_answers_are_worth_comparing(nano):
    assert len({tuple(outcome.tokens) for outcome in nano.expected}) == len(SPANS)
    assert all(len(set(outcome.tokens)) > 4 for outcome in nano.expected)


def test_batched_equals_alone(nano):
    nano.check(nano.run(nano.prompts))


def test_chunked_equals_whole(nano):
    nano.check(nano.run(nano.prompts, max_batch_tokens=37, max_num_seqs=3))


def test_cached_equals_fresh(nano):
    engine = nano.engine()
    nano.check(nano.run(nano.prompts, engine))
    cached = nano.run(nano.prompts, engine)
    nano.check(cached)
    assert [o.prompt.cached_tokens for o in cached] == [
        (len(p) - 1) // 32 * 32 for p in nano.prompts
    ]
    assert cached[-1].prompt.cached_tokens == 96


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_equals_undisturbed(nano, prefix_caching):
    # Two blocks each and one to spare; both need a third one at the same step.
    engine = nano.engine(num_blocks=5, prefix_caching=prefix_caching)
    nano.check(nano.run(nano.prompts[1:3], engine), nano.expected[1:3])
    assert engine.stats().preemptions == 1


def test_seeds_do_not_depend_on_batch_mates(nano):
    if not nano.is_exact:
        pytest.skip("a draw may land on the rounding of fp32 batches; int8 is exact")
    params = [SamplingParams(max_tokens=nano.num_tokens, seed=seed, top_p=0.9) for seed in range(3)]
    alone = []
    for each in params:
        engine = nano.engine()
        engine.add("only", nano.prompts[0], each)
        alone.append(drive(engine)["only"].tokens)
    engine = nano.engine(max_batch_tokens=33, max_num_seqs=8)
    for index, each in enumerate(params):
        engine.add(str(index), nano.prompts[0], each)
        engine.add(
            f"other {index}", nano.prompts[index], SamplingParams(max_tokens=nano.num_tokens)
        )
    outcomes = drive(engine)
    assert [outcomes[str(index)].tokens for index in range(3)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_prompt_scores_equal_generated_logprobs(nano):
    prompt, answer = nano.prompts[0], nano.expected[0]
    engine = nano.engine(max_batch_tokens=18)
    engine.add("score", prompt + answer.tokens, SamplingParams(max_tokens=0, prompt_logprobs=0))
    scored = drive(engine)["score"].prompt.prompt_logprobs[len(prompt) :]
    assert [item.token_id for item in scored] == answer.tokens
    tolerance = 0.0 if nano.is_exact else 1e-3
    assert [item.logprob for item in scored] == pytest.approx(
        [output.logprob.logprob for output in answer.outputs], abs=tolerance
    )


@pytest.mark.slow
def test_soak():
    """200 requests of mixed length from 16 clients, a third aborted, in little memory: nothing lost, nothing leaked."""
    nano = Nano("int8", num_tokens=48)
    engine = nano.engine(num_blocks=8, max_num_seqs=8, max_batch_tokens=64)
    worker = EngineWorker(engine, check_integrity=True)
    worker.start()
    reasons: list[str] = []
    wrong: list[str] = []
    tickets = iter(range(200))
    lock = threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with lock:
                ticket = next(tickets, None)
            if ticket is None:
                return
            index = rng.randrange(len(SPANS))
            length = rng.randrange(1, nano.num_tokens + 1)
            is_aborted = ticket % 3 == 0
            abort_after = rng.randrange(length + 1) if is_aborted else None
            submission = worker.submit(
                nano.prompts[index],
                SamplingParams(temperature=0.0, max_tokens=length, top_logprobs=2),
            )
            outcome = Outcome()
            if abort_after == 0:
                submission.abort()
            for event in submission:
                outcome.add(event)
                if len(outcome.tokens) == abort_after:
                    submission.abort()
            reason = outcome.finished.reason
            expected = nano.expected[index].outputs
            with lock:
                reasons.append(reason)
                if reason != "length" and not (is_aborted and reason == "abort"):
                    wrong.append(f"{ticket}: {outcome.finished}")
                if outcome.outputs != expected[: len(outcome.outputs)]:
                    wrong.append(f"{ticket}: other tokens")
                if reason == "length" and len(outcome.tokens) != length:
                    wrong.append(f"{ticket}: {len(outcome.tokens)} of {length} tokens")

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not wrong
    assert len(reasons) == 200
    assert worker.is_alive, "check_integrity stops the worker if it fails"
    worker.stop()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.finished == {reason: reasons.count(reason) for reason in set(reasons)}
    assert stats.finished["abort"] > 30
    assert stats.preemptions > 0
