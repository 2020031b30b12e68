"""A search on a tiny Llama, in the process that the service starts, continues after a kill and returns a front."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from tiny_model import make_tiny_llama

from slmops.contracts.profile import EDGE_SMALL
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.contracts.search import SearchSpec
from slmops.optimizer.domain.result import PICTURES, JobResult
from slmops.optimizer.jobs.process import run_job
from slmops.optimizer.recipes.spec import JobSpec

MINUTE = timedelta(minutes=1)
TRIALS = 5
START = tuple(
    Recipe(name=f"int{bits}", passes=(PassSpec(pass_="quantize", params={"bits": bits}), PassSpec(pass_="pack")))
    for bits in (8, 4)
)
SPEC = JobSpec(recipes=START, search=SearchSpec(budget=MINUTE, max_trials=TRIALS))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def trials(work: Path) -> list[bytes]:
    return [line for log in work.glob("evaluations/*/trials.jsonl") for line in log.read_bytes().splitlines()]


async def run(llama: Path, work: Path, reported: list[str], cancel_after: int = TRIALS + 1) -> JobResult:
    """Cancels the job, which kills its process, after this many trials."""

    async def progress(step: str, done: int, of: int) -> None:
        assert 0 <= done < of
        reported.append(step)
        if len(trials(work)) >= cancel_after and task is not None:
            task.cancel()

    task = asyncio.current_task()
    return await run_job(llama, work, SPEC, progress, 2 * MINUTE)


@pytest.fixture(scope="module")
def searched(llama, tmp_path_factory) -> tuple[Path, JobResult, list[str], list[bytes]]:
    """Returns a search that was killed after two trials and restarted, its progress, and the trials before the kill."""
    work, reported = tmp_path_factory.mktemp("work"), []
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run(llama, work, [], cancel_after=2))
    before = trials(work)
    return work, asyncio.run(run(llama, work, reported)), reported, before


def test_a_search_returns_a_front_a_choice_and_all_trials(searched):
    _, result, _, _ = searched
    assert [variant.recipe for variant in result.variants][:2] == ["int8", "int4"]
    assert len({variant.definition.digest for variant in result.variants}) == TRIALS
    by_name = {variant.recipe: variant for variant in result.variants}
    measured = {name for name, variant in by_name.items() if variant.evaluation}
    assert set(result.front.recipes) | set(result.front.dominated) == measured
    sizes = [by_name[name].evaluation.bytes for name in result.front.recipes]
    assert sizes == sorted(sizes)
    chosen = by_name[result.choice.recipe]
    assert chosen.verdict.passed
    assert chosen.evaluation.bytes < by_name["int4"].evaluation.bytes
    assert f"that pass {EDGE_SMALL.name}" in result.choice.reason and "the runner-up" in result.choice.reason


def test_a_search_draws_the_front(searched):
    work, result, _, _ = searched
    assert [(work / name).read_bytes()[:4] for name in PICTURES] == [b"\x89PNG", b"<?xm"]
    assert all(variant.recipe in (work / "front.svg").read_text() for variant in result.variants)


def test_a_restarted_search_repeats_no_trial(searched):
    work, result, reported, before = searched
    assert len(before) >= 2
    assert trials(work)[: len(before)] == before
    assert len(trials(work)) == len(result.variants) == TRIALS
    done = {variant.recipe for variant in result.variants[: len(before)]}
    assert not [step for step in reported if step.partition(":")[0] in done]


def test_a_search_reports_its_best_result_so_far(searched):
    known = [step for step in searched[2] if step.startswith("best so far: ")]
    assert len(known) == TRIALS - len(searched[3])
    assert all(" on the front, 0:0" in step and step.endswith(" left") for step in known)
