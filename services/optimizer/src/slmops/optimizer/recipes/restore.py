"""Restores cached variants into a work folder, so that the job treats them as already made and measured.

The folder of a restored variant is empty: its files are in the object store or are not needed, and no pass reads a
finished variant. A folder's name is a digest of all its inputs, so a variant with other inputs has another folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.model import ModelFile
from slmops.optimizer.domain.result import Variant
from slmops.optimizer.store import Measured

_CLAIM = "claim.json"  # written by the pipeline, which empties a folder without it
_NOTES = "evaluations"


def record(variant: Variant, work: Path, files: Iterable[ModelFile], report: Descriptor, *, stored: bool) -> Measured:
    """Returns the cache entry of a variant that the job in `work` made and measured."""
    assert variant.path is not None and variant.evaluation is not None
    found = [work / _CLAIM, *(work / _NOTES).glob(f"*/{Path(variant.path).name}*")]
    return Measured(
        definition=variant.definition,
        evaluation=variant.evaluation,
        files=tuple(files),
        report=report,
        stored=stored,
        path=variant.path,
        notes={path.relative_to(work).as_posix(): path.read_text(encoding="utf-8") for path in found},
    )


def restore(work: Path, known: Iterable[Measured]) -> None:
    """Restores `known` into a work folder. Variants that an earlier worker restored there are removed first."""
    for folder in work.glob("passes/*"):
        if not any(folder.iterdir()):
            folder.rmdir()
    for measured in known:
        _restore_one(measured, work)


def _restore_one(measured: Measured, work: Path) -> None:
    """Restores a variant, unless the job has made it itself or the work folder has another source."""
    claim = work / _CLAIM
    if (claim.exists() and claim.read_text(encoding="utf-8") != measured.notes[_CLAIM]) or (
        work / measured.path
    ).exists():
        return
    for name, text in measured.notes.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (work / measured.path).mkdir(parents=True)
