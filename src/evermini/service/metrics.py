"""Prometheus metrics: latencies as the service sees them, and the engines' own counters read at scrape time.

Names follow vLLM's, with the prefix ``evermini_``. The registry is the runtime's own, so that several runtimes (tests,
embedding programs) can live in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from evermini.engine.engine import EngineStats
from evermini.engine.masks import MASK_BUCKETS
from evermini.service.fine_tuning.metrics import TuningGauges
from evermini.service.tracing import Phases

if TYPE_CHECKING:
    from evermini.service.generation import Usage
    from evermini.service.metering import Meter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_COMPILE = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE_REQUEST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """All metrics of one runtime.

    Args:
        engine_stats: Returns the current statistics of each engine by model id; called at every scrape.

    Attributes:
        meter: Counts tokens for the bill, where there is a database.
    """

    def __init__(self, engine_stats: Callable[[], Mapping[str, EngineStats]]) -> None:
        self.registry = CollectorRegistry()
        self.meter: Meter | None = None
        model = ["model_name"]
        self.first_token = Histogram(
            "evermini_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            model,
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "evermini_inter_token_latency_seconds",
            "Between two tokens of one choice.",
            model,
            buckets=_BETWEEN_TOKENS,
            registry=self.registry,
        )
        self.whole_request = Histogram(
            "evermini_e2e_request_latency_seconds",
            "From the arrival of a request to its last token.",
            model,
            buckets=_WHOLE_REQUEST,
            registry=self.registry,
        )
        self.choices = Counter(
            "evermini_choices",
            "Choices that ended, by how they ended: stop, length, abort or error.",
            [*model, "finished_reason"],
            registry=self.registry,
        )
        self.grammar_compile = Histogram(
            "evermini_grammar_compile_seconds",
            "From a request for a form of the answer to its compiled grammar, found in the cache or not.",
            model,
            buckets=_COMPILE,
            registry=self.registry,
        )
        self.http_requests = Counter(
            "evermini_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine_stats))
        self.tuning = TuningGauges(self.registry)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)


class RequestTimer:
    """Observes one request's latencies; does nothing without metrics (in-process use).

    Args:
        metrics: Where to report.
        model_name: Id of the model that answers.
        arrived: ``time.perf_counter()`` when the request came in.
    """

    def __init__(self, metrics: Metrics | None, model_name: str, arrived: float) -> None:
        self._metrics = metrics
        self._model = model_name
        self._arrived = arrived
        self._saw_token = False
        self._was_counted = False
        self._last_token: dict[int, float] = {}
        self._phases = Phases(model_name)

    def submitted(self) -> None:
        """The prompt waits for the engine."""
        self._phases.begin("evermini.prefill")

    def prompt_done(self, num_tokens: int, num_cached: int) -> None:
        """The engine has computed the prompt."""
        self._phases.end(
            {"evermini.prompt_tokens": num_tokens, "gen_ai.usage.cached_tokens": num_cached}
        )
        self._phases.begin("evermini.decode")

    def ended(self, num_tokens: int) -> None:
        """The engine has nothing to do with it any more; ``num_tokens`` were generated."""
        self._phases.end({"gen_ai.usage.output_tokens": num_tokens})

    def token(self, choice: int) -> None:
        """A token of ``choice`` arrived."""
        if self._metrics is None:
            return
        now = time.perf_counter()
        if not self._saw_token:
            self._metrics.first_token.labels(self._model).observe(now - self._arrived)
            self._saw_token = True
        if choice in self._last_token:
            self._metrics.between_tokens.labels(self._model).observe(now - self._last_token[choice])
        self._last_token[choice] = now

    def compiled(self, seconds: float) -> None:
        """The grammar of the answer was there after ``seconds``."""
        if self._metrics is not None:
            self._metrics.grammar_compile.labels(self._model).observe(seconds)

    def used(self, usage: Usage) -> None:
        """The request has ended, answered or not, and used these tokens; counted the first time only."""
        if self._metrics is None or self._metrics.meter is None or self._was_counted:
            return
        self._was_counted = True
        self._metrics.meter.count(self._model, usage, time.perf_counter() - self._arrived)

    def choice_ended(self, reason: str) -> None:
        """A choice ended."""
        if self._metrics is not None:
            self._metrics.choices.labels(self._model, reason).inc()

    def completed(self) -> None:
        """The whole request was answered."""
        if self._metrics is not None:
            self._metrics.whole_request.labels(self._model).observe(
                time.perf_counter() - self._arrived
            )


class _EngineCollector(Collector):
    """Reads the engines' statistics when it is scraped, so that serving pays nothing for them."""

    def __init__(self, engine_stats: Callable[[], Mapping[str, EngineStats]]) -> None:
        self._engine_stats = engine_stats

    def describe(self) -> Iterable[Metric]:
        """Return the families without asking the engines."""
        return [*(family for family, _ in _families()), _mask_family()]

    def collect(self) -> Iterator[Metric]:
        """Yield each family with one sample per engine."""
        stats = self._engine_stats()
        for family, read in _families():
            for model_name, snapshot in stats.items():
                family.add_metric([model_name], read(snapshot))
            yield family
        masks = _mask_family()
        for model_name, snapshot in stats.items():
            times = snapshot.mask_times
            cumulated = accumulate(times.counts)
            bounds = [*map(str, MASK_BUCKETS), "+Inf"]
            masks.add_metric([model_name], list(zip(bounds, cumulated, strict=True)), times.seconds)
        yield masks


def _mask_family() -> HistogramMetricFamily:
    return HistogramMetricFamily(
        "evermini_grammar_mask_seconds",
        "Per step, what the token masks of all its requests with a grammar took.",
        labels=["model_name"],
    )


EngineFamily = GaugeMetricFamily | CounterMetricFamily
Reader = Callable[[EngineStats], float]


def _families() -> list[tuple[EngineFamily, Reader]]:
    def gauge(name: str, text: str, read: Reader) -> tuple[EngineFamily, Reader]:
        return GaugeMetricFamily(f"evermini_{name}", text, labels=["model_name"]), read

    def counter(name: str, text: str, read: Reader) -> tuple[EngineFamily, Reader]:
        return CounterMetricFamily(f"evermini_{name}", text, labels=["model_name"]), read

    return [
        gauge("num_requests_running", "Requests being computed.", lambda s: s.running),
        gauge("num_requests_waiting", "Requests waiting for a place.", lambda s: s.waiting),
        gauge(
            "kv_cache_usage_ratio",
            "Share of KV memory that running requests own, 0 to 1.",
            lambda s: s.kv_blocks_used / s.kv_blocks_total,
        ),
        gauge("kv_blocks_used", "KV blocks that running requests own.", lambda s: s.kv_blocks_used),
        gauge(
            "kv_blocks_cached",
            "KV blocks without an owner, kept for equal prefixes.",
            lambda s: s.kv_blocks_cached,
        ),
        counter("prompt_tokens", "Prompt tokens of started requests.", lambda s: s.prompt_tokens),
        counter(
            "prefix_cache_hit_tokens",
            "Prompt tokens found in KV memory or on the disk instead of computed.",
            lambda s: s.cached_tokens,
        ),
        counter(
            "prefix_cache_restored_tokens",
            "Tokens whose keys and values were read from the disk.",
            lambda s: s.restored_tokens,
        ),
        counter(
            "prefix_cache_disk_written_blocks",
            "KV blocks written to the disk.",
            lambda s: s.disk.blocks_written,
        ),
        counter(
            "prefix_cache_disk_damaged_blocks",
            "KV blocks on the disk that were not what was written.",
            lambda s: s.disk.blocks_damaged,
        ),
        gauge(
            "prefix_cache_disk_bytes",
            "What computed prompts take on the disk, of all models.",
            lambda s: s.disk.num_bytes,
        ),
        counter("generation_tokens", "Tokens generated.", lambda s: s.generated_tokens),
        counter(
            "preemptions", "Times a request lost its KV memory to another.", lambda s: s.preemptions
        ),
        counter(
            "spec_decode_num_draft_tokens",
            "Guessed tokens that were verified.",
            lambda s: s.drafted_tokens,
        ),
        counter(
            "spec_decode_num_accepted_tokens",
            "Guessed tokens that were right.",
            lambda s: s.accepted_tokens,
        ),
        counter("engine_steps", "Forward passes.", lambda s: s.steps),
        counter(
            "grammar_mask_wait_seconds",
            "Seconds that steps waited for token masks after the forward pass.",
            lambda s: s.mask_times.waited_seconds,
        ),
        counter(
            "engine_step_seconds", "Seconds spent in forward passes.", lambda s: s.step_seconds
        ),
    ]
