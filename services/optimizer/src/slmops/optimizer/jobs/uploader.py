"""Uploads the artifacts of a job: delivered files, reports, pictures, and measurements for the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.manifest import FILE_PATH, JOB_REPORT
from slmops.contracts.model import ModelFile, files_digest
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.contracts.prompts.golden import dump_golden
from slmops.kit.objects.store import Objects, digest_of_path
from slmops.optimizer.domain.front import front
from slmops.optimizer.domain.gate import unmeasured
from slmops.optimizer.domain.result import PICTURES, JobResult, Variant
from slmops.optimizer.jobs.report import Report, source_of, tool_versions
from slmops.optimizer.measure.tasks import bundled_tasks, read_tasks
from slmops.optimizer.measure.texts import read_texts
from slmops.optimizer.recipes.library import check
from slmops.optimizer.recipes.restore import record
from slmops.optimizer.recipes.spec import JobSpec
from slmops.optimizer.store import Measured, Outcome, VariantOutcome

REPORT = "application/vnd.slmops.evaluation.v1+json"
_FILE = "application/octet-stream"
_MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


class JobReport(JobResult):
    """The result of a job: all variants, the front, and the choice. `pictures` are the plots of a search."""

    pictures: tuple[Descriptor, ...] = ()


class ArtifactUploader:
    """Uploads the artifacts of one job in the work folder `folder`.

    `files` are the version's files, `known` the cached variants, `data` the own texts and tasks that `spec` reads.
    After `upload`, `measured` holds the new variants for the cache.
    """

    def __init__(
        self,
        objects: Objects,
        spec: JobSpec,
        files: Sequence[ModelFile],
        folder: Path,
        known: Sequence[Measured],
        result: JobResult,
        data: EvaluationData | None = None,
    ) -> None:
        self._objects, self._spec, self._files, self._folder, self._result = objects, spec, files, folder, result
        self._data = data or EvaluationData()
        self._known = {one.path: one for one in known}
        # A search makes many variants that nobody needs, so it delivers only the front of those that passed. Variants
        # that were requested by name are always delivered.
        passed = [variant for variant in result.variants if variant.verdict.passed]
        self._dominated = front(passed).dominated if spec.search else {}
        self.measured: list[Measured] = []

    async def upload(self) -> Outcome:
        """Uploads delivered files, reports and pictures."""
        variants = [await self._variant(variant) for variant in self._result.variants]
        found = await asyncio.to_thread(lambda: [p for name in PICTURES if (p := self._folder / name).exists()])
        pictures = [await self._picture(path) for path in found]
        report = JobReport(**dict(self._result), pictures=tuple(pictures))
        return Outcome(
            variants=tuple(variants),
            reason=self._result.choice.reason,
            report=await self._put(report.model_dump_json(indent=2, by_alias=True), JOB_REPORT),
            pictures=tuple(pictures),
        )

    async def _variant(self, variant: Variant) -> VariantOutcome:
        delivered = variant.verdict.passed and variant.recipe not in self._dominated
        measured = await self._measured(variant, delivered)
        return VariantOutcome(
            recipe=variant.recipe,
            digest=files_digest(measured.files) if measured else None,
            files=measured.files if measured else (),
            evaluation=variant.evaluation,
            passed=delivered,
            chosen=variant.recipe == self._result.choice.recipe,
            reason=self._reason(variant),
            report=measured.report if measured else None,
        )

    async def _measured(self, variant: Variant, delivered: bool) -> Measured | None:
        """Uploads one variant; returns None for a recipe that failed or whose variant was too large to be measured.

        Such a variant is not cached, because another profile may allow its size.
        """
        if variant.path is None or variant.evaluation is None or unmeasured(variant.evaluation):
            return None
        folder = self._folder / variant.path
        paths = await asyncio.to_thread(lambda: sorted(path for path in folder.rglob("*") if path.is_file()))
        if not paths:  # the folder was restored from the cache, without files
            return self._known[variant.path]
        files = [await self._file(path, path.relative_to(folder).as_posix(), delivered) for path in paths]
        report = await self._put(
            (await asyncio.to_thread(self._report, variant, files)).model_dump_json(indent=2), REPORT
        )
        measured = await asyncio.to_thread(record, variant, self._folder, files, report, stored=delivered)
        self.measured.append(measured)
        return self.measured[-1]

    async def _file(self, path: Path, name: str, delivered: bool) -> ModelFile:
        if delivered:
            stored = await self._objects.put_file(path, _FILE)
            return ModelFile(path=name, digest=stored.digest, size_bytes=stored.size)
        digest, size_bytes = await asyncio.to_thread(digest_of_path, path)
        return ModelFile(path=name, digest=digest, size_bytes=size_bytes)

    def _report(self, variant: Variant, variant_files: Sequence[ModelFile]) -> Report:
        assert variant.evaluation is not None
        spec, reference = self._spec, self._result.reference
        texts = read_texts(spec.evaluation_texts, spec.calibration_texts)
        calibrated = any(step.params.calibrated for step in check(variant.definition))
        tasks = read_tasks(spec.tasks) if spec.tasks else bundled_tasks()
        files = {PurePosixPath(file.path).stem: file for file in self._data.tasks}
        return Report(
            recipe=variant.definition,
            evaluation=variant.evaluation,
            reference_files=tuple(self._files),
            variant_files=tuple(variant_files),
            evaluation_text=source_of(texts.evaluation, self._data.texts, reference.text_tokens),
            windows=reference.windows,
            window_tokens=reference.window_tokens,
            calibration_text=source_of(texts.calibration, self._data.calibration_texts) if calibrated else None,
            tasks=tuple(source_of(task, [files[task.name]] if task.name in files else []) for task in tasks),
            golden=digest_of(dump_golden(spec.golden).encode()) if spec.golden else None,
            seed=spec.seed,
            prompt_format=reference.prompt_format,
            tools=tool_versions(),
        )

    async def _picture(self, path: Path) -> Descriptor:
        stored = await self._objects.put_file(path, _MEDIA_TYPES[path.suffix])
        return stored.model_copy(update={"annotations": {FILE_PATH: path.name}})

    async def _put(self, text: str, media_type: str) -> Descriptor:
        return await self._objects.put_bytes(text.encode(), media_type)

    def _reason(self, variant: Variant) -> str:
        choice = self._result.choice
        if variant.recipe == choice.recipe:
            return choice.reason
        if not variant.verdict.passed:
            return "; ".join(variant.verdict.reasons)
        if better := self._dominated.get(variant.recipe):
            return f"passes, but is dominated by {better}, which is no worse in bytes, KL and tokens/s"
        return f"passes, not chosen; {choice.reason}"
