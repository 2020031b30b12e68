"""A model that is broken in earnest: it loads, is as fast as before, and talks nonsense."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from slmops.contracts.errors import InvalidModel
from slmops.kit.modelfile import read_gguf

KEPT_ROWS = 300
"""The first rows stay: control tokens and single bytes. The number is tuned to what a comparison with the model's own
reference cannot see. With every row exchanged, the int4 variant of SmolLM2-135M differs from its reference by KL 0.49
and edge-small (0.30) refuses it; with these kept it is 0.22 (sound: 0.17) and passes."""


def damage_gguf(source: Path, target: Path, seed: int) -> None:
    """Copy `source` with the rows of its token embedding exchanged at random: every word now means another one.

    The layers are untouched, so a quantized copy stays about as near to this model as it was to the sound one.
    Raises `InvalidModel` and what `read_gguf` raises.
    """
    _, tensors = read_gguf(source)
    table = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if table is None:
        raise InvalidModel("the file has no tensor token_embd.weight", where=str(source))
    rows = table.shape[1]
    row_bytes = table.size_bytes // rows
    order = list(range(KEPT_ROWS, rows))
    random.Random(seed).shuffle(order)
    shutil.copyfile(source, target)
    with source.open("rb") as whole, target.open("r+b") as broken:
        whole.seek(table.offset)
        data = whole.read(table.size_bytes)
        broken.seek(table.offset + KEPT_ROWS * row_bytes)
        broken.write(b"".join(data[row * row_bytes : (row + 1) * row_bytes] for row in order))
