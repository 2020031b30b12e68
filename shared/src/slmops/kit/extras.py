"""Names the package to install when an optional module is missing."""

from __future__ import annotations

from typing import Final

from slmops.contracts.errors import NotFound

_EXTRAS: Final = {
    "slmops-shared[service]": ("faststream", "uvicorn"),
    "slmops-shared[journal]": ("sqlalchemy", "psycopg"),
    "slmops-shared[objects]": ("minio", "httpx"),
    "slmops-shared[delta]": ("numpy", "zstandard"),
    "slmops-shared[package]": ("cryptography", "model_signing", "OpenSSL"),
    "slmops-shared[trust]": ("tuf", "securesystemslib"),
    "slmops-shared[websocket]": ("aiohttp",),
    "slmops-shared[otlp]": ("opentelemetry.exporter",),
}
"""Extra → the modules that it brings."""


def not_installed(error: ModuleNotFoundError) -> NotFound:
    """Returns the error of the tree for a missing module."""
    name = error.name or str(error)
    package = next(
        (extra for extra, modules in _EXTRAS.items() if any(f"{name}.".startswith(f"{m}.") for m in modules)),
        name.partition(".")[0],
    )
    return NotFound(f"the Python module {name} is not installed", fix=f"Install it: pip install '{package}'")
