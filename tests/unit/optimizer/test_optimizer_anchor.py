"""The pass `anchor`: scales and zeros stay, few codes change, and unsuitable predecessors are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tiny_model import VOCABULARY, make_tiny, make_tiny_llama, make_tuned

from slmops.contracts.errors import OptimizationFailed
from slmops.kit.delta import apply, by_digest, make
from slmops.optimizer.intake.export import export
from slmops.optimizer.intake.graph import Graph
from slmops.optimizer.passes import Context, anchor, pack
from slmops.optimizer.passes import quantize as quantizing
from slmops.optimizer.passes.quantize import Quantize

TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, size=(8, 48))
ANCHOR = anchor.Anchor(predecessor="sha256:" + "0" * 64, max_changed=0.5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tuned(llama, tmp_path_factory) -> Path:
    return make_tuned(tmp_path_factory.mktemp("tuned"), llama)


def context_of(model: Path, tmp_path: Path, predecessor: Path | None = None) -> Context:
    def exported(given: Path) -> Path:
        out = tmp_path / f"fp32-{model.name}"
        return out if out.exists() else export(given, out)

    return Context(model, exported, lambda: TOKENS, 0, lambda what, share: None, predecessor)


@pytest.fixture(scope="module", params=[{}, {"embedding_bits": 4}, {"scale_bits": 8, "upgraded_share": 0.3}], ids=str)
def predecessor(request, llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predecessor")
    context = context_of(llama, folder)
    quantizing.run(llama, folder / "coded", Quantize.model_validate(request.param), context)
    pack.run(folder / "coded", folder / "variant", pack.Pack(), context)
    return folder / "variant"


def initializers(folder: Path) -> dict[str, np.ndarray]:
    graph = ir.load(folder / "model.onnx").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}


def test_grids_stay_and_only_few_codes_change(tuned, predecessor, tmp_path):
    context = context_of(tuned, tmp_path, predecessor)
    anchor.run(tuned, tmp_path / "anchored", ANCHOR, context)
    before, after = initializers(predecessor), initializers(tmp_path / "anchored")
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert moved
    assert not [name for name in moved if "scales" in name or "zeros" in name]
    codes = [name for name in before if name.endswith("_codes")]
    changed = sum(int((before[name] != after[name]).sum()) for name in codes)
    assert 0 < changed < 0.35 * sum(before[name].size for name in codes)


def test_the_anchored_graph_is_closer_to_the_new_version_than_its_predecessor(llama, tuned, predecessor, tmp_path):
    context = context_of(tuned, tmp_path, predecessor)
    exact = ANCHOR.model_copy(update={"keep_embedding": 0.5})
    anchor.run(tuned, tmp_path / "anchored", exact, context)
    expected = Graph(context.export(tuned))(TOKENS[0])
    lost = [np.square(Graph(folder)(TOKENS[0]) - expected).mean() for folder in (tmp_path / "anchored", predecessor)]
    assert lost[0] < lost[1]


def test_rows_with_a_shorter_last_block_are_anchored(tmp_path):
    shape = {"hidden_size": 72, "intermediate_size": 100, "head_dim": 16, "num_attention_heads": 2}
    model = make_tiny(tmp_path / "hf", "llama", **shape, num_key_value_heads=1)
    context = context_of(model, tmp_path)
    quantizing.run(model, tmp_path / "coded", Quantize(), context)
    pack.run(tmp_path / "coded", tmp_path / "before", pack.Pack(), context)
    anchor.run(
        model,
        tmp_path / "same",
        ANCHOR.model_copy(update={"keep": 0.5}),
        context_of(model, tmp_path, tmp_path / "before"),
    )
    before, same = initializers(tmp_path / "before"), initializers(tmp_path / "same")
    assert {name: values.tobytes() for name, values in before.items()} == {n: v.tobytes() for n, v in same.items()}
    tuned = make_tuned(tmp_path / "tuned", model)
    context = context_of(tuned, tmp_path, tmp_path / "before")
    anchor.run(tuned, tmp_path / "anchored", ANCHOR, context)
    expected = Graph(context.export(tuned))(TOKENS[0])
    lost = [np.square(Graph(tmp_path / name)(TOKENS[0]) - expected).mean() for name in ("anchored", "before")]
    assert lost[0] < lost[1]


def test_an_anchored_update_is_a_fraction_of_an_update_on_new_grids(tuned, predecessor, tmp_path):
    context = context_of(tuned, tmp_path, predecessor)
    anchor.run(tuned, tmp_path / "anchored", ANCHOR, context)
    quantizing.run(tuned, tmp_path / "coded", Quantize(), context)
    pack.run(tmp_path / "coded", tmp_path / "regular", pack.Pack(), context)
    sizes = {name: update(predecessor, tmp_path / name, tmp_path / f"{name}.delta") for name in ("anchored", "regular")}
    assert sizes["anchored"] < 0.6 * sizes["regular"]


def update(base: Path, target: Path, out: Path) -> int:
    """Makes, applies and compares the delta; returns its size in bytes."""
    make(base, target, out)
    again = apply(out, by_digest(base), lambda file: out.with_name(f"again-{file.digest[7:]}"), limit_bytes=1 << 30)
    assert {path.read_bytes() for path in again} == {path.read_bytes() for path in target.iterdir()}
    return out.stat().st_size


def test_anchoring_the_same_version_gives_the_predecessor(llama, predecessor, tmp_path):
    anchor.run(
        llama, tmp_path / "again", ANCHOR.model_copy(update={"keep": 2}), context_of(llama, tmp_path, predecessor)
    )
    again = initializers(tmp_path / "again")
    assert all((again[name] == value).mean() > 0.97 for name, value in initializers(predecessor).items())
    assert json.loads((tmp_path / "again" / "genai_config.json").read_bytes()) == json.loads(
        (predecessor / "genai_config.json").read_bytes()
    )


def test_a_predecessor_of_another_architecture_is_refused(predecessor, tmp_path):
    other = make_tiny(tmp_path / "qwen", "qwen3")
    with pytest.raises(OptimizationFailed, match="different structure"):
        anchor.run(other, tmp_path / "out", ANCHOR, context_of(other, tmp_path, predecessor))


def test_a_missing_predecessor_is_an_error_that_names_it(llama, tmp_path):
    context = context_of(llama, tmp_path)
    for given in (context, replace(context, predecessor=tmp_path)):
        with pytest.raises(OptimizationFailed, match=r"sha256:0000.* is missing"):
            anchor.run(llama, tmp_path / "out", ANCHOR, given)


def test_a_version_that_changes_too_many_codes_is_refused(predecessor, tmp_path):
    other = make_tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(OptimizationFailed, match=r"\d\d% of the codes would change"):
        anchor.run(other, tmp_path / "out", ANCHOR, context_of(other, tmp_path, predecessor))
    assert not (tmp_path / "out").exists()
