"""A model that is broken in earnest: it loads, is as fast as before, and talks nonsense."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import BinaryIO

from slmops.contracts.errors import InvalidModel
from slmops.kit.modelfile import read_gguf

KEPT_ROWS = 300
"""The first rows stay: control tokens and single bytes. The number is tuned to what a comparison with the model's own
reference cannot see. With every row exchanged, the int4 variant of SmolLM2-135M differs from its reference by KL 0.49
and edge-small (0.30) refuses it; with these kept it is 0.22 (sound: 0.17) and passes."""


def damage(source: Path, target: Path, seed: int = 1) -> Path:
    """A broken copy of a GGUF file or of a Hugging Face directory with safetensors. Raises `InvalidModel`."""
    if source.is_file():
        damage_gguf(source, target, seed)
    else:
        _damage_directory(source, target, seed)
    return target


def _damage_directory(source: Path, target: Path, seed: int) -> None:
    """The same for the embedding of a Hugging Face directory, in whichever of its files it is."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for file in sorted(target.glob("*.safetensors")):
        with file.open("r+b") as broken:
            header_bytes = int.from_bytes(broken.read(8), "little")
            header = json.loads(broken.read(header_bytes))
            for name, tensor in header.items():
                if name.endswith("embed_tokens.weight"):
                    begin, end = tensor["data_offsets"]
                    _shuffle_rows(broken, 8 + header_bytes + begin, end - begin, tensor["shape"][0], seed)
                    return
    raise InvalidModel("no file has a tensor embed_tokens.weight", where=str(source))


def damage_gguf(source: Path, target: Path, seed: int) -> None:
    """Copy `source` with the rows of its token embedding exchanged at random: every word now means another one.

    The layers are untouched, so a quantized copy stays about as near to this model as it was to the sound one.
    Raises `InvalidModel` and what `read_gguf` raises.
    """
    _, tensors = read_gguf(source)
    table = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if table is None:
        raise InvalidModel("the file has no tensor token_embd.weight", where=str(source))
    shutil.copyfile(source, target)
    with target.open("r+b") as broken:
        _shuffle_rows(broken, table.offset, table.size_bytes, table.shape[1], seed)


def _shuffle_rows(file: BinaryIO, offset: int, size_bytes: int, rows: int, seed: int) -> None:
    """Exchange the rows of a matrix that lies in `file`, all but the first `KEPT_ROWS`."""
    row_bytes = size_bytes // rows
    order = list(range(min(KEPT_ROWS, rows), rows))
    file.seek(offset)
    data = file.read(size_bytes)
    random.Random(seed).shuffle(order)
    file.seek(offset + min(KEPT_ROWS, rows) * row_bytes)
    file.write(b"".join(data[row * row_bytes : (row + 1) * row_bytes] for row in order))
