"""Traces of requests, as OpenTelemetry has them: where their time went. The extra `otel`; without it, nothing happens.

    POST /v1/chat/completions           the request, continuing its sender's trace (traceparent)
      evermini.read                     what exceeds the window was indexed and looked up, or swept
      evermini.prefill                  until the engine had computed the prompt, the wait for a place included
      evermini.decode                   from then on to the last token
    job response                        a background job; a batch's has its lines' requests below it

Everything is set up by OpenTelemetry's own variables: an endpoint (``OTEL_EXPORTER_OTLP_ENDPOINT``) switches traces on.
Spans hold names and numbers, never prompts, answers or keys.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

SERVICE = "evermini"
Attributes = Mapping[str, str | int | float | bool]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_tracer: Tracer | None = None


def start(version: str) -> Callable[[], None] | None:
    """Begin to trace if the environment asks for it.

    Args:
        version: Evermini's.

    Returns:
        What sends the last spans and ends it; ``None``: nothing is traced.
    """
    exporter = _env("OTEL_TRACES_EXPORTER") or ("otlp" if _env(*_ENDPOINTS) else "none")
    if exporter == "none" or _env("OTEL_SDK_DISABLED").lower() == "true":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        sender = _exporter(exporter)
    except ModuleNotFoundError as error:
        log.warning(
            "traces are asked for (OTEL_*) but not sent: %s is not installed; `pip install 'evermini[otel]'`, which "
            "speaks http/protobuf",
            error.name,
        )
        return None
    resource = Resource.create({"service.version": version})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(sender))
    use(provider)

    def stop() -> None:
        use(None)
        provider.shutdown()

    return stop


def use(provider: TracerProvider | None) -> None:
    """Send spans to a provider from now on; ``None``: nowhere."""
    global _tracer
    _tracer = provider.get_tracer(SERVICE) if provider is not None else None


@contextmanager
def span(name: str, attributes: Attributes | None = None) -> Iterator[Span | None]:
    """Trace what the block does, as part of what is being traced; gives ``None`` where nothing is.

    An error's type is noted, not its message, which may quote the request.
    """
    if _tracer is None:
        yield None
        return
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except Exception as error:
            _fail(current, type(error).__name__)
            raise


@contextmanager
def request_span(
    method: str, path: str, headers: Mapping[str, str]
) -> Iterator[Callable[[str | None, int, str], None]]:
    """Trace a request; gives what is to be told its route (``None``: unmatched), status and id."""
    if _tracer is None:
        yield lambda route, status, request_id: None
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    attributes = {"http.request.method": method, "url.path": path}
    with _tracer.start_as_current_span(
        method,
        context=extract(headers),
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:

        def note(route: str | None, status: int, request_id: str) -> None:
            if route is not None:
                current.update_name(f"{method} {route}")
                current.set_attribute("http.route", route)
            current.set_attribute("http.response.status_code", status)
            current.set_attribute("evermini.request_id", request_id)
            if status >= 500:
                _fail(current, str(status))

        yield note


class Phases:
    """The phases of a request in the engine, which overlap with other requests' and end in other tasks.

    Args:
        model: Id of the model.
    """

    def __init__(self, model: str) -> None:
        self._tracer = _tracer
        self._context: Context | None = None
        if self._tracer is not None:
            from opentelemetry.context import get_current

            self._context = get_current()
        self._model = model
        self._name: str | None = None
        self._began = 0

    def begin(self, name: str) -> None:
        """A phase begins."""
        if self._tracer is not None:
            self._name, self._began = name, time.time_ns()

    def end(self, attributes: Attributes) -> None:
        """The phase that began last has ended; does nothing if none has."""
        if self._tracer is None or self._name is None:
            return
        done = self._tracer.start_span(
            self._name,
            context=self._context,
            start_time=self._began,
            attributes={"gen_ai.response.model": self._model, **attributes},
        )
        done.end(time.time_ns())
        self._name = None


def trace_id() -> str | None:
    """Return the id of the trace that is going on, for the log; ``None`` where there is none."""
    if _tracer is None:
        return None
    from opentelemetry.trace import format_trace_id, get_current_span

    context = get_current_span().get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else None


def _env(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


def _exporter(name: str) -> SpanExporter:
    """Return what sends spans; the endpoint, headers and time limits are its own to read from the environment."""
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if _env(*_PROTOCOLS) == "grpc":
        import importlib

        module: Any = importlib.import_module(
            "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
        )
        exporter: SpanExporter = module.OTLPSpanExporter()
        return exporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _fail(current: Span, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    current.set_status(StatusCode.ERROR)
    current.set_attribute("error.type", kind)
