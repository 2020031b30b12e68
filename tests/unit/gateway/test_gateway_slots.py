"""Two slots: the active one is never touched, and kill -9 between any two file system operations does no harm."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from slmops.contracts.errors import IllegalTransition, InvalidMessage, PermanentError
from slmops.gateway.install.slots import Slots, SlotsState

ONE, TWO, THREE = ("sha256:" + digit * 64 for digit in "123")
KILLED = 9


def blob(folder: Path, text: str) -> Path:
    path = folder / sha256(text.encode()).hexdigest()
    path.write_text(text)
    return path


def files(folder: Path, text: str) -> list[tuple[Path, str]]:
    return [(blob(folder, text), "model.onnx"), (blob(folder, text + " config"), "onnx/deep/config.json")]


def content(slots: Slots) -> str | None:
    return (slots.active.path / "model.onnx").read_text() if slots.active else None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "gateway"


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    return tmp_path / "blobs"


def commit(slots: Slots, digest: str, blobs: Path) -> None:
    slots.install(digest, files(blobs, digest))
    slots.activate()
    slots.commit()


def test_the_second_release_can_be_reverted_and_the_first_cannot(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    assert slots.active is None
    slots.install(ONE, files(blobs, ONE))
    assert slots.active is None
    slots.activate()
    assert slots.on_trial
    assert slots.revert() is None
    slots.clear_failure(ONE)
    commit(slots, ONE, blobs)
    commit(slots, TWO, blobs)
    assert content(slots) == TWO
    assert (slots.active.path / "onnx/deep/config.json").read_text() == TWO + " config"  # type: ignore[union-attr]
    assert slots.candidate is not None
    assert slots.candidate.digest == ONE


def test_a_failed_trial_returns_to_the_previous_release_and_is_recorded(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    commit(slots, ONE, blobs)
    slots.install(TWO, files(blobs, TWO))
    slots.activate()
    assert content(Slots(root)) == TWO
    slots.revert()
    again = Slots(root)
    assert (content(again), again.failed, again.on_trial, again.attempts(TWO)) == (ONE, (TWO,), False, 1)
    again.clear_failure(TWO)
    assert (again.failed, again.attempts(TWO)) == ((), 0)


def test_a_trial_interrupted_by_a_restart_counts_as_an_attempt_and_not_as_a_failure(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    commit(slots, ONE, blobs)
    for attempt in (1, 2):
        slots.install(TWO, files(blobs, TWO))
        slots.activate()
        slots = Slots(root)
        slots.revert(failed=False)
        assert (content(slots), slots.failed, slots.attempts(TWO)) == (ONE, (), attempt)
    slots.install(TWO, files(blobs, TWO))
    slots.activate()
    slots.commit()
    assert slots.attempts(TWO) == 0


def test_a_rejected_candidate_is_deleted_and_recorded_as_failed(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    commit(slots, ONE, blobs)
    candidate = slots.install(TWO, files(blobs, TWO))
    slots.reject()
    assert not candidate.path.exists()
    assert (slots.candidate, slots.failed, content(slots)) == (None, (TWO,), ONE)


def test_only_the_last_32_failures_are_kept(root: Path) -> None:
    slots = Slots(root)
    for number in range(40):
        slots.fail(f"sha256:{number:064x}")
    assert len(slots.failed) == 32
    assert slots.failed[-1].endswith("27")


def test_installing_an_installed_release_changes_nothing(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    first = slots.install(ONE, files(blobs, ONE))
    assert slots.install(ONE, []) == first


@pytest.mark.parametrize("step", ["activate", "commit", "revert", "reject"])
def test_a_step_on_empty_slots_is_illegal(root: Path, step: str) -> None:
    with pytest.raises(IllegalTransition):
        getattr(Slots(root), step)()


def test_the_previous_release_is_not_overwritten_during_a_trial(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    commit(slots, ONE, blobs)
    slots.install(TWO, files(blobs, TWO))
    slots.activate()
    for step in (lambda: slots.install(THREE, files(blobs, THREE)), slots.activate, slots.reject):
        with pytest.raises(IllegalTransition):
            step()
    slots.revert()
    assert content(slots) == ONE


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a/..", "a\\..\\b", "a\0b", "model.onnx", "model.onnx/x"],
)
def test_a_path_that_leaves_the_slot_or_repeats_is_rejected_without_changes(root: Path, blobs: Path, path: str) -> None:
    slots = Slots(root)
    commit(slots, ONE, blobs)
    with pytest.raises(PermanentError):
        slots.install(TWO, [*files(blobs, TWO), (blob(blobs, "evil"), path)])
    assert content(Slots(root)) == ONE
    assert {path.name for path in (root / "slots").iterdir()} <= {"A", "B"}


def test_a_file_and_a_folder_of_the_same_name_are_rejected(root: Path, blobs: Path) -> None:
    with pytest.raises(PermanentError):
        Slots(root).install(ONE, [(blob(blobs, "1"), "a/b"), (blob(blobs, "2"), "a")])


def test_a_symlink_is_rejected_as_a_blob(root: Path, blobs: Path) -> None:
    (blobs / "link").symlink_to("/etc/hostname")
    with pytest.raises(InvalidMessage, match="regular"):
        Slots(root).install(ONE, [(blobs / "link", "model.onnx")])


def test_blobs_are_hard_linked(root: Path, blobs: Path) -> None:
    slot = Slots(root).install(ONE, files(blobs, ONE))
    assert (slot.path / "model.onnx").stat().st_ino == blob(blobs, ONE).stat().st_ino


def test_without_hard_links_the_blob_is_copied(root: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EXDEV, "a different file system")

    monkeypatch.setattr(os, "link", no_links)
    slot = Slots(root).install(ONE, files(blobs, ONE))
    assert (slot.path / "model.onnx").read_text() == ONE
    assert (slot.path / "model.onnx").stat().st_ino != blob(blobs, ONE).stat().st_ino


def test_the_state_file_is_replaced_atomically(root: Path, blobs: Path) -> None:
    slots = Slots(root)
    slots.install(ONE, files(blobs, ONE))
    with (root / "slots.json").open() as before:
        slots.activate()
        assert SlotsState.model_validate_json(before.read()).active is None
    assert Slots(root).on_trial


def survives(operation: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a child process that exits, as by kill -9, before its n-th file system operation.

    Returns whether `work` finished before that.
    """
    if (child := os.fork()) == 0:
        left = operation

        def count(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if event.startswith(("os.", "shutil.")) or event == "open":
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), "the work itself failed"
    return code == 0


def update(root: Path, blobs: Path) -> None:
    """Does what an agent does after a start: installs the good release TWO, then the bad release THREE."""
    slots = Slots(root)
    if slots.on_trial:
        slots.revert(failed=False)
    slots.install(TWO, files(blobs, TWO))
    slots.activate()
    slots.commit()
    slots.install(THREE, files(blobs, THREE))
    slots.activate()
    slots.revert()
    slots.install(ONE, files(blobs, ONE))
    slots.reject()


def check(slots: Slots, root: Path) -> None:
    """Asserts what holds after a power loss: an active slot, complete slots, and a way to revert a trial."""
    assert slots.active is not None
    assert slots.candidate is not None or not slots.on_trial
    present = [slot for slot in (slots.active, slots.candidate) if slot]
    for slot in present:
        assert (slot.path / "model.onnx").read_text() == slot.digest
        assert (slot.path / "onnx/deep/config.json").read_text() == slot.digest + " config"
    assert {path.name for path in (root / "slots").iterdir()} == {slot.name for slot in present}


def test_kill_9_between_any_two_operations_of_a_whole_update(tmp_path: Path, root: Path, blobs: Path) -> None:
    commit(Slots(root), ONE, blobs)
    for digest in (TWO, THREE):
        files(blobs, digest)
    operation, finished = 0, False
    while not finished:
        killed = tmp_path / f"killed-{operation}"
        shutil.copytree(root, killed)
        finished = survives(operation, partial(update, killed, blobs))
        check(Slots(killed), killed)
        if operation % 7 == 0:  # a restarted agent gets the same result
            assert survives(10**6, partial(update, killed, blobs))
            check(Slots(killed), killed)
            assert content(Slots(killed)) == TWO
        operation += 1
    assert operation > 100
