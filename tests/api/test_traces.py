"""Spans of requests, collected in memory; and what OpenTelemetry's variables switch on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import openai
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from evermini.service import tracing
from tests.serving import CHAT, wait_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_continues_its_senders_trace(
    client: openai.OpenAI, spans: InMemorySpanExporter, stream: bool
) -> None:
    answer = client.with_options(default_headers={"traceparent": PARENT}).chat.completions.create(
        **CHAT, stream=stream
    )
    if stream:
        list(answer)
    wait_for(lambda: len(spans.get_finished_spans()) == 3)
    found = by_name(spans)
    request = found["POST /v1/chat/completions"]
    assert request.kind is SpanKind.SERVER
    assert format(request.context.trace_id, "032x") == TRACE
    assert request.parent
    assert format(request.parent.span_id, "016x") == PARENT.split("-")[2]
    assert request.attributes
    assert request.attributes["http.response.status_code"] == 200
    assert str(request.attributes["evermini.request_id"]).startswith("req_")
    prefill, decode = found["evermini.prefill"], found["evermini.decode"]
    for child in (prefill, decode):
        assert child.parent
        assert child.parent.span_id == request.context.span_id
        assert child.attributes
        assert child.attributes["gen_ai.response.model"] == "gpt-4.1-nano-2025-04-14"
    times = [request.start_time, prefill.start_time, prefill.end_time, decode.end_time]
    assert times == sorted(times)  # type: ignore[type-var]
    assert decode.attributes
    assert decode.attributes["gen_ai.usage.output_tokens"] == 2
    assert "Hello" not in str([span.to_json() for span in found.values()])


def test_failures_and_probes(
    base_url: str, client: openai.OpenAI, spans: InMemorySpanExporter
) -> None:
    httpx.get(f"{base_url}/healthz")
    httpx.get(f"{base_url}/readyz")
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-1")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**CHAT, "temperature": 9})
    wait_for(lambda: len(spans.get_finished_spans()) == 2)
    found = by_name(spans)
    assert found.keys() == {"GET /v1/files/{file_id}", "POST /v1/chat/completions"}
    for span in found.values():  # not a failure of the server
        assert span.status.status_code is StatusCode.UNSET


def test_background_jobs_have_a_span(client: openai.OpenAI, spans: InMemorySpanExporter) -> None:
    queued = client.responses.create(
        model="gpt-4.1-nano", input="Hi", background=True, max_output_tokens=2
    )
    wait_for(lambda: "job response" in by_name(spans), 30)
    found = by_name(spans)
    job = found["job response"]
    assert job.attributes
    assert (job.attributes["job.id"], job.attributes["job.attempt"]) == (queued.id, 1)
    assert found["evermini.decode"].parent
    assert found["evermini.decode"].parent.span_id == job.context.span_id


def test_reading_has_a_span(spans: InMemorySpanExporter) -> None:
    class WrongError(Exception):
        pass

    with (
        pytest.raises(WrongError),
        tracing.span("evermini.read", {"evermini.reading": "recall"}),
    ):
        raise WrongError("what the user wrote")
    [span] = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes
    assert span.attributes["error.type"] == "WrongError"
    assert "what the user wrote" not in span.to_json()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bytes]]]:
    """A receiver of OTLP over HTTP, which the environment names."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        yield received
        server.shutdown()
        thread.join()


def test_the_environment_switches_them_on(
    collector: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test-rig")
    stop = tracing.start("1.2.3")
    assert stop
    with tracing.span("evermini.read"):
        assert tracing.trace_id()
    stop()
    [(path, body)] = collector
    assert path == "/v1/traces"
    for word in (b"evermini.read", b"test-rig", b"1.2.3", b"service.name"):
        assert word in body
    assert tracing.trace_id() is None


@pytest.mark.parametrize("variable", ["OTEL_SDK_DISABLED=true", "OTEL_TRACES_EXPORTER=none"])
def test_the_environment_switches_them_off(
    collector: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(*variable.split("="))  # type: ignore[arg-type]
    assert tracing.start("1") is None


def test_without_an_endpoint_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing.start("1") is None
    with tracing.span("anything") as span:
        assert span is None


def test_a_missing_package_is_told(
    collector: list[tuple[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with caplog.at_level(logging.WARNING):
        assert tracing.start("1") is None
    assert "opentelemetry.exporter.otlp.proto.grpc" in caplog.text
    assert "evermini[otel]" in caplog.text
