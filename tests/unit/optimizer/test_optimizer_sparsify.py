"""Sparsify sets the requested number of the least important weights to exactly zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from float_models import context, divergence, logits, make_model, unseen
from pydantic import ValidationError

from slmops.optimizer.passes import decoder, sparsify
from slmops.optimizer.passes.sparsify import Sparsify

LOUD = 5  # an input of the first layer's projections that is far larger than the others


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "given"
    model = make_model(folder)
    for layer in model.model.layers:
        layer.input_layernorm.weight[LOUD] = 100
        layer.self_attn.q_proj.weight[:, LOUD] *= 0.05
    model.save_pretrained(folder)
    return folder


def made(given: Path, out: Path, **params):
    sparsify.run(given, out, Sparsify(**params), context(given))
    return decoder.load(out)


def matrices(model):
    return {n: m.weight for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_every_row_has_the_share_of_zeros_and_other_weights_are_unchanged(given, tmp_path, method):
    model, before = made(given, tmp_path / "out", share=0.25, method=method), matrices(decoder.load(given))
    for name, weight in matrices(model).items():
        assert ((weight == 0).sum(1) == weight.shape[1] // 4).all()
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
    assert torch.equal(model.model.embed_tokens.weight, decoder.load(given).model.embed_tokens.weight)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_two_of_four_neighbours_are_zero(given, tmp_path, method):
    for weight in matrices(made(given, tmp_path / "out", pattern="2:4", method=method)).values():
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()


def test_magnitude_drops_the_smallest(given, tmp_path):
    before = matrices(decoder.load(given))
    for name, weight in matrices(made(given, tmp_path / "out", share=0.5, method="magnitude")).items():
        size = before[name].abs()
        dropped, stays = size.masked_fill(weight != 0, 0), size.masked_fill(weight == 0, torch.inf)
        assert (dropped.amax(1) <= stays.amin(1)).all()


def test_wanda_keeps_a_small_weight_with_a_large_input(given, tmp_path):
    by_length = made(given, tmp_path / "wanda", share=0.5, method="wanda")
    by_size = made(given, tmp_path / "magnitude", share=0.5, method="magnitude")
    alive = [(m.model.layers[0].self_attn.q_proj.weight[:, LOUD] != 0).float().mean() for m in (by_length, by_size)]
    assert alive[0] > 0.8 > 0.2 > alive[1]
    expected = logits(decoder.load(given), unseen())
    assert divergence(expected, logits(by_length, unseen())) < divergence(expected, logits(by_size, unseen()))


def test_the_pattern_2_4_with_another_share_is_refused():
    with pytest.raises(ValidationError, match=r"share of 0\.5"):
        Sparsify(pattern="2:4", share=0.6)
