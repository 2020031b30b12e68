"""Structured pruning drops parts without effect first, and the rest is still a working model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from float_models import ARCHITECTURES, LAYERS, context, divergence, logits, make_model, unseen
from pydantic import ValidationError

from slmops.contracts.errors import OptimizationFailed, UnsupportedArchitecture
from slmops.optimizer.intake import export
from slmops.optimizer.passes import decoder, prune_depth, prune_heads, prune_vocabulary, prune_width
from slmops.optimizer.passes.prune_depth import PruneDepth
from slmops.optimizer.passes.prune_heads import PruneHeads
from slmops.optimizer.passes.prune_vocabulary import PruneVocabulary
from slmops.optimizer.passes.prune_width import PruneWidth

_QUICK = ("llama", "gemma3_text")  # the simplest architecture and the one that differs most from it
everywhere = pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in ARCHITECTURES],
)
HALF = torch.arange(0, 128, 2)
HALF_WIDTH = PruneWidth(share=0.5, tokens=3072)
ONE_GROUP = PruneHeads(groups=1, tokens=3072)
ONE_LAYER = PruneDepth(layers=1, tokens=3072)


@pytest.fixture
def given(tmp_path) -> Path:
    return tmp_path / "given"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def config_of(folder: Path):
    return json.loads((folder / "config.json").read_text())


@everywhere
def test_channels_without_effect_are_dropped_and_the_output_stays_the_same(architecture, given, out):
    model = make_model(given, architecture)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, HALF] = 0
    model.save_pretrained(given)
    prune_width.run(given, out, HALF_WIDTH, context(given))
    assert config_of(out)["intermediate_size"] == 64
    torch.testing.assert_close(logits(decoder.load(out), unseen()), logits(model, unseen()), atol=1e-3, rtol=0)


@everywhere
def test_heads_without_effect_are_dropped_and_the_output_stays_the_same(architecture, given, out):
    model = make_model(given, architecture)
    for number, layer in enumerate(model.model.layers):
        output = layer.self_attn.o_proj
        output.weight[:, torch.arange(output.in_features // 2) + (output.in_features // 2) * (number % 2)] = 0
    model.save_pretrained(given)
    size = model.model.layers[0].self_attn.head_dim
    prune_heads.run(given, out, ONE_GROUP, context(given))
    shape = config_of(out)
    assert (shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]) == (2, 1, size)
    torch.testing.assert_close(logits(decoder.load(out), unseen()), logits(model, unseen()), atol=1e-3, rtol=0)


@everywhere
@pytest.mark.parametrize("place", [1, 2])
def test_a_layer_without_effect_is_dropped_and_the_output_stays_the_same(architecture, place, given, out):
    model = make_model(given, architecture)
    model.model.layers[place].mlp.down_proj.weight[:] = 0
    model.model.layers[place].self_attn.o_proj.weight[:] = 0
    model.save_pretrained(given)
    prune_depth.run(given, out, ONE_LAYER, context(given))
    shape = config_of(out)
    assert shape["num_hidden_layers"] == LAYERS - 1
    if "layer_types" in shape:
        before = config_of(given)["layer_types"]
        assert shape["layer_types"] == before[:place] + before[place + 1 :]
    torch.testing.assert_close(logits(decoder.load(out), unseen()), logits(model, unseen()), atol=1e-3, rtol=0)


def test_a_channel_replaces_its_dropped_duplicate(given, out):
    """Every channel has an effect: half of the channels duplicate the other half, and the layer adds them up."""
    model = make_model(given)
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[HALF] = projection.weight[HALF + 1]
    model.save_pretrained(given)
    prune_width.run(given, out, HALF_WIDTH, context(given))
    assert divergence(logits(model, unseen()), logits(decoder.load(out), unseen())) < 1e-3


def test_the_layer_before_a_dropped_one_is_refitted_to_replace_it(given, out, tmp_path, monkeypatch):
    """Compares with dropping the same layer without a refit."""
    expected = logits(make_model(given), unseen())
    prune_depth.run(given, out, ONE_LAYER, context(given))
    monkeypatch.setattr(decoder, "refit", lambda linear, normal: None)
    prune_depth.run(given, tmp_path / "plain", ONE_LAYER, context(given))
    bridged, plain = (divergence(expected, logits(decoder.load(f), unseen())) for f in (out, tmp_path / "plain"))
    assert bridged < 0.9 * plain


def test_all_four_kinds_together_still_export(given, tmp_path):
    make_model(given)
    steps = (
        (prune_depth.run, ONE_LAYER),
        (prune_width.run, PruneWidth(share=0.25)),
        (prune_heads.run, ONE_GROUP),
        (prune_vocabulary.run, PruneVocabulary(size=300)),
    )
    folder = given
    for number, (run, params) in enumerate(steps):
        run(folder, tmp_path / str(number), params, context(given))
        folder = tmp_path / str(number)
    assert {path.name for path in given.iterdir()} <= {path.name for path in folder.iterdir()}
    export.check_parity(folder, export.export(folder, tmp_path / "graph"))


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_channels_are_dropped_in_multiples_of_a_block(share, given, out):
    make_model(given)
    with pytest.raises(OptimizationFailed, match="multiple of 32"):
        prune_width.run(given, out, PruneWidth(share=share), context(given))


def test_the_first_layer_the_last_layer_and_one_head_must_stay(given, out):
    make_model(given)
    with pytest.raises(OptimizationFailed, match="3 of 4 layers"):
        prune_depth.run(given, out, PruneDepth(layers=3), context(given))
    with pytest.raises(OptimizationFailed, match="2 of 2 key-value heads"):
        prune_heads.run(given, out, PruneHeads(groups=2), context(given))
    assert not out.exists()


def test_parameters_that_drop_nothing_or_everything_are_refused():
    for make in (
        lambda: PruneWidth(share=0),
        lambda: PruneWidth(share=1),
        lambda: PruneDepth(layers=0),
        lambda: PruneHeads(groups=0),
    ):
        with pytest.raises(ValidationError):
            make()


def test_an_architecture_of_another_shape_is_refused_by_name(given, out):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=320)).save_pretrained(given)
    with pytest.raises(UnsupportedArchitecture, match="GPT2LMHeadModel"):
        prune_width.run(given, out, HALF_WIDTH, context(given))


def test_the_same_input_gives_the_same_bytes(given, tmp_path):
    make_model(given)
    for name in ("one", "two"):
        prune_width.run(given, tmp_path / name, HALF_WIDTH, context(given))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
