"""A LoRA adapter and its base are merged as in PEFT; a mismatch is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_model import write_gguf
from safetensors.numpy import load_file, save_file
from tiny_model import make_tiny

from slmops.contracts.errors import InvalidModel, TruncatedModel, UnsupportedArchitecture
from slmops.kit.modelfile import inspect
from slmops.optimizer.intake import materialize

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(3, 320, size=(1, 48))


def make_adapter(folder: Path, base: Path, **settings: object) -> Path:
    """Writes an adapter as PEFT does, with random matrices and a copy of `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    common = {"r": 4, "lora_alpha": 16, "target_modules": LINEAR, "init_lora_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(common | settings)))
    model.save_pretrained(folder)
    shutil.copytree(base, folder / "base")
    return folder


def peft_logits(adapter: Path) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(adapter / "base")
    with torch.inference_mode():
        return PeftModel.from_pretrained(base, adapter)(torch.from_numpy(TOKENS)).logits.numpy()


def logits(model: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(model)(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base") / "hf", "llama")


@pytest.fixture(scope="module")
def made(tmp_path_factory, base) -> Path:
    return make_adapter(tmp_path_factory.mktemp("made") / "adapter", base)


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 1},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 64}},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_the_merged_model_equals_that_of_peft(tmp_path, base, settings):
    folder = make_adapter(tmp_path / "adapter", base, **settings)
    merged = logits(materialize(folder, tmp_path / "merged"))
    np.testing.assert_allclose(merged, peft_logits(folder), atol=1e-4)
    assert np.abs(merged - logits(base)).max() > 0.1


def test_the_base_may_be_a_gguf_file(tmp_path, adapter):
    expected = peft_logits(adapter)
    shutil.move(adapter / "base", tmp_path / "origin")
    (adapter / "base").mkdir()
    write_gguf(adapter / "base" / "base.gguf", tmp_path / "origin")
    assert inspect(adapter).architecture == "llama"
    np.testing.assert_allclose(logits(materialize(adapter, tmp_path / "merged")), expected, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "origin"]


def test_the_tokenizer_that_it_was_trained_with_is_kept(tmp_path, adapter):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(adapter / "base" / name, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    merged = materialize(adapter, tmp_path / "merged")
    assert (merged / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_facts_describe_the_adapter_with_its_base(adapter):
    facts, alone = inspect(adapter), inspect(adapter / "base")
    assert (facts.format, facts.architecture, facts.parameters) == ("adapter", "llama", alone.parameters)
    assert facts.size_bytes > alone.size_bytes


def test_the_base_may_be_in_another_folder(tmp_path, adapter):
    expected = inspect(adapter)
    shutil.move(adapter / "base", tmp_path / "origin")
    assert inspect(adapter, tmp_path / "origin") == expected
    with pytest.raises(InvalidModel, match="base is missing") as caught:
        inspect(adapter)
    assert "--base" in (caught.value.fix or "")


def test_a_base_without_an_adapter_is_refused(base):
    with pytest.raises(InvalidModel, match="only an adapter can have a base"):
        inspect(base, base)


def test_an_adapter_of_tied_embeddings_is_refused(tmp_path):
    tied = make_tiny(tmp_path / "hf", "qwen2")
    folder = make_adapter(tmp_path / "adapter", tied, target_modules=["q_proj", "lm_head"])
    with pytest.raises(InvalidModel, match="lm_head"):
        materialize(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


Change = Callable[[Path], None]


def config(**settings: object) -> Change:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | settings))

    return change


def renamed(old: str, new: str) -> Change:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file({name.replace(old, new): values for name, values in load_file(path).items()}, path)

    return change


def without(part: str) -> Change:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file({name: values for name, values in load_file(path).items() if part not in name}, path)

    return change


def named(wanted: str, found: str) -> Change:
    """Writes hub ids: of the base that the adapter was trained on, and of the base that is there."""

    def change(adapter: Path) -> None:
        config(base_model_name_or_path=wanted)(adapter)
        path = adapter / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"_name_or_path": found}))

    return change


def repeat_key(path: Path, key: str) -> None:
    text = path.read_text().rstrip().removesuffix("}")
    path.write_text(f'{text}, "{key}": 64}}')


def other_base(**settings: object) -> Change:
    def change(adapter: Path) -> None:
        shutil.rmtree(adapter / "base")
        make_tiny(adapter / "base", "llama", **settings)

    return change


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (config(peft_type="IA3"), UnsupportedArchitecture, "IA3"),
        (config(modules_to_save=["lm_head"]), UnsupportedArchitecture, "modules_to_save"),
        (config(layer_replication=[[0, 2], [0, 2]]), UnsupportedArchitecture, "layer_replication"),
        (config(target_modules=["q_proj", "c_attn"]), InvalidModel, "c_attn"),
        (config(r=0), InvalidModel, "rank is 0"),
        (config(r="4"), InvalidModel, "r = '4'"),
        (config(r=8), InvalidModel, "rank is 4, but adapter_config.json says 8"),
        (renamed("layers.1", "layers.7"), InvalidModel, r"layers\.7.*the base does not have this weight"),
        (renamed("lora_A", "lora_embedding_A"), UnsupportedArchitecture, "lora_embedding_A"),
        (without("q_proj.lora_B"), InvalidModel, "B is None"),
        (without("lora"), InvalidModel, "has no matrices"),
        (other_base(hidden_size=96), InvalidModel, "the base's has"),
        (other_base(num_hidden_layers=1), InvalidModel, "the base does not have this weight"),
        (config(auto_mapping={"base_model_class": "Qwen2ForCausalLM"}), InvalidModel, "trained on a Qwen2ForCausalLM"),
        (
            named("one/smol-instruct", "one/smol"),
            InvalidModel,
            "trained on one/smol-instruct, but its base is one/smol",
        ),
        (config(task_type="SEQ_CLS"), UnsupportedArchitecture, "SEQ_CLS"),
        (lambda adapter: repeat_key(adapter / "adapter_config.json", "r"), InvalidModel, "'r' occurs twice"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), InvalidModel, "adapter_model.safetensors"),
        (lambda adapter: (adapter / "base" / "tokenizer.json").unlink(), InvalidModel, "tokenizer.json"),
        (lambda adapter: shutil.rmtree(adapter / "base"), InvalidModel, "base is missing"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), InvalidModel, "not JSON"),
    ],
)
def test_a_mismatched_adapter_is_refused_before_it_is_loaded(adapter, change, error, match):
    change(adapter)
    with pytest.raises(error, match=match) as caught:
        inspect(adapter)
    assert caught.value.where and caught.value.fix


def test_a_base_of_another_architecture_with_the_same_shapes_is_refused(adapter):
    shutil.rmtree(adapter / "base")
    make_tiny(adapter / "base", "qwen2", tie_word_embeddings=False)
    with pytest.raises(InvalidModel, match="trained on a LlamaForCausalLM, but its base is a Qwen2ForCausalLM"):
        inspect(adapter)


@pytest.mark.parametrize("wanted", ["two/Smol", "./smol", "/models/smol", "smol", None])
def test_a_base_by_another_owner_or_from_a_folder_is_accepted(adapter, wanted):
    named(wanted, "one/smol")(adapter)
    assert inspect(adapter).format == "adapter"


def test_cut_weights_are_truncated(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedModel):
        inspect(adapter)


def test_unexpected_matrices_are_refused_not_dropped(tmp_path, adapter):
    config(target_modules=["q_proj"])(adapter)
    with pytest.raises(InvalidModel, match="disagree about"):
        materialize(adapter, tmp_path / "merged")


def test_a_configuration_cannot_make_peft_import_or_download(tmp_path, adapter):
    expected = peft_logits(adapter)
    config(megatron_config={"a": 1}, megatron_core="no.such.module", base_model_name_or_path="nobody/nothing")(adapter)
    config(
        auto_mapping={"parent_library": "no.such.module", "base_model_class": "LlamaForCausalLM"},
        init_lora_weights="pissa",
    )(adapter)
    np.testing.assert_allclose(logits(materialize(adapter, tmp_path / "merged")), expected, atol=1e-4)
