"""Chosen ports are free, distinct and stored. A fixed port that is taken raises an error."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.contracts.errors import PortTaken
from slmops.local.ports import HOST, choose_ports, is_free

NAMES = [f"p{i}" for i in range(30)]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as server:
        yield server


def test_ports_are_free_distinct_and_stored(tmp_path: Path) -> None:
    ports = choose_ports(tmp_path / "ports", NAMES)
    assert len(set(ports.values())) == len(NAMES)
    assert all(is_free(port) for port in ports.values())
    assert choose_ports(tmp_path / "ports", NAMES) == ports


def test_only_a_stored_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    ports = choose_ports(tmp_path / "ports", ["a", "b"])
    with socket.create_server((HOST, ports["a"])):
        again = choose_ports(tmp_path / "ports", ["a", "b"])
    assert again["a"] != ports["a"]
    assert again["b"] == ports["b"]


def test_a_fixed_port_is_used_and_stored(tmp_path: Path) -> None:
    free = choose_ports(tmp_path / "other", ["x"])["x"]
    assert choose_ports(tmp_path / "ports", ["a"], {"a": free})["a"] == free
    assert choose_ports(tmp_path / "ports", ["a"])["a"] == free


def test_a_taken_fixed_port_raises_an_error(tmp_path: Path, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(PortTaken, match=str(port)) as error:
        choose_ports(tmp_path / "ports", ["nats"], {"nats": port})
    assert error.value.where == f"{HOST}:{port}"
    assert error.value.fix
