"""The settings of each process as environment variables. A process gets only the secrets that it needs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from slmops.contracts.permissions import ENROL_USER, SYSTEM_USER
from slmops.local.layout import Layout
from slmops.local.ports import HOST
from slmops.local.process import ProcessSpec
from slmops.local.servers import BUCKET, http_answers

SERVICES = ("access", "registry", "optimizer", "packager", "rollout", "telemetry")


@dataclass(frozen=True)
class GatewaySpec:
    """One gateway to run. Rollout stages select gateways by `labels`."""

    id: str
    blueprint: str = "edge-chat"
    labels: Mapping[str, str] = field(default_factory=dict)


def default_gateways(count: int = 3) -> tuple[GatewaySpec, ...]:
    """Returns the default gateways: `gw-1` is the canary, the others are the fleet."""
    return tuple(GatewaySpec(f"gw-{i}", labels={"ring": "canary" if i == 1 else "fleet"}) for i in range(1, count + 1))


def service_spec(layout: Layout, ports: Mapping[str, int], service: str, *, tls: bool = True) -> ProcessSpec:
    """Returns the process of a service. `tls`: whether NATS and S3 are encrypted, and its `/health` too."""
    home, credentials = layout.home(service), layout.s3_credentials()
    settings = {
        "NATS_CREDS": str(layout.creds(service)),
        "DATABASE_URL": f"sqlite:///{home / f'{service}.db'}",
        "S3_ENDPOINT": f"{HOST}:{ports['s3.api']}",
        "S3_ACCESS_KEY": credentials.access_key,
        "S3_SECRET_KEY": credentials.secret_key,
        "S3_BUCKET": BUCKET,
    }
    if service == "packager":
        settings["SIGNING_KEY"] = str(layout.signing_key)
        settings["TRUST_KEYS"] = str(layout.trust.online)
        settings["TRUST_METADATA"] = str(layout.trust.metadata)
    if service == "rollout":
        settings["GATEWAY_SIGNING_SEED"] = str(layout.gateway_signing_key)
        settings["ENROLMENT_TOKEN"] = str(layout.enrolment_token)
        settings["PLAN_SIGNING_KEY"] = str(layout.plan_signing_key)
    if service == "access":
        settings = {name: settings[name] for name in ("NATS_CREDS", "DATABASE_URL")}
        settings["ACCESS_KEYS"] = str(layout.access_keys)
        settings["SYSTEM_CREDS"] = str(layout.creds(SYSTEM_USER))
        settings["FIRST_ADMIN"] = str(layout.first_admin)
    return _spec(layout, ports, service, f"slmops.{service}.app", settings, tls=tls)


def gateway_spec(
    layout: Layout, ports: Mapping[str, int], gateway: GatewaySpec, *, api_tls: bool = False
) -> ProcessSpec:
    """Returns the process of a gateway. It gets no S3 key, because it downloads by presigned URL."""
    settings = {
        "GATEWAY_ID": gateway.id,
        "BLUEPRINT": gateway.blueprint,
        "LABELS": json.dumps(dict(gateway.labels)),
        "ENROL_CREDS": str(layout.creds(ENROL_USER)),
        "ENROLMENT_TOKEN": str(layout.enrolment_token),
        "TRUSTED_KEY": str(layout.trusted_key),
        "TRUSTED_ROOT": str(layout.trusted_root),
        "API_PORT": str(ports[f"{gateway.id}.api"]),
    }
    if api_tls:
        settings["API_TLS_CERT"] = str(layout.certificates.server("http"))
    return _spec(layout, ports, gateway.id, "slmops.gateway.app", settings)


def _spec(
    layout: Layout, ports: Mapping[str, int], name: str, module: str, settings: dict[str, str], *, tls: bool = True
) -> ProcessSpec:
    home = layout.home(name)
    home.mkdir(exist_ok=True)
    port, certificates = ports[f"{name}.http"], layout.certificates if tls else None
    settings |= {
        "NATS_URL": f"{'tls' if certificates else 'nats'}://{HOST}:{ports['nats']}",
        "DATA_DIR": str(home),
        "HTTP_PORT": str(port),
        "TRACE_FILE": str(layout.trace(name)),
    }
    if certificates:
        settings["TLS_CA"] = str(certificates.trusted)
        settings["HTTP_TLS_CERT"] = str(certificates.server("http"))
    # A key in the caller's environment must not reach a process that must not have one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLMOPS_S3_", "AWS_"))}
    env = inherited | {f"SLMOPS_{key}": value for key, value in settings.items()}
    argv = [sys.executable, "-m", module]
    return ProcessSpec(name, argv, layout.log(name), env, ready=lambda: http_answers(port, certificates), cwd=home)
