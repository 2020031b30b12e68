"""Sets up OpenTelemetry once per process, and reads and writes W3C trace contexts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from opentelemetry import context, propagate, trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind

from slmops.contracts.errors import InvalidMessage
from slmops.kit.rotating_file import RotatingFile
from slmops.kit.settings import BusSettings

TRACE_LIMIT_BYTES = 16 << 20
"""Size at which a trace file is rotated. The previous one is kept too."""
_tracer = trace.get_tracer("slmops")
_file: RotatingFile | None = None


def _line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


def setup(service: str, settings: BusSettings) -> TracerProvider:
    """Exports spans to the trace file and the collector in the settings. Without either, spans are dropped."""
    global _file
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    if settings.trace_file is not None:
        _file = RotatingFile(settings.trace_file, TRACE_LIMIT_BYTES)
        out = cast(IO[str], _file)
        # Short delay: a service that is killed loses at most this much of its trace.
        provider.add_span_processor(
            BatchSpanProcessor(
                ConsoleSpanExporter(service_name=service, out=out, formatter=_line), schedule_delay_millis=500
            )
        )
    if settings.traces_url is not None:
        provider.add_span_processor(BatchSpanProcessor(_collector(settings.traces_url)))
    trace.set_tracer_provider(provider)
    return provider


def _collector(url: str) -> SpanExporter:
    """Headers, timeout, certificates and compression come from the standard `OTEL_EXPORTER_OTLP_*` variables.

    Raises `InvalidMessage` without the extra `otlp`, which a gateway on a small device does not need.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise InvalidMessage(
            "spans cannot be exported: the OTLP exporter is not installed",
            where=url,
            fix="Install it (pip install 'slmops-shared[otlp]'), or unset OTEL_EXPORTER_OTLP_ENDPOINT.",
        ) from None
    return OTLPSpanExporter(endpoint=url)


def stop(provider: TracerProvider, within_s: float) -> None:
    """Exports what is left and returns after at most `within_s` seconds, also if the collector does not answer.

    Spans of the trace file come first, so that only a collector's can be lost.
    """
    stopping = threading.Thread(target=provider.shutdown, daemon=True, name="last spans")
    stopping.start()
    stopping.join(within_s)


def problem() -> OSError | None:
    """Returns why the trace file of this process cannot be written; None if it can, or if there is none."""
    return _file.problem if _file else None


def traceparent() -> str | None:
    """Returns the current span as a W3C `traceparent`; None outside a trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


def trace_ids() -> dict[str, str]:
    """Returns `trace_id` and `span_id` of the current span in hexadecimal; empty outside a trace."""
    current = trace.get_current_span().get_span_context()
    if not current.is_valid:
        return {}
    return {"trace_id": f"{current.trace_id:032x}", "span_id": f"{current.span_id:016x}"}


@contextmanager
def span(
    name: str, *, parent: str | None = None, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int | float | bool
) -> Iterator[Span]:
    """Starts a span under `parent` (a `traceparent`) or the current span. Attributes never hold prompts or secrets."""
    outer = propagate.extract({"traceparent": parent}) if parent else context.get_current()
    with _tracer.start_as_current_span(name, context=outer, kind=kind, attributes=attributes) as current:
        yield current
