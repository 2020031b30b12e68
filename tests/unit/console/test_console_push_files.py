"""Which files of a folder belong to a model."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tiny_model import make_gguf, make_tiny

from slmops.console.commands.push import check, model_files, named_files
from slmops.contracts.errors import InvalidModel


def test_a_gguf_file_is_the_model(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf")
    assert model_files(path) == [path]


def test_configuration_tokenizer_weights_and_licence_of_a_hugging_face_folder_are_pushed(tmp_path: Path) -> None:
    wanted = [
        "LICENSE", "LICENSE.txt", "README.md", "chat_template.jinja", "config.json", "merges.txt",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    for name in [*wanted, ".gitattributes", ".hidden.json", "pytorch_model.bin", "optimizer.pt", "golden.jsonl"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint.json").mkdir()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "config.json").write_text("{}")
    assert [path.name for path in model_files(tmp_path)] == wanted


def test_symlinks_of_a_model_cache_are_followed(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("{}")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").symlink_to(blob)
    assert [path.name for path in model_files(folder)] == ["config.json"]
    assert stat.S_ISREG(model_files(folder)[0].stat().st_mode)


def test_a_link_to_a_missing_file_is_reported_with_what_it_points_to(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "llama")
    (model / "NOTICE").symlink_to("../../blobs/1234")
    with pytest.raises(InvalidModel, match="NOTICE is a link to a file that does not exist") as refusal:
        check(model, "smollm2", "1.0.0", None)
    assert "../../blobs/1234" in (refusal.value.fix or "")
    (model / "NOTICE").unlink()
    (model / "pytorch_model.bin").symlink_to("gone")  # not part of the version
    check(model, "smollm2", "1.0.0", None)


@pytest.mark.parametrize("name", ["a\nb.json", "CONFIG.json"])
def test_a_file_name_that_cannot_be_in_a_version_is_refused_before_the_push(name: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "llama")
    (model / name).write_text("{}")
    with pytest.raises(InvalidModel) as refusal:
        check(model, "smollm2", "1.0.0", None)
    assert "Rename" in (refusal.value.fix or "")


def test_onnx_files_are_pushed_only_from_an_onnx_folder(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in model_files(tmp_path)] == ["tokenizer.json"]
    (tmp_path / "genai_config.json").write_text("{}")
    names = [path.name for path in model_files(tmp_path)]
    assert names == ["genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"]


def test_an_adapter_is_pushed_with_its_base_from_any_folder(tmp_path: Path) -> None:
    adapter, elsewhere = tmp_path / "adapter", tmp_path / "elsewhere"
    for folder, name in (
        (adapter, "adapter_config.json"),
        (adapter / "base", "config.json"),
        (elsewhere, "tokenizer.json"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    own = {"adapter_config.json": adapter / "adapter_config.json"}
    assert named_files(adapter) == own | {"base/config.json": adapter / "base" / "config.json"}
    assert named_files(adapter, elsewhere) == own | {"base/tokenizer.json": elsewhere / "tokenizer.json"}
    gguf = make_gguf(tmp_path / "m.gguf")
    assert named_files(adapter, gguf) == own | {"base/m.gguf": gguf}
    (adapter / "base" / "m.gguf").write_bytes(gguf.read_bytes())
    assert named_files(adapter) == own | {"base/m.gguf": adapter / "base" / "m.gguf"}
