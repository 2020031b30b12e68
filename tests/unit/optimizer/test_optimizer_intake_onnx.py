"""An onnxruntime-genai folder becomes a Hugging Face directory that computes the same, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file
from tiny_model import make_tiny

from slmops.contracts.errors import InvalidModel, TruncatedModel, UnsupportedArchitecture
from slmops.kit.modelfile import inspect
from slmops.optimizer.intake import materialize
from slmops.optimizer.intake.export import build, check_parity, export, parity

ROUNDED = {"block_size": "32", "algo_config": "rtn"}
SHARED = ROUNDED | {"is_symmetric": "false", "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {name: make_tiny(home / name, name) for name in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory) -> Path:
    return export(models["llama"], tmp_path_factory.mktemp("exported") / "og")


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "og"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"fuse_qkv": "false"}], ids=["packed", "apart"])
def test_a_float_graph_is_converted_back_to_its_original_weights(tmp_path, models, name, options):
    folder = build(models[name], tmp_path / "og", "fp32", options)
    back = materialize(folder, tmp_path / "back")
    before, after = (load_file(model / "model.safetensors") for model in (models[name], back))
    assert before.keys() == after.keys()
    for key, values in before.items():
        np.testing.assert_array_equal(after[key], values)
    expected, found = (json.loads((model / "config.json").read_bytes()) for model in (models[name], back))
    for key in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size", "eos_token_id"):
        assert found[key] == expected[key]
    assert check_parity(back, export(back, tmp_path / "again")) < 1e-4


@pytest.mark.parametrize(
    ("name", "precision", "options"),
    [("llama", "int4", ROUNDED), ("qwen2", "int4", SHARED), ("qwen3", "int8", ROUNDED), ("qwen3", "int4", SHARED)],
)
def test_a_quantized_graph_is_dequantized_exactly(tmp_path, models, name, precision, options):
    """With activations in float32 the two must not differ at all."""
    folder = build(models[name], tmp_path / "og", precision, options | {"accuracy_level": "1"})
    back = materialize(folder, tmp_path / "back")
    assert parity(back, folder).difference < 1e-4
    assert parity(models[name], folder).difference > 1e-2


def test_a_graph_in_float16_is_read(tmp_path, models):
    """As built for a GPU: the tables of angles are in float16 too."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = ("", str(models["llama"]), str(tmp_path / "og"), "fp16", "cuda", str(tmp_path / "cache"))
    create_model(*place, **parse_extra_options(*place, []))
    back = materialize(tmp_path / "og", tmp_path / "back")
    weights = load_file(models["llama"] / "model.safetensors")
    for name, values in load_file(back / "model.safetensors").items():
        np.testing.assert_array_equal(values, weights[name].astype(np.float16).astype(np.float32))


def test_llama_3_positions_are_read_from_the_table(tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = make_tiny(tmp_path / "hf", "llama", rope_parameters=scaled, head_dim=64)
    back = materialize(export(model, tmp_path / "og"), tmp_path / "back")
    assert json.loads((back / "config.json").read_bytes())["rope_parameters"] == scaled


def test_a_graph_with_another_activation_is_refused(tmp_path, folder):
    """The conversion does not see the activation; only the comparison with the graph does."""
    model = ir.load(folder / "model.onnx")
    next(node for node in model.graph if node.name == "/model/layers.1/mlp/act_fn/Sigmoid").op_type = "Tanh"
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    with pytest.raises(UnsupportedArchitecture, match="differs from the graph, KL"):
        materialize(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_graph_with_another_structure_is_refused_and_the_missing_node_named(tmp_path, folder):
    model = ir.load(folder / "model.onnx")
    for node in model.graph:
        node.name = f"fused_{node.name}"
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    with pytest.raises(UnsupportedArchitecture, match="embed_tokens has no Gather"):
        materialize(folder, tmp_path / "back")


def test_facts_of_a_folder(exported, models):
    facts = inspect(exported)
    assert (facts.format, facts.architecture) == ("onnx", "llama")
    assert facts.parameters == inspect(models["llama"]).parameters
    assert facts.size_bytes == sum(path.stat().st_size for path in exported.iterdir())


def test_parameters_of_a_quantized_graph_are_counted_as_weights_not_as_bytes(tmp_path, models):
    folder = build(models["qwen2"], tmp_path / "og", "int4", SHARED)
    assert inspect(folder).parameters == inspect(models["qwen2"]).parameters


@pytest.mark.parametrize("architecture", ["phi3", "gemma3_text", "whisper", None, 7])
def test_a_folder_of_another_architecture_is_refused(folder, architecture):
    config = json.loads((folder / "genai_config.json").read_bytes())
    config["model"]["type"] = architecture
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitecture, match="llama, qwen2, qwen3"):
        inspect(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InvalidModel, match=name.replace(".", r"\.")):
        inspect(folder)


def test_weights_cut_off_are_truncated(folder):
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[:-1])
    with pytest.raises(TruncatedModel, match=r"model\.onnx\.data"):
        inspect(folder)


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "", "a/b"])
def test_weights_outside_the_folder_are_refused(folder, location):
    graph = (folder / "model.onnx").read_bytes()
    length = len(b"model.onnx.data")
    changed = graph.replace(b"model.onnx.data", location.encode().ljust(length, b" ")[:length])
    (folder / "model.onnx").write_bytes(changed)
    with pytest.raises(InvalidModel, match=r"not a file name in its folder|has no"):
        inspect(folder)


def test_a_graph_cut_anywhere_is_a_typed_error(folder):
    graph = (folder / "model.onnx").read_bytes()
    for length in range(0, len(graph), 97):
        (folder / "model.onnx").write_bytes(graph[:length])
        with pytest.raises(InvalidModel) as caught:
            inspect(folder)
        assert caught.value.where


def test_a_graph_with_a_byte_changed_is_read_or_refused_with_a_typed_error(folder):
    graph = (folder / "model.onnx").read_bytes()
    for position in range(0, len(graph), 53):
        (folder / "model.onnx").write_bytes(graph[:position] + bytes([graph[position] ^ 0xFF]) + graph[position + 1 :])
        try:
            inspect(folder)
        except InvalidModel as error:
            assert error.where  # noqa: PT017 - a successful read is allowed
