"""A variant that was made and measured before, as what it would have left in a work folder: the job takes it for done.

Its folder is left empty, for its files are in the store, or nobody wants them; a pass never reads a finished variant. A
folder's name follows from everything that went into it, so what was made otherwise is not found there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.model import ModelFile
from slmops.optimizer.domain.result import Variant
from slmops.optimizer.store import Measured

_CLAIM = "claim.json"  # of the pipeline: without it nothing in the folder counts
_NOTES = "evaluations"


def take(variant: Variant, work: Path, files: Iterable[ModelFile], report: Descriptor, *, stored: bool) -> Measured:
    """What to keep of a variant that the job in `work` made and measured."""
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
    """Put `known` into a work folder, in place of what an earlier worker put there: that may know other things."""
    for folder in work.glob("passes/*"):
        if not any(folder.iterdir()):
            folder.rmdir()
    for measured in known:
        _lay(measured, work)


def _lay(measured: Measured, work: Path) -> None:
    """Do nothing where the job came so far itself, or where it is about something else."""
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
