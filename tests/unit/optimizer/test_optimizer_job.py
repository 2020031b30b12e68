"""A whole job on a tiny Llama, as the process that the service starts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.errors import InvalidModel, NotAModel, NotFound, OptimizationFailed
from slmops.contracts.profile import EDGE_SMALL
from slmops.optimizer.domain import judge
from slmops.optimizer.evaluate import Reference, evaluate, reference
from slmops.optimizer.result import JobResult
from slmops.optimizer.runner import run_job

MINUTE = timedelta(minutes=1)


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
    result = asyncio.run(run_job(llama, work, ["int8", "int4"], EDGE_SMALL, progress, MINUTE))
    return work, result, progress


def test_a_job_makes_measures_and_chooses(finished):
    work, result, progress = finished
    assert progress == ["read", "reference", "quantize int8", "evaluate int8", "quantize int4", "evaluate int4"]
    int8, int4 = result.variants
    assert 0 < int8.evaluation.kl < int4.evaluation.kl < EDGE_SMALL.max_kl
    assert int4.evaluation.top1 < int8.evaluation.top1 <= 1
    assert int4.evaluation.bytes < int8.evaluation.bytes
    assert result.choice.recipe == "int4"
    for variant in result.variants:
        assert variant.verdict.passed, variant.verdict.reasons
        files = {path.name for path in (work / variant.path).iterdir()}
        assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= files
        assert variant.evaluation.bytes == sum(path.stat().st_size for path in (work / variant.path).iterdir())


def test_the_memory_is_the_variants_and_not_the_jobs(finished):
    for variant in finished[1].variants:  # the job itself holds torch: 500 MB and more
        assert 20_000_000 < variant.evaluation.peak_rss_bytes < 250_000_000


async def test_a_finished_job_started_again_repeats_no_build(finished, llama, tmp_path):
    work = Path(shutil.copytree(finished[0], tmp_path / "work"))
    model = work / "variants" / "int4" / "model.onnx"
    before = model.stat().st_mtime_ns
    shutil.rmtree(work / "variants" / "int8")
    (work / "evaluations" / "int8.json").unlink()
    again = await run_job(llama, work, ["int8", "int4"], EDGE_SMALL, Progress(), MINUTE)
    assert model.stat().st_mtime_ns == before
    assert again.variants[1] == finished[1].variants[1]
    assert again.variants[0].evaluation.kl == finished[1].variants[0].evaluation.kl


async def test_a_tighter_profile_refuses_by_name_value_and_limit(finished, llama, tmp_path):
    work = Path(shutil.copytree(finished[0], tmp_path / "work"))
    strict = EDGE_SMALL.model_copy(update={"name": "strict", "max_kl": 1e-9})
    result = await run_job(llama, work, ["int8", "int4"], strict, Progress(), MINUTE)
    assert result.choice.recipe is None
    assert result.choice.reason.startswith("nothing passes strict; int8 refused: kl ")


def test_a_variant_with_nan_in_its_weights_never_passes(finished, tmp_path):
    work = finished[0]
    broken = Path(shutil.copytree(work / "variants" / "int8", tmp_path / "broken"))
    data = broken / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)  # as float32, every bit set is a NaN
    evaluation = evaluate(broken, reference(work / "reference"))
    assert np.isnan(evaluation.kl)
    assert not judge(evaluation, EDGE_SMALL).passed


def test_a_variant_equal_to_its_reference_diverges_by_nothing(finished):
    """The reference's own onnx build in float32, so only the order of additions differs."""
    from slmops.optimizer.quantize import Recipe, quantize

    work = finished[0]
    against: Reference = reference(work / "reference")
    exact = evaluate(quantize(work / "reference", work / "fp32", Recipe("fp32", "fp32")), against)
    assert exact.kl == pytest.approx(0, abs=1e-4)
    assert exact.top1 > 0.995
    assert exact.ppl == pytest.approx(exact.reference_ppl, rel=1e-3)


async def test_bad_input_comes_back_as_its_typed_error(tmp_path, llama):
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    with pytest.raises(NotAModel) as caught:
        await run_job(text, tmp_path / "a", ["int4"], EDGE_SMALL, Progress(), MINUTE)
    assert caught.value.where == str(text)
    with pytest.raises(NotFound, match="int3"):
        await run_job(llama, tmp_path / "b", ["int3"], EDGE_SMALL, Progress(), MINUTE)


async def test_weights_that_do_not_fit_the_configuration_are_an_invalid_model(llama, tmp_path):
    broken = Path(shutil.copytree(llama, tmp_path / "hf"))
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"hidden_size": 64', '"hidden_size": 96'))
    with pytest.raises(InvalidModel):
        await run_job(broken, tmp_path / "work", ["int4"], EDGE_SMALL, Progress(), MINUTE)


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
        if b"slmops.optimizer.job" in arguments and str(work).encode() in arguments:
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
        if step.startswith("evaluate") and not started.done():
            started.set_result(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", remember)
        job = asyncio.create_task(run_job(llama, tmp_path, ["int4"], EDGE_SMALL, on_progress, MINUTE))
        await started
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    assert not _members(created[0])
    result = await run_job(llama, tmp_path, ["int4"], EDGE_SMALL, Progress(), MINUTE)
    assert result.choice.recipe == "int4"


async def test_a_job_does_not_outlive_the_service_that_was_killed(llama, tmp_path):
    script = f"""
import asyncio, datetime, pathlib
from slmops.contracts.profile import EDGE_SMALL
from slmops.optimizer.runner import run_job
async def tell(step, done, of): print(step, flush=True)
asyncio.run(run_job(pathlib.Path({str(llama)!r}), pathlib.Path({str(tmp_path)!r}), ["int4"], EDGE_SMALL, tell,
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
        await run_job(llama, tmp_path, ["int4"], EDGE_SMALL, Progress(), timedelta(milliseconds=300))


async def test_a_killed_process_is_a_failed_job_with_the_end_of_its_log(llama, tmp_path):
    async def kill(step: str, done: int, of: int) -> None:
        for job in _jobs_in(tmp_path):
            os.kill(job, signal.SIGKILL)

    with pytest.raises(OptimizationFailed, match="code -9"):
        await run_job(llama, tmp_path, ["int4"], EDGE_SMALL, kill, MINUTE)
