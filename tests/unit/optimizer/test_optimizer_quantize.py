"""Codes on grids: the loss of rounding, the gain of calibration, and the packed graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import VOCABULARY, make_tiny, make_tiny_llama

from slmops.optimizer.intake.export import export
from slmops.optimizer.intake.graph import Graph
from slmops.optimizer.passes import Context, pack
from slmops.optimizer.passes import quantize as quantizing
from slmops.optimizer.passes.quantize import Quantize, fitting_block, most_sensitive
from slmops.optimizer.recipes.library import check, recipe_named
from slmops.optimizer.weights import codes, decoder
from slmops.optimizer.weights.codes import Coded
from slmops.optimizer.weights.gptq import gptq
from slmops.optimizer.weights.grid import fit
from slmops.optimizer.weights.origin import Rows

TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, size=(24, 48))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory) -> Path:
    return export(llama, tmp_path_factory.mktemp("exported") / "fp32")


@pytest.fixture
def context(llama, exported) -> Context:
    return Context(llama, lambda model: exported, lambda: TOKENS, 0, lambda what, share: None)


def quantized(llama: Path, out: Path, context: Context, **params: object) -> Path:
    quantizing.run(llama, out, Quantize.model_validate(params), context)
    return out


def divergence(llama: Path, coded: Path) -> float:
    """Returns the KL in nats of the model with dequantized weights, on tokens that were not used for calibration."""
    model = decoder.load(llama)
    tokens = torch.from_numpy(np.random.default_rng(9).integers(3, VOCABULARY, size=(6, 48)))
    with torch.inference_mode():
        expected = model(tokens).logits.log_softmax(-1)
        for name, coded_one in codes.load(coded).items():
            model.get_parameter(name).copy_(torch.from_numpy(coded_one.weights()))
        found = model(tokens).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_a_searched_grid_loses_less_than_rounding_and_more_bits_lose_even_less():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    lost = {
        (bits, search): float((fit(weight, bits, 32, search=search).rounded(weight) - weight).square().mean())
        for bits in (4, 8)
        for search in (False, True)
    }
    assert lost[4, True] < 0.97 * lost[4, False]
    assert lost[8, False] < lost[4, True] / 50


def test_a_weight_on_a_grid_point_is_kept_exactly():
    scale = torch.tensor([0.03125, 0.5]).repeat_interleave(32)
    weight = (torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(3))).float() * scale
    weight[:, ::32], weight[:, 1::32] = -8 * scale[::32], 7 * scale[::32]
    assert torch.equal(fit(weight, 4, 32).rounded(weight), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_8_bits_cost_little(bits):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    wide, narrow = (fit(weight, bits, 32, scale_bits=scale_bits) for scale_bits in (16, 8))
    lost = [float((grid.rounded(weight) - weight).square().mean()) for grid in (wide, narrow)]
    assert lost[0] < lost[1] < 1.1 * lost[0]
    assert narrow.scale_codes.max() == 255
    assert (narrow.scale_codes == narrow.scale_codes.round()).all()


def test_gptq_loses_less_of_the_output_than_rounding_to_the_same_grid():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(48, 96, generator=generator)
    inputs = torch.randn(512, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    grid, moment = fit(weight, 4, 32), inputs.T @ inputs / len(inputs)

    def lost(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    assert lost(grid.weights(gptq(weight, moment, grid, 0.01))) < 0.5 * lost(grid.rounded(weight))


def test_gptq_handles_inputs_that_are_always_zero():
    weight, moment = torch.randn(8, 64), torch.eye(64)
    moment[5, 5] = 0
    assert torch.isfinite(gptq(weight, moment, fit(weight, 4, 32), 0.01)).all()


def test_calibration_and_upgrades_bring_the_model_closer(llama, tmp_path, context):
    kl = {
        name: divergence(llama, quantized(llama, tmp_path / name, context, **params))
        for name, params in {
            "rtn": {"method": "rtn"},
            "searched": {"method": "searched"},
            "gptq": {"method": "gptq"},
            "upgraded": {"method": "gptq", "upgraded_share": 0.4},
            "int8": {"bits": 8},
        }.items()
    }
    assert kl["rtn"] > kl["searched"] > kl["gptq"] > kl["upgraded"] > kl["int8"] > 0


def test_the_most_sensitive_matrices_are_upgraded_up_to_the_share():
    expected, sizes = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.1}, {"a": 10, "b": 100, "c": 10, "d": 80}
    assert most_sensitive(expected, sizes, 0.1) == {"c", "a"}
    assert most_sensitive(expected, sizes, 0.6) == {"c", "a", "b"}
    assert most_sensitive(expected, sizes, 0) == frozenset()


@pytest.mark.parametrize(
    "params",
    [
        {"method": "searched"},
        {"bits": 8},
        {"upgraded_share": 0.4},
        {"embedding_bits": 4},
        {"embedding_bits": None},
        {"scale_bits": 8},
    ],
    ids=json.dumps,
)
def test_the_packed_graph_computes_exactly_with_the_codes(llama, tmp_path, context, params):
    """With full-precision activations, only the order of additions differs."""
    coded = quantized(llama, tmp_path / "coded", context, **params)
    pack.run(coded, tmp_path / "variant", pack.Pack(accuracy_level=0), context)
    model = decoder.load(llama)
    for name, found in codes.load(coded).items():
        model.get_parameter(name).data = torch.from_numpy(found.weights())
    with torch.inference_mode():
        expected = model(torch.from_numpy(TOKENS[:1])).logits[0].numpy()
    assert np.abs(Graph(tmp_path / "variant")(TOKENS[0]) - expected).max() < 1e-2 * np.abs(expected).max()


def test_a_packed_variant_has_the_size_of_its_codes(llama, tmp_path, context):
    coded = quantized(llama, tmp_path / "coded", context)
    pack.run(coded, tmp_path / "variant", pack.Pack(), context)
    found = codes.load(coded).values()
    bits = sum(
        c.codes.size * c.bits + c.scales.size * 16 + c.zeros.size * (c.bits if c.bits == 4 else 0) for c in found
    )
    norms_and_rotations = 150_000  # for a context of 2,048 positions
    assert bits / 8 < (tmp_path / "variant" / "model.onnx.data").stat().st_size < bits / 8 + norms_and_rotations


@pytest.mark.slow
def test_quantizing_twice_gives_the_same_bytes(llama, tmp_path, context):
    first, second = (
        quantized(llama, tmp_path / name, context, method="gptq", upgraded_share=0.2) for name in ("first", "second")
    )
    assert (first / codes.CODES_FILE).read_bytes() == (second / codes.CODES_FILE).read_bytes()


@pytest.mark.parametrize(
    ("columns", "largest", "expected"),
    [(576, 32, 32), (576, 128, 64), (80, 32, 16), (200, 32, 16), (100, 128, 16), (64, 16, 16)],
)
def test_the_largest_block_that_divides_the_columns_is_chosen(columns, largest, expected):
    assert fitting_block(columns, largest) == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_shorter_last_block_is_quantized_as_a_block_of_its_own(bits, symmetric):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(3)) + 0.5
    weight[:, 32:] *= 100  # so that a shared scale would ruin the other weights
    rounded = fit(weight, bits, 32, symmetric=symmetric).rounded(weight)
    for part, expected, block in ((slice(32), weight[:, :32], 32), (slice(32, 40), weight[:, 32:], 8)):
        alone = fit(expected, bits, block, symmetric=symmetric)
        assert torch.equal(rounded[:, part], alone.rounded(expected))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_default_recipes_take_a_hidden_size_that_32_does_not_divide(tmp_path, name):
    """Blocks of 16 for 80 columns, and of 32 for 192."""
    shape = {"hidden_size": 80, "intermediate_size": 192, "head_dim": 16, "num_attention_heads": 5}
    model = make_tiny(tmp_path / "hf", "llama", **shape, num_key_value_heads=5)
    graph = export(model, tmp_path / "fp32")
    context = Context(model, lambda given: graph, lambda: TOKENS, 0, lambda what, share: None)
    quantize, packing = check(recipe_named(name))
    quantizing.run(model, tmp_path / "coded", quantize.params, context)
    packing.kind.run(tmp_path / "coded", tmp_path / "variant", packing.params, context)
    assert {c.codes.shape[1]: c.block for c in codes.load(tmp_path / "coded").values()} == {80: 16, 192: 32}
    whole, found = Graph(graph)(TOKENS[0]), Graph(tmp_path / "variant")(TOKENS[0])
    assert np.corrcoef(whole.ravel(), found.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    "params",
    [
        {"method": "gptq", "scale_bits": 8, "upgraded_share": 0.3, "windows": 8},
        {"bits": 8, "tied": False},
        {"embedding_bits": 4},
        {"embedding_bits": 4, "symmetric": True, "tied": False},
    ],
    ids=json.dumps,
)
def test_a_graph_with_shorter_last_blocks_computes_exactly_with_the_codes(tmp_path, params):
    """72 and 100 columns are not multiples of 16. The codes are compared with a float model that has their weights."""
    shape = {"hidden_size": 72, "intermediate_size": 100, "head_dim": 16, "num_attention_heads": 2}
    tied = {"tie_word_embeddings": params.get("tied", True)}
    model = make_tiny(tmp_path / "hf", "llama", **shape, **tied, num_key_value_heads=1)
    graph = export(model, tmp_path / "fp32")
    context = Context(model, lambda given: graph, lambda: TOKENS, 0, lambda what, share: None)
    coded = quantized(model, tmp_path / "coded", context, **{k: v for k, v in params.items() if k != "tied"})
    found = codes.load(coded)
    assert {c.codes.shape[1]: (c.block, c.zeros.shape[1]) for c in found.values()} == {
        72: (16, 5),
        100: (16, 7),
        32: (32, 1),
    }
    pack.run(coded, tmp_path / "variant", pack.Pack(accuracy_level=0), context)
    whole = decoder.load(model)
    with torch.inference_mode():
        float_logits = whole(torch.from_numpy(TOKENS[:1])).logits[0].numpy()
        for name, one in found.items():
            whole.get_parameter(name).data = torch.from_numpy(one.weights())
        expected = whole(torch.from_numpy(TOKENS[:1])).logits[0].numpy()
    computed = Graph(tmp_path / "variant")(TOKENS[0])
    assert np.abs(computed - expected).max() < 1e-2 * np.abs(expected).max()
    assert np.corrcoef(float_logits.ravel(), computed.ravel())[0, 1] > 0.9


def test_every_rotary_table_is_stored_in_half_precision(tmp_path):
    """Gemma has two pairs: 67 of 319 MB."""
    import onnx_ir as ir

    model = make_tiny(tmp_path / "hf", "gemma3_text")
    graph = export(model, tmp_path / "fp32")
    context = Context(model, lambda given: graph, lambda: TOKENS, 0, lambda what, share: None)
    coded = quantized(model, tmp_path / "coded", context, bits=8)
    pack.run(coded, tmp_path / "variant", pack.Pack(), context)
    initializers = ir.load(tmp_path / "variant" / "model.onnx").graph.initializers
    tables = {name: value.dtype for name, value in initializers.items() if pack.is_rotation(name)}
    pairs = {f"{x}_cache_{kind}_narrow" for x in ("cos", "sin") for kind in ("global", "local")}
    assert tables == dict.fromkeys(pairs, ir.DataType.FLOAT16)
    whole, found = Graph(graph)(TOKENS[0]), Graph(tmp_path / "variant")(TOKENS[0])
    assert np.corrcoef(whole.ravel(), found.ravel())[0, 1] > 0.95


def test_contradictory_parameters_are_refused():
    with pytest.raises(ValueError, match="no effect with bits: 8"):
        Quantize(bits=8, upgraded_share=0.1)


def test_rows_are_found_in_packed_and_repeated_matrices(llama):
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
    model = decoder.load(llama)
    query, key = (model.get_parameter(name).numpy() for name in names)
    rows = Rows(llama, names)
    assert rows.origin(np.concatenate([query, key])) == [(names[0], 0, len(query)), (names[1], 0, len(key))]
    assert rows.origin(query[8:20]) == [(names[0], 8, 12)]
    assert rows.origin(query + 1) == []


def test_codes_can_be_saved_and_loaded(tmp_path):
    scale_codes, zeros = np.full((4, 2), 2, np.uint8), np.full((4, 2), 8, np.uint8)
    codes.save(
        tmp_path, {"w": Coded(np.full((4, 64), 7, np.uint8), scale_codes, np.full(4, 0.25, np.float16), zeros, 4, 32)}
    )
    found = codes.load(tmp_path)["w"]
    assert found.bits == 4
    assert found.block == 32
    assert (found.weights() == -0.5).all()
