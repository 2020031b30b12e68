"""Settings come from the environment, and an invalid variable is named without its value."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops.contracts.errors import InvalidMessage
from slmops.kit.settings import BusSettings, DatabaseSettings, ObjectSettings, load


class Settings(BusSettings, DatabaseSettings, ObjectSettings):
    """Settings as a service combines them."""


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_NATS_URL", "nats://one:4222,nats://two:4222")
    monkeypatch.setenv("SLMOPS_NATS_CREDS", "/keys/registry.creds")
    monkeypatch.setenv("SLMOPS_S3_SECRET_KEY", "hunter2")
    monkeypatch.setenv("SLMOPS_UNKNOWN", "ignored")
    settings = load(Settings)
    assert settings.nats_url == "nats://one:4222,nats://two:4222"
    assert settings.nats_creds == Path("/keys/registry.creds")
    assert settings.s3_secret_key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings)


def test_an_invalid_variable_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_HTTP_PORT", "hunter2")
    monkeypatch.setenv("SLMOPS_S3_SECURE", "perhaps")
    with pytest.raises(InvalidMessage) as caught:
        load(Settings)
    assert "SLMOPS_HTTP_PORT" in str(caught.value)
    assert "SLMOPS_S3_SECURE" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None  # the cause would print the value
