"""Each process gets the settings and only the secrets that it needs."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from slmops.local.environment import SERVICES, default_gateways, gateway_spec, service_spec
from slmops.local.layout import Layout
from slmops.local.process import ProcessSpec


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.prepare()
    return layout


@pytest.fixture
def specs(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> dict[str, ProcessSpec]:
    monkeypatch.setenv("SLMOPS_S3_SECRET_KEY", "leaked")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "leaked")
    ports: dict[str, int] = defaultdict(lambda: 4000)
    found = [service_spec(layout, ports, service) for service in SERVICES]
    found += [gateway_spec(layout, ports, gateway) for gateway in default_gateways()]
    return {spec.name: spec for spec in found}


def test_there_are_six_services_and_three_gateways(specs: dict[str, ProcessSpec]) -> None:
    assert list(specs) == [*SERVICES, "gw-1", "gw-2", "gw-3"]


def test_services_have_the_s3_keys_and_gateways_do_not(specs: dict[str, ProcessSpec], layout: Layout) -> None:
    secret = layout.s3_credentials().secret_key
    for name, spec in specs.items():
        values = set(spec.env.values())
        assert "leaked" not in values
        stores = name in SERVICES and name != "access"
        assert (secret in values) == stores
        assert stores or not [key for key in spec.env if key.startswith("SLMOPS_S3_")]


@pytest.mark.parametrize(
    ("path", "holders"),
    [
        ("signing_key", {"packager"}),
        ("access_keys", {"access"}),
        ("gateway_signing_key", {"rollout"}),
        ("enrolment_token", {"rollout", "gw-1", "gw-2", "gw-3"}),
        ("trusted_key", {"gw-1", "gw-2", "gw-3"}),
        ("plan_signing_key", {"rollout"}),
        ("trusted_root", {"gw-1", "gw-2", "gw-3"}),
    ],
)
def test_only_its_holders_get_a_key(
    specs: dict[str, ProcessSpec], layout: Layout, path: str, holders: set[str]
) -> None:
    value = str(getattr(layout, path))
    assert {name for name, spec in specs.items() if value in spec.env.values()} == holders


def test_no_process_gets_the_keyholders_keys(specs: dict[str, ProcessSpec], layout: Layout) -> None:
    assert list(layout.trust.offline.glob("*.pem"))
    shown = {value for spec in specs.values() for value in spec.env.values()}
    assert not shown & {str(layout.trust.root), str(layout.trust.offline)}
    assert str(layout.trust.online) in shown


def test_no_process_gets_the_authority(specs: dict[str, ProcessSpec]) -> None:
    assert not [value for spec in specs.values() for value in spec.env.values() if "nats-authority" in value]


def test_the_first_gateway_is_the_canary(specs: dict[str, ProcessSpec]) -> None:
    rings = [json.loads(specs[name].env["SLMOPS_LABELS"])["ring"] for name in ("gw-1", "gw-2", "gw-3")]
    assert rings == ["canary", "fleet", "fleet"]


def test_every_process_connects_encrypted_and_trusts_the_local_authority(
    specs: dict[str, ProcessSpec], layout: Layout
) -> None:
    for spec in specs.values():
        assert spec.env["SLMOPS_NATS_URL"].startswith("tls://")
        assert spec.env["SLMOPS_TLS_CA"] == str(layout.certificates.trusted)
        assert spec.env["SLMOPS_HTTP_TLS_CERT"] == str(layout.certificates.server("http"))
        assert "SLMOPS_API_TLS_CERT" not in spec.env
        assert str(layout.certificates.authority) not in spec.env.values()
    ports: dict[str, int] = defaultdict(lambda: 4000)
    encrypted = gateway_spec(layout, ports, default_gateways()[0], api_tls=True)
    assert encrypted.env["SLMOPS_API_TLS_CERT"] == str(layout.certificates.server("http"))
