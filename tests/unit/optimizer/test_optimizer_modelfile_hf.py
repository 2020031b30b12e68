"""A Hugging Face directory with inconsistent headers is refused before a weight is read."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import ARCHITECTURES, make_tiny

from slmops.contracts.errors import InvalidModel, NotAModel, TruncatedModel, UnsupportedArchitecture
from slmops.kit.modelfile import inspect
from slmops.optimizer.intake import materialize

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("llama") / "hf", "llama")


@pytest.fixture
def directory(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "hf"))


Change = Callable[[Path], object]


def config(**settings: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | settings))

    return change


def without(name: str) -> Change:
    return lambda folder: rewrite(folder, lambda weights: weights.pop(name))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Change:
    """Replaces the header and keeps the weights."""

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


def split(folder: Path, index: Mapping[str, str] | None = None) -> None:
    """Writes the weights in two files, with an index that `index` updates."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (number > 5)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | dict(index or {})}))


def placed(file: str, tensor: str = "lm_head.weight") -> Change:
    return lambda folder: split(folder, {tensor: file})


def added(name: str, *shape: int) -> Change:
    """Adds a tensor, or one per layer if the name has a place for its number."""
    names = sorted({name.format(layer) for layer in range(2)})
    return lambda folder: rewrite(folder, lambda w: w.update({name: np.ones(shape, np.float32) for name in names}))


def only(*names: str) -> Change:
    """Replaces all files by empty ones."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return change


def rope(**scaling: object) -> Change:
    return config(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0} | scaling)


def twice(file: str, key: str, value: object) -> Change:
    def change(folder: Path) -> None:
        text = (folder / file).read_text().rstrip().removesuffix("}")
        (folder / file).write_text(f"{text}, {json.dumps(key)}: {json.dumps(value)}}}")

    return change


def token(content: str, number: int) -> Change:
    """Adds a token to the tokenizer and to the chat template."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_bytes())
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": number, "content": content})
        path.write_text(json.dumps(tokenizer))
        template = folder / "chat_template.jinja"
        template.write_text(content + template.read_text())

    return change


def vocabulary(start: int) -> Change:
    """Moves the ids of most tokens, as in the tokenizer of a larger model."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_bytes())
        words = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {word: n if n < 100 else n + start for word, n in words.items()}
        path.write_text(json.dumps(tokenizer))

    return change


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_known(tmp_path, architecture):
    assert inspect(make_tiny(tmp_path / "hf", architecture)).architecture == architecture


def test_weights_in_two_files_are_one_model(tmp_path, llama, directory):
    split(directory)
    assert inspect(directory).parameters == inspect(llama).parameters
    before, after = load_file(llama / WEIGHTS), load_file(materialize(directory, tmp_path / "out") / WEIGHTS)
    assert all(np.array_equal(after[name], values) for name, values in before.items())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (config(num_hidden_layers=3), InvalidModel, "3 layers, but the weights have 2"),
        (config(num_hidden_layers=10**12), InvalidModel, "1,000,000,000,000 layers"),
        (config(num_hidden_layers="two"), InvalidModel, "num_hidden_layers = 'two'"),
        (config(num_hidden_layers=True), InvalidModel, "num_hidden_layers = True"),
        (config(hidden_size=10**9), InvalidModel, "1000000000"),
        (config(max_position_embeddings=10**12), InvalidModel, "context length is 1000000000000"),
        (config(max_position_embeddings=0), InvalidModel, "context length is 0"),
        (config(vocab_size=321), InvalidModel, "embed_tokens"),
        (config(intermediate_size=256), InvalidModel, "down_proj"),
        (config(quantization_config={"quant_method": "gptq"}), UnsupportedArchitecture, "already quantized"),
        (config(model_type="gemma3"), UnsupportedArchitecture, "gemma3_text"),
        (config(model_type=["llama"]), UnsupportedArchitecture, "llama"),
        (without("model.layers.1.self_attn.q_proj.weight"), InvalidModel, "layers"),
        (without("model.norm.weight"), InvalidModel, r"model\.norm\.weight has shape None"),
        (header(lambda table: table["lm_head.weight"].update(shape=[10**6, 10**6])), InvalidModel, "F32 in"),
        (header(lambda table: table["lm_head.weight"].update(shape=[-1, -20480])), InvalidModel, "not a number"),
        (header(lambda table: table["lm_head.weight"].update(dtype="F3")), InvalidModel, "F3"),
        (header(lambda table: table["lm_head.weight"].update(data_offsets=[8, 81928])), InvalidModel, "overlap"),
        (header(lambda table: table.pop("lm_head.weight")), InvalidModel, "gap or overlap|bytes more"),
        (header(lambda table: table.update(x=7)), InvalidModel, "damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": '), InvalidModel, "tokenizer.json is not"),
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000), InvalidModel, "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), InvalidModel, "is not a JSON object"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), InvalidModel, "no model.safetensors"),
        (lambda folder: (folder / INDEX).write_text("{}"), InvalidModel, "weight_map = None"),
        (placed("../hf/x.safetensors"), InvalidModel, "x.safetensors"),
        (placed("../hf/model-00001-of-00002.safetensors"), InvalidModel, "not a file name in its folder"),
        (placed("pytorch_model.bin"), InvalidModel, "pytorch_model.bin"),
        (placed("model-00001-of-00002.safetensors", "more"), InvalidModel, "does not contain 'more'"),
        (added("model.layers.{}.self_attn.q_proj.bias", 64), UnsupportedArchitecture, r"q_proj\.bias and 1 other"),
        (added("score.weight", 2, 64), UnsupportedArchitecture, r"score\.weight and 0 other tensors are not part"),
        (config(architectures=["LlamaForTokenClassification"]), UnsupportedArchitecture, "TokenClassification, which"),
        (config(architectures=["LlamaModel"]), UnsupportedArchitecture, "LlamaModel, which does not generate"),
        (config(model_type="t5"), UnsupportedArchitecture, "t5 is an encoder-decoder"),
        (config(model_type="odd", is_encoder_decoder=True), UnsupportedArchitecture, "odd is an encoder-decoder"),
        (only("encoder_model.onnx", "decoder_model.onnx"), UnsupportedArchitecture, "export of an encoder-decoder"),
        (only("snapshots/abc/config.json"), NotAModel, "cache of a download"),
        (rope(rope_type="yarn", factor=4.0), UnsupportedArchitecture, "rotary scaling 'yarn'"),
        (rope(rope_type="dynamic", factor=4.0), UnsupportedArchitecture, "rotary scaling 'dynamic'"),
        (rope(rope_type="magic"), UnsupportedArchitecture, "rotary scaling 'magic'"),
        (rope(rope_type="linear"), InvalidModel, "'linear' has factor = None"),
        (rope(rope_type="linear", factor=0), InvalidModel, "'linear' has factor = 0"),
        (rope(rope_type="llama3", factor=8.0), InvalidModel, "low_freq_factor = None"),
        (rope(rope_theta=0), InvalidModel, "rope_theta = 0"),
        (config(rope_scaling={"type": "yarn", "factor": 4.0}), UnsupportedArchitecture, "'yarn'"),
        (config(num_attention_heads=0), InvalidModel, "0 attention heads"),
        (config(num_key_value_heads=3), InvalidModel, "4 attention heads and 3 key-value heads"),
        (config(num_attention_heads=8), InvalidModel, "q_proj has 64 rows, but config.json requires 8 heads of 16"),
        (config(rms_norm_eps=float("nan")), InvalidModel, "NaN is not a JSON number"),
        (twice("config.json", "hidden_size", 128), InvalidModel, "'hidden_size' occurs twice"),
        (header(lambda table: [entry.update(dtype="F8_E4M3") for entry in table.values()]), UnsupportedArchitecture,
         "already quantized to F8_E4M3"),
        (token("<|tool|>", 1500), InvalidModel, r"'<\|tool\|>' with id 1,500, but the embedding has 320 rows"),
        (vocabulary(700), InvalidModel, "with id 800, but the embedding has 320 rows"),
    ],
)  # fmt: skip
def test_inconsistent_headers_are_refused(directory, change, error, match):
    change(directory)
    with pytest.raises(error, match=match) as caught:
        inspect(directory)
    assert caught.value.where and caught.value.fix


@pytest.mark.parametrize("settings", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_that_the_configuration_names_and_a_tied_head_are_accepted(tmp_path, settings):
    assert inspect(make_tiny(tmp_path / "hf", "llama", **settings)).architecture == "llama"


def test_buffers_of_old_checkpoints_are_ignored(tmp_path, llama, directory):
    added("model.layers.{}.self_attn.rotary_emb.inv_freq", 8)(directory)
    assert (materialize(directory, tmp_path / "out") / WEIGHTS).stat().st_size == (llama / WEIGHTS).stat().st_size


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, directory, value):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda weights: weights[name].__setitem__((3, 3), value))
    with pytest.raises(InvalidModel, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values that are NaN"):
        materialize(directory, tmp_path / "out")


def test_an_image_token_beyond_the_embedding_is_removed(tmp_path, directory):
    """The text models of Gemma 3 have one. The runtime would fail on a text that contains it."""
    from transformers import AutoTokenizer

    template = (directory / "chat_template.jinja").read_text()
    token("<image>", 320)(directory)
    (directory / "chat_template.jinja").write_text(template)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token": "<image>"}))
    assert 320 in AutoTokenizer.from_pretrained(directory)("an <image>")["input_ids"]
    found = AutoTokenizer.from_pretrained(materialize(directory, tmp_path / "out"))
    assert max(found("an <image>")["input_ids"]) < 320
    assert found.decode(found("an <image>")["input_ids"]) == "an <image>"
    assert len(found) <= 320


def test_bytes_after_the_weights_are_refused(directory):
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(InvalidModel, match="4 bytes more"):
        inspect(directory)


def test_the_second_of_two_files_cut_off_is_truncated(directory):
    split(directory)
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedModel, match="00002"):
        inspect(directory)


def test_a_parameter_without_weights_is_refused_not_initialized_at_random(tmp_path, directory):
    """transformers would initialize it at random and only warn."""
    rewrite(directory, lambda weights: [weights.pop(name) for name in list(weights) if name.endswith("k_proj.weight")])
    with pytest.raises(InvalidModel, match=r"no weights for model\.layers\.0\.self_attn\.k_proj\.weight"):
        materialize(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_in_a_model_directory_is_not_run(tmp_path, directory):
    config(auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})(directory)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with contextlib.suppress(InvalidModel):
        materialize(directory, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_an_unfinished_conversion_is_started_again(tmp_path, directory):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "model.safetensors").write_text("half")
    materialize(directory, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
