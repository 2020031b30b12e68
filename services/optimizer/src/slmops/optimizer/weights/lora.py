"""A LoRA beside a quantized graph instead of merged into it: where it goes in, and the file that it comes in.

y = W·x + B·A·x, with the adapter's scaling in B (Hu et al., LoRA, 2021). A and B are inputs of the graph whose defaults
have rank 0, so that the graph alone is the base, exactly, and an adapter is a file that onnxruntime feeds to it.
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

_MERGED = "A recipe without adapters merges them."
Matrix = npt.NDArray[np.float32]
Part = tuple[str, int, int]
"""Rows of a graph's matrix: parameter, first row, number of rows."""


class Low(NamedTuple):
    """What is added to a parameter [rows, columns], transposed: `a` [columns, rank] times `b` [rank, rows]."""

    a: Matrix
    b: Matrix


def read_lora(adapter: Path, base: Path) -> dict[str, Low]:
    """By the name of the parameter. Raises `InvalidModel`, and `OptimizationFailed` for what is no plain LoRA."""
    try:
        wrapped = attached(adapter, base)
    except (RuntimeError, ValueError) as error:  # PEFT's and torch's: modules that are not there, or other shapes
        raise OptimizationFailed(
            f"the adapter does not fit what the recipe made of its base: {str(error)[:200]}", fix=_MERGED
        ) from error
    found = {}
    modules: Iterable[tuple[str, Any]] = wrapped.base_model.model.named_modules()
    loras = [(name, module) for name, module in modules if "lora_A" in dict(module.named_children())]
    for name, module in loras:
        if any(module.use_dora.values()) or not module.lora_A:
            raise OptimizationFailed(f"the adapter changes {name} by other than a plain LoRA", fix=_MERGED)
        [key] = module.lora_A
        a, b = (layer[key].weight.detach().numpy() for layer in (module.lora_A, module.lora_B))
        found[f"{name}.weight"] = Low(a.T, b.T * np.float32(module.scaling[key]))
    return found


class Branches:
    """Of one graph, at `targets`, the last names of modules; and the tensors of `lora` for them."""

    def __init__(self, graph: ir.Graph, targets: Sequence[str], lora: Mapping[str, Low] | None) -> None:
        self._graph, self._targets, self._lora = graph, frozenset(targets), lora
        self._tensors: dict[str, npt.NDArray[np.float16]] = {}
        self._used: set[str] = set()

    def added(self, old: ir.Node, new: ir.Node, parts: Sequence[Part]) -> ir.Node:
        """The sum of `new`, which computes what the MatMul `old` did, and a LoRA; `new` where none is wanted."""
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
        """With a default of rank 0, which makes it one that may be left out."""
        import onnx_ir as ir

        rank = f"{name[:-1]}rank"  # its own: the runtime takes equal names for equal sizes
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
        """[columns, ranks] and [ranks, rows] of all parts: what one of them adds stays within its rows."""
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
        """The file of the LoRA, if there is one. Raises `OptimizationFailed` if not all of it goes into the graph."""
        import onnxruntime as ort

        if missing := sorted(self._targets - {name.split(".")[-2] for name in self._used}):
            raise OptimizationFailed(f"no quantized projection of the model is called {missing[0]!r}")
        if self._lora is None:
            return
        if left := sorted({name.split(".")[-2] for name in self._lora.keys() - self._used}):
            raise OptimizationFailed(
                f"the adapter changes {', '.join(left)} too, and the recipe's graph takes one only at "
                f"{', '.join(sorted(self._targets))}",
                fix=f"Name them in the recipe and make the base with it again. {_MERGED}",
            )
        # The library keeps no reference to numpy's memory: `_tensors` has to outlive the export.
        file = ort.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(t) for name, t in self._tensors.items() if t.size})
        file.export_adapter(str(path))
