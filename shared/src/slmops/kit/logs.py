"""Configures logging: one JSON object per line on stderr, with the trace in whose span it was written."""

from __future__ import annotations

import json
import logging
import time

from slmops.kit.tracing import trace_ids


class _JsonLines(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self.service,
            "logger": record.name,
            "message": record.getMessage(),
            **trace_ids(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json(service: str, level: str) -> None:
    """Makes the root logger write one JSON object per line to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("alembic", "httpx", "httpcore", "urllib3", "uvicorn.access", "nats"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
