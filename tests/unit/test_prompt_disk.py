"""The engine with computed prompts on the disk: what is restored, counted and kept, and who waits for whom."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from evermini.config import Settings
from evermini.engine import prompt_disk
from evermini.engine.adapters import LoadedAdapter
from evermini.engine.engine import Engine
from evermini.engine.kv import PrefixChain
from evermini.engine.prompt_disk import MIN_TOKENS, PromptDisk
from evermini.engine.prompt_store import FOLDER, PromptStore
from evermini.engine.request import (
    BATCH,
    Embedded,
    EmbeddedRun,
    Finished,
    PromptDone,
    SamplingParams,
)
from evermini.models.batch import BLOCK_SIZE, KVCache
from evermini.service.runtime import start_worker
from tests.fakes import (
    Outcome,
    TinyAdapter,
    TinyModel,
    drive,
    drive_crowd,
    greedy_oracle,
    random_prompt,
    tiny_config,
)
from tests.serving import wait_for

PROMPT = random_prompt(MIN_TOKENS + 100)
RECORD = KVCache.bytes_per_block(tiny_config(), torch.float64)
FULL = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
"""Tokens in its full blocks."""


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens)


class Process:
    """An engine with the disk of ``home``; what one computes, the next one finds."""

    def __init__(self, home: Path, store: PromptStore | None = None, **changes) -> None:
        self.model = TinyModel()
        self.store = store or PromptStore(home, "tiny", RECORD, 1 << 30)
        self.disk = PromptDisk(self.store)
        arguments = {
            "num_blocks": 256,
            "max_batch_tokens": 512,
            "max_num_seqs": 16,
            "max_waiting": 64,
            "speculation": False,
        }
        self.engine = Engine(self.model, **{**arguments, **changes}, disk=self.disk)

    def ask(self, prompt: list[int], num_tokens: int = 4, **how) -> Outcome:
        self.engine.add("only", prompt, greedy(num_tokens), **how)
        return drive(self.engine)["only"]

    @property
    def num_computed(self) -> int:
        """Rows of prompts and outputs."""
        return sum(map(sum, self.model.batches))


@contextmanager
def process(home: Path, store: PromptStore | None = None, **changes) -> Iterator[Process]:
    one = Process(home, store, **changes)
    yield one
    one.engine.close()


def test_what_was_computed_before_a_restart_is_not_computed_again(tmp_path):
    with process(tmp_path) as one:
        first = one.ask(PROMPT)
        assert first.prompt.cached_tokens == 0
        assert one.num_computed == len(PROMPT) + 3
    with process(tmp_path) as other:
        second = other.ask(PROMPT)
        assert second.prompt.cached_tokens == FULL
        assert other.num_computed == len(PROMPT) + 3 - FULL
        stats = other.engine.stats()
        assert (stats.cached_tokens, stats.restored_tokens) == (FULL, FULL)
        assert stats.disk.blocks_read == FULL // BLOCK_SIZE
        assert other.disk._num_waiting_bytes == 0
        third = other.ask(PROMPT)  # now it is in memory
        assert third.prompt.cached_tokens == FULL
        assert other.engine.stats().restored_tokens == FULL
    assert first.tokens == second.tokens == third.tokens == greedy_oracle(TinyModel(), PROMPT, 4)


def test_restored_blocks_are_the_same_bit_for_bit(tmp_path):
    seen = []
    for _ in range(2):
        with process(tmp_path) as one:
            one.engine.add("only", PROMPT, greedy(1))
            blocks: list[int] = []
            while one.engine.has_work:
                one.engine.step()
                if one.engine.stats().running:
                    blocks = list(one.engine._blocks.table("only"))[: FULL // BLOCK_SIZE]
            seen.append(one.engine._kv.copy_out(blocks))
    assert one.engine.stats().restored_tokens == FULL
    assert torch.equal(*seen)


def test_copies_of_blocks_go_back_as_they_were():
    for dtype in (torch.float16, torch.float32):
        kv = KVCache(tiny_config(), 8, dtype)
        for tensor in (*kv.k, *kv.v):
            tensor.copy_(torch.randn(tensor.shape))
        rows = kv.copy_out([5, 0, 3])
        assert rows.shape == (3, KVCache.bytes_per_block(tiny_config(), dtype))
        other = KVCache(tiny_config(), 8, dtype)
        other.copy_in([1, 2, 7], rows)
        for ours, theirs in zip((*kv.k, *kv.v), (*other.k, *other.v), strict=True):
            assert torch.equal(ours[[5, 0, 3]], theirs[[1, 2, 7]])
            assert not theirs[[0, 3, 4, 5, 6]].any()


def test_the_next_turn_finds_question_and_answer(tmp_path):
    with process(tmp_path) as one:
        answer = one.ask(PROMPT, 80).tokens
    turn = PROMPT + answer + random_prompt(40)
    with process(tmp_path) as other:
        known = (len(PROMPT) + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert other.ask(turn).prompt.cached_tokens == known > FULL


def test_what_an_aborted_request_has_computed_is_kept(tmp_path):
    with process(tmp_path) as one:
        one.engine.add("only", PROMPT, greedy(4))
        one.engine.step()
        one.engine.abort("only")
        drive(one.engine)
    with process(tmp_path) as other:
        assert other.ask(PROMPT).prompt.cached_tokens == 512


def test_what_is_short_scored_of_a_batch_or_not_to_be_kept_is_not_kept(tmp_path):
    with process(tmp_path) as one:
        one.ask(PROMPT[: MIN_TOKENS - 10])
        one.ask(random_prompt(1500), priority=BATCH)
        for params in (
            SamplingParams(max_tokens=0, pool=True),
            SamplingParams(max_tokens=0, prompt_logprobs=1),
            SamplingParams(max_tokens=2, is_kept=False),
        ):
            one.engine.add("only", random_prompt(1200), params)
            drive(one.engine)
    assert list((tmp_path / FOLDER).glob("*/*/*.kv")) == []


def test_another_adapter_or_image_finds_nothing(tmp_path):
    def image(seed: int) -> Embedded:
        values = torch.full((8, 32), 0.1 * seed)
        return Embedded((EmbeddedRun(16, values, seed.to_bytes(32)),))

    kinds = [
        {},
        {"adapter": LoadedAdapter(b"one", TinyAdapter(1))},
        {"adapter": LoadedAdapter(b"two", TinyAdapter(2))},
        {"embedded": image(1)},
        {"embedded": image(2)},
        {"cache_salt": b"theirs"},
    ]
    for expected in (0, FULL):
        for how in kinds:
            with process(tmp_path) as one:
                assert one.ask(PROMPT, **how).prompt.cached_tokens == expected, how


def test_from_a_damaged_record_on_tokens_are_computed_again(tmp_path, caplog):
    with process(tmp_path) as one:
        expected = one.ask(PROMPT).tokens
    chain = PrefixChain()
    chain.extend(PROMPT)
    path = one.store._path(chain.keys[9])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with process(tmp_path) as other:
        outcome = other.ask(PROMPT)
        assert outcome.prompt.cached_tokens == 9 * BLOCK_SIZE
        assert outcome.tokens == expected
        assert other.engine.stats().disk.blocks_damaged == 1
    assert path.name in caplog.text
    with process(tmp_path) as third:
        assert third.ask(PROMPT).prompt.cached_tokens == FULL


class SlowStore(PromptStore):
    """A disk that has nothing read before ``gate`` is open."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, "tiny", RECORD, 1 << 30)
        self.gate = threading.Event()
        self.num_reads = 0

    def read(self, key, into):
        self.num_reads += 1
        self.gate.wait(30)
        return super().read(key, into)


def test_a_slow_disk_delays_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_disk, "PATIENCE_SECONDS", 60.0)
    with process(tmp_path) as one:
        expected = one.ask(PROMPT).tokens
    store = SlowStore(tmp_path)
    with process(tmp_path, store) as other:
        other.engine.add("slow", PROMPT, greedy(4))
        other.engine.add("short", random_prompt(50), greedy(4))
        outcomes = {"slow": Outcome(), "short": Outcome()}
        while outcomes["short"].finished is None:
            for name, event in other.engine.step():
                outcomes[name].add(event)
        assert outcomes["slow"].prompt is None
        store.gate.set()
        drive(other.engine, outcomes)
    assert outcomes["slow"].prompt.cached_tokens == FULL
    assert outcomes["slow"].tokens == expected
    assert outcomes["short"].tokens == greedy_oracle(TinyModel(), random_prompt(50), 4)


def test_a_disk_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_disk, "PATIENCE_SECONDS", 0.05)
    prompts = [random_prompt(1100), random_prompt(1200)]
    with process(tmp_path) as one:
        expected = [one.ask(prompt) for prompt in prompts]
    store = SlowStore(tmp_path)
    with process(tmp_path, store) as other:
        for prompt, before in zip(prompts, expected, strict=True):
            outcome = other.ask(prompt)
            assert outcome.tokens == before.tokens
            assert outcome.prompt.cached_tokens == 0
        assert store.num_reads == 1  # the second request does not even ask
        store.gate.set()


def test_requests_that_end_while_they_wait_for_the_disk_harm_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_disk, "PATIENCE_SECONDS", 60.0)
    with process(tmp_path) as one:
        expected = one.ask(PROMPT).tokens
    store = SlowStore(tmp_path)
    with process(tmp_path, store, num_blocks=40) as other:
        other.engine.add("gone", PROMPT, greedy(4))
        other.engine.step()
        assert other.engine.stats().running == 1
        other.engine.abort("gone")
        # Its memory is somebody else's when the disk answers.
        other.engine.add("next", random_prompt(1000), greedy(20))

        def answer(step: int) -> None:
            if step == 2:
                store.gate.set()

        outcomes = drive(other.engine, after_step=answer)
        assert outcomes["next"].tokens == greedy_oracle(TinyModel(), random_prompt(1000), 20)
        assert outcomes["gone"].finished.reason == "abort"
        assert other.ask(PROMPT).tokens == expected
        assert other.engine.stats().restored_tokens == FULL


def test_what_the_disk_cannot_take_in_time_is_offered_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_disk, "MAX_WAITING_BYTES", 4 * RECORD)
    with process(tmp_path) as one:
        expected = one.ask(PROMPT, 60).tokens
        for _ in range(30):
            wait_for(lambda: not one.disk._writes)
            one.ask(PROMPT, 1)
    with process(tmp_path) as other:
        assert other.ask(PROMPT, 60).tokens == expected
        assert other.engine.stats().restored_tokens == FULL


def test_what_memory_serves_is_used_on_the_disk_too_the_beginning_last(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_disk, "TOUCH_SECONDS", 0.0)
    chain = PrefixChain()
    chain.extend(PROMPT)
    with process(tmp_path) as one:
        for _ in range(2):
            began = time.time_ns()
            one.ask(PROMPT)
            wait_for(lambda: not one.disk._writes)
            used = [one.store._path(key).stat().st_mtime_ns for key in chain.keys]
            assert used == sorted(used, reverse=True)
            assert used[-1] > began


@pytest.mark.parametrize("seed", range(3))
def test_crowds_with_little_memory_get_the_same_tokens(tmp_path, seed):
    """Preempted, aborted, restored, sharing prefixes of each other: the oracle is an engine without a disk."""
    draw = random.Random(seed)
    common = random_prompt(1100, seed)
    requests = {
        str(index): (
            common[: draw.randrange(1030, 1100)] + random_prompt(draw.randrange(1, 200), index),
            greedy(draw.randrange(1, 40)),
        )
        for index in range(12)
    }
    oracle = Engine(
        TinyModel(), num_blocks=256, max_batch_tokens=512, max_num_seqs=16, max_waiting=64
    )
    for name, request in requests.items():
        oracle.add(name, *request)
    expected = drive(oracle)
    restored = 0
    for _ in range(2):
        with process(tmp_path, num_blocks=60, speculation=True) as one:
            outcomes, aborted = drive_crowd(one.engine, requests, draw)
            for name, outcome in outcomes.items():
                tokens = expected[name].tokens
                assert outcome.tokens == (
                    tokens[: len(outcome.tokens)] if name in aborted else tokens
                )
                if outcome.prompt is not None:
                    assert outcome.prompt.cached_tokens < len(requests[name][0])
            restored += one.engine.stats().restored_tokens
    assert restored > 0


@pytest.mark.parametrize(
    ("weights", "changes"),
    [("other", {}), ("same", {"precision": "int4"}), ("same", {"prompt_disk": 0})],
)
def test_a_folder_for_each_model_and_way_to_compute(tmp_path, weights, changes):
    def ask(weights: str, **changes) -> int:
        settings = Settings(home=tmp_path, kv_memory=4 << 20, **changes)
        worker = start_worker(TinyModel(), settings, weights=weights)
        events = list(worker.submit(PROMPT, greedy(1)))
        worker.stop()
        return next(event.cached_tokens for event in events if isinstance(event, PromptDone))

    assert ask("same") == 0
    assert ask("same") == FULL
    assert ask(weights, **changes) == 0


def test_a_home_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / FOLDER).write_text("in the way")
    settings = Settings(home=tmp_path, kv_memory=4 << 20)
    worker = start_worker(TinyModel(), settings, weights="same")
    assert isinstance(list(worker.submit(PROMPT, greedy(1)))[-1], Finished)
    worker.stop()
    assert "prompt_disk" in caplog.text


def test_what_was_evicted_is_kept_again_when_it_comes_back(tmp_path):
    """Two prompts, memory for one of them, and a disk for one and a half."""
    first, second = random_prompt(1100), random_prompt(1200)
    store = PromptStore(tmp_path, "tiny", RECORD, 55 * (RECORD + 100))
    with process(tmp_path, store, num_blocks=42) as one:
        expected = one.ask(first)
        for prompt, finds in ((second, False), (first, True), (first, True)):
            wait_for(lambda: not one.disk._writes)
            assert (one.ask(prompt).prompt.cached_tokens > 0) == finds
    with process(tmp_path) as other:
        again = other.ask(first)
        assert again.prompt.cached_tokens == 1100 // BLOCK_SIZE * BLOCK_SIZE
        assert again.tokens == expected.tokens


def test_others_get_their_tokens_while_a_long_prompt_is_read(tmp_path):
    """At most `MAX_COPIES` blocks before a step, so a stream goes on between them."""
    prompt = random_prompt(5000)
    with process(tmp_path) as one:
        expected = one.ask(prompt).tokens
    with process(tmp_path) as other:
        other.engine.add("stream", random_prompt(20), greedy(400))
        other.engine.add("long", prompt, greedy(4))
        outcomes = drive(other.engine)
        assert outcomes["long"].tokens == expected
        assert outcomes["long"].prompt.cached_tokens == 5000 // BLOCK_SIZE * BLOCK_SIZE
        assert outcomes["long"].steps[0] >= 5000 // BLOCK_SIZE // prompt_disk.MAX_COPIES
        assert outcomes["stream"].steps == list(range(400))
