"""Distillation: what pruning cost comes back, within the budget, also if the process is killed on the way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from float_models import context, divergence, logits, make_model, unseen
from pydantic import ValidationError
from tiny_model import VOCABULARY

from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.passes import decoder, distill, prune_depth, prune_vocabulary, prune_width, sparsify
from slmops.optimizer.passes.distill import Distill
from slmops.optimizer.passes.prune_depth import PruneDepth
from slmops.optimizer.passes.prune_vocabulary import PruneVocabulary
from slmops.optimizer.passes.prune_width import PruneWidth
from slmops.optimizer.passes.sparsify import Sparsify

STEP = 256
SHORT = Distill(tokens=20 * STEP, step_tokens=STEP, learning_rate=1e-3, checkpoint_s=0)
LONGER = Distill(tokens=60 * 512, step_tokens=512, learning_rate=1e-3)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model"
    prune_width.run(teacher, out, PruneWidth(share=0.5), context(teacher))
    return out


def lost(teacher: Path, student: Path) -> float:
    return divergence(*(logits(decoder.load(folder), unseen()) for folder in (teacher, student)))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def zeros(folder: Path):
    return {name: weight == 0 for name, weight in decoder.load(folder).named_parameters() if weight.ndim == 2}


@pytest.mark.parametrize("hidden", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_what_was_lost_comes_back_on_a_text_that_was_not_trained_on(teacher, pruned, tmp_path, hidden):
    told = []
    longer = LONGER.model_copy(update={"hidden": hidden})
    distill.run(pruned, tmp_path / "out", longer, context(teacher, tell=lambda what, share: told.append((what, share))))
    assert lost(teacher, tmp_path / "out") < 0.92 * lost(teacher, pruned)
    assert not list(tmp_path.glob("*.checkpoint"))
    assert all(what.startswith("distilling, KL 0.") and 0 <= share < 1 for what, share in told)


@pytest.mark.slow
def test_a_model_without_some_of_the_layers_learns_too(teacher, tmp_path):
    prune_depth.run(teacher, tmp_path / "given", PruneDepth(layers=1), context(teacher))
    distill.run(tmp_path / "given", tmp_path / "out", LONGER, context(teacher))
    assert lost(teacher, tmp_path / "out") < 0.9 * lost(teacher, tmp_path / "given")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_others(teacher, pruned, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        distill.run(pruned, tmp_path / name, SHORT, context(teacher, seed=seed))
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != weights(tmp_path / "other")


def test_a_killed_run_continues_and_ends_where_it_would_have(teacher, pruned, tmp_path, monkeypatch):
    distill.run(pruned, tmp_path / "whole", SHORT, context(teacher))
    shares: list[float] = []

    def kill(what: str, share: float) -> None:
        shares.append(share)
        if len(shares) == 10:
            raise Killed

    monkeypatch.setattr(distill, "TELL_S", 0)
    with pytest.raises(Killed):
        distill.run(pruned, tmp_path / "out", SHORT, context(teacher, tell=kill))
    assert not (tmp_path / "out").exists()
    again: list[float] = []
    distill.run(pruned, tmp_path / "out", SHORT, context(teacher, tell=lambda what, share: again.append(share)))
    assert again[0] == shares[-1] > 0
    assert len(again) == 20 - 9
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_time_is_a_budget_that_a_kill_does_not_refill(teacher, pruned, tmp_path, monkeypatch):
    params = Distill(minutes=3 / 60, step_tokens=STEP, checkpoint_s=0)
    clock = itertools.count(step=0.01)  # a reading takes a hundredth of a second, however busy the machine is

    def kill(what: str, share: float) -> None:
        if share > 0.6:
            raise Killed

    monkeypatch.setattr(distill, "TELL_S", 0)
    with pytest.raises(Killed):
        distill.run(pruned, tmp_path / "out", params, context(teacher, tell=kill, clock_s=lambda: next(clock)))
    again: list[float] = []
    told = context(teacher, tell=lambda what, share: again.append(share), clock_s=lambda: next(clock))
    distill.run(pruned, tmp_path / "out", params, told)
    assert 0.5 < again[0] <= again[-1] < 1


@pytest.mark.slow
def test_zeros_stay_zero_and_the_others_make_up_for_them(teacher, tmp_path):
    sparsify.run(teacher, tmp_path / "given", Sparsify(pattern="2:4"), context(teacher))
    distill.run(tmp_path / "given", tmp_path / "out", LONGER, context(teacher))
    before, after = zeros(tmp_path / "given"), zeros(tmp_path / "out")
    assert sum(int(mask.sum()) for mask in before.values()) > 50_000
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lost(teacher, tmp_path / "out") < 0.9 * lost(teacher, tmp_path / "given")


@pytest.mark.slow
def test_embedding_and_head_stay_one_and_as_they_were(teacher, pruned, tmp_path):
    distill.run(pruned, tmp_path / "out", SHORT, context(teacher))
    before, after = decoder.load(pruned), decoder.load(tmp_path / "out")
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.slow
def test_a_smaller_vocabulary_is_compared_with_what_the_teacher_says_of_it(teacher, tmp_path, monkeypatch):
    """Nothing else was cut, so that only a mistaken token could make a difference."""
    seen = [*range(3, 259), *range(290, VOCABULARY, 3)]  # bytes, and some words: numbers change
    windows, told = np.random.default_rng(0).choice(seen, (100, 64)), []
    given = context(teacher, windows, tell=lambda what, share: told.append(what))
    prune_vocabulary.run(teacher, tmp_path / "given", PruneVocabulary(), given)
    monkeypatch.setattr(distill, "TELL_S", 0)
    # The teacher's mass on the lost words is shared out: what is left is the same distribution.
    distill.run(tmp_path / "given", tmp_path / "out", SHORT.model_copy(update={"learning_rate": 1e-9}), given)
    assert {what.removeprefix("distilling, KL ").lstrip("-") for what in told} == {"0.000"}


def test_a_training_that_runs_away_is_an_error(teacher, pruned, tmp_path):
    wild = SHORT.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(OptimizationFailed, match="diverged"):
        distill.run(pruned, tmp_path / "out", wild, context(teacher))


def test_a_distillation_without_end_is_refused():
    with pytest.raises(ValidationError, match="budget"):
        Distill()
    assert Distill(minutes=1, tokens=10).share(30.0, 2) == 0.5
    assert Distill(minutes=1, tokens=10).share(30.0, 9) == 0.9
