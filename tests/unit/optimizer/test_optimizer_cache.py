"""A result is found again if and only if nothing that it depends on has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.model import ModelFile
from slmops.contracts.profile import EDGE_SMALL, DeviceProfile
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.optimizer.jobs import environment as environment_module
from slmops.optimizer.jobs.environment import environment
from slmops.optimizer.measure.texts import Text, Texts, read_texts
from slmops.optimizer.recipes.pipeline import TOOLS
from slmops.optimizer.recipes.restore import restore
from slmops.optimizer.store import Measured, Outcome, Results, VariantOutcome

PACKAGE = Path(str(environment_module.__file__)).parents[1]
BLOB = Descriptor.of(b"report", "application/json")
INT4 = Recipe(name="int4", passes=(PassSpec(pass_="quantize", params={"bits": 4}), PassSpec(pass_="pack")))
JOB = OptimizeJob(
    model="smollm2",
    version="1.0.0",
    digest=digest_of(b"weights"),
    format="gguf",
    files=(ModelFile(path="model.gguf", digest=digest_of(b"file"), size_bytes=4),),
    golden=Descriptor.of(b"questions", "application/jsonl"),
    profile=EDGE_SMALL,
    recipes=("int4",),
    definitions=(INT4,),
)
OUTCOME = Outcome(variants=(), reason="smallest of 1", report=BLOB)
MEASURED = Measured(
    definition=INT4,
    evaluation=Evaluation(bytes=7, kl=float("nan")),
    files=(),
    report=BLOB,
    stored=False,
    path="passes/pack-1",
    notes={"claim.json": "{}", "evaluations/1/pack-1.json": '{"bytes": 7}'},
)


class Memory:
    """An object store in memory. `collected` are blobs that garbage collection removed; all others exist."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.collected: set[Digest] = set()
        self.kept: set[Digest] = set()

    async def keep(self, digest: Digest) -> bool:
        self.kept.add(digest)
        return digest not in self.collected

    async def get_object(self, key: str) -> bytes | None:
        return self.objects.get(key)

    async def put_object(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    async def remove_old(self, prefix: str, before: datetime) -> int:
        raise NotImplementedError

    async def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self.objects if key.startswith(prefix)]


def limit(name: str) -> Any:
    """Returns a value that differs from that of edge-small for a field of a profile."""
    value = getattr(EDGE_SMALL, name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value // 2
    if isinstance(value, float):
        return value / 2
    return {"everyday": 0.5} if name == "min_accuracy" else "other" if isinstance(value, str) else 0.5


def other(**changes: Any) -> OptimizeJob:
    return JOB.model_copy(update=changes)


def with_params(params: dict[str, Any]) -> Recipe:
    return INT4.model_copy(update={"passes": (PassSpec(pass_="quantize", params=params), INT4.passes[1])})


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(other(digest=digest_of(b"others")), id="input"),
        pytest.param(other(definitions=(with_params({"bits": 8}),)), id="parameter"),
        pytest.param(other(definitions=(INT4.model_copy(update={"passes": INT4.passes[:1]}),)), id="pass"),
        pytest.param(other(recipes=("int4", "int8")), id="recipes"),
        pytest.param(other(golden=Descriptor.of(b"others", "application/jsonl")), id="golden prompts"),
        pytest.param(other(golden=None), id="no golden prompts"),
        pytest.param(other(search=SearchSpec()), id="search"),
        pytest.param(other(search=SearchSpec(budget=timedelta(minutes=1))), id="budget"),
        *(
            pytest.param(other(profile=EDGE_SMALL.model_copy(update={name: limit(name)})), id=f"profile {name}")
            for name in DeviceProfile.model_fields
        ),
    ],
)
async def test_another_job_is_a_miss(job: OptimizeJob) -> None:
    results = Results(Memory(), lambda: digest_of(b"here"))
    await results.put_outcome(JOB.work, OUTCOME)
    assert await results.outcome(job.work) is None


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(JOB, id="the same"),
        pytest.param(other(model="other", version="2.0.0"), id="by another name"),
        pytest.param(other(asked="again"), id="asked again"),
        pytest.param(other(definitions=(INT4.model_copy(update={"description": "New."}),)), id="described otherwise"),
    ],
)
async def test_the_same_work_is_a_hit(job: OptimizeJob) -> None:
    results = Results(Memory(), lambda: digest_of(b"here"))
    await results.put_outcome(JOB.work, OUTCOME)
    assert await results.outcome(job.work) == OUTCOME


FILE = ModelFile(path="model.onnx", digest=digest_of(b"made"), size_bytes=4)
PICTURE = Descriptor.of(b"picture", "image/png")
OF_VARIANT = Descriptor.of(b"of a variant", "application/json")


def variant(*, passed: bool) -> VariantOutcome:
    fields: dict[str, Any] = {"recipe": "int4", "digest": None, "evaluation": None, "chosen": passed, "reason": ""}
    return VariantOutcome(files=(FILE,), passed=passed, report=OF_VARIANT, **fields)


@pytest.mark.parametrize("gone", [BLOB.digest, FILE.digest, PICTURE.digest, OF_VARIANT.digest])
async def test_a_result_with_a_collected_blob_is_a_miss(gone: Digest) -> None:
    store = Memory()
    results = Results(store, lambda: digest_of(b"here"))
    outcome = OUTCOME.model_copy(update={"variants": (variant(passed=True),), "pictures": (PICTURE,)})
    await results.put_outcome(JOB.work, outcome)
    assert await results.outcome(JOB.work) == outcome
    assert store.kept == {BLOB.digest, FILE.digest, PICTURE.digest, OF_VARIANT.digest}
    store.collected.add(gone)
    assert await results.outcome(JOB.work) is None


async def test_a_refused_variant_needs_only_its_report() -> None:
    store = Memory()
    store.collected.add(FILE.digest)  # files of a refused variant are never stored
    results = Results(store, lambda: digest_of(b"here"))
    outcome = OUTCOME.model_copy(update={"variants": (variant(passed=False),)})
    await results.put_outcome(JOB.work, outcome)
    assert await results.outcome(JOB.work) == outcome
    await results.put_measured("source", MEASURED.model_copy(update={"files": (FILE,)}))
    assert len(await results.measured("source")) == 1


async def test_a_variant_with_a_collected_blob_is_made_again() -> None:
    store = Memory()
    results = Results(store, lambda: digest_of(b"here"))
    await results.put_measured("source", MEASURED.model_copy(update={"files": (FILE,), "stored": True}))
    assert len(await results.measured("source")) == 1
    store.collected.add(FILE.digest)
    assert await results.measured("source") == []


def changed_tool(tool: str) -> Callable[[pytest.MonkeyPatch, Path], Path]:
    def change(monkeypatch: pytest.MonkeyPatch, package: Path) -> Path:
        real = environment_module.version
        monkeypatch.setattr(environment_module, "version", lambda name: "0.0" if name == tool else real(name))
        return package

    return change


def changed_file(name: str) -> Callable[[pytest.MonkeyPatch, Path], Path]:
    def change(_: pytest.MonkeyPatch, package: Path) -> Path:
        with (package / name).open("a") as file:
            file.write("\n")
        return package

    return change


def changed_calibration(monkeypatch: pytest.MonkeyPatch, package: Path) -> Path:
    texts = Texts(read_texts().evaluation, Text("other", "Another text, of another machine."))
    monkeypatch.setattr(environment_module, "read_texts", lambda: texts)
    return package


def new_file(_: pytest.MonkeyPatch, package: Path) -> Path:
    (package / "passes" / "new.py").write_text("")
    return package


CHANGES = (
    *(pytest.param(changed_tool(tool), id=tool) for tool in (*TOOLS, "slmops-shared")),
    *(
        pytest.param(changed_file(name), id=name)
        for name in (
            "data/evaluation.txt",
            "data/everyday.jsonl",
            "measure/evaluate.py",
            "measure/benchmark.py",
            "passes/pack.py",
        )
    ),
    pytest.param(new_file, id="a new pass"),
    pytest.param(changed_calibration, id="calibration text"),
)


@pytest.mark.parametrize("change", CHANGES)
async def test_another_environment_is_a_miss_for_jobs_and_for_variants(
    change: Callable[[pytest.MonkeyPatch, Path], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))

    texts = read_texts()  # takes half a second; called several times below
    monkeypatch.setattr(environment_module, "read_texts", lambda: texts)

    def digest() -> str:
        return digest_of(repr(sorted(environment(package).items())).encode())

    memory, before = Memory(), digest()
    results = Results(memory, lambda: before)
    await results.put_outcome(JOB.work, OUTCOME)
    await results.put_measured("input", MEASURED)
    assert digest() == before
    assert await results.outcome(JOB.work) == OUTCOME
    assert repr(await results.measured("input")) == repr([MEASURED])  # compare text, because NaN does not equal NaN

    change(monkeypatch, package)
    later = Results(memory, digest)
    assert await later.outcome(JOB.work) is None
    assert await later.measured("input") == []


async def test_variants_are_cached_by_input_and_recipe() -> None:
    results = Results(Memory(), lambda: digest_of(b"here"))
    eight = MEASURED.model_copy(update={"definition": with_params({"bits": 8})})
    for one in (MEASURED, eight, MEASURED):
        await results.put_measured("input", one)
    assert len(await results.measured("input")) == 2
    assert await results.measured("another input") == []


def test_a_cached_variant_is_restored_into_its_folder_and_removed_by_the_next_restore(tmp_path: Path) -> None:
    restore(tmp_path, [MEASURED])
    assert (tmp_path / "evaluations/1/pack-1.json").read_text() == '{"bytes": 7}'
    assert (tmp_path / "claim.json").read_text() == "{}"
    assert list((tmp_path / "passes/pack-1").iterdir()) == []

    restore(tmp_path, [])  # another worker does not know it, so the job must make it
    assert not (tmp_path / "passes/pack-1").exists()


def test_a_variant_that_the_job_made_itself_is_not_replaced(tmp_path: Path) -> None:
    made = tmp_path / "passes/pack-1"
    made.mkdir(parents=True)
    (made / "model.onnx").write_text("weights")
    (tmp_path / "claim.json").write_text("{}")
    restore(tmp_path, [MEASURED])
    assert (made / "model.onnx").exists()
    assert not (tmp_path / "evaluations").exists()


def test_nothing_is_restored_into_a_folder_of_another_source(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"seed": 1}')
    restore(tmp_path, [MEASURED])
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]
