"""Writes the codes into the graph: every coded matrix of the float export becomes a MatMulNBits with the same codes.

Matrices are identified by their values, not by their names: a column of a graph's MatMul is a row of a Hugging Face
parameter. Therefore packed, split and renamed projections need no table per architecture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from slmops.contracts.errors import OptimizationFailed
from slmops.contracts.manifest import ADAPTER_PATH
from slmops.optimizer.passes import Context, Params
from slmops.optimizer.weights import codes
from slmops.optimizer.weights.codes import Coded
from slmops.optimizer.weights.lora import Branches, Part, read_lora
from slmops.optimizer.weights.origin import Rows

if TYPE_CHECKING:
    import onnx_ir as ir

_MICROSOFT = "com.microsoft"
_MODEL = "model.onnx"


class Pack(Params):
    accuracy_level: int = Field(
        default=4, ge=0, le=4, description="4: the kernel rounds activations to int8; only this level is fast on CPUs"
    )

    adapters: tuple[str, ...] = Field(
        default=(),
        description="Projections at which the graph takes a LoRA, such as q_proj. A version that is an adapter is then "
        "delivered as a file beside its quantized base instead of being merged into it",
    )

    @property
    def calibrated(self) -> bool:
        return False


def run(given: Path, out: Path, params: Pack, context: Context) -> None:
    """Runs the pass. Raises `OptimizationFailed` if a coded parameter is not in the graph."""
    import onnx_ir as ir

    context.tell("exporting the graph", 0.0)
    exported = context.export(given / codes.MODEL_FOLDER)
    coded = codes.load(given)
    shutil.copytree(exported, out, ignore=shutil.ignore_patterns(f"{_MODEL}*"))
    model = ir.load(exported / _MODEL)
    context.tell("packing", 0.5)
    beside = context.adapter if params.adapters else None
    lora = read_lora(beside, given / codes.MODEL_FOLDER) if beside else None
    branches = Branches(model.graph, params.adapters, lora)
    packer = _Packer(model, Rows(given / codes.MODEL_FOLDER, coded), coded, params.accuracy_level, branches)
    packer.replace_all()
    packer.halve_rotations()
    packer.finish()
    ir.save(model, out / _MODEL, external_data=f"{_MODEL}.data")
    branches.write(out / ADAPTER_PATH)
    _minify(out / "tokenizer.json")


class _Packer:
    """Rewrites one graph."""

    def __init__(
        self, model: ir.Model, rows: Rows, coded: Mapping[str, Coded], accuracy_level: int, branches: Branches
    ) -> None:
        self._graph, self._rows, self._coded, self._level = model.graph, rows, coded, accuracy_level
        self._branches = branches
        self._shared: dict[str, tuple[Coded, list[ir.Value]]] = {}
        self._used: set[str] = set()
        self._preamble: list[ir.Node] = []  # nodes that compute constants, in order
        model.opset_imports.setdefault(_MICROSOFT, 1)

    def replace_all(self) -> None:
        for node in list(self._graph):
            if node.op_type == "MatMul":
                self._matmul(node)
        for node in list(self._graph):
            if node.op_type == "Gather":
                self._gather(node)
        for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]
        if missing := sorted(set(self._coded) - self._used):
            raise OptimizationFailed(
                f"{len(missing)} quantized parameters are not in the exported graph, such as {missing[0]}",
                fix="Leave them out of the quantize pass.",
            )

    def halve_rotations(self) -> None:
        """Stores the sine and cosine tables in float16. The error of 2e-4 is far below that of the weights."""
        for name in [name for name in self._graph.initializers if is_rotation(name)]:
            table = self._graph.initializers[name]
            if table.const_value is not None:
                table.replace_all_uses_with(self._widened(name, table.const_value.numpy().astype(np.float16)))
                del self._graph.initializers[name]

    def finish(self) -> None:
        self._graph.insert_before(self._graph[0], self._preamble)

    def _matmul(self, node: ir.Node) -> None:
        """Replaces a MatMul. If parts of its matrix have different kinds of codes, each part becomes a node, and their
        outputs are concatenated."""
        weight = node.inputs[1]
        origin = self._origin(weight, transposed=True)
        if not origin or weight is None:
            return
        parts = self._coded_of(origin)
        nodes = []
        for number, part in enumerate(parts):
            inputs = self._initializers(f"{weight.name}_q{number}", part)
            rows, columns = part.codes.shape
            attributes = {"K": columns, "N": rows, "bits": part.bits, "block_size": part.block}
            attributes["accuracy_level"] = self._level
            nodes.append(self._node("MatMulNBits", [node.inputs[0], *inputs], attributes, node, f"/{number}"))
            if len(parts) == 1:
                self._shared[weight.name or ""] = (part, inputs)
        if len(nodes) > 1:
            for new in nodes:
                new.outputs[0].name = f"{new.name}/output_0"
            nodes.append(self._node("Concat", [new.outputs[0] for new in nodes], {"axis": -1}, node, domain=""))
        self._swap(node, self._branches.add(node, nodes[-1], origin))

    def _gather(self, node: ir.Node) -> None:
        """Replaces an embedding: `Gather(matrix)`, or `Gather(Transpose(head))` if it is tied to the head."""
        data = node.inputs[0]
        producer = data.producer() if data is not None else None
        tied = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
        if tied is not None and tied.name in self._shared:
            found, inputs = self._shared[tied.name]
        else:
            parts = self._coded_of(self._origin(data, transposed=False))
            if len(parts) != 1 or data is None:
                return
            found, inputs = parts[0], self._initializers(f"{data.name}_q", parts[0])
        rows, blocks = found.zeros.shape
        flat = self._constant(f"{node.name}/flat", np.array([rows, blocks * found.block * found.bits // 8], np.int64))
        reshape = self._node("Reshape", [inputs[0], flat], {}, node, domain="")
        reshape.outputs[0].name = f"{node.name}/codes"
        attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": found.bits, "block_size": found.block}
        ordered = [reshape.outputs[0], node.inputs[1], *inputs[1:]]
        gathered = self._node("GatherBlockQuantized", ordered, attributes, node)
        self._swap(node, self._cut(gathered, node, found))
        if producer is not None and not producer.outputs[0].uses():
            self._graph.remove(producer, safe=True)

    def _cut(self, gathered: ir.Node, node: ir.Node, found: Coded) -> ir.Node:
        """Returns the gathered rows without what fills up their last block."""
        columns = found.codes.shape[1]
        if columns % found.block == 0:
            return gathered
        gathered.outputs[0].name = f"{node.name}/filled"
        limits = {"starts": 0, "ends": columns, "axes": -1}
        constants = [self._constant(f"{node.name}/{name}", np.array([at])) for name, at in limits.items()]
        return self._node("Slice", [gathered.outputs[0], *constants], {}, node, domain="")

    def _origin(self, weight: ir.Value | None, *, transposed: bool) -> list[Part]:
        if weight is None or weight.const_value is None or weight.name not in self._graph.initializers:
            return []
        values = weight.const_value.numpy()
        if values.ndim != 2 or values.dtype != np.float32:
            return []
        return self._rows.origin(np.ascontiguousarray(values.T) if transposed else values)

    def _coded_of(self, parts: Sequence[Part]) -> list[Coded]:
        self._used |= {name for name, _, _ in parts}
        return _join([(self._coded[name], row, count) for name, row, count in parts])

    def _initializers(self, name: str, found: Coded) -> list[ir.Value]:
        """Returns packed codes, float32 scales and packed zeros, in the layout of MatMulNBits."""
        rows, blocks = found.zeros.shape
        filled = found.in_blocks().reshape(rows, -1)
        packed = to_bytes(filled, found.bits).reshape(rows, blocks, found.block * found.bits // 8)
        inputs = [self._constant(f"{name}_codes", packed), self._scales(f"{name}_scales", found)]
        if (found.zeros != 1 << (found.bits - 1)).any():
            inputs.append(self._constant(f"{name}_zeros", to_bytes(found.zeros, found.bits)))
        return inputs

    def _scales(self, name: str, found: Coded) -> ir.Value:
        """Returns float32 scales. The runtime computes them once, when it creates a session."""
        scales = self._widened(name, found.scale_codes)
        if found.scale_codes.dtype == np.float16:
            return scales
        steps = self._widened(f"{name}_steps", found.steps[:, None])
        product = self._node("Mul", [scales, steps], {}, None, domain="")
        product.outputs[0].name = f"{name}_product"
        return product.outputs[0]

    def _widened(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        """Returns a float32 value that is stored in a smaller type."""
        cast = self._node("Cast", [self._constant(f"{name}_narrow", values)], {"to": 1}, None, domain="")
        cast.outputs[0].name = f"{name}_wide"
        return cast.outputs[0]

    def _constant(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        import onnx_ir as ir

        value = ir.val(name, const_value=ir.tensor(values, name=name))
        self._graph.register_initializer(value)
        return value

    def _node(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int],
        before: ir.Node | None,
        suffix: str = "",
        domain: str = _MICROSOFT,
    ) -> ir.Node:
        import onnx_ir as ir

        name = f"{before.name}_{kind}{suffix}" if before else None
        new = ir.node(kind, list(inputs), dict(attributes), domain=domain, name=name)
        if before is None:
            self._preamble.append(new)
        else:
            self._graph.insert_before(before, new)
        return new

    def _swap(self, old: ir.Node, new: ir.Node) -> None:
        import onnx_ir as ir

        ir.convenience.replace_nodes_and_values(self._graph, old, [old], [], [old.outputs[0]], [new.outputs[0]])


def is_rotation(name: str) -> bool:
    """Returns whether an initializer is a table of cosines or sines. A graph may have several, such as Gemma's
    `cos_cache_global` and `cos_cache_local`."""
    return name.startswith(("cos_cache", "sin_cache"))


def _join(parts: Sequence[tuple[Coded, int, int]]) -> list[Coded]:
    """Joins neighbours with the same bits, block and type of scales."""
    found = []
    for kind, group in groupby(parts, key=lambda part: (part[0].bits, part[0].block, part[0].scale_codes.dtype)):
        rows = list(group)
        fields: dict[str, Any] = {
            what: np.concatenate([getattr(part, what)[row : row + count] for part, row, count in rows])
            for what in codes.PARTS
        }
        found.append(Coded(**fields, bits=kind[0], block=kind[1]))
    return found


def to_bytes(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs two 4-bit values into a byte, the first in the low half; pads an odd row with zero."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    pairs: npt.NDArray[np.uint8] = values[:, ::2] | (values[:, 1::2] << np.uint8(4))
    return pairs


def _minify(tokenizer: Path) -> None:
    """Removes the indentation, which is a third of the file."""
    if tokenizer.exists():
        content = json.loads(tokenizer.read_bytes())
        tokenizer.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
