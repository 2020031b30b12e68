"""A job is refused before it starts if it needs more memory or disk than available."""

from __future__ import annotations

import os

import pytest

from slmops.contracts.errors import DiskFull, NotEnoughMemory
from slmops.kit.modelfile import ModelFacts
from slmops.optimizer.jobs.capacity import (
    COPIES_PER_VARIANT,
    Memory,
    check_disk,
    check_memory,
    copies,
    free_memory_bytes,
    memory,
)
from slmops.optimizer.recipes.library import recipe_named


def facts(parameters: int) -> ModelFacts:
    return ModelFacts(architecture="llama", parameters=parameters, size_bytes=4 * parameters, format="hf")


def test_a_model_that_no_host_can_hold_is_refused_with_both_figures():
    with pytest.raises(NotEnoughMemory, match=r"takes about .* of memory; .* GB are free"):
        check_memory(facts(10**15), memory(None))


def test_the_jobs_memory_limit_applies_if_it_is_below_the_hosts():
    with pytest.raises(NotEnoughMemory, match=r"0\.1 GB are the job's limit"):
        check_memory(facts(10**9), memory(100_000_000))
    assert memory(10**18).why == "free"
    check_memory(facts(100_000), Memory(10**9, "free"))


def test_a_recipe_that_uses_gradients_needs_more_memory():
    model, there = facts(134_515_008), Memory(4 * 10**9, "free")
    check_memory(model, there)
    check_memory(model, there, recipe_named("int4"))
    with pytest.raises(NotEnoughMemory, match=r"this recipe takes about .*; 4 GB are free") as caught:
        check_memory(model, there, recipe_named("int4-calibrated"))
    assert "without gptq" in str(caught.value.fix)


def test_free_memory_in_a_container_respects_its_limit(tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 1500\n")
    assert free_memory_bytes(tmp_path) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path) > 10**6
    assert free_memory_bytes(tmp_path / "no cgroup") > 10**6


def test_a_disk_without_room_is_refused_with_both_figures(tmp_path):
    with pytest.raises(DiskFull, match=r"takes about .* on the disk; .* are free") as caught:
        check_disk(facts(10**13), tmp_path, 1.2)
    assert caught.value.where == str(tmp_path)
    check_disk(facts(1000), tmp_path, 1.2)


def test_a_recipe_that_prunes_needs_disk_for_float_copies():
    assert copies(recipe_named("int8")) == COPIES_PER_VARIANT
    assert copies(recipe_named("student")) == COPIES_PER_VARIANT + 3  # pruned, distilled, exported


def test_files_of_an_earlier_run_reduce_the_needed_disk(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    too_large = facts(round(1.1 * free / (4 * 3.6)))
    with pytest.raises(DiskFull):
        check_disk(too_large, tmp_path, 0.6)
    (tmp_path / "passes").mkdir()
    with (tmp_path / "passes" / "weights").open("wb") as file:
        file.truncate(round(0.2 * free))  # a hole: no byte of it is written
    check_disk(too_large, tmp_path, 0.6)
