"""Where the command line finds the address of the system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unit.console.console_examples import nothing_set_up

from slmops.console import settings
from slmops.contracts.errors import InvalidMessage, NotFound


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    client = {
        "nats_url": "nats://127.0.0.1:9000",
        "nats_creds": "/keys/console.creds",
        "gateways": {"gw-1": "http://127.0.0.1:9001"},
        "trace_file": "/traces/console.jsonl",
        "something_newer": 1,
    }
    (tmp_path / "client.json").write_text(json.dumps(client))
    return tmp_path


def test_all_settings_come_from_a_named_folder(folder: Path) -> None:
    found = settings.find(folder)
    assert found.nats_url == "nats://127.0.0.1:9000"  # although the environment names another address
    assert found.nats_creds == Path("/keys/console.creds")
    assert found.gateways == {"gw-1": "http://127.0.0.1:9001"}
    assert found.trace_file == Path("/traces/console.jsonl")


def test_the_default_folder_is_used_without_other_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLMOPS_NATS_URL")
    monkeypatch.setattr(settings, "DEFAULT_DATA", folder)
    assert settings.find().nats_url == "nats://127.0.0.1:9000"


def test_a_folders_credentials_are_not_used_for_an_address_from_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_DATA", str(folder))
    found = settings.find()
    assert (found.nats_url, found.nats_creds) == ("nats://127.0.0.1:1", None)
    assert found.gateways == {"gw-1": "http://127.0.0.1:9001"}


def test_credentials_in_the_environment_override_those_of_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLMOPS_NATS_URL")
    monkeypatch.setenv("SLMOPS_DATA", str(folder))
    monkeypatch.setenv("SLMOPS_NATS_CREDS", "/mine.creds")
    found = settings.find()
    assert (found.nats_url, found.nats_creds) == ("nats://127.0.0.1:9000", Path("/mine.creds"))


def test_the_environment_is_enough_without_a_folder() -> None:
    assert settings.find().nats_url == "nats://127.0.0.1:1"


def test_a_named_folder_without_a_system_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="slmops up --data"):
        settings.find(tmp_path / "elsewhere")
    monkeypatch.setenv("SLMOPS_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(NotFound):
        settings.find()


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text("{")
    with pytest.raises(InvalidMessage, match="slmops up"):
        settings.find(tmp_path)


def test_the_trace_to_continue_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEPARENT", "00-" + "1" * 32 + "-" + "2" * 16 + "-01")
    assert settings.find().traceparent == "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
