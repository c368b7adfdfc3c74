from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from evermini.engine.engine import Engine
from evermini.engine.request import Event, Finished, PromptDone, SamplingParams, TokenOutput
from evermini.engine.worker import EngineWorker
from evermini.errors import ContextLengthError, EngineStoppedError, OverloadedError
from tests.fakes import Outcome, TinyModel, greedy_oracle


class GatedModel(TinyModel):
    """Waits in each step until the test opens the gate, so tests need no sleeps."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def forward(self, batch, kv):
        self.entered.release()
        assert self.gate.wait(30), "the test left the gate closed"
        return super().forward(batch, kv)


def make_engine(model: TinyModel | None = None, **changes) -> Engine:
    arguments = {"num_blocks": 64, "max_batch_tokens": 128, "max_num_seqs": 8, "max_waiting": 64}
    return Engine(model or TinyModel(), **{**arguments, **changes})


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    with EngineWorker(make_engine(), check_integrity=True) as worker:
        yield worker


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(97) for _ in range(length)]


def greedy(num_tokens: int, **changes) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, **changes)


def sort_out(events: list[Event]) -> Outcome:
    outcome = Outcome()
    for event in events:
        outcome.add(event)
    assert outcome.finished is not None
    return outcome


async def collect(submission) -> Outcome:
    return sort_out([event async for event in submission])


def wait_until(condition, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def is_idle(worker: EngineWorker) -> bool:
    stats = worker.stats()
    return (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


# Streams


def test_a_thread_reads_events(worker):
    outcome = sort_out(list(worker.submit(prompt_of(40), greedy(10))))
    assert outcome.tokens == greedy_oracle(TinyModel(), prompt_of(40), 10)
    assert outcome.prompt == PromptDone(0)
    assert outcome.finished == Finished("length")


async def test_a_coroutine_reads_events(worker):
    outcomes = await asyncio.gather(
        *(collect(worker.submit(prompt_of(40, i), greedy(10))) for i in range(6))
    )
    for i, outcome in enumerate(outcomes):
        assert outcome.tokens == greedy_oracle(TinyModel(), prompt_of(40, i), 10)


async def test_events_that_came_before_the_reader_are_kept(worker):
    submission = worker.submit(prompt_of(40), greedy(10))
    await asyncio.to_thread(wait_until, lambda: is_idle(worker))
    assert len((await collect(submission)).tokens) == 10


async def test_a_loop_is_woken_once_per_step_not_per_stream():
    model = GatedModel()
    with EngineWorker(make_engine(model)) as worker:
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *a, **k: (calls.append(a), original(*a, **k))[1]
        model.gate.clear()
        submissions = [worker.submit(prompt_of(5, i), greedy(20)) for i in range(6)]
        readers = [asyncio.create_task(collect(s)) for s in submissions]
        await asyncio.sleep(0)
        model.gate.set()
        outcomes = await asyncio.gather(*readers)
        assert sum(len(o.tokens) for o in outcomes) == 120
        assert len(calls) <= worker.stats().steps <= 22


async def test_the_loop_runs_on_while_a_step_computes():
    model = GatedModel()
    with EngineWorker(make_engine(model)) as worker:
        model.gate.clear()
        first = asyncio.create_task(collect(worker.submit(prompt_of(5), greedy(2))))
        assert await asyncio.to_thread(model.entered.acquire, timeout=20)
        started = time.monotonic()
        others = [worker.submit(prompt_of(5, i), greedy(2)) for i in range(20)]
        for submission in others:
            submission.abort()
        worker.stats()
        assert time.monotonic() - started < 10.0
        assert not first.done()
        model.gate.set()
        await first
        for submission in others:
            assert (await collect(submission)).finished.reason == "abort"


def test_a_submission_is_read_once(worker):
    submission = worker.submit(prompt_of(5), greedy(2))
    list(submission)
    with pytest.raises(RuntimeError, match="once"):
        list(submission)


# Refusals


def test_what_cannot_fit_is_refused_at_once(worker):
    assert worker.max_model_len == 64 * 32
    with pytest.raises(ContextLengthError, match="2048 tokens"):
        worker.submit(prompt_of(2000), greedy(49))
    assert is_idle(worker)


def test_a_full_queue_refuses_and_recovers():
    model = GatedModel()
    with EngineWorker(make_engine(model, max_num_seqs=2, max_waiting=3)) as worker:
        model.gate.clear()
        submissions = [worker.submit(prompt_of(5, i), greedy(3)) for i in range(5)]
        with pytest.raises(OverloadedError, match="5 requests"):
            worker.submit(prompt_of(5), greedy(3))
        model.gate.set()
        assert all(sort_out(list(s)).finished.reason == "length" for s in submissions)
        sort_out(list(worker.submit(prompt_of(5), greedy(3))))


def test_ids_of_unfinished_requests_are_taken():
    model = GatedModel()
    with EngineWorker(make_engine(model)) as worker:
        model.gate.clear()
        first = worker.submit(prompt_of(5), greedy(3), "a")
        with pytest.raises(ValueError, match="'a'"):
            worker.submit(prompt_of(5), greedy(3), "a")
        model.gate.set()
        list(first)
        list(worker.submit(prompt_of(5), greedy(3), "a"))


# Aborts


def test_abort_ends_the_stream_and_can_be_repeated(worker):
    submission = worker.submit(prompt_of(40), greedy(1000))
    outcome = Outcome()
    for event in submission:
        outcome.add(event)
        if isinstance(event, TokenOutput):
            submission.abort()
            submission.abort()
    assert outcome.finished == Finished("abort")
    submission.abort()
    wait_until(lambda: is_idle(worker))


def test_abort_after_the_end_changes_nothing(worker):
    submission = worker.submit(prompt_of(40), greedy(2), "a")
    events = list(submission)
    again = worker.submit(prompt_of(40), greedy(20), "a")
    submission.abort()
    assert sort_out(list(again)).finished == Finished("length")
    assert sort_out(events).finished == Finished("length")


def test_leaving_the_loop_aborts(worker):
    for event in worker.submit(prompt_of(40), greedy(1000)):
        if isinstance(event, TokenOutput):
            break
    wait_until(lambda: is_idle(worker))
    assert worker.stats().finished == {"abort": 1}


def test_leaving_the_context_aborts(worker):
    with worker.submit(prompt_of(40), greedy(1000)):
        pass
    wait_until(lambda: is_idle(worker))
    assert worker.stats().finished == {"abort": 1}


async def test_leaving_the_async_context_aborts(worker):
    async with worker.submit(prompt_of(40), greedy(1000)):
        pass
    await asyncio.to_thread(wait_until, lambda: is_idle(worker))
    assert worker.stats().finished == {"abort": 1}


async def test_cancelling_the_reader_aborts(worker):
    got_one = asyncio.Event()

    async def read():
        async for _ in worker.submit(prompt_of(40), greedy(1900)):
            got_one.set()

    task = asyncio.create_task(read())
    await got_one.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_until, lambda: is_idle(worker))
    assert worker.stats().finished == {"abort": 1}


async def test_closing_the_async_iterator_aborts(worker):
    events = aiter(worker.submit(prompt_of(40), greedy(1900)))
    await anext(events)
    await events.aclose()
    await asyncio.to_thread(wait_until, lambda: is_idle(worker))
    assert worker.stats().finished == {"abort": 1}


def test_a_closed_loop_aborts_what_it_read(worker):
    async def read_one():
        events = aiter(worker.submit(prompt_of(40), greedy(1900)))
        await anext(events)
        return events

    loop = asyncio.new_event_loop()
    events = loop.run_until_complete(read_one())
    loop.close()
    wait_until(lambda: is_idle(worker))
    assert worker.stats().finished == {"abort": 1}
    del events
    gc.collect()


# Start and stop


def test_nothing_is_accepted_before_start_and_after_stop():
    worker = EngineWorker(make_engine())
    with pytest.raises(EngineStoppedError, match="not started"):
        worker.submit(prompt_of(5), greedy(2))
    assert not worker.is_alive
    worker.start()
    assert worker.is_alive
    worker.stop()
    assert not worker.is_alive
    with pytest.raises(EngineStoppedError, match="stopped"):
        worker.submit(prompt_of(5), greedy(2))
    worker.stop()


def test_stopping_what_was_never_started():
    EngineWorker(make_engine()).stop()


def test_stop_lets_requests_end():
    worker = EngineWorker(make_engine(), check_integrity=True)
    worker.start()
    submissions = [worker.submit(prompt_of(50, i), greedy(30)) for i in range(20)]
    worker.stop(timeout=60)
    assert all(sort_out(list(s)).finished == Finished("length") for s in submissions)


def test_stop_aborts_what_does_not_end_in_time():
    model = GatedModel()
    worker = EngineWorker(make_engine(model), check_integrity=True)
    worker.start()
    model.gate.clear()
    submissions = [worker.submit(prompt_of(50, i), greedy(1500)) for i in range(20)]
    assert model.entered.acquire(timeout=20)
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(worker.stop, timeout=0)
        wait_until(lambda: not worker.is_alive)
        model.gate.set()
        stopped.result(timeout=20)
    for submission in submissions:
        assert sort_out(list(submission)).finished == Finished(
            "abort", "The server is shutting down."
        )


def test_stop_gives_up_a_stuck_step(monkeypatch):
    monkeypatch.setattr("evermini.engine.worker._STUCK_SECONDS", 0.05)
    model = GatedModel()
    worker = EngineWorker(make_engine(model))
    worker.start()
    model.gate.clear()
    submission = worker.submit(prompt_of(50), greedy(5))
    assert model.entered.acquire(timeout=20)
    worker.stop(timeout=0.05)
    outcome = sort_out(list(submission))
    assert outcome.finished.reason == "error"
    assert "did not answer" in outcome.finished.message
    model.gate.set()
    worker._thread.join(20)
    assert not worker._thread.is_alive()


def test_a_failing_model_ends_its_requests_and_the_worker_lives():
    model = TinyModel()
    with EngineWorker(make_engine(model), check_integrity=True) as worker:
        model.fail_on = 3
        outcome = sort_out(list(worker.submit(prompt_of(5), greedy(50))))
        assert outcome.finished.reason == "error"
        assert "injected" in outcome.finished.message
        assert sort_out(list(worker.submit(prompt_of(5), greedy(5)))).finished.reason == "length"


async def test_a_broken_engine_ends_everything_and_refuses(monkeypatch):
    engine = make_engine()
    worker = EngineWorker(engine, check_integrity=True)
    monkeypatch.setattr(engine._blocks, "check_integrity", lambda: 1 / 0)
    worker.start()
    outcome = await collect(worker.submit(prompt_of(5), greedy(5)))
    assert outcome.finished.reason == "error"
    assert "ZeroDivisionError" in outcome.finished.message
    with pytest.raises(EngineStoppedError, match="ZeroDivisionError"):
        worker.submit(prompt_of(5), greedy(5))
    assert not worker.is_alive
    worker.stop()


def test_integrity_is_checked_when_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("EVERMINI_DEBUG_INTEGRITY", "1")
    engine = make_engine()
    checks = []
    monkeypatch.setattr(engine, "check_integrity", lambda: checks.append(1))
    with EngineWorker(engine) as worker:
        list(worker.submit(prompt_of(5), greedy(5)))
    assert checks


def test_an_idle_worker_sleeps(worker):
    list(worker.submit(prompt_of(5), greedy(2)))
    steps = worker._engine._steps
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1
    assert worker._engine._steps == steps


# Soak


def test_soak_with_threads_and_coroutines(worker):
    """Two loops and four threads at once, every third request aborted somewhere; nothing is lost or leaked."""
    prompts = [prompt_of(n, n) for n in (1, 30, 64, 100, 200, 333)]
    expected = [greedy_oracle(TinyModel(), prompt, 25) for prompt in prompts]

    def check(index: int, events: list[Event], aborted: bool) -> str:
        outcome = sort_out(events)
        reason = outcome.finished.reason
        assert reason == "length" or (aborted and reason == "abort"), outcome.finished
        assert outcome.tokens == expected[index][: len(outcome.tokens)]
        assert reason == "abort" or len(outcome.tokens) == 25
        return reason

    def client(seed: int) -> list[str]:
        rng, reasons = random.Random(seed), []
        for _ in range(8):
            index, after = rng.randrange(len(prompts)), rng.choice([None, None, rng.randrange(20)])
            submission = worker.submit(prompts[index], greedy(25))
            events = []
            if after == 0:
                submission.abort()
            for event in submission:
                events.append(event)
                if len(events) == after:
                    submission.abort()
            reasons.append(check(index, events, after is not None))
        return reasons

    async def async_client(seed: int) -> list[str]:
        rng, reasons = random.Random(seed), []
        for _ in range(8):
            index, after = rng.randrange(len(prompts)), rng.choice([None, None, rng.randrange(20)])
            submission = worker.submit(prompts[index], greedy(25))
            events = []
            if after == 0:
                submission.abort()
            async for event in submission:
                events.append(event)
                if len(events) == after:
                    submission.abort()
            reasons.append(check(index, events, after is not None))
        return reasons

    async def async_clients(seeds: range) -> list[list[str]]:
        return await asyncio.gather(*map(async_client, seeds))

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(client, seed) for seed in range(4)]
        futures += [
            pool.submit(asyncio.run, async_clients(range(start, start + 6))) for start in (10, 20)
        ]
        results = [future.result(timeout=120) for future in futures]
    reasons = [r for result in results[:4] for r in result]
    reasons += [r for result in results[4:] for each in result for r in each]
    assert len(reasons) == 16 * 8
    wait_until(lambda: is_idle(worker))
    assert worker.is_alive
    assert worker.stats().finished == {
        reason: reasons.count(reason) for reason in ("length", "abort")
    }
