"""Settings that services share. A service's `settings.py` extends them; no other code reads the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from slmops.contracts.errors import InvalidMessage

S = TypeVar("S", bound=BaseSettings)
_OTLP_TRACES = "/v1/traces"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _level(value: str) -> str:
    if value.upper() not in _LEVELS:
        raise ValueError(f"use one of {', '.join(_LEVELS)}")
    return value.upper()


LogLevel = Annotated[str, AfterValidator(_level)]


class TlsSettings(BaseSettings):
    """Settings of every encrypted connection that a process opens."""

    model_config = SettingsConfigDict(env_prefix="SLMOPS_", extra="ignore", populate_by_name=True)

    tls_ca: Path | None = Field(
        default=None,
        description="File (PEM) with the certificates of the authorities that NATS and S3 are trusted by, and only "
        "these; read again when it changes. None: those of the operating system",
    )


class BusSettings(TlsSettings):
    """Settings of the bus connection and of monitoring."""

    nats_url: str = Field(
        default="nats://127.0.0.1:4222",
        description="One URL, or several separated by commas: tls:// or wss:// (encrypted), nats:// or ws:// (not)",
    )
    nats_proxy: str | None = Field(
        default=None,
        description="HTTP proxy (CONNECT) for ws:// and wss:// URLs, such as http://proxy:3128; None: direct",
    )
    nats_creds: Path | None = Field(
        default=None, description="Credentials file (JWT and seed); None: no authentication"
    )
    nats_answers_creds: Path | None = Field(
        default=None,
        description="Credentials of the user that answers commands; None: `<name>-answers.creds` beside `nats_creds`",
    )
    stream_bytes: int | None = Field(
        default=None, gt=0, description="Size of all streams of the bus together; None: as specified, 4 to 5 GiB"
    )
    http_host: str = Field(default="127.0.0.1", description="Where /health and /metrics listen")
    http_port: int = Field(default=0, ge=0, le=65535, description="0: any free port")
    http_tls_cert: Path | None = Field(
        default=None,
        description="Certificate (PEM, with its chain) of /health and /metrics, read again when it changes; None: no "
        "TLS",
    )
    http_tls_key: Path | None = Field(default=None, description="Its private key; None: it is in the same file")
    trace_file: Path | None = Field(default=None, description="Spans as JSON lines; None: not written to a file")
    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias=AliasChoices("SLMOPS_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="Base URL of an OTLP/HTTP collector, such as http://collector:4318; None: not exported",
    )
    otlp_traces_endpoint: str | None = Field(
        default=None,
        validation_alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        description="Whole URL for traces, instead of the base URL",
    )
    log_level: LogLevel = Field(default="INFO", description="DEBUG, INFO, WARNING, ERROR or CRITICAL")
    data_dir: Path = Field(default=Path("data"), description="The service's own folder")
    disk_floor_bytes: int = Field(
        default=64 << 20, ge=0, description="With less free disk space, /health says that the service is degraded"
    )

    @property
    def traces_url(self) -> str | None:
        """Where spans are posted: the whole URL as given, or the base URL completed with OTLP's path; None: nowhere."""
        if self.otlp_traces_endpoint or not self.otlp_endpoint:
            return self.otlp_traces_endpoint or None
        base = self.otlp_endpoint.rstrip("/")
        return base if base.endswith(_OTLP_TRACES) else base + _OTLP_TRACES

    @property
    def answering_creds(self) -> Path | None:
        """The credentials file of the user that answers commands; None: no authentication."""
        if self.nats_answers_creds is not None or self.nats_creds is None:
            return self.nats_answers_creds
        return self.nats_creds.with_name(f"{self.nats_creds.stem}-answers{self.nats_creds.suffix}")


class DatabaseSettings(BaseSettings):
    """Settings of the journal's database."""

    model_config = SettingsConfigDict(env_prefix="SLMOPS_", extra="ignore")

    database_url: str = Field(
        default="sqlite:///journal.db", description="sqlite:///PATH (embedded) or postgresql+psycopg://… (shared)"
    )


class ObjectSettings(TlsSettings):
    """Settings of the S3-compatible object store."""

    s3_endpoint: str = Field(default="127.0.0.1:8333", description="host:port, without a scheme")
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_bucket: str = "slmops"
    s3_secure: bool | None = Field(default=None, description="TLS to the store; None: if SLMOPS_TLS_CA is set")

    @property
    def s3_is_secure(self) -> bool:
        return self.tls_ca is not None if self.s3_secure is None else self.s3_secure


def load(kind: type[S]) -> S:
    """Reads the environment. Raises `InvalidMessage` with the names of invalid variables, without their values."""
    try:
        return kind()
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix", "")
        wrong = "; ".join(f"{prefix}{'_'.join(map(str, e['loc']))}".upper() + f": {e['msg']}" for e in error.errors())
        raise InvalidMessage(f"invalid settings: {wrong}", where="environment") from None
