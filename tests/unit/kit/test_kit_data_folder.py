"""Data folders: an older one is migrated, a newer one is refused and left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.contracts.errors import DiskFull, IncompatibleFolder
from slmops.contracts.exit_codes import ExitCode
from slmops.kit import data_folder
from slmops.kit.data_folder import LAYOUT_FILE, FolderLayout
from slmops.local.layout import FOLDER, Layout


def move_keys(folder: Path) -> None:
    """A migration that finds its work done when it is repeated."""
    if (folder / "keys").exists():
        (folder / "keys").rename(folder / "secrets")


def mark(folder: Path) -> None:
    (folder / "migrated").write_text("yes")


FIRST = FolderLayout("a test", ("keys",))
SECOND = FolderLayout("a test", ("keys",), (move_keys,))
THIRD = FolderLayout("a test", ("keys",), (move_keys, mark))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(folder: Path) -> int:
    return int(json.loads((folder / LAYOUT_FILE).read_bytes())["version"])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder of release 0.1, which wrote no version."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "a.pem").write_text("secret")
    return tmp_path


def test_a_new_folder_gets_the_newest_version_without_migrations(tmp_path: Path) -> None:
    THIRD.migrate(tmp_path)
    assert written(tmp_path) == 3
    assert not (tmp_path / "migrated").exists()


def test_a_folder_of_the_first_release_is_migrated_step_by_step(old: Path) -> None:
    FIRST.migrate(old)
    assert (written(old), (old / "keys" / "a.pem").read_text()) == (1, "secret")
    THIRD.migrate(old)
    assert written(old) == 3
    assert (old / "secrets" / "a.pem").read_text() == "secret"
    assert (old / "migrated").exists()
    before = contents(old)
    THIRD.migrate(old)
    assert contents(old) == before


def test_a_folder_without_a_version_is_migrated(old: Path) -> None:
    SECOND.migrate(old)
    assert (written(old), (old / "secrets" / "a.pem").exists()) == (2, True)


def test_a_migration_that_fails_is_repeated_and_earlier_ones_are_not(old: Path) -> None:
    done: list[str] = []

    def fails(folder: Path) -> None:
        done.append("fails")
        if len(done) < 3:
            raise OSError("killed")

    layout = FolderLayout("a test", ("keys",), (lambda _: done.append("first"), fails))
    with pytest.raises(OSError, match="killed"):
        layout.migrate(old)
    assert written(old) == 2
    layout.migrate(old)
    assert (written(old), done) == (3, ["first", "fails", "fails"])


@pytest.mark.parametrize(
    ("stamp", "what"),
    [
        ('{"kind": "a test", "version": 4, "release": "9.1.0"}', "version 4 .* release 9.1.0; .* up to 3"),
        ('{"kind": "a gateway", "version": 1}', "data folder of a gateway, not of a test"),
        ('{"kind": "a test", "version": 0}', "cannot be read"),
        ("", "cannot be read"),
    ],
    ids=["newer", "another kind", "no version", "empty"],
)
def test_a_folder_that_does_not_fit_is_refused_and_left_alone(old: Path, stamp: str, what: str) -> None:
    (old / LAYOUT_FILE).write_text(stamp)
    before = contents(old)
    with pytest.raises(IncompatibleFolder, match=what) as refusal:
        THIRD.migrate(old)
    assert contents(old) == before
    assert refusal.value.fix
    assert refusal.value.exit_code is ExitCode.REFUSED


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_folder, "atomic_write", full)
    with pytest.raises(DiskFull, match="No space left"):
        FIRST.migrate(tmp_path)


def test_the_keys_of_a_system_of_the_first_release_are_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.prepare()
    (tmp_path / LAYOUT_FILE).unlink()
    before = {
        path: data
        for path, data in contents(tmp_path / "keys").items()
        if not path.endswith((".creds", "first-admin.json"))
    }
    layout.prepare()
    assert before.items() <= contents(tmp_path / "keys").items()
    assert written(tmp_path) == FOLDER.newest
