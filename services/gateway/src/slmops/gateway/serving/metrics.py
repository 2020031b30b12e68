"""The OpenTelemetry GenAI metrics of this gateway in Prometheus form. No label contains text from a client."""

from __future__ import annotations

from datetime import timedelta

from prometheus_client import CollectorRegistry, Histogram

from slmops.gateway.serving.inference import Done

# Bucket boundaries recommended by the GenAI semantic conventions.
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)

_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_PROVIDER = "slmops"


class GenAiMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, (*_LABELS, *labels), buckets=buckets, registry=registry)

        self._first = histogram(
            "gen_ai_server_time_to_first_token_seconds", "From request to first token", _FIRST_TOKEN_S
        )
        self._per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds", "After the first token", _PER_TOKEN_S
        )
        self._duration = histogram(
            "gen_ai_server_request_duration_seconds", "Of a whole request", _DURATION_S, "error_type"
        )
        self._usage = histogram("gen_ai_client_token_usage", "Tokens of a request", _TOKENS, "gen_ai_token_type")

    def answered(self, operation: str, model: str, done: Done, took: timedelta) -> None:
        labels = (operation, _PROVIDER, model)
        self._first.labels(*labels).observe(done.ttft_s)
        if done.tokens_per_s:
            self._per_token.labels(*labels).observe(1 / done.tokens_per_s)
        self._usage.labels(*labels, "input").observe(done.prompt_tokens)
        self._usage.labels(*labels, "output").observe(done.completion_tokens)
        self._duration.labels(*labels, "").observe(took.total_seconds())

    def failed(self, operation: str, model: str, code: str, took: timedelta) -> None:
        """Records a failed request. `operation` is `gen_ai.operation.name`; `code` is a code of the error tree."""
        self._duration.labels(operation, _PROVIDER, model, code).observe(took.total_seconds())
