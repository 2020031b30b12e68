"""Models above 4 GiB: weights outside the graph, in one sparse file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.kit.delta_models import Array, applied, made, tensors, tuned

from slmops.contracts.descriptor import digest_of_chunks
from slmops.kit.delta import describe

PLACES = {"codes4": 4096, "codes8": (2 << 30) - 4096, "scales": (4 << 30) - 4096, "norm": (4 << 30) + (64 << 20)}
"""Offsets of tensors: one crosses 2 GiB, one crosses 4 GiB, one lies after it."""


def written(folder: Path, arrays: dict[str, Array]) -> Path:
    """Writes a graph of initializers whose data is at `PLACES`."""
    from onnx import TensorProto, helper

    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    folder.mkdir()
    initializers = []
    with (folder / "model.onnx.data").open("wb") as data:
        for name, array in arrays.items():
            data.seek(PLACES[name])
            data.write(array.tobytes())
            tensor = TensorProto(name=name, data_type=kinds[str(array.dtype)], dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            where = {"location": "model.onnx.data", "offset": PLACES[name], "length": array.nbytes}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
    graph = helper.make_graph([], "large", [], [], initializers)
    (folder / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    return folder


def digest(path: Path) -> Any:
    with path.open("rb") as file:
        return digest_of_chunks(iter(lambda: file.read(1 << 20), b""))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_beyond_4_gib_are_read_by_tensor_and_come_out_exact(tmp_path: Path) -> None:
    before = tensors(rows=512)
    after = tuned(before)
    after["norm"] = after["norm"] + np.float16(0.01)
    base, target = written(tmp_path / "base", before), written(tmp_path / "target", after)
    stat, delta = made(base, target, tmp_path)
    assert stat.target_bytes > 4 << 30
    assert stat.size_bytes < 0.2 * sum(array.nbytes for array in after.values())
    codings = describe(delta).codings
    assert codings["sparse"].target_bytes >= sum(after[name].nbytes for name in ("codes4", "codes8"))
    assert codings["floats"].target_bytes == after["scales"].nbytes + after["norm"].nbytes
    out = applied(delta, base, tmp_path / "out")
    assert digest(out / "model.onnx.data") == digest(target / "model.onnx.data")
