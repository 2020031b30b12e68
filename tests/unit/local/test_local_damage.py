"""A damaged model differs from the original only in the order of its embedding rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import make_gguf

from slmops.contracts.errors import InvalidModel, NotAModel
from slmops.kit.modelfile import read_gguf
from slmops.local.damage import KEPT_ROWS, damage

ROWS, WIDTH = KEPT_ROWS + 100, 8
EMBEDDING = "model.embed_tokens.weight"
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]


def gguf(folder: Path) -> Path:
    return make_gguf(folder / "model.gguf", rows=ROWS)


def gguf_rows(path: Path) -> Matrix:
    table = read_gguf(path)[1][0]
    return np.frombuffer(path.read_bytes(), np.float32, ROWS * WIDTH, table.offset).reshape(ROWS, WIDTH)


def directory(folder: Path) -> Path:
    """Makes a model of two files. The embedding is in the second file, between other tensors."""
    home = folder / "model"
    home.mkdir()
    (home / "config.json").write_text("{}")
    rows = np.repeat(np.arange(ROWS, dtype=np.float32), WIDTH).reshape(ROWS, WIDTH)
    layer = np.ones((4, 4), np.float32)
    save_file({"model.layers.0.weight": layer}, home / "model-00001-of-00002.safetensors")
    save_file({"a": layer, EMBEDDING: rows, "z": layer}, home / "model-00002-of-00002.safetensors")
    return home


def directory_rows(path: Path) -> Matrix:
    return load_file(path / "model-00002-of-00002.safetensors")[EMBEDDING]


KINDS = pytest.mark.parametrize(("make", "rows_of"), [(gguf, gguf_rows), (directory, directory_rows)])
Make, Rows = Callable[[Path], Path], Callable[[Path], Matrix]


def contents(path: Path) -> list[tuple[str, bytes]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.read_bytes()) for file in files]


@KINDS
def test_the_first_rows_are_kept_and_the_others_are_shuffled(tmp_path: Path, make: Make, rows_of: Rows) -> None:
    source = make(tmp_path)
    before, sound = contents(source), rows_of(source)
    broken = rows_of(damage(source, tmp_path / "broken"))
    assert contents(source) == before
    assert (broken[:KEPT_ROWS] == sound[:KEPT_ROWS]).all()
    moved = (broken[KEPT_ROWS:] != sound[KEPT_ROWS:]).any(axis=1)
    assert moved.mean() > 0.9
    assert sorted(map(tuple, broken)) == sorted(map(tuple, sound)), "the rows are the same"


def test_header_and_size_of_a_gguf_file_do_not_change(tmp_path: Path) -> None:
    source = gguf(tmp_path)
    broken = damage(source, tmp_path / "broken.gguf")
    assert read_gguf(broken) == read_gguf(source)
    start = read_gguf(source)[1][0].offset
    assert broken.read_bytes()[:start] == source.read_bytes()[:start]
    assert broken.stat().st_size == source.stat().st_size


def test_other_tensors_and_files_of_a_directory_do_not_change(tmp_path: Path) -> None:
    source = directory(tmp_path)
    broken = damage(source, tmp_path / "broken")
    for (name, sound), (same, other) in zip(contents(source), contents(broken), strict=True):
        assert (same, len(other)) == (name, len(sound))
        if name != "model-00002-of-00002.safetensors":
            assert other == sound
    tensors, sound_tensors = (load_file(path / "model-00002-of-00002.safetensors") for path in (broken, source))
    assert tensors.keys() == sound_tensors.keys()
    assert all((tensors[name] == sound_tensors[name]).all() for name in tensors if name != EMBEDDING)


@KINDS
def test_the_damage_depends_only_on_the_seed(tmp_path: Path, make: Make, rows_of: Rows) -> None:
    source = make(tmp_path)
    first, again, other = (
        rows_of(damage(source, tmp_path / name, seed)) for name, seed in (("1", 1), ("1 again", 1), ("2", 2))
    )
    assert (first == again).all()
    assert (first != other).any()


def test_an_existing_target_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "broken"
    target.mkdir()
    (target / "left.bin").touch()
    damage(directory(tmp_path), target)
    assert not (target / "left.bin").exists()


def test_a_model_that_cannot_be_damaged_raises_an_error_and_leaves_no_copy(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf(tmp_path).read_bytes().replace(b"token_embd", b"token_embo"))
    without = directory(tmp_path)
    (without / "model-00002-of-00002.safetensors").unlink()
    few = make_gguf(tmp_path / "few.gguf", rows=KEPT_ROWS)
    for source, what in (
        (other, "token_embd"),
        (without, "embed_tokens"),
        (few, "only 300 rows"),
        (tmp_path / "no", "no"),
    ):
        with pytest.raises(InvalidModel, match=what) as error:
            damage(source, tmp_path / "broken")
        assert str(source) in str(error.value.where)
        assert not (tmp_path / "broken").exists()
    text = tmp_path / "text.gguf"
    text.write_text("weights")
    with pytest.raises(NotAModel):
        damage(text, tmp_path / "broken")
