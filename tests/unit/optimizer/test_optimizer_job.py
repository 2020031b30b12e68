"""A complete job on a tiny Llama, in the process that the service starts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.errors import (
    InvalidMessage,
    InvalidModel,
    InvalidRecipe,
    NotAModel,
    NotEnoughMemory,
    OptimizationFailed,
)
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.profile import EDGE_SMALL, DeviceProfile
from slmops.contracts.prompts.golden import GoldenPrompt
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.kit.modelfile import inspect
from slmops.optimizer.domain.gate import judge, shown
from slmops.optimizer.domain.result import JobResult
from slmops.optimizer.intake import needed_bytes
from slmops.optimizer.jobs.main import Job
from slmops.optimizer.jobs.process import run_job
from slmops.optimizer.measure.evaluate import evaluate, reference
from slmops.optimizer.recipes.spec import JobSpec

MINUTE = timedelta(minutes=1)


def recipe(name: str, **params: object) -> Recipe:
    return Recipe(name=name, passes=(PassSpec(pass_="quantize", params=params), PassSpec(pass_="pack")))


INT8, INT4 = recipe("int8", bits=8), recipe("int4")
FAILING = Recipe(  # special tokens and bytes are more than one token
    name="tiny-vocabulary", passes=(PassSpec(pass_="prune-vocabulary", params={"size": 1}), *INT4.passes)
)
SPEC = JobSpec(recipes=(INT8, INT4, FAILING))
ONE = JobSpec(recipes=(INT4,))


class Progress(list[str]):
    async def __call__(self, step: str, done: int, of: int) -> None:
        assert 0 <= done < of
        self.append(step)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory) -> tuple[Path, JobResult, Progress]:
    work, progress = tmp_path_factory.mktemp("work"), Progress()
    result = asyncio.run(run_job(llama, work, SPEC, progress, MINUTE))
    return work, result, progress


def again(llama: Path, work: Path, spec: JobSpec) -> JobResult:
    """Runs the job again in the same folder, in this process; finished steps are not repeated."""
    return Job(llama, work, spec, lambda line: None).run()


def test_a_job_makes_measures_and_chooses(finished):
    work, result, progress = finished
    assert progress == [
        *("read", "export", "reference"),
        *("int8: quantize", "int8: pack", "int8: evaluate"),
        *("int4: quantize", "int4: pack", "int4: evaluate"),
        "tiny-vocabulary: prune-vocabulary",
    ]
    int8, int4, _ = result.variants
    assert 0 < int8.evaluation.kl < int4.evaluation.kl < EDGE_SMALL.max_kl
    assert int4.evaluation.top1 < int8.evaluation.top1 <= 1
    assert int4.evaluation.bytes < int8.evaluation.bytes
    assert result.choice.recipe == "int4"
    for variant in (int8, int4):
        assert variant.verdict.passed, variant.verdict.reasons
        files = {path.name for path in (work / variant.path).iterdir()}
        assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= files
        assert variant.evaluation.bytes == sum(path.stat().st_size for path in (work / variant.path).iterdir())
        assert variant.definition.passes[0].params["method"] == "searched"  # defaults are written out


def test_a_recipe_that_fails_is_a_refused_variant_with_its_reason(finished):
    failed = finished[1].variants[2]
    assert (failed.evaluation, failed.path) == (None, None)
    assert failed.verdict.reasons == ("259 special tokens and bytes must stay, but size is 1. Use a larger size.",)


def test_the_memory_is_the_variants_and_not_the_jobs(finished):
    for variant in finished[1].variants[:2]:  # the job itself has torch loaded: 500 MB and more
        assert 20_000_000 < variant.evaluation.peak_rss_bytes < 250_000_000


def test_a_finished_job_started_again_repeats_no_pass(finished, llama):
    work = finished[0]
    int8, int4, _ = finished[1].variants
    model = work / int4.path / "model.onnx"
    before = model.stat().st_mtime_ns
    shutil.rmtree(work / int8.path)
    for measured in work.glob(f"evaluations/*/{Path(int8.path).name}.json"):
        measured.unlink()
    found = again(llama, work, SPEC)
    assert model.stat().st_mtime_ns == before
    assert found.variants[1].evaluation == int4.evaluation
    assert found.variants[0].path == int8.path
    # Not exactly, because threads add in a different order each time.
    assert found.variants[0].evaluation.kl == pytest.approx(int8.evaluation.kl, rel=1e-2)


def test_a_tighter_profile_refuses_by_name_value_and_limit(finished, llama, tmp_path):
    work = Path(shutil.copytree(finished[0], tmp_path / "work", symlinks=True))
    strict = EDGE_SMALL.model_copy(update={"name": "strict", "max_kl": 1e-9})
    result = again(llama, work, SPEC.model_copy(update={"profile": strict}))
    assert result.choice.recipe is None
    assert result.choice.reason.startswith("nothing passes strict; int8 refused: kl_high ")
    assert result.variants[1].evaluation == finished[1].variants[1].evaluation  # measured once


def test_golden_prompts_that_the_profile_requires_are_run(finished, llama, tmp_path):
    work = Path(shutil.copytree(finished[0], tmp_path / "work", symlinks=True))
    demanding = EDGE_SMALL.model_copy(update={"all_golden": True})
    question = GoldenPrompt(prompt="What is the capital of France?", expect=("no model of this size knows",))
    spec = JobSpec(recipes=(INT4,), profile=demanding, golden=(question,))
    assert again(llama, work, spec).variants[0].verdict.reasons == ("golden_passed 0 < 1",)
    unasked = JobSpec(recipes=(INT4,), profile=demanding)
    assert again(llama, work, unasked).variants[0].verdict.reasons == (
        "golden_passed not measured, must be at least 1",
    )


def test_a_recipe_that_needs_too_much_memory_is_refused_and_the_others_are_made(finished, llama, tmp_path):
    work = Path(shutil.copytree(finished[0], tmp_path / "work", symlinks=True))
    facts = inspect(llama)
    limit = (needed_bytes(facts) + needed_bytes(facts, calibrated=True)) // 2
    spec = JobSpec(recipes=(INT4, recipe("gptq", method="gptq")), memory_limit_bytes=limit)
    int4, calibrated = again(llama, work, spec).variants
    assert int4.evaluation == finished[1].variants[1].evaluation
    assert calibrated.evaluation is None
    assert "of memory; 0.903 GB are the job's limit" in calibrated.verdict.reasons[0]


def limited(**limits: int) -> DeviceProfile:
    return EDGE_SMALL.model_copy(update=limits)


def test_a_variant_with_too_many_bytes_is_not_measured(finished, llama, tmp_path):
    """Measuring takes a third of a job."""
    work = Path(shutil.copytree(finished[0], tmp_path / "work", symlinks=True))
    shutil.rmtree(work / "evaluations")
    int8, int4 = (variant.evaluation.bytes for variant in finished[1].variants[:2])
    steps: list[str] = []
    spec = JobSpec(recipes=(INT8,), profile=limited(max_package_bytes=(int8 + int4) // 2))
    (found,) = Job(llama, work, spec, lambda line: steps.append(str(line.get("step")))).run().variants
    assert found.evaluation == Evaluation(bytes=int8)
    assert [reason.split()[0] for reason in found.verdict.reasons] == ["bytes"]
    assert not any((work / "evaluations").glob("*/*.json"))


def test_a_recipe_that_is_certainly_too_large_is_not_run(finished, llama, tmp_path):
    work = Path(shutil.copytree(finished[0], tmp_path / "work", symlinks=True))
    shutil.rmtree(work / "passes")
    limit = inspect(llama).parameters * 6 // 8  # between 4 and 8 bits per weight
    pruned = Recipe(name="p", passes=(PassSpec(pass_="prune-vocabulary", params={"size": 1}), *INT4.passes))
    spec = JobSpec(recipes=(INT8, pruned), profile=limited(max_package_bytes=limit))
    int8, _ = again(llama, work, spec).variants
    assert int8.verdict.reasons == (f"bytes at least {shown('bytes', limit * 8 // 6)} > {shown('bytes', limit)}",)
    assert not list((work / "passes").glob("quantize*"))


def test_a_model_that_is_too_large_for_every_recipe_is_refused_before_it_is_read(llama, tmp_path):
    limit = inspect(llama).parameters * 3 // 8
    spec = JobSpec(recipes=(INT8, INT4), profile=limited(max_package_bytes=limit))
    with pytest.raises(OptimizationFailed, match="too large for edge-small: each variant has at least"):
        Job(llama, tmp_path / "work", spec, lambda line: None)
    assert not (tmp_path / "work" / "reference").exists()


def _planted(work: Path, path: Path, bad: str, tmp_path: Path) -> Evaluation:
    """`path`'s variant with its weights replaced by something bad, measured against the job's reference."""
    broken = Path(shutil.copytree(work / path, tmp_path / "broken"))
    data = broken / "model.onnx.data"
    content = bytearray(data.read_bytes())
    if bad == "nan":
        content = bytearray(b"\xff" * len(content))  # as float16 and float32, every bit set is a NaN
    else:
        content[len(content) // 2 :] = np.random.default_rng(0).permutation(content[len(content) // 2 :]).tobytes()
    data.write_bytes(content)
    return evaluate(broken, reference(work / "reference"))


@pytest.mark.parametrize("bad", ["nan", "shuffled"])
def test_a_planted_bad_model_is_refused_and_the_metric_named(finished, tmp_path, bad):
    evaluation = _planted(finished[0], Path(finished[1].variants[0].path), bad, tmp_path)
    reasons = judge(evaluation, EDGE_SMALL).reasons
    assert {"kl_high", "top1_low"} <= {reason.split()[0] for reason in reasons}


def test_another_models_variant_is_refused(finished, tmp_path):
    """The weights are valid, but those of another model."""
    other = reference(make_tiny_llama(tmp_path / "other", seed=1))
    reasons = judge(evaluate(finished[0] / finished[1].variants[0].path, other), EDGE_SMALL).reasons
    assert {"kl_high", "top1_low"} <= {reason.split()[0] for reason in reasons}


async def test_bad_input_comes_back_as_its_typed_error(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    with pytest.raises(NotAModel) as caught:
        await run_job(text, tmp_path / "a", SPEC, Progress(), MINUTE)
    assert caught.value.where == str(text)


def test_a_job_that_cannot_succeed_is_refused_before_any_work(llama, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lighthouse wrote in his book every evening: the wind, the ships and the birds.")
    contradiction = Recipe(name="bad", passes=(PassSpec(pass_="pack"), PassSpec(pass_="quantize")))
    meaningless = recipe("bad", bits=8, upgraded_share=0.5)
    for error, spec in (
        (InvalidRecipe, JobSpec(recipes=(INT4, contradiction))),
        (InvalidRecipe, JobSpec(recipes=(INT4, meaningless))),
        (InvalidMessage, JobSpec(recipes=(INT4,), evaluation_texts=(empty,))),
        (InvalidMessage, JobSpec(recipes=(INT4,), evaluation_texts=(text,), calibration_texts=(text,))),
        (NotEnoughMemory, JobSpec(recipes=(INT4,), memory_limit_bytes=1000)),
    ):
        with pytest.raises(error):
            Job(llama, tmp_path / "work", spec, lambda line: None)
        assert not (tmp_path / "work" / "reference").exists()


def test_recipes_of_a_job_have_unique_names():
    with pytest.raises(ValueError, match="several recipes 'int4'"):
        JobSpec(recipes=(INT4, recipe("int4", block=16)))


async def test_weights_that_do_not_fit_the_configuration_are_an_invalid_model(llama, tmp_path):
    broken = Path(shutil.copytree(llama, tmp_path / "hf"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    with pytest.raises(InvalidModel):
        await run_job(broken, tmp_path / "work", SPEC, Progress(), MINUTE)


def _members(group: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def _jobs_in(work: Path) -> list[int]:
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = cmdline.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if b"slmops.optimizer.jobs.main" in arguments and str(work).encode() in arguments:
            found.append(int(cmdline.parent.name))
    return found


async def test_a_cancelled_job_leaves_no_process_and_can_be_continued(llama, tmp_path):
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    created: list[int] = []
    original = asyncio.create_subprocess_exec

    async def remember(*command: str, **options: object) -> asyncio.subprocess.Process:
        process = await original(*command, **options)
        created.append(process.pid)
        return process

    async def on_progress(step: str, done: int, of: int) -> None:
        if step.endswith("evaluate") and not started.done():
            started.set_result(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", remember)
        job = asyncio.create_task(run_job(llama, tmp_path, ONE, on_progress, MINUTE))
        await started
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    assert not _members(created[0])
    result = await run_job(llama, tmp_path, ONE, Progress(), MINUTE)
    assert result.choice.recipe == "int4"


async def test_a_job_does_not_outlive_the_service_that_was_killed(llama, tmp_path):
    script = f"""
import asyncio, datetime, pathlib
from slmops.optimizer.jobs.process import run_job
from slmops.optimizer.recipes.spec import JobSpec
spec = JobSpec.model_validate_json({ONE.model_dump_json(by_alias=True)!r})
async def tell(step, done, of): print(step, flush=True)
asyncio.run(run_job(pathlib.Path({str(llama)!r}), pathlib.Path({str(tmp_path)!r}), spec, tell,
                    datetime.timedelta(minutes=1)))
"""
    service = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert service.stdout
    assert await service.stdout.readline() == b"read\n"
    (job,) = _jobs_in(tmp_path)
    service.kill()
    await service.wait()
    for _ in range(100):
        if not _jobs_in(tmp_path):
            return
        await asyncio.sleep(0.1)
    os.kill(job, signal.SIGKILL)
    pytest.fail("the job is still at work")


async def test_a_job_that_takes_too_long_is_stopped(llama, tmp_path):
    with pytest.raises(OptimizationFailed, match="longer than"):
        await run_job(llama, tmp_path, ONE, Progress(), timedelta(milliseconds=300))


async def test_a_killed_process_is_a_failed_job_that_says_so(llama, tmp_path):
    async def kill(step: str, done: int, of: int) -> None:
        for job in _jobs_in(tmp_path):
            os.kill(job, signal.SIGKILL)

    with pytest.raises(NotEnoughMemory, match="code -9"):
        await run_job(llama, tmp_path, ONE, kill, MINUTE)
