"""A LoRA file beside its quantized base: together they equal PEFT's model, and the base alone is unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import VOCABULARY, make_tiny
from unit.optimizer.test_optimizer_intake_adapter import LINEAR, make_adapter

from slmops.contracts.errors import OptimizationFailed
from slmops.contracts.manifest import ADAPTER_PATH
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.intake.adapter import attached
from slmops.optimizer.intake.export import export
from slmops.optimizer.intake.graph import Graph
from slmops.optimizer.measure.genai import GenaiModel
from slmops.optimizer.passes import Context, pack, quantize
from slmops.optimizer.recipes.pipeline import Pipeline
from slmops.optimizer.recipes.spec import JobSpec
from slmops.optimizer.weights import codes, decoder

TOKENS = np.random.default_rng(2).integers(3, VOCABULARY, size=48)
HEADS = ("q_proj", "v_proj")


class World:
    """A base that is quantized once; `packed` makes its graph."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.folder, self.base = folder, make_tiny(folder / "hf", architecture)
        exported = export(self.base, folder / "fp32")
        self.context = Context(self.base, lambda model: exported, lambda: TOKENS[None], 0, lambda what, share: None)
        self.coded = folder / "coded"
        quantize.run(
            self.base, self.coded, quantize.Quantize.model_validate({"bits": 4, "method": "searched"}), self.context
        )

    def packed(self, name: str, adapters: tuple[str, ...] = (), adapter: Path | None = None) -> Path:
        # Level 0 computes in float32, like PEFT's model.
        params = pack.Pack(adapters=adapters, accuracy_level=0)
        pack.run(self.coded, self.folder / name, params, replace(self.context, adapter=adapter))
        return self.folder / name

    def expected(self, adapter: Path) -> np.ndarray:
        """By PEFT on what the codes stand for."""
        wrapped = attached(adapter, self.coded / codes.MODEL_FOLDER)
        parameters = {name.replace(".base_layer", ""): p for name, p in wrapped.base_model.model.named_parameters()}
        with torch.inference_mode():
            for name, found in codes.load(self.coded).items():
                parameters[name].copy_(torch.from_numpy(found.weights()))
            return wrapped(torch.from_numpy(TOKENS[None])).logits[0].numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("lora"), "llama")


@pytest.fixture(scope="module")
def plain(world) -> Path:
    return world.packed("plain")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": LINEAR},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ],
)
def test_the_graph_with_the_adapter_file_equals_the_base_with_the_lora(world, plain, tmp_path, settings):
    adapter = make_adapter(tmp_path / "adapter", world.base, **settings)
    made = world.packed(tmp_path.name, tuple(LINEAR), adapter)
    found, expected = Graph(made)(TOKENS), world.expected(adapter)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
    assert np.abs(Graph(plain)(TOKENS) - expected).max() > 0.1 * np.abs(expected).max()


def test_without_an_adapter_the_graph_equals_the_base_and_its_files_are_the_same(world, plain, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", world.base, target_modules=list(HEADS))
    base, made = world.packed("base", HEADS), world.packed("made", HEADS, adapter)
    assert not (base / ADAPTER_PATH).exists()
    assert (Graph(base)(TOKENS) == Graph(plain)(TOKENS)).all()
    files = {path.name for path in made.iterdir()} - {ADAPTER_PATH}
    assert files == {path.name for path in base.iterdir()}
    assert all((base / name).read_bytes() == (made / name).read_bytes() for name in files)


def test_the_runtime_of_the_gateways_answers_with_the_adapter(world, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", world.base, target_modules=list(HEADS), lora_alpha=64)
    made = world.packed("answering", HEADS, adapter)
    logits = Graph(made)(TOKENS)
    assert next(GenaiModel(made).tokens(list(TOKENS), 1)) == logits[-1].argmax()
    (made / ADAPTER_PATH).unlink()
    assert np.abs(Graph(made)(TOKENS) - logits).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "adapters", "message"),
    [
        ({}, HEADS, "also changes down_proj, gate_proj, k_proj, o_proj, up_proj"),
        ({"target_modules": ["q_proj"], "use_dora": True}, HEADS, "not as a plain LoRA"),
        ({"target_modules": ["q_proj"]}, ("q_proj", "qq"), "no quantized projection 'qq'"),
    ],
)
def test_a_lora_that_the_graph_does_not_take_is_refused_by_name(world, tmp_path, settings, adapters, message):
    adapter = make_adapter(tmp_path / "adapter", world.base, **settings)
    with pytest.raises(OptimizationFailed, match=message):
        world.packed(tmp_path.name, adapters, adapter)


def test_a_recipe_that_takes_adapters_gives_the_base_and_its_adapter_the_same_base_files(world, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", world.base, target_modules=list(HEADS))
    steps = {"quantize": {"method": "searched", "bits": 4}, "pack": {"adapters": list(HEADS)}}
    recipe = Recipe(name="mine", passes=tuple(PassSpec(pass_=name, params=params) for name, params in steps.items()))

    def variant(source: Path) -> Path:
        pipeline = Pipeline(
            source, tmp_path / f"{source.name}-work", JobSpec(recipes=(recipe,)), lambda what, share: None
        )
        return pipeline.variant(recipe, lambda name: None)

    base, made = variant(world.base), variant(adapter)
    differing = {path.name for path in made.iterdir() if not (base / path.name).exists()}
    assert differing == {ADAPTER_PATH}
    assert all(
        (base / path.name).read_bytes() == path.read_bytes() for path in made.iterdir() if path.name not in differing
    )
    merged = decoder.load(tmp_path / "adapter-work" / "reference")  # the reference of the variant
    with torch.inference_mode():
        expected = merged(torch.from_numpy(TOKENS[None])).logits[0].numpy()
    assert np.abs(Graph(made)(TOKENS) - expected).max() < np.abs(Graph(base)(TOKENS) - expected).max() / 2
