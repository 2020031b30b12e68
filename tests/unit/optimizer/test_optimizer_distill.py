"""Distillation recovers quality after pruning, within its budget, even if the process is killed."""

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
    """An exception that no code catches, in place of a kill."""


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
def test_distillation_recovers_quality_on_unseen_text(teacher, pruned, tmp_path, hidden):
    reported = []
    longer = LONGER.model_copy(update={"hidden": hidden})
    distill.run(
        pruned, tmp_path / "out", longer, context(teacher, tell=lambda what, share: reported.append((what, share)))
    )
    assert lost(teacher, tmp_path / "out") < 0.92 * lost(teacher, pruned)
    assert not list(tmp_path.glob("*.checkpoint"))
    assert all(what.startswith("distilling, KL 0.") and 0 <= share < 1 for what, share in reported)


@pytest.mark.slow
def test_distillation_recovers_a_model_with_fewer_layers(teacher, tmp_path):
    prune_depth.run(teacher, tmp_path / "given", PruneDepth(layers=1), context(teacher))
    distill.run(tmp_path / "given", tmp_path / "out", LONGER, context(teacher))
    assert lost(teacher, tmp_path / "out") < 0.9 * lost(teacher, tmp_path / "given")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_bytes(teacher, pruned, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        distill.run(pruned, tmp_path / name, SHORT, context(teacher, seed=seed))
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != weights(tmp_path / "other")


def test_a_killed_run_continues_and_gives_the_same_result(teacher, pruned, tmp_path, monkeypatch):
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


def test_a_restart_does_not_reset_the_time_budget(teacher, pruned, tmp_path, monkeypatch):
    params = Distill(minutes=3 / 60, step_tokens=STEP, checkpoint_s=0)
    clock = itertools.count(step=0.01)  # each reading advances it by 0.01 s, so a busy machine does not matter

    def kill(what: str, share: float) -> None:
        if share > 0.6:
            raise Killed

    monkeypatch.setattr(distill, "TELL_S", 0)
    with pytest.raises(Killed):
        distill.run(pruned, tmp_path / "out", params, context(teacher, tell=kill, clock_s=lambda: next(clock)))
    again: list[float] = []
    reported = context(teacher, tell=lambda what, share: again.append(share), clock_s=lambda: next(clock))
    distill.run(pruned, tmp_path / "out", params, reported)
    assert 0.5 < again[0] <= again[-1] < 1


@pytest.mark.slow
def test_zeros_stay_zero_and_the_other_weights_compensate(teacher, tmp_path):
    sparsify.run(teacher, tmp_path / "given", Sparsify(pattern="2:4"), context(teacher))
    distill.run(tmp_path / "given", tmp_path / "out", LONGER, context(teacher))
    before, after = zeros(tmp_path / "given"), zeros(tmp_path / "out")
    assert sum(int(mask.sum()) for mask in before.values()) > 50_000
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lost(teacher, tmp_path / "out") < 0.9 * lost(teacher, tmp_path / "given")


@pytest.mark.slow
def test_embedding_and_head_stay_tied_and_unchanged(teacher, pruned, tmp_path):
    distill.run(pruned, tmp_path / "out", SHORT, context(teacher))
    before, after = decoder.load(pruned), decoder.load(tmp_path / "out")
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.slow
def test_a_pruned_vocabulary_is_compared_with_the_same_tokens_of_the_teacher(teacher, tmp_path, monkeypatch):
    """Nothing else was pruned, so only a wrong token id could make a difference."""
    seen = [*range(3, 259), *range(290, VOCABULARY, 3)]  # bytes and some words, so token ids change
    windows, reported = np.random.default_rng(0).choice(seen, (100, 64)), []
    given = context(teacher, windows, tell=lambda what, share: reported.append(what))
    prune_vocabulary.run(teacher, tmp_path / "given", PruneVocabulary(), given)
    monkeypatch.setattr(distill, "TELL_S", 0)
    # The teacher's probability of the dropped words is redistributed, so the two distributions are equal.
    distill.run(tmp_path / "given", tmp_path / "out", SHORT.model_copy(update={"learning_rate": 1e-9}), given)
    assert {what.removeprefix("distilling, KL ").lstrip("-") for what in reported} == {"0.000"}


def test_a_training_that_diverges_is_an_error(teacher, pruned, tmp_path):
    wild = SHORT.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(OptimizationFailed, match="diverged"):
        distill.run(pruned, tmp_path / "out", wild, context(teacher))


def test_a_distillation_without_a_budget_is_refused():
    with pytest.raises(ValidationError, match="budget"):
        Distill()
    assert Distill(minutes=1, tokens=10).share(30.0, 2) == 0.5
    assert Distill(minutes=1, tokens=10).share(30.0, 9) == 0.9
