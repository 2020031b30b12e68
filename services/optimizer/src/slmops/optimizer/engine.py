"""From local files to variants in the store: the job's process, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.model import ModelFile, files_digest
from slmops.contracts.profile import DeviceProfile
from slmops.kit.objects import Objects, digest_of_path
from slmops.optimizer.result import JobResult, Variant
from slmops.optimizer.runner import OnProgress, run_job
from slmops.optimizer.store import VariantOutcome

REPORT = "application/vnd.slmops.evaluation.v1+json"
_FILE = "application/octet-stream"


@dataclass(frozen=True)
class Made:
    """A variant on the local disk, judged; not kept yet."""

    variant: Variant
    folder: Path
    chosen: bool
    reason: str
    report: bytes


class Engine:
    """Works under `home`, one folder per job, so that a job that was cut off continues where it was."""

    def __init__(self, home: Path, timeout: timedelta) -> None:
        self._home = home
        self._timeout = timeout

    def folder(self, job: str) -> Path:
        return self._home / "jobs" / job

    async def run(
        self, source: Path, folder: Path, recipes: Sequence[str], profile: DeviceProfile, on_progress: OnProgress
    ) -> list[Made]:
        """Make, measure and judge one variant per recipe.

        Raises what the job raises: typed errors of the model's fault, `OptimizationFailed`, `DiskFull`.
        """
        result = await run_job(source, folder, recipes, profile, on_progress, self._timeout)
        return [self._made(result, variant, folder) for variant in result.variants]

    async def keep(self, made: Made, objects: Objects) -> VariantOutcome:
        """Store the report, and the files of a variant that passed: what was refused is never delivered."""
        report = await objects.put_bytes(made.report, REPORT)
        files = [await self._file(made, path, objects) for path in _files(made.folder)]
        return VariantOutcome(
            recipe=made.variant.recipe,
            digest=files_digest(files),
            files=tuple(files),
            evaluation=made.variant.evaluation,
            passed=made.variant.verdict.passed,
            chosen=made.chosen,
            reason=made.reason,
            report=report,
        )

    async def _file(self, made: Made, path: Path, objects: Objects) -> ModelFile:
        name = path.relative_to(made.folder).as_posix()
        if made.variant.verdict.passed:
            stored: Descriptor = await objects.put_file(path, _FILE)
            return ModelFile(path=name, digest=stored.digest, size_bytes=stored.size)
        digest, size_bytes = digest_of_path(path)
        return ModelFile(path=name, digest=digest, size_bytes=size_bytes)

    def _made(self, result: JobResult, variant: Variant, folder: Path) -> Made:
        chosen = variant.recipe == result.choice.recipe
        passed = variant.verdict.passed
        refusal = "; ".join(variant.verdict.reasons)
        reason = (
            result.choice.reason if chosen else (f"passes, not chosen; {result.choice.reason}" if passed else refusal)
        )
        return Made(variant, folder / variant.path, chosen, reason, result.model_dump_json(indent=2).encode())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
