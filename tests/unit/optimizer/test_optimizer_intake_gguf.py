"""A GGUF file is converted to a model with the same weights and logits, or refused with a reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_model import converted, write_gguf
from safetensors.numpy import load_file, save_file
from tiny_model import ARCHITECTURES, make_tiny

from slmops.contracts.errors import InvalidModel, TruncatedModel, UnsupportedArchitecture
from slmops.kit.modelfile import inspect
from slmops.kit.modelfile.gguf import hf_names
from slmops.optimizer.intake import materialize

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def logits(model: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 320, size=(1, 48)))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits[0].numpy()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model with rows of 256 values, the block size of K-quants."""
    return make_tiny(tmp_path_factory.mktemp("wide") / "hf", "llama", hidden_size=256, intermediate_size=256)


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q6_K]
)
def test_every_value_equals_that_of_the_gguf_package(tmp_path, wide, kind):
    held = write_gguf(tmp_path / "m.gguf", wide, kind)
    target = materialize(tmp_path / "m.gguf", tmp_path / "hf")
    config = json.loads((target / "config.json").read_bytes())
    found, names = load_file(target / "model.safetensors"), hf_names("llama", config["num_hidden_layers"])
    assert {names[name] for name in held} == found.keys()
    for name, values in held.items():
        np.testing.assert_array_equal(converted("llama", name, found[names[name]], config), values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float_file_of_each_architecture_computes_the_same_as_its_origin(tmp_path, architecture):
    origin = make_tiny(tmp_path / "origin", architecture)
    write_gguf(tmp_path / "m.gguf", origin)
    found = logits(materialize(tmp_path / "m.gguf", tmp_path / "hf"))
    np.testing.assert_allclose(found, logits(origin), atol=1e-4)


def test_the_tokenizer_is_converted_too(tmp_path):
    from transformers import AutoTokenizer

    origin = make_tiny(tmp_path / "origin", "llama")
    write_gguf(tmp_path / "m.gguf", origin)
    text = "<|im_start|>the quick fox of France<|im_end|>"
    before, after = (
        AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
        for folder in (origin, materialize(tmp_path / "m.gguf", tmp_path / "hf"))
    )
    assert after == before


def test_llama_3_positions_are_reconstructed(tmp_path):
    origin = make_tiny(tmp_path / "origin", "llama", rope_parameters=LLAMA3, head_dim=64)
    write_gguf(tmp_path / "m.gguf", origin)
    target = materialize(tmp_path / "m.gguf", tmp_path / "hf")
    assert json.loads((target / "config.json").read_bytes())["rope_parameters"] == LLAMA3


@pytest.mark.parametrize("metadata", [
    {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    {"llama.rope.scale_linear": 4.0},
])  # fmt: skip
def test_linearly_scaled_positions_are_read(tmp_path, metadata):
    linear = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    origin = make_tiny(tmp_path / "origin", "llama", rope_parameters=linear)
    write_gguf(tmp_path / "m.gguf", origin, scaled=metadata)
    found = logits(materialize(tmp_path / "m.gguf", tmp_path / "hf"))
    np.testing.assert_allclose(found, logits(origin), atol=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    write_gguf(folder / "m.gguf", make_tiny(folder / "hf", "llama"))
    return (folder / "m.gguf").read_bytes()


def moved(data: bytes, by: int) -> bytes:
    """Changes the offset of the second tensor: `by` 0 puts it where the first one is."""
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8 + 4
    offset = struct.unpack_from("<Q", data, at)[0] if by else 0
    return data[:at] + struct.pack("<Q", offset + by) + data[at + 8 :]


def doubled(data: bytes, key: bytes) -> bytes:
    """Adds a metadata key again with another value."""
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 16)
    count = struct.unpack_from("<Q", data, 16)[0]
    return data[:16] + struct.pack("<Q", count + 1) + pair + data[24:]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[:4] + data[4:8][::-1] + data[8:], "big-endian"),
        (lambda data: doubled(data, b"llama.context_length"), r"'llama\.context_length' occurs twice"),
        (lambda data: moved(data, 0), r"overlap"),
        (lambda data: moved(data, 4), r"'blk\.0\.attn_q\.weight' does not begin at a multiple of 32 bytes"),
        (lambda data: data.replace(b"token_embd.weight" + struct.pack("<IQQ", 2, 64, 320),
                                   b"token_embd.weight" + struct.pack("<IQQ", 2, 64, 300)),
         "320 tokens, but the embedding has 300 rows"),
    ],
    ids=["big-endian", "key twice", "overlap", "unaligned", "tokens"],
)  # fmt: skip
def test_a_header_that_readers_understand_differently_is_refused(tmp_path, plain, change, match):
    (tmp_path / "m.gguf").write_bytes(change(plain))
    with pytest.raises(InvalidModel, match=match):
        inspect(tmp_path / "m.gguf")


def test_nan_weights_of_a_file_are_named(tmp_path):
    origin = make_tiny(tmp_path / "origin", "llama")
    weights = load_file(origin / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, origin / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", origin)
    with pytest.raises(InvalidModel, match=r"model\.norm\.weight has 1 values that are NaN"):
        materialize(tmp_path / "m.gguf", tmp_path / "hf")


def test_positions_scaled_in_an_unknown_way_are_refused(tmp_path):
    strange = LLAMA3 | {"high_freq_factor": 2.0}
    write_gguf(tmp_path / "m.gguf", make_tiny(tmp_path / "origin", "llama", rope_parameters=strange, head_dim=64))
    with pytest.raises(UnsupportedArchitecture, match="rotary embedding is scaled"):
        materialize(tmp_path / "m.gguf", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "origin"]


@pytest.mark.parametrize(
    ("metadata", "error", "match"),
    [
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedArchitecture, "yarn"),
        ({"llama.context_length": 2**30}, InvalidModel, "context length is 1073741824"),
        ({"split.count": 3}, InvalidModel, "one of 3 parts"),
        ({"general.type": "adapter"}, InvalidModel, "'adapter'"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -4.0}, InvalidModel, "factor = -4.0"),
    ],
)
def test_unsupported_metadata_is_refused_before_weights_are_read(tmp_path, metadata, error, match):
    write_gguf(tmp_path / "m.gguf", make_tiny(tmp_path / "origin", "llama"), scaled=metadata)
    with pytest.raises(error, match=match):
        inspect(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), InvalidModel, r"blk\.1\.ffn_up\.weight"),
        (lambda w: w.pop("model.norm.weight"), InvalidModel, r"model\.norm\.weight"),
        (lambda w: w.pop("model.embed_tokens.weight"), InvalidModel, "embedding"),
    ],
)
def test_a_file_without_one_of_its_tensors_is_refused(tmp_path, change, error, match):
    origin = make_tiny(tmp_path / "origin", "llama")
    weights = load_file(origin / "model.safetensors")
    change(weights)
    save_file(weights, origin / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", origin)
    with pytest.raises(error, match=match):
        materialize(tmp_path / "m.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_file_whose_configuration_and_weights_disagree_is_refused(tmp_path):
    origin = make_tiny(tmp_path / "origin", "llama")
    config = json.loads((origin / "config.json").read_bytes())
    (origin / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    write_gguf(tmp_path / "m.gguf", origin)
    with pytest.raises(InvalidModel, match="but the configuration needs"):
        materialize(tmp_path / "m.gguf", tmp_path / "hf")


def test_a_tensor_that_the_architecture_does_not_have_is_refused_not_dropped(tmp_path):
    """transformers would ignore these biases and compute other results."""
    origin = make_tiny(tmp_path / "origin", "qwen2")
    write_gguf(tmp_path / "m.gguf", origin)
    data = (tmp_path / "m.gguf").read_bytes().replace(b"qwen2.", b"llama.")
    data = data.replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0llama")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UnsupportedArchitecture, match=r"attn_k\.bias"):
        inspect(tmp_path / "m.gguf")


def test_a_file_cut_in_its_weights_is_truncated(tmp_path, wide):
    write_gguf(tmp_path / "m.gguf", wide, Kind.Q4_0)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(TruncatedModel):
        materialize(tmp_path / "m.gguf", tmp_path / "hf")
