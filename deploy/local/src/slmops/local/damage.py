"""Makes a damaged copy of a model: it loads, is as fast as before, and gives nonsense answers."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.errors import InvalidModel
from slmops.kit.modelfile import read_gguf

KEPT_ROWS = 300
"""The first rows, control tokens and single bytes, are not changed. The number is chosen so that a comparison with the
model's own reference does not detect the damage. With every row shuffled, the int4 variant of SmolLM2-135M differs from
its reference by KL 0.49 and edge-small (0.30) refuses it. With these rows kept, KL is 0.22 (undamaged: 0.17) and the
variant passes."""


def damage(source: Path, target: Path, seed: int = 1) -> Path:
    """Copies a GGUF file, or a Hugging Face directory with safetensors, and shuffles the rows of the token embedding.

    Every token then has the meaning of another one. The layers are not changed, so a quantized copy is about as close
    to this model as it was to the undamaged one. Raises `InvalidModel` and what `read_gguf` raises; then there is no
    copy.
    """
    if source.is_file():
        table = _in_gguf(source)
        shutil.copyfile(source, target)
        _shuffle_rows(target, table, seed)
    else:
        name, table = _in_directory(source)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        _shuffle_rows(target / name, table, seed)
    return target


@dataclass(frozen=True)
class _Table:
    """The position of the token embedding in its file: `rows` of the same size, one per token."""

    offset: int
    size_bytes: int
    rows: int


def _in_gguf(source: Path) -> _Table:
    _, tensors = read_gguf(source)
    for tensor in tensors:
        if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
            return _checked(_Table(tensor.offset, tensor.size_bytes, tensor.shape[1]), source)
    raise InvalidModel("the file has no matrix token_embd.weight", where=str(source))


def _in_directory(source: Path) -> tuple[str, _Table]:
    """Returns the name of the file that contains the embedding, and the position in that file."""
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as weights:
            header_bytes = int.from_bytes(weights.read(8), "little")
            header = json.loads(weights.read(header_bytes))
        for name, tensor in header.items():
            if name.endswith("embed_tokens.weight"):
                begin, end = tensor["data_offsets"]
                return file.name, _checked(_Table(8 + header_bytes + begin, end - begin, tensor["shape"][0]), file)
    raise InvalidModel("no file has a tensor embed_tokens.weight", where=str(source))


def _checked(table: _Table, where: Path) -> _Table:
    if table.rows < KEPT_ROWS + 2:
        raise InvalidModel(
            f"the embedding has only {table.rows} rows; damage needs at least {KEPT_ROWS + 2}", where=str(where)
        )
    return table


def _shuffle_rows(path: Path, table: _Table, seed: int) -> None:
    """Shuffles the rows after the first `KEPT_ROWS` in place."""
    row_bytes = table.size_bytes // table.rows
    order = list(range(KEPT_ROWS, table.rows))
    random.Random(seed).shuffle(order)
    with path.open("r+b") as file:
        file.seek(table.offset)
        data = file.read(table.size_bytes)
        file.seek(table.offset + KEPT_ROWS * row_bytes)
        file.write(b"".join(data[row * row_bytes : (row + 1) * row_bytes] for row in order))
