"""An export of every architecture computes the same as the model; otherwise it is refused with the divergence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import ARCHITECTURES, make_tiny

from slmops.contracts.errors import OptimizationFailed
from slmops.kit.modelfile import inspect
from slmops.optimizer.intake import materialize
from slmops.optimizer.intake.export import MAX_PARITY_KL, build, check_parity, export, parity
from slmops.optimizer.intake.graph import Graph


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("llama")
    model = make_tiny(home / "hf", "llama")
    return model, export(model, home / "exported")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_export_of_each_architecture_computes_the_same(tmp_path, architecture):
    model = materialize(make_tiny(tmp_path / "source", architecture), tmp_path / "reference")
    exported = export(model, tmp_path / "exported")
    assert check_parity(model, exported) < 1e-4
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= {
        path.name for path in exported.iterdir()
    }


def test_transformers_reads_the_exported_folder(llama):
    from transformers import AutoConfig, AutoTokenizer

    model, exported = llama
    found = AutoConfig.from_pretrained(exported, local_files_only=True)
    assert (found.model_type, found.num_hidden_layers) == ("llama", AutoConfig.from_pretrained(model).num_hidden_layers)
    text = "The capital of France"
    tokens = [AutoTokenizer.from_pretrained(folder, local_files_only=True)(text) for folder in (model, exported)]
    assert tokens[0]["input_ids"] == tokens[1]["input_ids"]


@pytest.mark.parametrize("architecture", ["gemma3_text", "phi3"])
def test_generation_beyond_the_sliding_window_matches_transformers(tmp_path, architecture):
    import onnxruntime_genai as og
    import torch
    from transformers import AutoModelForCausalLM

    source = make_tiny(tmp_path / "hf", architecture)
    prompt = np.random.default_rng(1).integers(3, 320, size=24)
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = model.generate(
        torch.from_numpy(prompt[None]), max_length=64, min_length=64, do_sample=False, eos_token_id=None
    )
    exported = og.Model(str(export(source, tmp_path / "exported")))
    search = og.GeneratorParams(exported)
    search.set_search_options(max_length=64, min_length=64)
    generator = og.Generator(exported, search)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected[0].tolist()


def test_llama_3_positions_are_exported(tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = make_tiny(tmp_path / "hf", "llama", rope_parameters=scaled)
    assert check_parity(model, export(model, tmp_path / "exported")) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_linearly_scaled_positions_are_exported(tmp_path, architecture):
    scaled = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    model = make_tiny(tmp_path / "hf", architecture, rope_parameters=scaled)
    assert inspect(model).architecture == architecture
    assert check_parity(model, export(model, tmp_path / "exported")) < 1e-4


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_graph_that_computes_something_else_is_refused_with_the_figure(tmp_path, llama, tensor):
    model, exported = llama
    other = make_tiny(tmp_path / "hf", "llama")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {tensor: weights[tensor] * 1.1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(OptimizationFailed, match=r"KL [0-9.e-]+ > 0\.0001") as caught:
        check_parity(other, exported)
    found = re.search(r"KL (\S+)", caught.value.what)
    assert found and float(found[1]) > MAX_PARITY_KL
    assert check_parity(model, exported) < 1e-4


def test_nan_weights_are_refused(tmp_path, llama):
    _, exported = llama
    other = make_tiny(tmp_path / "hf", "llama")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(OptimizationFailed, match="KL nan"):
        check_parity(other, exported)


def test_a_graph_of_another_vocabulary_is_refused(tmp_path, llama):
    other = make_tiny(tmp_path / "hf", "llama", vocab_size=300)
    with pytest.raises(OptimizationFailed, match="320 tokens, the model 300"):
        check_parity(other, llama[1])


def test_rounding_to_eight_bits_is_detected(tmp_path, llama):
    model, exported = llama
    rounded = build(model, tmp_path / "int8", "int8", {"block_size": "32"})
    assert parity(model, rounded).kl > 100 * abs(parity(model, exported).kl)


def test_a_build_that_fails_leaves_nothing(tmp_path, llama):
    with pytest.raises(OptimizationFailed, match="fp32 build failed"):
        build(llama[0], tmp_path / "out", "fp32", {"num_hidden_layers": "many"})
    assert list(tmp_path.iterdir()) == []


def test_a_graph_is_causal(llama):
    logits_of, tokens = Graph(llama[1]), np.arange(3, 40, dtype=np.int64)
    whole, start = logits_of(tokens), logits_of(tokens[:20])
    assert whole.shape == (37, 320)
    np.testing.assert_allclose(whole[:20], start, atol=1e-4)


def test_a_folder_without_a_graph_is_a_typed_error(tmp_path):
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    with pytest.raises(OptimizationFailed, match="does not load"):
        Graph(tmp_path)
