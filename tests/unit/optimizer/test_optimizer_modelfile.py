"""Invalid model files are refused before any work, with an error that names the defect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_model import make_gguf, make_tiny_llama

from slmops.contracts.errors import InvalidModel, NotAModel, TruncatedModel, UnsupportedArchitecture
from slmops.kit.modelfile import inspect


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def directory(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "hf"))


def test_facts_of_a_gguf_file(tmp_path):
    path = make_gguf(tmp_path / "m.gguf", rows=400)
    facts = inspect(path)
    assert (facts.architecture, facts.parameters, facts.format) == ("llama", 3200, "gguf")
    assert facts.size_bytes == path.stat().st_size


def test_facts_of_a_hugging_face_directory(llama):
    from safetensors import safe_open

    with safe_open(llama / "model.safetensors", "np") as weights:
        parameters = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118 - not a dict
    facts = inspect(llama)
    assert (facts.architecture, facts.parameters, facts.format) == ("llama", parameters, "hf")


def test_a_file_of_another_kind_is_not_a_model(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a model at all")
    with pytest.raises(NotAModel) as caught:
        inspect(path)
    assert caught.value.where == str(path)
    assert ".gguf" in (caught.value.fix or "")


@pytest.mark.parametrize("content", [b"", b"GG"])
def test_an_almost_empty_file_is_not_a_model(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(NotAModel):
        inspect(path)


def test_a_missing_path_is_not_a_model(tmp_path):
    with pytest.raises(NotAModel):
        inspect(tmp_path / "nothing")
    with pytest.raises(NotAModel, match=r"config\.json"):
        inspect(tmp_path)


def test_a_gguf_file_cut_anywhere_is_truncated(tmp_path):
    whole = make_gguf(tmp_path / "m.gguf", rows=4).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(4, len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(TruncatedModel):
            inspect(cut)


def test_a_gguf_file_with_any_byte_of_its_header_changed_is_read_or_refused_with_a_typed_error(tmp_path):
    whole = make_gguf(tmp_path / "m.gguf", rows=4).read_bytes()
    broken = tmp_path / "broken.gguf"
    for position in range(len(whole) - 4 * 32):
        broken.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            inspect(broken)
        except InvalidModel as error:
            assert error.where  # noqa: PT017 - an error must name the file; a successful read is allowed


def test_an_unsupported_architecture_is_refused_and_the_supported_ones_listed(tmp_path, directory):
    with pytest.raises(UnsupportedArchitecture, match="mamba") as caught:
        inspect(make_gguf(tmp_path / "m.gguf", architecture="mamba"))
    assert "qwen2" in (caught.value.fix or "")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UnsupportedArchitecture, match="bert"):
        inspect(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_the_missing_file_of_an_incomplete_directory_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(InvalidModel, match=name):
        inspect(directory)


def test_truncated_weights_are_refused(directory):
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:length])
        with pytest.raises(TruncatedModel):
            inspect(directory)


def test_config_that_is_not_json_is_refused(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(InvalidModel, match=r"config\.json"):
        inspect(directory)
