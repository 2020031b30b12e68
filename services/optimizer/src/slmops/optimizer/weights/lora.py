"""Adds inputs for a LoRA to a quantized graph, and writes the adapter file, instead of merging the LoRA.

y = W·x + B·A·x, with the adapter's scaling in B (Hu et al., LoRA, 2021). A and B are inputs of the graph with defaults
of rank 0. Without an adapter file the graph therefore computes exactly the base; onnxruntime feeds an adapter file to
these inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.intake.adapter import attached

if TYPE_CHECKING:
    import onnx_ir as ir

_MERGED = "Or use a recipe without adapters, which merges the LoRA."
Matrix = npt.NDArray[np.float32]
Part = tuple[str, int, int]
"""Rows of a graph's matrix: parameter name, first row, number of rows."""


class LowRank(NamedTuple):
    """A low-rank change of a parameter [rows, columns], transposed: `a` [columns, rank] times `b` [rank, rows]."""

    a: Matrix
    b: Matrix


def read_lora(adapter: Path, base: Path) -> dict[str, LowRank]:
    """Reads a LoRA by parameter name. Raises `InvalidModel`, and `OptimizationFailed` for other kinds of adapters."""
    try:
        wrapped = attached(adapter, base)
    except (RuntimeError, ValueError) as error:  # raised by PEFT and torch for missing modules and other shapes
        raise OptimizationFailed(
            f"the adapter does not fit the base after the recipe's passes: {str(error)[:200]}",
            fix=f"Use a recipe that does not change the base's shape. {_MERGED}",
        ) from error
    found = {}
    modules: Iterable[tuple[str, Any]] = wrapped.base_model.model.named_modules()
    loras = [(name, module) for name, module in modules if "lora_A" in dict(module.named_children())]
    for name, module in loras:
        if any(module.use_dora.values()) or not module.lora_A:
            raise OptimizationFailed(
                f"the adapter changes {name}, but not as a plain LoRA", fix=f"Train a plain LoRA. {_MERGED}"
            )
        [key] = module.lora_A
        a, b = (layer[key].weight.detach().numpy() for layer in (module.lora_A, module.lora_B))
        found[f"{name}.weight"] = LowRank(a.T, b.T * np.float32(module.scaling[key]))
    return found


class Branches:
    """Adds LoRA branches to a graph, with the tensors of `lora`. `targets` are the last parts of module names."""

    def __init__(self, graph: ir.Graph, targets: Sequence[str], lora: Mapping[str, LowRank] | None) -> None:
        self._graph, self._targets, self._lora = graph, frozenset(targets), lora
        self._tensors: dict[str, npt.NDArray[np.float16]] = {}
        self._used: set[str] = set()

    def add(self, old: ir.Node, new: ir.Node, parts: Sequence[Part]) -> ir.Node:
        """Returns the sum of `new`, which replaces the MatMul `old`, and a LoRA; `new` itself if it is not a target."""
        import onnx_ir as ir

        wanted = {name for name, _, _ in parts if name.split(".")[-2] in self._targets}
        weight = old.inputs[1]
        if not wanted or weight is None or weight.const_value is None:
            return new
        self._used |= wanted
        stacked = self._stacked(parts)
        flow, nodes = old.inputs[0], []
        for side, size, values in zip("AB", weight.const_value.shape.numpy(), stacked, strict=True):
            wide = ir.node("Cast", [self._input(f"{weight.name}.lora_{side}", int(size), side, values)], {"to": 1})
            product = ir.node("MatMul", [flow, wide.outputs[0]], name=f"{old.name}/lora_{side}")
            flow = product.outputs[0]
            nodes += [wide, product]
        new.outputs[0].name = f"{new.name}/base_0"
        total = ir.node("Add", [new.outputs[0], flow], name=f"{old.name}/lora")
        for number, node in enumerate(nodes):
            node.outputs[0].name = f"{total.name}_{number}"
        self._graph.insert_before(old, [*nodes, total])
        return total

    def _input(self, name: str, size: int, side: str, values: Matrix) -> ir.Value:
        """Adds a graph input with a default of rank 0, so that callers may omit it."""
        import onnx_ir as ir

        rank = f"{name[:-1]}rank"  # unique, because the runtime requires equal sizes for equal names
        empty = np.zeros((size, 0) if side == "A" else (0, size), np.float16)
        shape = ir.Shape([size, rank] if side == "A" else [rank, size])
        value = ir.Value(
            name=name,
            shape=shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(empty, name=name),
        )
        self._graph.inputs.append(value)
        self._graph.register_initializer(value)
        self._tensors[name] = np.ascontiguousarray(values, np.float16)
        return value

    def _stacked(self, parts: Sequence[Part]) -> tuple[Matrix, Matrix]:
        """Stacks the LoRAs of all parts as [columns, ranks] and [ranks, rows]; each changes only its own rows."""
        lows = [((self._lora or {}).get(name), row, count) for name, row, count in parts]
        a = [low.a for low, _, _ in lows if low]
        b = np.zeros((sum(part.shape[1] for part in a), sum(count for _, _, count in lows)), np.float32)
        rank = start = 0
        for low, row, count in lows:
            if low:
                b[rank : rank + len(low.b), start : start + count] = low.b[:, row : row + count]
                rank += len(low.b)
            start += count
        return (np.concatenate(a, axis=1) if a else np.zeros((0, 0), np.float32)), b

    def write(self, path: Path) -> None:
        """Writes the adapter file, if there is a LoRA.

        Raises `OptimizationFailed` if the graph does not take all of it.
        """
        import onnxruntime as ort

        if missing := sorted(self._targets - {name.split(".")[-2] for name in self._used}):
            raise OptimizationFailed(
                f"the model has no quantized projection {missing[0]!r}", fix="Correct the adapters of the pass pack."
            )
        if self._lora is None:
            return
        if left := sorted({name.split(".")[-2] for name in self._lora.keys() - self._used}):
            raise OptimizationFailed(
                f"the adapter also changes {', '.join(left)}, but the recipe's graph takes a LoRA only at "
                f"{', '.join(sorted(self._targets))}",
                fix=f"Add them to the recipe and optimize the base again with it. {_MERGED}",
            )
        # The library does not keep a reference to numpy's memory, so `_tensors` must outlive the export.
        file = ort.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(t) for name, t in self._tensors.items() if t.size})
        file.export_adapter(str(path))
