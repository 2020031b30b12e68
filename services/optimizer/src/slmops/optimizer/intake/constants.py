"""Computes values of a graph that do not depend on its inputs, including dequantized matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float32]


class NotConstant(Exception):
    """The value depends on the graph's inputs, or on an operator that we do not know."""


def constant(value: ir.Value | None) -> Array:
    """Returns the value. Raises `NotConstant`."""
    if value is None:
        raise NotConstant("a missing input")
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or node.op_type not in _FOLDED:
        raise NotConstant(value.name)
    return _FOLDED[node.op_type](node)


def _transposed(node: ir.Node) -> Array:
    return constant(node.inputs[0]).transpose(node.attributes["perm"].as_ints())


_FOLDED: Mapping[str, Callable[[ir.Node], Array]] = {
    "Constant": lambda node: np.asarray(node.attributes["value"].as_tensor().numpy()),
    "Cast": lambda node: constant(node.inputs[0]),
    "Reshape": lambda node: constant(node.inputs[0]).reshape(constant(node.inputs[1])),
    "Transpose": _transposed,
}


def matrix(node: ir.Node) -> Matrix:
    """Returns the matrix of a MatMul or MatMulNBits, [outputs, inputs] as in Hugging Face. Raises `NotConstant`."""
    if node.op_type == "MatMul":
        return constant(node.inputs[1]).T.astype(np.float32)
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    return _dequantized(node, (node.inputs[1], *node.inputs[2:4]), rows)[:, :columns]


def embedding(node: ir.Node) -> Matrix:
    """Returns the embedding of a Gather or GatherBlockQuantized, [tokens, width]. Raises `NotConstant`."""
    if node.op_type == "Gather":
        return constant(node.inputs[0]).astype(np.float32)
    return _dequantized(node, (node.inputs[0], *node.inputs[2:4]), len(constant(node.inputs[0])))


def _dequantized(node: ir.Node, inputs: tuple[ir.Value | None, ...], rows: int) -> Matrix:
    """Returns (code - zero) * scale, with one scale and zero per block of a row.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
    """
    bits, block = (node.attributes[name].as_int() if name in node.attributes else known for name, known in _DEFAULTS)
    codes = _unpacked(constant(inputs[0]).reshape(rows, -1), bits)
    scales = constant(inputs[1]).astype(np.float32).reshape(rows, -1, 1)
    zeros: Array = np.full((rows, scales.shape[1]), 1 << (bits - 1), dtype=np.uint8)
    if len(inputs) > 2 and inputs[2] is not None:
        zeros = constant(inputs[2]).reshape(rows, -1)
        if zeros.dtype == np.uint8:
            zeros = _unpacked(zeros, bits)[:, : scales.shape[1]]
    blocks = codes.reshape(rows, -1, block).astype(np.float32) - zeros[..., None].astype(np.float32)
    return (blocks * scales).reshape(rows, -1)


_DEFAULTS = (("bits", 4), ("block_size", 128))


def _unpacked(codes: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Unpacks [rows, bytes] to [rows, values]; a byte holds two 4-bit codes, the first in its low half."""
    if codes.dtype != np.uint8 or bits not in (4, 8):
        raise NotConstant(f"codes of {bits} bits in {codes.dtype}")
    if bits == 8:
        return codes
    return np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(len(codes), -1)
