"""Reads an onnxruntime-genai folder: genai_config.json, the graph (onnx.proto3) with its weights, and a tokenizer."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.errors import TruncatedModel
from slmops.kit.modelfile import facts
from slmops.kit.modelfile.facts import Facts, ModelFacts, Shape, damaged, json_object, value
from slmops.kit.modelfile.protobuf import fields, inner, integers, text

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""Values of `model.type` in genai_config.json that can be converted back to a Hugging Face model."""

# Numbers of fields and of data types are those of onnx.proto3.
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_DIMS, _TYPE, _NAME, _INLINE, _EXTERNAL = 1, 2, 8, 9, 13
_INPUT, _OP_TYPE, _ATTRIBUTE, _ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 4, 5, 1, 3
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
_FLOATS = {1, 10, 16}
_PLAIN = {"MatMul", "Gather", "Add", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
"""Kinds of nodes whose weights are not quantized."""


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: Shape
    kind: int

    @property
    def size_bytes(self) -> int:
        return -(-math.prod(self.shape) * _BITS[self.kind] // 8)


@dataclass(frozen=True)
class _Node:
    kind: str
    inputs: Sequence[str]
    integers: Mapping[str, int]

    @classmethod
    def read(cls, message: memoryview) -> _Node:
        kind, inputs, attributes = "", [], {}
        for number, found in fields(message):
            if number == _INPUT:
                inputs.append(text(found))
            elif number == _OP_TYPE:
                kind = text(found)
            elif number == _ATTRIBUTE:
                parts = dict(fields(inner(found)))
                if isinstance(amount := parts.get(_ATTRIBUTE_INTEGER), int):
                    attributes[text(parts.get(_ATTRIBUTE_NAME, 0))] = amount
        return cls(kind, inputs, attributes)


def onnx_facts(folder: Path) -> Facts:
    """Returns the facts of a folder. Raises `NotAModel`, `TruncatedModel`, `UnsupportedArchitecture`,
    `InvalidModel`."""
    where = folder / "genai_config.json"
    model = value(json_object(where), "model", dict, where)
    architecture = facts.supported(model.get("type"), ARCHITECTURES, folder)
    decoder = value(model, "decoder", dict, where)
    facts.check_positions(model.get("context_length"), where)
    facts.check_tokenizer(folder)
    graph = facts.inside(folder, decoder.get("filename"))
    parameters = _parameters(graph)
    return Facts(ModelFacts(architecture, parameters, facts.folder_bytes(folder), "onnx"), {})


def _parameters(path: Path) -> int:
    """Returns the number of weights after checking that each is inside its file. A separately quantized embedding is
    not counted."""
    if not path.stat().st_size:
        raise TruncatedModel("the graph is empty", where=str(path), fix="Download the model again.")
    with path.open("rb") as file:  # the mapping is closed when its last view is deleted
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _count(data, path)
    except EOFError as error:
        raise TruncatedModel("the graph is cut off", where=str(path), fix="Download it again.") from error
    except (ValueError, LookupError) as error:
        raise damaged(f"the graph is not a supported ONNX model: {error}", path) from error


def _count(data: memoryview, path: Path) -> int:
    graph = [
        (number, part) for kind, inside in fields(data) if kind == _GRAPH for number, part in fields(inner(inside))
    ]
    tensors = {t.name: t for t in (_tensor(inner(part), path) for number, part in graph if number == _INITIALIZER)}
    nodes = [_Node.read(inner(part)) for number, part in graph if number == _NODE]
    if not nodes:
        raise ValueError("it has no graph")
    plain = {name for node in nodes if node.kind in _PLAIN for name in node.inputs if name in tensors}
    matrices = {node.inputs[2]: node.integers["K"] * node.integers["N"] for node in nodes if node.kind == "MatMulNBits"}
    return sum(math.prod(tensors[name].shape) for name in plain if tensors[name].kind in _FLOATS) + sum(
        matrices.values()
    )


def _tensor(message: memoryview, path: Path) -> _Tensor:
    dims: list[int] = []
    kind, name, inline, external = 0, "", 0, {}
    for number, found in fields(message):
        if number == _DIMS:
            dims += integers(found)
        elif number == _TYPE:
            kind = integers(found)[0]
        elif number == _NAME:
            name = text(found)
        elif number == _INLINE:
            inline = len(inner(found))
        elif number == _EXTERNAL:
            pair = {key: text(part) for key, part in fields(inner(found))}
            external[pair.get(1, "")] = pair.get(2, "")
    tensor = _Tensor(name, tuple(dims), kind)
    if external:
        _check_external(tensor, external, path)
    elif inline and inline != tensor.size_bytes:
        raise ValueError(f"tensor {name!r} has {inline:,} bytes instead of {tensor.size_bytes:,}")
    return tensor


def _check_external(tensor: _Tensor, external: Mapping[str, str], path: Path) -> None:
    file = facts.inside(path.parent, external.get("location"))
    offset, length = int(external.get("offset", 0)), int(external.get("length", tensor.size_bytes))
    if offset < 0 or length != tensor.size_bytes:
        raise ValueError(f"tensor {tensor.name!r} has {length:,} bytes instead of {tensor.size_bytes:,}")
    if offset + length > file.stat().st_size:
        raise TruncatedModel(
            f"tensor {tensor.name!r} ends at byte {offset + length:,}, {file.name} at {file.stat().st_size:,}",
            where=str(file),
            fix="Download the file again.",
        )
