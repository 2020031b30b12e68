"""The uploader stores the artifacts of a job and gives a reason for each variant."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.evaluation import Evaluation, Verdict
from slmops.contracts.manifest import FILE_PATH
from slmops.contracts.model import ModelFile
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.optimizer.domain.choice import choose
from slmops.optimizer.domain.front import front
from slmops.optimizer.domain.result import JobResult, ReferenceFigures, Variant
from slmops.optimizer.jobs.report import Report
from slmops.optimizer.jobs.uploader import ArtifactUploader, JobReport
from slmops.optimizer.recipes.restore import restore
from slmops.optimizer.recipes.spec import JobSpec
from slmops.optimizer.store import Measured, Outcome, VariantOutcome

SOURCE = (ModelFile(path="model.gguf", digest=digest_of(b"gguf"), size_bytes=4),)


class Memory:
    """The methods of the object store that the uploader uses."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}

    async def put_bytes(self, data: bytes, media_type: str) -> Descriptor:
        self.blobs[digest_of(data)] = data
        return Descriptor.of(data, media_type)

    async def put_file(self, path: Path, media_type: str) -> Descriptor:
        return await self.put_bytes(path.read_bytes(), media_type)


def recipe(name: str) -> Recipe:
    quantize = PassSpec(pass_="quantize", params={"bits": 4, "windows": 1 + len(name)})
    return Recipe(name=name, passes=(quantize, PassSpec(pass_="pack")))


def variant(work: Path, name: str, size: int, kl: float, *, passed: bool = True) -> Variant:
    """Returns a variant and writes its folder, as the job does."""
    path = f"passes/pack-{name}"
    (work / path).mkdir(parents=True)
    (work / path / "model.onnx").write_text(f"weights of {name}")
    (work / "evaluations" / "1").mkdir(parents=True, exist_ok=True)
    (work / "evaluations" / "1" / f"pack-{name}.json").write_text("{}")
    (work / "claim.json").write_text("{}")
    verdict = Verdict(passed=passed, reasons=() if passed else (f"kl {kl} > 0.3",))
    evaluation = Evaluation(bytes=size, kl=kl, tokens_per_s=50)
    return Variant(recipe=name, definition=recipe(name), evaluation=evaluation, verdict=verdict, path=path, seconds=1)


def failed(name: str) -> Variant:
    verdict = Verdict(passed=False, reasons=("no matrix",))
    return Variant(recipe=name, definition=recipe(name), evaluation=None, verdict=verdict, path=None, seconds=1)


def keeper(objects: Memory, work: Path, *variants: Variant, known: tuple[Measured, ...] = (), search: bool = False):
    spec = JobSpec(
        recipes=tuple(one.definition for one in variants),
        search=SearchSpec(budget=timedelta(minutes=1)) if search else None,
    )
    result = JobResult(
        reference=ReferenceFigures(architecture="llama", parameters=1, ppl=10, windows=6, window_tokens=256),
        variants=variants,
        front=front(variants),
        choice=choose(variants, spec.profile),
        timings_s={},
    )
    return ArtifactUploader(objects, spec, SOURCE, work, known, result)  # type: ignore[arg-type]


def by_recipe(outcome: Outcome) -> dict[str, VariantOutcome]:
    return {one.recipe: one for one in outcome.variants}


async def test_files_of_passed_variants_are_stored_and_files_of_refused_ones_only_listed(tmp_path: Path) -> None:
    objects = Memory()
    mine = keeper(objects, tmp_path, variant(tmp_path, "good", 10, 0.1), variant(tmp_path, "bad", 5, 9, passed=False))
    kept = by_recipe(await mine.upload())
    assert objects.blobs[kept["good"].files[0].digest] == b"weights of good"
    assert kept["bad"].files[0].digest not in objects.blobs
    assert (kept["good"].passed, kept["good"].chosen) == (True, True)
    assert (kept["bad"].passed, kept["bad"].reason) == (False, "kl 9 > 0.3")
    assert {one.definition.name: one.stored for one in mine.measured} == {"good": True, "bad": False}


async def test_a_report_contains_everything_needed_to_measure_again(tmp_path: Path) -> None:
    objects = Memory()
    kept = by_recipe(await keeper(objects, tmp_path, variant(tmp_path, "good", 10, 0.1), failed("torn")).upload())
    assert kept["good"].report
    report = Report.model_validate_json(objects.blobs[kept["good"].report.digest])
    assert (report.recipe, report.reference_files) == (recipe("good"), SOURCE)
    assert report.variant_files == kept["good"].files
    assert report.evaluation == kept["good"].evaluation
    assert "torch" in report.tools
    assert (kept["torn"].report, kept["torn"].digest, kept["torn"].reason) == (None, None, "no matrix")


async def test_a_search_delivers_the_front_and_names_what_dominates_the_rest(tmp_path: Path) -> None:
    objects = Memory()
    variants = [
        variant(tmp_path, "small", 10, 0.2),
        variant(tmp_path, "fine", 20, 0.1),
        variant(tmp_path, "poor", 25, 0.15),
        variant(tmp_path, "huge", 90, 0.01, passed=False),
    ]
    (tmp_path / "front.png").write_bytes(b"png")
    (tmp_path / "front.svg").write_bytes(b"svg")
    outcome = await keeper(objects, tmp_path, *variants, search=True).upload()
    kept = by_recipe(outcome)
    assert [name for name, one in kept.items() if one.passed] == ["small", "fine"]
    assert [name for name, one in kept.items() if one.files[0].digest in objects.blobs] == ["small", "fine"]
    assert "dominated by fine" in kept["poor"].reason
    report = JobReport.model_validate_json(objects.blobs[outcome.report.digest])
    pictures = {picture.annotations[FILE_PATH]: objects.blobs[picture.digest] for picture in report.pictures}
    assert pictures == {"front.png": b"png", "front.svg": b"svg"}
    assert {picture.media_type for picture in report.pictures} == {"image/png", "image/svg+xml"}
    assert report.front.recipes == ("small", "fine", "huge")  # of all variants, independent of the device


async def test_a_variant_requested_by_name_is_delivered_even_if_it_is_dominated(tmp_path: Path) -> None:
    variants = variant(tmp_path, "fine", 20, 0.1), variant(tmp_path, "poor", 25, 0.15)
    kept = by_recipe(await keeper(Memory(), tmp_path, *variants).upload())
    assert kept["poor"].passed
    assert kept["poor"].reason.startswith("passes, not chosen")


async def test_a_cached_variant_is_delivered_without_its_local_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    objects = Memory()
    one = keeper(objects, first, variant(first, "good", 10, 0.1))
    made = by_recipe(await one.upload())["good"]
    known = tuple(one.measured)
    second.mkdir()
    restore(second, known)
    there = variant(tmp_path / "third", "good", 10, 0.1)
    again = keeper(objects, second, there, known=known)
    assert by_recipe(await again.upload())["good"] == made
    assert again.measured == []
    assert json.loads(objects.blobs[made.report.digest])["recipe"]["name"] == "good"  # type: ignore[union-attr]


async def test_an_empty_folder_without_a_cached_variant_is_a_defect(tmp_path: Path) -> None:
    lost = variant(tmp_path, "lost", 10, 0.1)
    (tmp_path / "passes/pack-lost/model.onnx").unlink()
    with pytest.raises(KeyError):
        await keeper(Memory(), tmp_path, lost).upload()
