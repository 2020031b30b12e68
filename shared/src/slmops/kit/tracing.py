"""Sets up OpenTelemetry once per process, and reads and writes W3C trace contexts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from opentelemetry import context, propagate, trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.trace import Span, SpanKind

from slmops.kit.rotating_file import RotatingFile
from slmops.kit.settings import BusSettings

TRACE_LIMIT_BYTES = 16 << 20
"""Size at which a trace file is rotated. The previous one is kept too."""
_tracer = trace.get_tracer("slmops")


def _line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


def setup(service: str, settings: BusSettings) -> TracerProvider:
    """Exports spans to the trace file and the collector in the settings. Without either, spans are dropped."""
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    if settings.trace_file is not None:
        out = cast(IO[str], RotatingFile(settings.trace_file, TRACE_LIMIT_BYTES))
        # Short delay: a service that is killed loses at most this much of its trace.
        provider.add_span_processor(
            BatchSpanProcessor(
                ConsoleSpanExporter(service_name=service, out=out, formatter=_line), schedule_delay_millis=500
            )
        )
    if settings.otlp_endpoint is not None:
        # Installed only with the extra `otlp`, which a gateway on a small device does not need.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint)))
    trace.set_tracer_provider(provider)
    return provider


def traceparent() -> str | None:
    """Returns the current span as a W3C `traceparent`; None outside a trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def span(
    name: str, *, parent: str | None = None, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int | float | bool
) -> Iterator[Span]:
    """Starts a span under `parent` (a `traceparent`) or the current span. Attributes never hold prompts or secrets."""
    outer = propagate.extract({"traceparent": parent}) if parent else context.get_current()
    with _tracer.start_as_current_span(name, context=outer, kind=kind, attributes=attributes) as current:
        yield current
