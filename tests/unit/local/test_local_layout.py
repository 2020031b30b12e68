"""The data folder: keys are generated once, and only their owner can read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.errors import Denied
from slmops.local.layout import Layout
from slmops.local.private import write_atomically


def test_keys_survive_a_restart(tmp_path: Path) -> None:
    first = Layout(tmp_path / "data")
    first.prepare()
    kept = [first.signing_key, first.trusted_key, first.enrolment_token, first.gateway_signing_key, first.weed_identity]
    before = [path.read_bytes() for path in kept]
    again = Layout(tmp_path / "data")
    again.prepare()
    assert [path.read_bytes() for path in kept] == before
    assert (again.authority(), again.s3_credentials()) == (first.authority(), first.s3_credentials())


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    layout.prepare()
    layout.s3_credentials()
    assert stat.S_IMODE(layout.root.stat().st_mode) == 0o700
    files = [path for path in layout.root.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_the_trusted_key_verifies_what_the_signing_key_signs(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    private = serialization.load_pem_private_key(layout.signing_key.read_bytes(), password=None)
    public = serialization.load_pem_public_key(layout.trusted_key.read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp256r1"
    assert private.public_key() == public


def test_a_file_in_place_of_the_folder_raises_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(Denied, match="data folder") as error:
        Layout(tmp_path / "data").prepare()
    assert error.value.where
    assert error.value.fix


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
