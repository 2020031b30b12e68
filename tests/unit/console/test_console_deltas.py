"""`slmops delta apply` makes no more than the base suggests, `--max-bytes` allows, or a signed package names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.console.console_examples import nothing_set_up, slmops
from unit.packager.packager_examples import CONTENT, Keys, new_keys, write_package

from slmops.console.commands import deltas
from slmops.contracts.manifest import MANIFEST_PATH, SIGNATURE_PATH
from slmops.kit.delta import make


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base", {"model.onnx": b"old graph"})


def written(folder: Path, content: dict[str, bytes]) -> Path:
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def delta(base: Path, content: dict[str, bytes], scratch: Path) -> Path:
    make(base, written(scratch / "target", content), scratch / "it.delta")
    return scratch / "it.delta"


def applied(base: Path, file: Path, out: Path, *options: str) -> Any:
    """Returns the answer, or the problem after checking that nothing was written."""
    done = slmops("delta", "apply", str(file), str(base), "--to", str(out), *options, "--json")
    if done.exit_code:
        assert not out.exists()
        return json.loads(done.stderr)
    return json.loads(done.stdout)


def test_a_delta_of_kilobytes_does_not_become_gigabytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "_SMALLEST_LIMIT_BYTES", 2 << 20)
    size = (2 << 20) + 1
    file = delta(base, {"model.onnx": bytes(size)}, tmp_path)
    assert file.stat().st_size < 100_000
    problem = applied(base, file, tmp_path / "out")
    assert (problem["code"], "--max-bytes" in problem["fix"]) == ("invalid_delta", True)
    done = applied(base, file, tmp_path / "out", "--max-bytes", str(size))
    assert done["target_bytes"] == size


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tmp_path: Path, keys: Keys) -> Path:
    """Only the manifest and the signature of a package."""
    write_package(tmp_path / "package", keys)
    files = {name: (tmp_path / "package" / name).read_bytes() for name in (MANIFEST_PATH, SIGNATURE_PATH)}
    return written(tmp_path / "signed", files)


def test_only_the_files_of_a_signed_package_are_made(base: Path, signed: Path, keys: Keys, tmp_path: Path) -> None:
    trusted = ["--signed", str(signed), "--key", str(keys.public)]
    file = delta(base, dict(CONTENT), tmp_path)
    assert len(applied(base, file, tmp_path / "out", *trusted)["files"]) == len(CONTENT)
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == CONTENT["model.onnx.data"]
    more = delta(base, CONTENT | {"run.sh": b"#!"}, tmp_path)
    assert applied(base, more, tmp_path / "more", *trusted)["code"] == "invalid_delta"


def test_the_signature_of_the_target_is_checked(base: Path, signed: Path, keys: Keys, tmp_path: Path) -> None:
    file = delta(base, dict(CONTENT), tmp_path)
    other = new_keys(tmp_path / "other")
    for options, code in (
        (["--key", str(other.public)], "signature_invalid"),
        ([], "invalid_message"),
    ):
        assert applied(base, file, tmp_path / "out", "--signed", str(signed), *options)["code"] == code
    manifest = signed / MANIFEST_PATH
    manifest.write_bytes(manifest.read_bytes().replace(b'"int4"', b'"int8"'))
    problem = applied(base, file, tmp_path / "out", "--signed", str(signed), "--key", str(keys.public))
    assert problem["code"] == "digest_mismatch"
