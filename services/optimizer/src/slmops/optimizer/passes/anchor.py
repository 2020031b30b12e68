"""A new version on its predecessor's grids: the predecessor's variant with only those codes changed that must be.

Quantized anew, a fine-tuned version gets new scales everywhere, though its weights hardly moved, and an update has to
carry all of them. On the predecessor's grids scales and zeros stay, and so does a code whose weight is still near it:
what is left to carry is about one code in two hundred (`slmops.kit.delta`). What that costs is measured and judged like
every variant.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import OptimizationFailed
from slmops.optimizer.passes import Context, Params
from slmops.optimizer.passes.pack import to_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

_MODEL = "model.onnx"
_CODED = re.compile(r"(?P<matrix>.+)_(Q[48]|q(?P<part>\d*)_codes)")
"""How the builder and `pack` name the codes of a matrix of the float graph, and of its rows in several parts."""


class Anchor(Params):
    predecessor: Digest = Field(description="Identity of the variant whose grids are kept; the job brings its files")
    keep: float = Field(
        default=0.5,
        ge=0.5,
        le=2,
        description="A code stays while its weight is within so many steps of it; 0.5 rounds to the nearest. More "
        "forgets what was learned: of 8-bit matrices, which are the sensitive ones, 1.5 lost half of it",
    )
    keep_embedding: float = Field(
        default=1.5,
        ge=0.5,
        le=8,
        description="The same for an embedding in 8 bits: its steps are fine, and its codes half of an update",
    )

    max_changed: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of codes that may change; a version that is further away is another model, not an update",
    )

    @property
    def calibrated(self) -> bool:
        return False


def run(given: Path, out: Path, params: Anchor, context: Context) -> None:
    """Raises `OptimizationFailed` for a predecessor that is not there, is another architecture, or is too far away."""
    import onnx_ir as ir

    before = context.predecessor
    if before is None or not (before / _MODEL).is_file():
        raise OptimizationFailed(
            f"the predecessor {params.predecessor} is not here", fix="Use a recipe without anchor for a first version."
        )
    context.tell("exporting the graph", 0.0)
    exported = context.export(given)
    context.tell("anchoring", 0.5)
    model = ir.load(before / _MODEL)
    _Anchored(model, ir.load(exported / _MODEL), params).replace_all()
    shutil.copytree(exported, out, ignore=shutil.ignore_patterns(f"{_MODEL}*"))
    for path in ("genai_config.json", "tokenizer.json"):  # as `pack` left them, where they say the same
        if (before / path).is_file() and _same_json(before / path, out / path):
            shutil.copyfile(before / path, out / path)
    ir.save(model, out / _MODEL, external_data=f"{_MODEL}.data")


@dataclass(frozen=True)
class _Coded:
    """Codes of consecutive rows of a matrix: initializers of the predecessor's graph."""

    codes: ir.Value
    part: int
    bits: int

    @property
    def matrix(self) -> str:
        found = _CODED.fullmatch(self.codes.name or "")
        assert found
        return found["matrix"]


class _Anchored:
    def __init__(self, before: ir.Model, after: ir.Model, params: Anchor) -> None:
        self._before, self._after = before.graph.initializers, after.graph.initializers
        self._params = params
        self._codes = self._changed = 0
        self._coded = list(_coded(before.graph))
        self._by_row = {node.inputs[0].name for node in after.graph if node.op_type == "Gather" and node.inputs[0]}
        self._embeddings = self._by_row | {  # tied to the head, which is transposed
            node.inputs[0].name for node in after.graph if node.op_type == "Transpose" and node.inputs[0]
        }

    def replace_all(self) -> None:
        done = set()
        for matrix in dict.fromkeys(coded.matrix for coded in self._coded):
            self._matrix(matrix, sorted((c for c in self._coded if c.matrix == matrix), key=lambda c: c.part))
            done.add(matrix)
        self._check_near()
        for name, value in self._after.items():
            if name not in done and name not in ("cos_cache", "sin_cache"):
                self._plain(name, value)

    def _check_near(self) -> None:
        if (share := self._changed / max(self._codes, 1)) > self._params.max_changed:
            raise OptimizationFailed(
                f"{share:.0%} of the codes would change: this is not a small update of its predecessor",
                fix="Use a recipe without anchor, or raise max_changed.",
            )

    def _matrix(self, name: str, parts: list[_Coded]) -> None:
        values = self._after.get(name)
        if values is None or values.const_value is None:
            raise _other(f"its matrix {name} is not in the new version")
        weights = values.const_value.numpy()
        rows = weights if name in self._by_row else np.ascontiguousarray(weights.T)
        start = 0
        for part in parts:
            start += self._part(part, rows[start:])
        if start != rows.shape[0]:
            raise _other(f"its matrix {name} has {start} rows, the new version's {rows.shape[0]}")

    def _part(self, part: _Coded, rows: npt.NDArray[np.float32]) -> int:
        """Replace the codes of the first of `rows`; how many those were."""
        old, scales, zeros = self._grid(part)
        count, columns = old.shape
        if rows.shape[0] < count or rows.shape[1] != columns:
            raise _other(f"its matrix {part.matrix} has rows of {columns} values, the new version's {rows.shape[1]}")
        blocks = rows[:count].reshape(count, scales.shape[1], -1)
        steps = blocks / np.where(scales == 0, 1, scales)[..., None] + zeros[..., None]
        nearest = np.clip(np.rint(steps), 0, 2**part.bits - 1).reshape(count, columns).astype(np.uint8)
        loose = part.bits == 8 and part.matrix in self._embeddings
        within = self._params.keep_embedding if loose else self._params.keep
        near = np.abs(steps.reshape(count, columns) - old) <= within
        kept = np.where(near, old, nearest)
        self._codes += old.size
        self._changed += int(np.count_nonzero(kept != old))
        _replace(part.codes, to_bytes(kept, part.bits).reshape(self._array(part.codes.name or "").shape))
        return int(count)

    def _grid(self, part: _Coded) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Codes [rows, columns]; scales and zeros [rows, blocks]."""
        stem = (part.codes.name or "").removesuffix("_codes")
        raw = self._array(part.codes.name or "")
        rows = raw.shape[0]
        scales = self._scales(stem, part.matrix).reshape(rows, -1)
        zeros = self._zeros(stem, part, scales.shape)
        return _unpacked(raw.reshape(rows, -1), part.bits), scales, zeros

    def _scales(self, stem: str, matrix: str) -> npt.NDArray[np.float32]:
        if f"{stem}_scales_narrow" not in self._before:
            return self._array(f"{matrix}_scales").astype(np.float32)
        narrow = self._array(f"{stem}_scales_narrow").astype(np.float32)
        steps = f"{stem}_scales_steps_narrow"
        return narrow * self._array(steps).astype(np.float32) if steps in self._before else narrow

    def _zeros(self, stem: str, part: _Coded, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        found = next((n for n in (f"{stem}_zeros", f"{part.matrix}_zero_points") if n in self._before), None)
        if found is None:
            return np.full(shape, 2.0 ** (part.bits - 1), np.float32)
        unpacked = _unpacked(self._array(found).reshape(shape[0], -1), part.bits)
        return unpacked[:, : shape[1]].astype(np.float32)

    def _array(self, name: str) -> npt.NDArray[np.generic]:
        value = self._before.get(name)
        if value is None or value.const_value is None:
            raise _other(f"it has no {name}")
        return value.const_value.numpy()

    def _plain(self, name: str, value: ir.Value) -> None:
        """What is in float in both: norms, biases."""
        there = self._before.get(name)
        if there is None or there.const_value is None or value.const_value is None:
            raise _other(f"the new version's {name} is not in it")
        if there.const_value.shape != value.const_value.shape or there.const_value.dtype != value.const_value.dtype:
            raise _other(f"its {name} is of another shape or kind")
        _replace(there, value.const_value.numpy())


def _coded(graph: ir.Graph) -> Iterator[_Coded]:
    seen: set[str] = set()
    for node in graph:
        position = {"MatMulNBits": 1, "GatherBlockQuantized": 0}.get(node.op_type)
        value = node.inputs[position] if position is not None else None
        if value is not None and (producer := value.producer()) is not None:  # an embedding, reshaped
            value = producer.inputs[0]
        if value is None or value.name is None or value.name in seen:
            continue
        seen.add(value.name)
        if not (found := _CODED.fullmatch(value.name)):
            raise _other(f"its codes {value.name} have a name that is not known here")
        yield _Coded(value, int(found["part"] or 0), node.attributes["bits"].as_int())


def _replace(value: ir.Value, data: npt.NDArray[np.generic]) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(np.ascontiguousarray(data), name=value.name)


def _unpacked(data: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    values = data.astype(np.uint8, copy=False)
    if bits == 8:
        return values
    return np.stack([values & 0x0F, values >> 4], axis=-1).reshape(values.shape[0], -1)


def _same_json(before: Path, after: Path) -> bool:
    import json

    try:
        found: tuple[Mapping[str, object], Mapping[str, object]] = (
            json.loads(before.read_bytes()),
            json.loads(after.read_bytes()),
        )
    except (OSError, ValueError):
        return False
    return found[0] == found[1]


def _other(why: str) -> OptimizationFailed:
    return OptimizationFailed(
        f"the predecessor is another kind of model: {why}", fix="Use a recipe without anchor: its update is larger."
    )
