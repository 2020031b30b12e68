"""Spans reach an OTLP collector as the standard variables say; a collector that is absent or hangs hurts nobody."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from slmops.kit import logs, tracing
from slmops.kit.settings import BusSettings, load

SCRIPT = """
from slmops.kit.settings import BusSettings, load
from slmops.kit.tracing import setup, span, stop
provider = setup("registry", load(BusSettings))
with span("work"):
    pass
stop(provider, 20)
"""
OTHERS = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SLMOPS_"))}


class Collector:
    """What was posted: path, headers in lower case, and spans. While `holds` is set, it does not answer."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []
        self.asked, self.released = threading.Event(), threading.Event()
        self.holds = False


@contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.posts.append((self.path, headers, ExportTraceServiceRequest.FromString(body)))
            found.asked.set()
            if found.holds:
                found.released.wait(60)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Writes nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield found, f"http://127.0.0.1:{server.server_port}"
    finally:
        found.released.set()
        server.shutdown()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, env=OTHERS | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("base", ["OTEL_EXPORTER_OTLP_ENDPOINT", "SLMOPS_OTLP_ENDPOINT"])
def test_spans_go_to_the_base_url_with_the_standard_headers(base: str) -> None:
    with collector() as (found, url):
        done = run(SCRIPT, **{base: url, "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=factory-7"})
        assert (done.returncode, done.stderr) == (0, "")
    [(path, headers, request)] = found.posts
    assert (path, headers["x-tenant"]) == ("/v1/traces", "factory-7")
    [resource] = request.resource_spans
    attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert attributes["service.name"] == "registry"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["work"]


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, None),
        ({"SLMOPS_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/v1/traces"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/otlp"}, "https://c/otlp/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://d"}, "http://c/x"),
        ({"SLMOPS_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://d"}, "http://c/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
    ],
)
def test_a_base_url_is_completed_and_a_whole_url_is_kept(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str | None
) -> None:
    for name in list(os.environ):
        if name.startswith(("OTEL_", "SLMOPS_OTLP")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load(BusSettings).traces_url == url


def test_a_collector_that_hangs_holds_nobody_up_and_the_trace_file_is_whole(tmp_path: Path) -> None:
    with collector() as (found, url):
        found.holds = True
        provider = tracing.setup("console", BusSettings(otlp_endpoint=url, trace_file=tmp_path / "traces.jsonl"))
        with provider.get_tracer("test").start_as_current_span("work"):
            pass
        tracing.stop(provider, within_s=1)
        assert found.asked.wait(30)
        assert not found.released.is_set(), "the collector still holds its answer back"
    assert [json.loads(line)["name"] for line in (tmp_path / "traces.jsonl").read_text().splitlines()] == ["work"]


def test_a_command_prints_its_own_error_alone_when_no_collector_listens(tmp_path: Path) -> None:
    code = "from slmops.console.app import main; import sys; sys.argv = ['slmops', 'model', 'ls', '--json']; main()"
    nothing = "http://127.0.0.1:1"
    done = run(code, OTEL_EXPORTER_OTLP_ENDPOINT=nothing, SLMOPS_NATS_URL="nats://127.0.0.1:1", HOME=str(tmp_path))
    assert json.loads(done.stderr)["code"] in ("unreachable", "not_found")


def test_a_log_line_names_the_trace_in_whose_span_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.log_as_json("registry", "INFO")
        trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
        with tracing.span("work", parent=f"00-{trace_id}-00f067aa0ba902b7-01"):
            logging.getLogger("slmops").warning("inside")
        logging.getLogger("slmops").warning("outside")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = map(json.loads, capsys.readouterr().err.splitlines())
    inside, outside = (line for line in lines if line["logger"] == "slmops")
    assert inside["trace_id"] == trace_id
    assert len(inside["span_id"]) == 16
    assert "trace_id" not in outside
